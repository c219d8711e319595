// SPDX-License-Identifier: Apache-2.0
// What a CUDA device keeps per session and per rank of a group, and how its loop thread and the loops of its peers find
// it without a lock. Written by control threads under the device's mutex; read by loop threads. An entry is removed
// only after the last part that uses it ended, which is the caller's promise (device.h).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

#include "daemon/base/limits.h"
#include "daemon/device/cuda/capture_lane.h"
#include "daemon/device/cuda/group_layout.h"
#include "daemon/device/cuda/ht_group.h"
#include "daemon/device/cuda/memory.h"
#include "daemon/device/cuda/node_group.h"
#include "daemon/device/cuda/node_lane.h"
#include "daemon/engine/ports.h"
#include "daemon/kernels/cuda/part_params.h"
#include "proto/abi/exchange_v1.h"

namespace expertd::device::cuda {

inline constexpr uint32_t kMaxArmedStreams = 24;    // of 32 connections; measured: 32 streams progress independently
inline constexpr uint32_t kMaxParkedStreams = 28;   // those of sessions, and two of each capture lane
inline constexpr uint32_t kMaxStreamEntries = 256;  // measured: 256 behind a wait are fine, 1024 hang the thread
inline constexpr uint32_t kEntriesPerPart = 16;     // the longest chain: doorbell, 10 kernels, 2 waits, slack
/// Of a chain of copies: two copies and two words for each rank and step, words and reports around them.
constexpr uint32_t copy_entries(uint32_t ranks) {
  return 8 + 4 * ranks;
}
// As many as the streams hold: with fewer, parts on two devices could each hold the place that the other's peer needs.
inline constexpr uint32_t kMaxPartsInFlight = kMaxArmedStreams * (kMaxStreamEntries / kEntriesPerPart);
inline constexpr uint32_t kMaxGroupsPerDevice = 256;

/// The same of a high throughput chain: for each rank of a combine three copies of rows, one of weights and a word
/// behind each chunk; a dispatch has fewer.
constexpr uint32_t ht_entries(uint32_t ranks) {
  return 14 + 7 * ranks;
}

/// Fixed table from a 64-bit key to an object. find() from any thread, insert() and erase() by one thread at a time.
template <typename T, uint32_t kSize>
class LookupTable {
 public:
  T* find(uint64_t key) const {
    for (const Slot& slot : slots_) {
      // Pairs with the release in insert(): whoever sees the key sees the value.
      if (slot.key.load(std::memory_order_acquire) == key + 1) {
        return slot.value;
      }
    }
    return nullptr;
  }
  /// Every value; for the thread that inserts and erases, or beside it as find() is.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (const Slot& slot : slots_) {
      if (slot.key.load(std::memory_order_acquire) != 0) {
        visit(slot.value);
      }
    }
  }
  /// False when the table is full.
  bool insert(uint64_t key, T* value) {
    for (Slot& slot : slots_) {
      if (slot.key.load(std::memory_order_relaxed) == 0) {
        slot.value = value;
        slot.key.store(key + 1, std::memory_order_release);  // pairs with the acquire in find()
        return true;
      }
    }
    return false;
  }
  void erase(uint64_t key) {
    for (Slot& slot : slots_) {
      if (slot.key.load(std::memory_order_relaxed) == key + 1) {
        slot.key.store(0, std::memory_order_release);
      }
    }
  }

 private:
  struct Slot {
    std::atomic<uint64_t> key{0};  // key + 1; 0 is free
    T* value = nullptr;
  };
  std::array<Slot, kSize> slots_{};
};

struct SessionEntry {
  uint64_t id = 0;
  std::unique_ptr<VmmMemory> flag_page;
  CUstream stream = nullptr;
  uint32_t queued_entries = 0;  // loop thread only
  uint64_t open_part = 0;       // of which more is to be enqueued; 0: none. Loop thread only
  uint32_t capture_words = 0;   // used ones of the flag page, as bits; control threads only
};

