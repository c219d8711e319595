// SPDX-License-Identifier: Apache-2.0
// NodeOutbox: messages that one rank fills for other nodes. For rows of a dispatch one is open per node, and goes when
// it is full or the last row is packed; in low latency a quarter of a node's rows is enough. Loop thread of the rank;
// nothing allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "daemon/device/nodes/node_op.h"

namespace expertd::device {

class NodeOutbox final : public kernels::host::RowPacker {
 public:
  explicit NodeOutbox(uint32_t ranks);
  void open(const NodeOp* op);
  /// Drops what was not sent.
  void close();

  /// Sends a filled buffer; `header` needs kind, node, targets and entries.
  void send(const engine::SendBuffer& buffer, engine::MessageHeader header, uint64_t bytes);

  /// Before the rows of a dispatch; capacities[r]: capacity_rows of rank r.
  void begin_rows(std::span<const uint32_t> capacities);
  bool resumes(uint32_t token) const override { return pending_ != 0 && token_ == token; }
  bool pack(const kernels::host::LandingRow& row) override;
  /// Sends what is open.
  void flush();
  /// Rows that other nodes' ranks get, since begin_rows().
  uint64_t landing_rows() const { return landing_; }

 private:
  struct Open {
    engine::SendBuffer buffer;
    uint64_t bytes = 0;
    uint64_t targets = 0;
    uint32_t entries = 0;
    kernels::EntryLayout layout;
    uint64_t most_bytes = 0;  // a message with so many goes, even if more would fit
  };
  bool start(Open* open);
  void send_open(uint32_t node);
  void send_fullest();

  const NodeOp* op_ = nullptr;
  std::vector<Open> open_;           // per node
  std::vector<uint32_t> sequences_;  // per kind and node
  kernels::MessageHead head_;
  std::span<const uint32_t> capacities_;
  uint32_t token_ = 0;
  uint64_t pending_ = 0;  // nodes that still need the token
  uint64_t landing_ = 0;
};

}  // namespace expertd::device
