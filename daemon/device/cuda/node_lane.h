// SPDX-License-Identifier: Apache-2.0
// A capture lane of a group over several nodes. As in capture_lane.h a client's graph writes the operation's entry into
// the lane's doorbell and waits for the lane's completion word; what crosses nodes needs the host, so here an arm only
// takes the doorbell and tells the loop, which runs the operation as any other over nodes (node_chain.h):
//
//   lane stream:  wait doorbell >= 1; take_doorbell      one arm, enqueued when the one before was taken
//                 the chain of the operation             enqueued by the loop
//
// Taking an arm back and a lane that fails are as in capture_lane.h. Made and destroyed by control threads, everything
// else is the loop's, but for CaptureLane::Shared.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/device/cuda/capture_lane.h"
#include "daemon/device/cuda/node_group.h"

namespace expertd::device::cuda {

struct NodeLane {
  enum class Stage : uint32_t {
    kIdle,       // nothing is enqueued, no place in the gate
    kClearing,   // a cancel value of before is taken out of the doorbell
    kArmed,      // the arm waits
    kRunning,    // an operation
    kAborting,   // it runs to its end as no-ops
    kReleasing,  // its words are being written
  };
  /// In pinned memory.
  struct alignas(128) Pinned {
    uint64_t taken = 0;  // arm << 32 | what the doorbell held, cut to 32 bits
    uint64_t swapped = 0;
    uint64_t released = 0;  // the part whose words were written
    uint64_t aborted = 0;   // the part whose kernels know that they were aborted
    uint64_t reserved[12] = {};
    kernels::cuda::PartFacts facts{};
  };
  struct Entry {
    engine::Request request;
    engine::LaunchSpec spec;  // requests are not those of then
    std::array<kernels::cuda::PartParams, kLanePages> params;
    std::vector<NodeNotice> notices;  // of this node's ranks
    uint64_t number = 0;              // of the captured operation in its group
    uint64_t timeout_ns = 0;
  };

  ~NodeLane();
  NodeLane() = default;
  NodeLane(const NodeLane&) = delete;
  NodeLane& operator=(const NodeLane&) = delete;

  Pinned* facts() const { return static_cast<Pinned*>(pinned->host()); }
  Pinned* device_facts() const { return reinterpret_cast<Pinned*>(pinned->device()); }
  uint64_t* word(uint64_t offset) const { return reinterpret_cast<uint64_t*>(static_cast<char*>(flag_page) + offset); }
  bool uses(const engine::Mapping* mapping) const;

  // Fixed.
  const Driver* driver = nullptr;
  GpuView view;
  CUstream stream = nullptr;
  void* flag_page = nullptr;  // of the rank's session, as the GPU sees it
  uint32_t lane = 0;          // of the group
  uint32_t words = 0;         // of the session's flag page
  std::unique_ptr<NodeGroup> nodes;
  std::unique_ptr<PinnedMemory> pinned;

  Stage stage = Stage::kIdle;
  std::vector<std::unique_ptr<Entry>> entries;
  std::unique_ptr<Entry> pending;  // of a capture that the ranks have not agreed on yet
  uint64_t arms = 0;
  uint64_t swaps = 0;
  uint64_t number = 0;  // replays so far
  uint64_t part = 0;
  const Entry* running = nullptr;
  uint64_t begin_ns = 0;
  uint64_t drain_since_ns = 0;
  bool cancelling = false;  // a swap of the cancel value is under way or done
  bool closed = false;      // the end of the running chain is enqueued
  bool ending = false;      // the rank leaves
  bool gated = false;
  uint32_t broken = 0;  // expertd_reason
  CaptureLane::Shared shared;
  std::array<EndedReplay, 64> ended{};
  uint64_t ended_head = 0;
  uint64_t ended_tail = 0;
};

}  // namespace expertd::device::cuda
