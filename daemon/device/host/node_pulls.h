// SPDX-License-Identifier: Apache-2.0
// NodePulls: a rank's combine as far as it concerns other nodes. Its tokens are taken in windows, a few at a time: for
// each the nodes are sent what to sum, and when all their sums are there the window's tokens are finished. A window is
// such that what one node sends for it is one message, so copies of no more than kWindows messages per node are ever
// kept.
// Loop thread.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "daemon/device/nodes/node_memory.h"
#include "daemon/device/nodes/node_outbox.h"

namespace expertd::device {

/// Most bytes of a message of pulls, which whoever serves them keeps, and of the sums that come back: some 16 rows of
/// 7168 channels. Memory is there for two of each per rank and node, of which only what is used is ever touched.
inline constexpr uint64_t kPullsBytes = uint64_t{16} * 1024;
inline constexpr uint64_t kSumsBytes = uint64_t{256} * 1024;
/// Windows under way at once in low latency: what is asked, summed elsewhere, under way and finished here are different
/// ones. In high throughput, where a window fills a message, two keep everybody busy, and more only make the fabric's
/// thread hold more messages that have begun.
inline constexpr uint32_t kWindows = 4;
inline constexpr uint32_t kThroughputWindows = 2;

class NodePulls {
 public:
  explicit NodePulls(uint32_t nodes);
  void open(const NodeOp* op, NodeOutbox* outbox);
  bool ok() const { return memory_.ok(); }
  void close() { op_ = nullptr; }
  /// Before the first pull; capacities[r]: rows behind in_x of rank r.
  void begin(std::span<const uint32_t> capacities);

  /// Sends what can be sent, and finishes up to `tokens` tokens; adds to the report's bytes. False: nothing moved.
  bool advance(uint32_t tokens, kernels::OpReport* report);
  /// Rows of other nodes that were asked for.
  uint64_t pulled_bytes() const { return pulled_bytes_; }
  bool finished() const { return all_sent_ && in_flight_ == 0; }
  /// Sums that arrived, of which a copy is kept. False: they are not what was asked for.
  bool take(const engine::Arrival& arrival, const kernels::MessageHead& head);
  /// What the node owes is not waited for any more.
  void give_up(uint32_t node);
  /// Nodes whose sums are missing.
  uint64_t missing_nodes() const;

 private:
  struct Asked {
    uint32_t entries = 0;
    engine::Arrival sums;  // the copy; data is null: not there
  };
  struct Window {
    kernels::host::TokenRange tokens;
    uint32_t done = 0;
    uint64_t waits = 0;  // nodes
    bool gathered = false;
    std::vector<Asked> asked;  // per node
  };
  bool send_window(Window* window, kernels::OpReport* report);
  bool send_pulls(Window* window, uint32_t node, engine::SendBuffer* buffer, kernels::OpReport* report);
  bool finish_tokens(Window* window, uint32_t tokens, kernels::OpReport* report);
  bool fits(const Window& window, const Asked& asked, const kernels::host::Entries& entries) const;

  const NodeOp* op_ = nullptr;
  NodeOutbox* outbox_ = nullptr;
  std::span<const uint32_t> capacities_;
  kernels::MessageHead head_;
  uint64_t pulled_bytes_ = 0;
  kernels::EntryLayout sums_;
  uint32_t window_tokens_ = 1;
  uint32_t most_windows_ = kThroughputWindows;
  std::array<Window, kWindows> windows_;
  NodeMemory memory_;  // per window and node
  uint32_t oldest_ = 0;
  uint32_t in_flight_ = 0;    // whole windows
  bool opening_ = false;      // the one behind them is sent to some nodes
  uint32_t next_node_ = 0;    // of it
  uint32_t sent_tokens_ = 0;  // of whole windows
  bool all_sent_ = false;
  uint64_t given_up_ = 0;                                       // nodes
  std::vector<uint32_t> messages_;                              // sent, per node
  std::vector<kernels::host::NodePartials::Message> partials_;  // of the oldest window
  uint32_t partial_count_ = 0;
};

}  // namespace expertd::device
