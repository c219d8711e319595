// SPDX-License-Identifier: Apache-2.0
// What a benchmark run is asked to do, and how it fails. Plain values: filled in by the main thread before any rank
// starts, read by all ranks afterwards.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace expertd::ctl {

/// Ends the run; thrown by a rank and told by the main thread.
class Failure : public std::runtime_error {
 public:
  Failure(int exit_code, const std::string& text) : std::runtime_error(text), exit_code_(exit_code) {}
  int exit_code() const { return exit_code_; }

 private:
  int exit_code_;
};

/// The group of one mode. `tokens` per rank, which is also the group's max_tokens.
struct BenchShape {
  uint32_t ranks = 0;
  uint32_t experts = 0;
  uint32_t hidden = 0;
  uint32_t top_k = 0;
  uint32_t tokens = 0;

  uint32_t local_experts() const { return experts / ranks; }
  uint64_t worst_rows() const { return uint64_t{ranks} * tokens; }
};

/// Group-limited routing: experts in `count` groups of equal size, of which a token takes `per_token`.
struct BenchExpertGroups {
  uint32_t count = 1;  // at most 64
  uint32_t per_token = 1;

  bool limited() const { return per_token < count; }
};

struct BenchOptions {
  std::string socket;                // empty: the client's default
  std::vector<std::string> devices;  // as the client names them; one rank each
  std::vector<std::string> sockets;  // per rank: its daemon's attach socket; where empty or left out: `socket`

  const std::string& socket_of(uint32_t rank) const {
    return rank < sockets.size() && !sockets[rank].empty() ? sockets[rank] : socket;
  }
  /// Ranks of several daemons: sums of a combine are rounded once more on each, and come in another order.
  bool spans_daemons() const {
    for (uint32_t rank = 1; rank < devices.size(); ++rank) {
      if (socket_of(rank) != socket_of(0)) {
        return true;
      }
    }
    return false;
  }
  /// Names "OPERATION FLAGS" of the rows that run; empty: all.
  std::vector<std::string> only;
  bool normal = true;
  bool inference = true;
  uint32_t tokens = 4096;
  uint32_t low_latency_tokens = 128;
  uint32_t hidden = 7168;
  uint32_t experts = 256;
  uint32_t top_k = 8;
  BenchExpertGroups expert_groups;
  uint32_t iterations = 200;  // at least 2: the first and the last are verified
  uint32_t warmup = 10;
  uint64_t seed = 1;
  uint32_t executor = 0;       // of groups that serve low latency: expertd_group_executor_t
  uint32_t capture_lanes = 0;  // of the same
  uint64_t timeout_ns = 60'000'000'000;
  bool plan = false;
  bool json = false;
  std::string json_file;

  /// Per rank, ranks of one daemon being on one node; nodes are numbered by their lowest rank.
  std::vector<uint32_t> node_of() const;

  BenchShape shape(bool low_latency) const {
    return {static_cast<uint32_t>(devices.size()), experts, hidden, top_k, low_latency ? low_latency_tokens : tokens};
  }
};

}  // namespace expertd::ctl
