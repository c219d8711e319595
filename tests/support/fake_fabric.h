// SPDX-License-Identifier: Apache-2.0
// FakeNetwork: nodes of one group that exchange messages inside one process. Pools are tiny, so that senders and
// receivers are held up all the time, and messages between two nodes overtake each other as the random sequence has it.
// A test may spoil messages on their way. One thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/engine/fabric_port.h"
#include "tests/support/random_case.h"

namespace expertd::test {

struct FakeNetworkSettings {
  uint64_t message_bytes = 0;
  uint32_t send_buffers = 1;     // per rank and lane
  uint32_t receive_buffers = 1;  // messages of one node that another keeps before nothing more of it is delivered
};

class FakeNetwork {
 public:
  FakeNetwork(const FakeNetworkSettings& settings, std::vector<engine::Placement> nodes, support::Random* random)
      : settings_(settings), random_(random) {
    for (engine::Placement& placement : nodes) {
      ports_.push_back(std::make_unique<Port>(this, std::move(placement)));
    }
  }

  engine::FabricPort* port(uint32_t node) { return ports_[node].get(); }
  const engine::Placement& placement(uint32_t node) const { return ports_[node]->placement; }

  /// Delivers one message of those that can be; false: there is none.
  bool deliver() {
    for (size_t tries = under_way_.size(); tries > 0; --tries) {
      const size_t pick = random_->below(static_cast<uint32_t>(under_way_.size()));
      std::swap(under_way_[pick], under_way_.back());
      if (ports_[under_way_.back().to]->accept(&under_way_.back())) {
        under_way_.pop_back();
        return true;
      }
    }
    return false;
  }
  /// A message that no part sent, of a rank of `from` to the node of the header, arrives now if there is a buffer.
  void inject(uint32_t from, const engine::MessageHeader& header, std::vector<std::byte> body) {
    Message message{header, std::move(body), from, header.node, header.source_rank, &injected_};
    injected_ = 1;
    (void)ports_[header.node]->accept(&message);
  }
  /// Nothing is under way, and no rank keeps a message or a buffer.
  bool quiet() const {
    return under_way_.empty() && std::all_of(ports_.begin(), ports_.end(), [](const auto& port) {
             return std::all_of(port->ranks.begin(), port->ranks.end(), [](const auto& rank) {
               return rank.kept == 0 && rank.out[0] == 0 && rank.out[1] == 0;
             });
           });
  }

  /// Called when something arrived for a rank of a node, or a buffer of its came back: a fabric wakes its loop then.
  std::function<void(uint32_t node, uint32_t rank)> stirred;
  /// Called with every message when it is sent, and may change it; false: the message is lost.
  std::function<bool(engine::MessageHeader*, std::vector<std::byte>*)> tamper;
  uint64_t messages = 0;
  uint64_t bytes = 0;

 private:
  struct Message {
    engine::MessageHeader header;
    std::vector<std::byte> bytes;
    uint32_t from = 0;
    uint32_t to = 0;
    uint32_t sender = 0;
    uint32_t* out = nullptr;  // the sender's buffers under way
  };
  struct Rank {
    uint32_t out[engine::kFabricLanes] = {};  // buffers taken or under way
    uint32_t kept = 0;                        // arrivals not released
    std::deque<engine::Arrival> inbox;
  };
  struct Buffer {
    std::unique_ptr<std::byte[]> data;
    uint32_t* out = nullptr;
  };

  struct Port final : engine::FabricPort {
    Port(FakeNetwork* of, engine::Placement at) : network(of), placement(std::move(at)), ranks(placement.ranks()) {}