struct GroupEntry {
  engine::GroupShape shape;
  GroupLayout layout;
  std::unique_ptr<VmmMemory> memory;
  uint64_t relay_ranks = 0;              // ranks whose GPUs and this one do not reach each other
  bool linked = false;                   // all GPUs of the group reach each other and have the link kernels
  std::unique_ptr<PinnedMemory> shared;  // with relay_ranks: sync pages, counts, relay
  std::unique_ptr<VmmMemory> exchange;   // of a group by copy engines
  expertd_exchange_layout exchange_layout{};
  std::unique_ptr<HtGroup> ht;       // with `exchange`, where high throughput goes by copies too
  std::unique_ptr<NodeGroup> nodes;  // of a group over several nodes
  std::array<std::unique_ptr<NodeLane>, kMaxGroupLanes> node_lanes;
  CUdeviceptr flag_page = 0;  // of the rank's session, with `exchange`
  uint64_t last_op = 0;       // operation launched last, and the ranks that took part; loop thread only
  uint64_t last_active = ~uint64_t{0};
  uint32_t progress_index = 0;  // of the device's pinned progress words
  kernels::cuda::Progress* host_progress = nullptr;
  kernels::cuda::Progress* device_progress = nullptr;
  std::array<std::unique_ptr<CaptureLane>, kMaxGroupLanes> lanes;  // as many as the shape says

  kernels::cuda::SyncPage* sync_page(uint32_t page) const {
    return reinterpret_cast<kernels::cuda::SyncPage*>(shared_address() + layout.sync_pages) + page;
  }
  int32_t* counts(uint32_t page) const {
    return reinterpret_cast<int32_t*>(shared_address() + layout.counts + page * layout.counts_page_bytes);
  }
  /// What this rank publishes; null when no rank needs it.
  char* relay() const {
    return shared == nullptr ? nullptr : reinterpret_cast<char*>(shared->device() + layout.shared_bytes);
  }
  /// The low latency buffer of a page; null when the group has none.
  char* low_latency(uint32_t page) const {
    const uint32_t buffer =
        page < engine::kExchangePages ? page % kLowLatencyBuffers : kLowLatencyBuffers + page - engine::kExchangePages;
    const uint64_t at = layout.low_latency + buffer * layout.low_latency_bytes;
    return layout.low_latency_bytes == 0 ? nullptr : reinterpret_cast<char*>(memory->address() + at);
  }
  /// The handle's tables; `handle` < layout.handle_count.
  kernels::Routing routing(uint32_t handle) const;
  /// Of eager operations, or of capture lane `stream` - 1.
  kernels::cuda::PartScratch scratch(uint32_t stream) const;
  kernels::cuda::LaneState* lane_state(uint32_t lane) const {
    return reinterpret_cast<kernels::cuda::LaneState*>(memory->address() + layout.lanes[lane].state);
  }
  kernels::cuda::PartState* arm_states(uint32_t lane) const {
    return reinterpret_cast<kernels::cuda::PartState*>(memory->address() + layout.lanes[lane].arm_states);
  }
  /// The lane's table of captured operations for one of its exchange pages.
  kernels::cuda::PartParams* captured(uint32_t lane, uint64_t parity) const {
    return reinterpret_cast<kernels::cuda::PartParams*>(memory->address() + layout.lanes[lane].entries) +
           parity * kernels::cuda::kMostCapturedEntries;
  }

 private:
  CUdeviceptr shared_address() const { return shared == nullptr ? memory->address() : shared->device(); }
};

/// The tables of all CUDA devices of the process by device index: how a device finds its peers' pages.
struct Registry {
  explicit Registry(const Driver& driver) : closer(driver, gates) {}
  using GroupTable = LookupTable<GroupEntry, kMaxGroupsPerDevice>;
  std::array<LaunchGate, base::kMaxDevices> gates{};
  Closer closer;
  std::array<std::atomic<const GroupTable*>, base::kMaxDevices> groups{};
};

}  // namespace expertd::device::cuda
