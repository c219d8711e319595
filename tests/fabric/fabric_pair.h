// SPDX-License-Identifier: Apache-2.0
// Several fabrics in one process, connected to each other, with one group over them; and messages whose bytes tell what
// they should be. Every wait has a deadline.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "daemon/fabric/fabric.h"

namespace expertd::fabric_test {

inline constexpr std::chrono::milliseconds kLimit{20'000};

/// Wakes a test that waits for a device or a peer.
class Bell final : public engine::WakePort, public fabric::FabricObserver {
 public:
  void wake(base::DeviceIndex device) override;
  void node_up(uint64_t node_id, const std::string& name) override;
  void node_lost(uint64_t node_id, const std::string& name, fabric::LossCause cause,
                 const std::string& detail) override;
  void rank_gone(uint64_t group_key, uint32_t rank, uint64_t through) override;
  void view_message(uint64_t group_key, uint32_t node, const engine::ViewMessage& message) override;
  void beat(fabric::LaneKind lane, uint64_t now_ns) override;

  /// On threads of lanes, where a rank's loop is woken; set before a group is open.
  std::function<void(base::DeviceIndex device)> on_wake;

  /// True once `ready` is, which is looked at after every ring and every few milliseconds.
  bool wait(const std::function<bool()>& ready, std::chrono::milliseconds limit = kLimit);

  struct Loss {
    uint64_t node_id = 0;
    fabric::LossCause cause = fabric::LossCause::kTransport;
    std::string detail;
    uint64_t at_ns = 0;
  };
  struct Gone {
    uint64_t group_key = 0;
    uint32_t rank = 0;
    uint64_t through = 0;
    friend bool operator==(const Gone&, const Gone&) = default;
  };
  struct Said {
    uint64_t group_key = 0;
    uint32_t node = 0;
    engine::ViewMessage message;
  };
  std::vector<Gone> gone();
  std::vector<Said> said();
  std::vector<uint64_t> up();
  std::vector<Loss> lost();
  uint64_t beats();
  uint64_t wakes();

 private:
  std::mutex mutex_;
  std::condition_variable rung_;
  std::vector<uint64_t> up_;
  std::vector<Loss> lost_;
  std::vector<Gone> gone_;
  std::vector<Said> said_;
  uint64_t beats_ = 0;
  uint64_t wakes_ = 0;
};

struct Node {
  std::unique_ptr<Bell> bell;
  std::unique_ptr<fabric::Fabric> fabric;
  std::unique_ptr<engine::FabricPort> port;
};

/// The options of all lanes for a test's transport: "tcp" (loopback) or "posix".
fabric::FabricOptions options_for(const std::string& transport, const std::string& name);

/// `ranks` of each node, numbered node by node.
engine::Placement placement_of(uint32_t own_node, const std::vector<uint32_t>& ranks);

/// The group of two nodes with a rank each that the tests of two processes use.
fabric::GroupLink pair_link(uint32_t own_node, const std::vector<uint64_t>& node_ids);

class World {
 public:
  explicit World(std::vector<uint32_t> ranks) : ranks_(std::move(ranks)), nodes_(ranks_.size()) {}

  /// Each of these fails the test when it does not work.
  void create(const std::function<fabric::FabricOptions(uint32_t node)>& options);
  void connect();
  void wait_up();
  void open(const std::function<void(fabric::GroupLink*)>& change = {});

  fabric::GroupLink link(uint32_t node) const;
  Node& node(uint32_t index) { return nodes_[index]; }
  uint32_t first_rank(uint32_t node) const;
  fabric::FabricSnapshot snapshot(uint32_t node);

 private:
  std::vector<uint32_t> ranks_;
  std::vector<Node> nodes_;
};

/// The byte that a message with this header has at `index`.
std::byte byte_at(const engine::MessageHeader& header, uint64_t index);
void fill(const engine::MessageHeader& header, std::byte* data, uint64_t bytes);
/// How many bytes are not what they should be.
uint64_t wrong_bytes(const engine::Arrival& arrival);

/// Sends one message as soon as there is a buffer; false when there is none in time.
bool send(Node& from, uint32_t rank, const engine::MessageHeader& header, uint64_t bytes);
/// Takes one message for the rank; false when none comes in time. The caller releases it.
bool receive(Node& at, uint32_t rank, engine::Arrival* arrival, std::chrono::milliseconds limit = kLimit);

}  // namespace expertd::fabric_test
