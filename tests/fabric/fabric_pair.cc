// SPDX-License-Identifier: Apache-2.0
#include "tests/fabric/fabric_pair.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

#include "daemon/base/clock.h"

namespace expertd::fabric_test {

void Bell::wake(base::DeviceIndex device) {
  if (on_wake) {
    on_wake(device);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ++wakes_;
  rung_.notify_all();
}

void Bell::node_up(uint64_t node_id, const std::string& /*name*/) {
  const std::lock_guard<std::mutex> lock(mutex_);
  up_.push_back(node_id);
  rung_.notify_all();
}

void Bell::node_lost(uint64_t node_id, const std::string& /*name*/, fabric::LossCause cause,
                     const std::string& detail) {
  const std::lock_guard<std::mutex> lock(mutex_);
  lost_.push_back({node_id, cause, detail, base::now_ns()});
  rung_.notify_all();
}

void Bell::rank_gone(uint64_t group_key, uint32_t rank, uint64_t through) {
  const std::lock_guard<std::mutex> lock(mutex_);
  gone_.push_back({group_key, rank, through});
  rung_.notify_all();
}

void Bell::beat(fabric::LaneKind /*lane*/, uint64_t /*now_ns*/) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++beats_;
  rung_.notify_all();
}

bool Bell::wait(const std::function<bool()>& ready, std::chrono::milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!ready()) {
    if (std::chrono::steady_clock::now() >= deadline) {
      return false;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    rung_.wait_for(lock, std::chrono::milliseconds(2));
  }
  return true;
}

std::vector<uint64_t> Bell::up() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return up_;
}

std::vector<Bell::Loss> Bell::lost() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lost_;
}

void Bell::view_message(uint64_t group_key, uint32_t node, const engine::ViewMessage& message) {
  const std::lock_guard<std::mutex> lock(mutex_);
  said_.push_back({group_key, node, message});
  rung_.notify_all();
}

std::vector<Bell::Said> Bell::said() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return said_;
}

std::vector<Bell::Gone> Bell::gone() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return gone_;
}

uint64_t Bell::beats() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return beats_;
}

uint64_t Bell::wakes() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return wakes_;
}

fabric::FabricOptions options_for(const std::string& transport, const std::string& name) {
  fabric::FabricOptions options;
  options.name = name;
  for (fabric::LaneOptionList& lane : options.lanes) {
    lane = {{"transports", transport}};
    if (transport == "tcp") {
      lane.push_back({"devices", "lo"});
    }
  }
  return options;
}

engine::Placement placement_of(uint32_t own_node, const std::vector<uint32_t>& ranks) {
  engine::Placement placement;
  placement.own_node = own_node;
  for (uint32_t node = 0; node < ranks.size(); ++node) {
    placement.ranks_of.emplace_back();
    for (uint32_t i = 0; i < ranks[node]; ++i) {
      placement.ranks_of[node].push_back(placement.ranks());
      placement.node_of.push_back(node);
      placement.index_of.push_back(i);
    }
  }
  return placement;
}

fabric::GroupLink pair_link(uint32_t own_node, const std::vector<uint64_t>& node_ids) {
  fabric::GroupLink link;
  link.key = 0x5eed'0000'0000'0001;
  link.epoch = 3;
  link.placement = placement_of(own_node, {1, 1});
  link.node_ids = node_ids;
  link.devices = {{0}};
  return link;
}

void World::create(const std::function<fabric::FabricOptions(uint32_t node)>& options) {
  for (uint32_t i = 0; i < nodes_.size(); ++i) {
    nodes_[i].bell = std::make_unique<Bell>();
    auto made = fabric::Fabric::create(options(i), nodes_[i].bell.get(), nodes_[i].bell.get());
    ASSERT_TRUE(made.is_ok()) << made.status().message();
    nodes_[i].fabric = std::move(made).value();
  }
}

