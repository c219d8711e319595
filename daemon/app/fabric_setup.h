// SPDX-License-Identifier: Apache-2.0
// From the configuration to the fabric's options: which lane gets which, and what is told of it. Pure.
#pragma once

#include <string>
#include <vector>

#include "daemon/config/config.h"
#include "daemon/fabric/options.h"

namespace expertd::app {

/// `name` is this node's; `gpus`: groups may be on GPUs, whose messages are larger.
fabric::FabricOptions fabric_options(const config::FabricConfig& config, const std::string& name, bool gpus);

/// How large messages of a group over `nodes` nodes are and how many buffers there are for them; the same on all of its
/// nodes. Buffers to receive into are for each other node, so with many nodes there are fewer for each: at most
/// `fabric.messages_per_peer`, and on host devices about 48 per lane in all, one at least.
void size_messages(const config::FabricConfig& config, uint32_t nodes, bool gpus, fabric::GroupLink* link);

/// A lane's options as people read them, "traffic_class=106", without its devices and transports.
std::vector<std::string> option_texts(const fabric::LaneOptionList& options);

}  // namespace expertd::app
