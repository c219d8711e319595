// SPDX-License-Identifier: Apache-2.0
// Rows of the table for each of the fabric's lanes: the same four keys with the lane's name in front.
#include <array>

#include "daemon/config/endpoint.h"
#include "daemon/config/keys.h"

namespace expertd::config {

namespace {

template <size_t kLane>
void set_devices(Config& config, const Value& value) {
  config.fabric.lanes[kLane].devices = value.texts;
}
template <size_t kLane>
void set_service_level(Config& config, const Value& value) {
  config.fabric.lanes[kLane].service_level = static_cast<int32_t>(value.integer);
}
template <size_t kLane>
void set_traffic_class(Config& config, const Value& value) {
  config.fabric.lanes[kLane].traffic_class = static_cast<int32_t>(value.integer);
}
template <size_t kLane>
void set_adaptive_routing(Config& config, const Value& value) {
  config.fabric.lanes[kLane].adaptive_routing = static_cast<AdaptiveRouting>(value.integer);
}

struct LaneNames {
  std::string_view devices;
  std::string_view service_level;
  std::string_view traffic_class;
  std::string_view adaptive_routing;
  std::string_view devices_sentence;
};

template <size_t kLane>
constexpr std::array<Key, 4> rows(const LaneNames& names) {
  return {{{.section = "fabric",
            .name = names.devices,
            .type = Type::kTextList,
            .default_text = "",
            .sentence = names.devices_sentence,
            .accepts = is_word,
            .form = "names such as \"mlx5_0:1\" or \"eth0\"",
            .set = set_devices<kLane>},
           {.section = "fabric",
            .name = names.service_level,
            .type = Type::kInteger,
            .min = -1,
            .max = 15,
            .default_text = "-1",
            .sentence = "InfiniBand service level of the lane, on RoCE the priority; -1 leaves it to UCX.",
            .set = set_service_level<kLane>},
           {.section = "fabric",
            .name = names.traffic_class,
            .type = Type::kInteger,
            .min = -1,
            .max = 255,
            .default_text = "-1",
            .sentence = "Traffic class of the lane (RoCE: DSCP and ECN bits); -1 leaves it to UCX.",
            .set = set_traffic_class<kLane>},
           {.section = "fabric",
            .name = names.adaptive_routing,
            .type = Type::kChoice,
            .default_text = "default",
            .choices = "default|no|try|yes",
            .sentence = "Adaptive routing of the lane: \"yes\" fails where there is none, \"try\" goes without; "
                        "\"default\" leaves it to UCX.",
            .set = set_adaptive_routing<kLane>}}};
}

constexpr std::array<Key, 4> kControl =
    rows<0>({"control_devices", "control_service_level", "control_traffic_class", "control_adaptive_routing",
             "Network devices of the control lane (signs of life); empty: those of fabric.devices."});
constexpr std::array<Key, 4> kLatency =
    rows<1>({"latency_devices", "latency_service_level", "latency_traffic_class", "latency_adaptive_routing",
             "Network devices of the latency lane, a rail each; empty: those of fabric.devices."});
constexpr std::array<Key, 4> kThroughput = rows<2>(
    {"throughput_devices", "throughput_service_level", "throughput_traffic_class", "throughput_adaptive_routing",
     "Network devices of the throughput lane, a rail each; empty: those of fabric.devices."});

}  // namespace

std::vector<Key> fabric_lane_keys() {
  std::vector<Key> keys;
  for (const std::array<Key, 4>* lane : {&kControl, &kLatency, &kThroughput}) {
    keys.insert(keys.end(), lane->begin(), lane->end());
  }
  return keys;
}

}  // namespace expertd::config
