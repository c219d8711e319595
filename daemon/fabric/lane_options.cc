// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/lane_options.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <string_view>

namespace expertd::fabric {

namespace {

enum class Type { kNames, kNumber, kChoice };

/// Families of transports, as bits of a set.
enum Transport : uint32_t { kTcp = 1, kShared = 2, kInfiniband = 4, kAny = 7 };

struct Option {
  std::string_view name;
  std::string_view variable;
  std::string_view key;
  Type type;
  uint32_t transports;  // where it means something
  uint64_t minimum = 0;
  uint64_t maximum = 0;
  std::string_view choices = {};  // of kChoice and of kNames, with a space around each; empty: any name
};

constexpr std::string_view kTransportNames = " all tcp sm posix sysv cma self rc rc_v rc_x ud ud_v ud_x dc dc_x ib ";

// The keys of tcp and shared memory were tried with UCX 1.13.1; those of InfiniBand follow the same rule and were not,
// for want of one.
constexpr std::array<Option, 11> kOptions = {{
    {"transports", "UCX_TLS", "TLS", Type::kNames, kAny, 0, 0, kTransportNames},
    {"devices", "UCX_NET_DEVICES", "NET_DEVICES", Type::kNames, kAny},
    {"rendezvous_rails", "UCX_MAX_RNDV_RAILS", "MAX_RNDV_RAILS", Type::kNumber, kAny, 1, 4},
    {"eager_rails", "UCX_MAX_EAGER_RAILS", "MAX_EAGER_RAILS", Type::kNumber, kAny, 1, 4},
    {"service_level", "UCX_IB_SL", "IB_SL", Type::kNumber, kInfiniband, 0, 15},
    {"traffic_class", "UCX_IB_TRAFFIC_CLASS", "IB_TRAFFIC_CLASS", Type::kNumber, kInfiniband, 0, 255},
    {"adaptive_routing", "UCX_IB_AR_ENABLE", "IB_AR_ENABLE", Type::kChoice, kInfiniband, 0, 0, " yes no try auto "},
    {"gid_index", "UCX_IB_GID_INDEX", "IB_GID_INDEX", Type::kNumber, kInfiniband, 0, 255},
    {"relaxed_ordering", "UCX_IB_PCI_RELAXED_ORDERING", "PCI_RELAXED_ORDERING", Type::kChoice, kInfiniband, 0, 0,
     " on off try auto "},
    {"tcp_send_segment_bytes", "UCX_TCP_TX_SEG_SIZE", "TX_SEG_SIZE", Type::kNumber, kTcp, 4096, 4 * 1024 * 1024},
    {"tcp_receive_segment_bytes", "UCX_TCP_RX_SEG_SIZE", "RX_SEG_SIZE", Type::kNumber, kTcp, 4096, 4 * 1024 * 1024},
}};

base::Status refused(std::string_view name, std::string_view value, const std::string& may_be) {
  return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE,
                      "lane option " + std::string(name) + "=\"" + std::string(value) + "\": " + may_be);
}

std::vector<std::string_view> split(std::string_view list) {
  std::vector<std::string_view> names;
  while (true) {
    const size_t comma = list.find(',');
    names.push_back(list.substr(0, comma));
    if (comma == std::string_view::npos) {
      return names;
    }
    list.remove_prefix(comma + 1);
  }
}

bool listed(std::string_view name, std::string_view choices) {
  return choices.find(" " + std::string(name) + " ") != std::string_view::npos;
}

bool is_device_name(std::string_view name) {
  return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string_view(":._-@").find(c) != std::string_view::npos;
  });
}

base::Status check_names(const Option& option, std::string_view value) {
  for (const std::string_view name : split(value)) {
    if (!is_device_name(name)) {
      return refused(option.name, value, "it is a list of names with commas between");
    }
    if (!option.choices.empty() && !listed(name, option.choices)) {
      return refused(option.name, value,
                     "\"" + std::string(name) + "\" is none of" + std::string(option.choices) +
                         "(ucx_info -d shows which are here)");
    }
  }
  return base::Status::ok();
}

base::Status check_number(const Option& option, std::string_view value) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size() || number < option.minimum ||
      number > option.maximum) {
    return refused(option.name, value,
                   "it is a number from " + std::to_string(option.minimum) + " to " + std::to_string(option.maximum));
  }
  return base::Status::ok();
}

