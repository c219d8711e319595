// SPDX-License-Identifier: Apache-2.0
// What a GPU keeps for its rank of a group over several nodes: memory that its kernels share with messages, and where
// the rank's operation stands, of which there is one at a time. Taken when the rank joins, by a control thread; then
// the loop's alone, which never allocates.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/device/cuda/group_layout.h"
#include "daemon/device/cuda/memory.h"
#include "daemon/device/nodes/node_inbox.h"
#include "daemon/device/nodes/node_messages.h"
#include "daemon/device/nodes/node_notice.h"
#include "daemon/device/nodes/node_outbox.h"
#include "daemon/kernels/cuda/node_jobs.h"

namespace expertd::device::cuda {

/// Windows of a combine under way at most: with 72 tokens each (rows of 7168 channels in messages of 1 MiB) 8 MiB of
/// sums per node.
inline constexpr uint32_t kNodeWindows = 8;
static_assert(kernels::cuda::kMostPullTokens == kMostWindowTokens);
/// Launches that touch messages and have not ended. One that finds no place is made in a later turn.
inline constexpr uint32_t kNodeBatches = 16;
/// Rows that arrived and wait for a launch: all buffers that a node may fill at once.
inline constexpr uint32_t kWaitingRows = 64;

/// In pinned memory, written by the stream and read by the loop behind `ticks`.
struct alignas(128) NodeFacts {
  kernels::cuda::Progress progress{};  // of the own rank; read by the loops of this node's other ranks
  uint64_t ticks = 0;                  // launches that ended, counted since the group began
  uint32_t plan_reason = 0;            // of the plan of a dispatch
  uint32_t unused = 0;
  kernels::cuda::NodeTotals totals{};
  uint32_t packed[kNodeBatches][kernels::cuda::kPackBuffers] = {};  // by launch: entries, per node or per window
};

/// A launch that reads or writes messages, until it has ended.
struct NodeBatch {
  enum class Kind : uint32_t { kFree, kRows, kSpread, kPulls, kKept, kServed, kSums, kCombined };
  struct Filled {
    engine::SendBuffer buffer{};
    uint32_t node = 0;
    uint32_t window = 0;          // kPulls
    engine::Arrival pulls{};      // kServed: whose, and their place
    bool last = false;            // kPulls: of the last window
    kernels::MessageHead head{};  // kServed: as it was asked
  };
  Kind kind = Kind::kFree;
  uint64_t tick = 0;
  bool last = false;  // kRows: all tokens are packed
  uint32_t filled_count = 0;
  uint32_t arrival_count = 0;
  std::array<Filled, kernels::cuda::kPackBuffers> filled;  // kRows: by node, in the order of its entries
  std::array<uint32_t, kernels::cuda::kMaxGpuNodes> per_message{};
  std::array<engine::Arrival, kernels::cuda::kNodeMessages> arrivals;  // released at its end
  uint64_t windows = 0;                                                // kCombined: bits; kSums: the one
};

/// Tokens of a combine that are pulled together.
struct NodeWindow {
  enum class Stage : uint32_t { kFree, kPacking, kWaiting, kReady, kCombining };
  Stage stage = Stage::kFree;
  uint32_t begin = 0;
  uint32_t end = 0;
  uint64_t waits = 0;  // nodes whose sums have not arrived
  uint64_t here = 0;   // nodes whose sums are in the device, or on their way before whatever is launched next
  std::array<uint32_t, kernels::cuda::kMaxGpuNodes> asked{};   // entries
  std::array<uint32_t, kernels::cuda::kMaxGpuNodes> number{};  // of the pulls, from 1
};

/// What another rank owes this one, or has pulled from it.
struct NodeSource {
  uint32_t arrived = 0;   // messages of rows or pulls
  uint32_t expected = 0;  // how many there are; 0: not told yet
  uint32_t served = 0;    // pulls
  uint32_t waiting = 0;   // pulls that hold a place
};

struct NodeGroup {
  /// POOL_EXHAUSTED, CUDA, UNSUPPORTED (the group's messages are too small).
  static base::Result<std::unique_ptr<NodeGroup>> create(const Reach& reach, Pool* pool,
                                                         const engine::GroupShape& shape);

  enum class Stage : uint32_t {
    kIdle,
    kRouting,   // up to the own row of the count matrix
    kCounting,  // the rows of all others are awaited
    kMoving,
    kClosed,  // the end of the chain is enqueued; what arrives is for the next operation
  };

  NodeGroup(const engine::GroupShape& shape, uint64_t bytes_of_message);