    uint64_t message_bytes() const override { return network->settings_.message_bytes; }
    engine::SendBuffer take(uint32_t rank, engine::FabricLane lane) override {
      uint32_t& out = ranks[rank].out[static_cast<uint32_t>(lane)];
      if (out == network->settings_.send_buffers) {
        return {};
      }
      ++out;
      buffers.push_back({std::make_unique<std::byte[]>(message_bytes()), &out});
      const auto id = static_cast<uint32_t>(buffers.size() - 1);
      std::memset(buffers[id].data.get(), 0xcd, message_bytes());
      return {buffers[id].data.get(), message_bytes(), lane, id};
    }
    void send(uint32_t /*rank*/, const engine::SendBuffer& buffer, const engine::MessageHeader& header,
              uint64_t bytes) override {
      Buffer& filled = buffers[buffer.id];
      if (bytes > message_bytes() || header.node == placement.own_node || header.targets == 0) {
        std::abort();
      }
      Message message{header,
                      {filled.data.get(), filled.data.get() + bytes},
                      placement.own_node,
                      header.node,
                      header.source_rank,
                      filled.out};
      filled.data.reset();
      ++network->messages;
      network->bytes += bytes;
      if (network->tamper && !network->tamper(&message.header, &message.bytes)) {
        give_back(message);
        return;
      }
      network->under_way_.push_back(std::move(message));
    }
    void drop(uint32_t /*rank*/, const engine::SendBuffer& buffer) override {
      --*buffers[buffer.id].out;
      buffers[buffer.id].data.reset();
    }
    bool receive(uint32_t rank, engine::Arrival* arrival) override {
      if (ranks[rank].inbox.empty()) {
        return false;
      }
      *arrival = ranks[rank].inbox.front();
      ranks[rank].inbox.pop_front();
      return true;
    }
    void release(uint32_t rank, const engine::Arrival& arrival) override {
      --ranks[rank].kept;
      if (--bodies[arrival.id].second == 0) {
        bodies[arrival.id].first.reset();  // whoever still reads it reads freed memory
        --kept_of[arrival.header.node];
      }
    }

    bool accept(Message* message) {
      std::vector<uint32_t> targets;
      for (uint32_t place = 0; place < placement.ranks_on(placement.own_node); ++place) {
        if ((message->header.targets >> place & 1) != 0) {
          targets.push_back(placement.ranks_of[placement.own_node][place]);
        }
      }
      uint32_t& link = kept_of[message->from];
      if (link >= network->settings_.receive_buffers) {
        return false;
      }
      ++link;
      const size_t bytes = message->bytes.size();
      // Of exactly its size, so that sanitizers see what reads behind it.
      auto body = std::make_unique<std::byte[]>(bytes);
      std::copy(message->bytes.begin(), message->bytes.end(), body.get());
      message->header.node = message->from;
      for (const uint32_t rank : targets) {
        engine::Arrival arrival;
        arrival.header = message->header;
        arrival.data = body.get();
        arrival.bytes = bytes;
        arrival.arrived_ns = base::now_ns();
        arrival.id = static_cast<uint32_t>(bodies.size());
        ranks[rank].inbox.push_back(arrival);
        ++ranks[rank].kept;
        network->stirred(placement.own_node, rank);
      }
      bodies.emplace_back(std::move(body), static_cast<uint32_t>(targets.size()));
      network->ports_[message->from]->give_back(*message);
      return true;
    }
    void give_back(const Message& message) const {
      --*message.out;
      network->stirred(placement.own_node, message.sender);
    }

    FakeNetwork* network;
    engine::Placement placement;
    std::vector<Rank> ranks;
    std::vector<uint32_t> kept_of = std::vector<uint32_t>(placement.nodes());  // messages per node
    std::deque<Buffer> buffers;
    std::deque<std::pair<std::unique_ptr<std::byte[]>, uint32_t>> bodies;  // with how many look at them
  };

  FakeNetworkSettings settings_;
  support::Random* random_;
  std::vector<std::unique_ptr<Port>> ports_;
  std::vector<Message> under_way_;
  uint32_t injected_ = 0;  // buffers that it seems to come from
};

}  // namespace expertd::test
