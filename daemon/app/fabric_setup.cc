// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/fabric_setup.h"

#include <algorithm>
#include <array>

namespace expertd::app {

namespace {

// Of groups on GPUs: times fabric.message_bytes, and send buffers of a rank.
constexpr uint64_t kGpuMessages = 4;
constexpr uint32_t kGpuSendBuffers = 8;
// Of groups on host devices: a lane's buffers to receive into, of all nodes, from which on each has fewer; and how many
// nodes are many, for which the small ones are halved as well.
constexpr uint32_t kHostReceiveBuffers = 48;
constexpr uint32_t kManyNodes = 24;

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) {
    text += (text.empty() ? "" : ",") + word;
  }
  return text;
}

fabric::LaneOptionList lane_options(const config::FabricConfig& config, const config::FabricLaneConfig& lane) {
  constexpr std::array<const char*, 4> kRouting = {"", "no", "try", "yes"};
  fabric::LaneOptionList options;
  if (!config.transports.empty()) {
    options.emplace_back("transports", joined(config.transports));
  }
  if (const std::vector<std::string>& devices = lane.devices.empty() ? config.devices : lane.devices;
      !devices.empty()) {
    options.emplace_back("devices", joined(devices));
  }
  if (lane.service_level >= 0) {
    options.emplace_back("service_level", std::to_string(lane.service_level));
  }
  if (lane.traffic_class >= 0) {
    options.emplace_back("traffic_class", std::to_string(lane.traffic_class));
  }
  if (lane.adaptive_routing != config::AdaptiveRouting::kDefault) {
    options.emplace_back("adaptive_routing", kRouting[static_cast<size_t>(lane.adaptive_routing)]);
  }
  return options;
}

}  // namespace

fabric::FabricOptions fabric_options(const config::FabricConfig& config, const std::string& name, bool gpus) {
  static_assert(static_cast<uint32_t>(config::FabricRoute::kRail) == static_cast<uint32_t>(fabric::Route::kRail));
  static_assert(static_cast<uint32_t>(config::FabricRoute::kSpread) == static_cast<uint32_t>(fabric::Route::kSpread));
  fabric::FabricOptions options;
  options.name = name;
  for (uint32_t lane = 0; lane < fabric::kLanes; ++lane) {
    options.lanes[lane] = lane_options(config, config.lanes[lane]);
  }
  options.route = static_cast<fabric::Route>(config.route);
  options.heartbeat.interval_ns = uint64_t{config.heartbeat_ms} * 1'000'000;
  options.heartbeat.misses = config.heartbeat_misses;
  // One group alone has no more than that under way from a node.
  options.window_bytes = config.message_bytes * config.messages_per_peer * (gpus ? kGpuMessages : 1);
  return options;
}

void size_messages(const config::FabricConfig& config, uint32_t nodes, bool gpus, fabric::GroupLink* link) {
  const uint32_t others = std::max(nodes, 2U) - 1;
  link->message_bytes = config.message_bytes;
  link->receive_buffers = config.messages_per_peer;
  if (gpus) {
    // Launches of a few microseconds fill and empty them, and each needs one of every node.
    link->message_bytes = std::min(link->message_bytes * kGpuMessages, fabric::kMaxMessageBytes);
    link->send_buffers = std::min(std::max(kGpuSendBuffers, 2 * others), fabric::kMaxBuffersPerLane);
    return;
  }
  link->receive_buffers = std::min(link->receive_buffers, std::max(kHostReceiveBuffers / others, 1U));
  link->eager_messages /= others >= kManyNodes ? 2 : 1;
}

std::vector<std::string> option_texts(const fabric::LaneOptionList& options) {
  std::vector<std::string> texts;
  for (const auto& [name, value] : options) {
    if (name != "devices" && name != "transports") {
      texts.push_back(name + "=" + value);
    }
  }
  return texts;
}

}  // namespace expertd::app