  NodeFacts* facts() const { return static_cast<NodeFacts*>(pinned->host()); }
  NodeFacts* device_facts() const { return reinterpret_cast<NodeFacts*>(pinned->device()); }
  /// Rows of other nodes' ranks in the count matrix, and the own one behind the kernel that counts.
  int32_t* row(uint32_t rank) const {
    return reinterpret_cast<int32_t*>(static_cast<char*>(pinned->host()) + rows_at) + uint64_t{rank} * row_ints;
  }
  std::byte* pulls_place(uint32_t rank, uint32_t place) const {
    return static_cast<std::byte*>(pinned->host()) + pulls_at + (uint64_t{rank} * kNodeWindows + place) * pulls_bytes;
  }
  /// The same of entries that arrived in memory of a GPU.
  std::byte* pulls_entries(uint32_t rank, uint32_t place) const {
    const uint64_t at = pulls_entries_at + (uint64_t{rank} * kNodeWindows + place) * pulls_bytes;
    return reinterpret_cast<std::byte*>(memory->address() + at);
  }
  uint32_t* counters() const { return reinterpret_cast<uint32_t*>(memory->address()); }
  kernels::cuda::NodeTotals* totals() const {
    return reinterpret_cast<kernels::cuda::NodeTotals*>(memory->address() + totals_at);
  }
  int32_t* positions() const { return reinterpret_cast<int32_t*>(memory->address() + positions_at); }
  char* sums(uint32_t window, uint32_t node) const {
    return reinterpret_cast<char*>(memory->address() + sums_at + (uint64_t{window} * nodes + node) * message_bytes);
  }
  bool is_open() const { return stage != Stage::kIdle; }
  /// The operation in `op` begins.
  void restart();

  // Fixed.
  uint32_t nodes;
  uint32_t ranks;
  uint32_t row_ints;
  uint64_t message_bytes;
  uint32_t window_count;  // of `windows`
  uint64_t pulls_bytes = 0;
  uint64_t rows_at = 0;
  uint64_t pulls_at = 0;
  uint64_t totals_at = 0;
  uint64_t positions_at = 0;
  uint64_t sums_at = 0;
  uint64_t pulls_entries_at = 0;
  std::unique_ptr<VmmMemory> memory;
  std::unique_ptr<PinnedMemory> pinned;
  kernels::cuda::NodeTable table;

  // Of the operation.
  Stage stage = Stage::kIdle;
  engine::LaunchSpec spec;
  NodeOp op;
  kernels::cuda::PartParams params;
  NodeInbox inbox;
  NodeOutbox outbox;
  std::vector<NodeNotice> notices;  // per rank
  std::vector<NodeSource> sources;  // per rank
  uint32_t lane = 0;                // of captured operations, plus one; 0: of the group's calls. Fixed
  uint64_t capture_number = 0;      // of the captured operation that is replayed; 0: none
  /// The same for the loops of this node's other ranks, by the parity of the replay's number.
  std::array<std::atomic<uint64_t>, 2> replays{};
  bool notice_only = false;  // a rank of this node was refused, or it is a barrier: nothing moves
  uint64_t counts_for = 0;   // nodes that have not been sent the counts
  uint64_t counted = 0;      // ranks of other nodes whose counts are here
  uint64_t spoiled = 0;      // ranks that sent what no honest one sends
  int32_t bad_rank = -1;
  kernels::OpReport report;  // with a Reason: why the operation does not run
  uint32_t peer_reason = 0;
  engine::Exchanged exchanged;
  std::vector<uint64_t> counts_ns;  // per rank: when its counts were here
  uint32_t packed_tokens = 0;       // of a dispatch: given to launches; of a combine: in windows
  bool all_packed = false;
  bool all_sent = false;
  uint32_t moved_tokens = 0;                                              // of a combine
  std::array<uint32_t, kernels::cuda::kMaxGpuNodes> messages{};           // sent, per node
  kernels::MessageHead head;                                              // of own rows or pulls
  std::array<kernels::EntryLayout, kernels::cuda::kMaxGpuNodes> layouts;  // of them, per node
  kernels::EntryLayout sums_layout;
  uint32_t window_tokens = 1;
  std::array<NodeWindow, kNodeWindows> windows;
  std::array<engine::Arrival, kWaitingRows> rows_waiting;
  uint32_t rows_waiting_count = 0;
  std::vector<engine::Arrival> pulls_waiting;  // a ring of copies
  uint32_t pulls_first = 0;
  uint32_t pulls_count = 0;
  std::array<NodeBatch, kNodeBatches> batches;
  uint64_t ticks = 0;    // enqueued
  uint64_t retired = 0;  // and ended
};

}  // namespace expertd::device::cuda
