// SPDX-License-Identifier: Apache-2.0
// The options a lane may have: their names, types, ranges and the transports they mean something to. UCX 1.13 takes
// unknown options and values silently, so what is not in this table is refused here. Pure, any thread.
#pragma once

#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/fabric/options.h"

namespace expertd::fabric {

struct UcxSetting {
  std::string variable;  // of the environment
  std::string key;       // the same for ucp_config_modify(), which knows a transport's options by its tables' names
  std::string value;
};

/// What the options say to UCX, with what every lane gets in front. CONFIG_BAD_VALUE names the option, its value and
/// what it may be.
base::Result<std::vector<UcxSetting>> lane_settings(LaneKind lane, const LaneOptionList& options);

/// The options of each rail of a lane: one per device of the latency and the throughput lane, one in all of the control
/// lane. CONFIG_BAD_VALUE names too many devices.
base::Result<std::vector<LaneOptionList>> rails_of(LaneKind lane, const LaneOptionList& options);

}  // namespace expertd::fabric