base::Status check_value(const Option& option, std::string_view value) {
  switch (option.type) {
    case Type::kNames:
      return check_names(option, value);
    case Type::kNumber:
      return check_number(option, value);
    case Type::kChoice:
      return listed(value, option.choices) && value.find(' ') == std::string_view::npos
                 ? base::Status::ok()
                 : refused(option.name, value, "it is one of" + std::string(option.choices));
  }
  return base::Status::ok();
}

uint32_t family(std::string_view transport) {
  if (transport == "all") {
    return kAny;
  }
  if (transport == "tcp") {
    return kTcp;
  }
  return listed(transport, " sm posix sysv cma self ") ? kShared : kInfiniband;
}

uint32_t transports_of(const LaneOptionList& options) {
  for (const auto& [name, value] : options) {
    if (name == "transports") {
      uint32_t set = 0;
      for (const std::string_view transport : split(value)) {
        set |= family(transport);
      }
      return set;
    }
  }
  return kAny;
}

}  // namespace

base::Result<std::vector<UcxSetting>> lane_settings(LaneKind lane, const LaneOptionList& options) {
  const uint32_t transports = transports_of(options);
  std::vector<UcxSetting> settings;
  if ((transports & kShared) != 0) {
    // Without it shared memory does not notice a dead peer, and an endpoint that must cannot be opened.
    settings.push_back({"UCX_POSIX_ERROR_HANDLING", "MM_ERROR_HANDLING", "y"});
    // And it looks for a dead peer only so often, with one look into /proc per peer on this machine. One lane is
    // enough.
    if (lane == LaneKind::kControl) {
      settings.push_back({"UCX_KEEPALIVE_INTERVAL", "KEEPALIVE_INTERVAL", "25ms"});
    }
  }
  if ((transports & kTcp) != 0) {
    // Measured over loopback: puts are faster by a factor of three than with UCX's 8 KiB.
    settings.push_back({"UCX_TCP_TX_SEG_SIZE", "TX_SEG_SIZE", "64k"});
    settings.push_back({"UCX_TCP_RX_SEG_SIZE", "RX_SEG_SIZE", "64k"});
  }
  std::vector<std::string_view> seen;
  for (const auto& [name, value] : options) {
    const auto option = std::find_if(kOptions.begin(), kOptions.end(), [&](const Option& o) { return o.name == name; });
    if (option == kOptions.end()) {
      std::string known;
      for (const Option& each : kOptions) {
        known += " " + std::string(each.name);
      }
      return refused(name, value, "there is no such option; there are" + known);
    }
    if (std::find(seen.begin(), seen.end(), option->name) != seen.end()) {
      return refused(name, value, "it is given twice");
    }
    seen.push_back(option->name);
    EXPERTD_RETURN_IF_ERROR(check_value(*option, value));
    if ((option->transports & transports) == 0) {
      return refused(
          name, value,
          "it means nothing to the lane's transports; leave it out, or name in fabric.transports one that it "
          "is for");
    }
    // What the lane is given comes in place of what every lane gets.
    std::erase_if(settings, [&](const UcxSetting& each) { return each.variable == option->variable; });
    settings.push_back({std::string(option->variable), std::string(option->key), value});
  }
  return settings;
}

base::Result<std::vector<LaneOptionList>> rails_of(LaneKind lane, const LaneOptionList& options) {
  const auto devices =
      std::find_if(options.begin(), options.end(), [](const auto& option) { return option.first == "devices"; });
  if (lane == LaneKind::kControl || devices == options.end()) {
    return std::vector<LaneOptionList>{options};
  }
  EXPERTD_RETURN_IF_ERROR(lane_settings(lane, options).status());
  const std::vector<std::string_view> names = split(devices->second);
  if (names.size() > kMaxRails) {
    return refused("devices", devices->second, "a lane has at most " + std::to_string(kMaxRails) + " of them");
  }
  std::vector<LaneOptionList> rails(names.size(), options);
  for (size_t rail = 0; rail < names.size(); ++rail) {
    rails[rail][static_cast<size_t>(devices - options.begin())].second = std::string(names[rail]);
  }
  return rails;
}

}  // namespace expertd::fabric