void World::connect() {
  for (Node& node : nodes_) {
    for (Node& other : nodes_) {
      if (&node != &other) {
        const base::Status connected = node.fabric->connect(other.fabric->identity());
        ASSERT_TRUE(connected.is_ok()) << connected.message();
      }
    }
  }
}

void World::wait_up() {
  for (Node& node : nodes_) {
    ASSERT_TRUE(node.bell->wait([&] { return node.bell->up().size() == nodes_.size() - 1; })) << "not all nodes are up";
  }
}

fabric::GroupLink World::link(uint32_t node) const {
  fabric::GroupLink link;
  link.key = 0x1234'5678'9abc'def0;
  link.epoch = 1;
  link.placement = placement_of(node, ranks_);
  for (const Node& each : nodes_) {
    link.node_ids.push_back(each.fabric->identity().node_id);
  }
  for (uint32_t i = 0; i < ranks_[node]; ++i) {
    link.devices.push_back({i});
  }
  return link;
}

void World::open(const std::function<void(fabric::GroupLink*)>& change) {
  for (uint32_t i = 0; i < nodes_.size(); ++i) {
    fabric::GroupLink of_node = link(i);
    if (change) {
      change(&of_node);
    }
    auto opened = nodes_[i].fabric->open_group(of_node);
    ASSERT_TRUE(opened.is_ok()) << opened.status().message();
    nodes_[i].port = std::move(opened).value();
  }
}

uint32_t World::first_rank(uint32_t node) const {
  uint32_t rank = 0;
  for (uint32_t i = 0; i < node; ++i) {
    rank += ranks_[i];
  }
  return rank;
}

fabric::FabricSnapshot World::snapshot(uint32_t node) {
  auto snapshot = nodes_[node].fabric->snapshot();
  EXPECT_TRUE(snapshot.is_ok()) << snapshot.status().message();
  return snapshot.is_ok() ? snapshot.value() : fabric::FabricSnapshot{};
}

std::byte byte_at(const engine::MessageHeader& header, uint64_t index) {
  return static_cast<std::byte>(index * 31 + (index >> 8) * 7 + header.op * 13 + header.sequence * 5 +
                                header.source_rank * 3 + static_cast<uint64_t>(header.lane));
}

void fill(const engine::MessageHeader& header, std::byte* data, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; ++i) {
    data[i] = byte_at(header, i);
  }
}

uint64_t wrong_bytes(const engine::Arrival& arrival) {
  uint64_t wrong = 0;
  for (uint64_t i = 0; i < arrival.bytes; ++i) {
    const bool apart = arrival.entries != nullptr && i >= engine::kMessageHeadBytes;
    const std::byte found = apart ? arrival.entries[i - engine::kMessageHeadBytes] : arrival.data[i];
    wrong += found != byte_at(arrival.header, i) ? 1 : 0;
  }
  return wrong;
}

bool send(Node& from, uint32_t rank, const engine::MessageHeader& header, uint64_t bytes) {
  engine::SendBuffer buffer;
  const bool taken = from.bell->wait([&] {
    buffer = from.port->take(rank, header.lane);
    return buffer.data != nullptr;
  });
  if (!taken) {
    return false;
  }
  engine::MessageHeader sent = header;
  sent.source_rank = rank;
  fill(sent, buffer.data, bytes);
  if (buffer.entries != nullptr && header.kind != engine::MessageKind::kCounts) {
    for (uint64_t i = engine::kMessageHeadBytes; i < bytes; ++i) {
      buffer.entries[i - engine::kMessageHeadBytes] = std::exchange(buffer.data[i], std::byte{0xee});
    }
  }
  from.port->send(rank, buffer, sent, bytes);
  return true;
}

bool receive(Node& at, uint32_t rank, engine::Arrival* arrival, std::chrono::milliseconds limit) {
  return at.bell->wait([&] { return at.port->receive(rank, arrival); }, limit);
}

}  // namespace expertd::fabric_test
