// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/fabric_setup.h"

#include <algorithm>
#include <array>

namespace expertd::app {

namespace {

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

fabric::FabricOptions fabric_options(const config::FabricConfig& config, const std::string& name) {
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
  options.window_bytes = config.message_bytes * config.messages_per_peer;
  return options;
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
