// SPDX-License-Identifier: Apache-2.0
// From the configuration to the fabric's options: which lane gets which, and what is told of it. Pure.
#pragma once

#include <string>
#include <vector>

#include "daemon/config/config.h"
#include "daemon/fabric/options.h"

namespace expertd::app {

/// `name` is this node's.
fabric::FabricOptions fabric_options(const config::FabricConfig& config, const std::string& name);

/// A lane's options as people read them, "traffic_class=106", without its devices and transports.
std::vector<std::string> option_texts(const fabric::LaneOptionList& options);

}  // namespace expertd::app
