// SPDX-License-Identifier: Apache-2.0
// Rates for `expertctl top`: the difference of two looks at counters and sessions. Pure functions, any thread.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "expertd/v1/control.pb.h"

namespace expertd::ctl {

/// One kind of operation on one device over the interval.
struct OpRate {
  uint32_t device = 0;
  std::string op;
  double ops_per_second = 0;
  double failed_per_second = 0;
  double tokens_per_second = 0;
  double local_bytes_per_second = 0;
  double remote_bytes_per_second = 0;
  uint64_t mean_ns = 0;  // submission to completion; 0 when nothing ended
};

/// In the order of `now`. A counter that went back (the daemon restarted) counts from zero.
std::vector<OpRate> op_rates(const v1::GetCountersResponse& before, const v1::GetCountersResponse& now);

/// What one session did over the interval.
struct SessionRate {
  double ops_per_second = 0;
  double bytes_per_second = 0;
};

/// In the order of `now`. A session that was not there before did all of its work since.
std::vector<SessionRate> session_rates(const v1::ListSessionsResponse& before, const v1::ListSessionsResponse& now,
                                       uint64_t interval_ns);

struct TopFrame {
  v1::GetStatusResponse status;
  v1::ListSessionsResponse sessions;
  std::vector<OpRate> rates;
  std::vector<SessionRate> session_rates;  // of `sessions`, one each
  uint64_t interval_ns = 0;
};

/// Idle kinds of operations are left out of the text, not of the JSON.
std::string top_text(const TopFrame& frame);
nlohmann::json top_json(const TopFrame& frame);

}  // namespace expertd::ctl
