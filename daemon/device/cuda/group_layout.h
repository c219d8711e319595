// SPDX-License-Identifier: Apache-2.0
// How large the tables of one rank of a group are on a GPU and where each lies. Pure functions without CUDA, so that
// they are built and tested everywhere; any thread.
#pragma once

#include <array>
#include <cstdint>

#include "daemon/device/device.h"
#include "daemon/engine/ports.h"
#include "proto/abi/exchange_ht_v1.h"
#include "proto/abi/exchange_v1.h"

namespace expertd::device::cuda {

inline constexpr uint64_t kMaxHandleTableBytes = 256ull << 20;  // per rank of a group

/// Buffers of the low latency kernels, by the parity of the exchange page. Two do: a rank that writes into a buffer for
/// operation n has ended n-1, for which it needed every other rank's flag of n-1, and that rank had ended n-2 before it
/// set the flag. Where the active ranks of n-1 were others than those of n, the other kernels serve n (chain.cc).
inline constexpr uint32_t kLowLatencyBuffers = 2;
static_assert(engine::kExchangePages % kLowLatencyBuffers == 0);

/// Capture lanes take exchange pages of their own, two each, behind those of eager operations, and a low latency buffer
/// per page: their operations have their own order.
inline constexpr uint32_t kMaxGroupLanes = engine::kMostCaptureLanes;
inline constexpr uint32_t kLanePages = 2;
/// Arms of a lane ahead: with two stream entries each, half of what a parked stream may hold.
inline constexpr uint32_t kArms = 64;
inline constexpr uint32_t lane_page(uint32_t lane, uint64_t parity) {
  return engine::kExchangePages + lane * kLanePages + static_cast<uint32_t>(parity);
}

/// Scratch of one stream of parts: that of eager operations, or a capture lane's.
struct ScratchLayout {
  uint64_t plan = 0;
  uint64_t chunk_counts = 0;
  uint64_t chunk_errors = 0;
  uint64_t plan_work = 0;
  uint64_t block_rows = 0;
  uint64_t rows = 0;
  uint64_t left_blocks = 0;
};

/// What else a capture lane has.
struct LaneLayout {
  uint64_t state = 0;       // LaneState
  uint64_t arm_states = 0;  // [kArms] PartState
  uint64_t entries = 0;     // [kLanePages, kMostCapturedEntries] PartParams
};

/// Offsets inside one rank's table memory; one function yields all of them. What peers write (sync pages and counts)
/// comes first: behind the relay that part lies in pinned memory of the host, with the relay after it.
struct GroupLayout {
  uint64_t sync_pages = 0;
  uint64_t counts = 0;
  uint64_t counts_page_bytes = 0;
  uint64_t shared_bytes = 0;  // sync pages and counts
  uint64_t relay_bytes = 0;
  std::array<ScratchLayout, 1 + kMaxGroupLanes> scratch{};
  std::array<LaneLayout, kMaxGroupLanes> lanes{};
  uint64_t low_latency = 0;        // two buffers and two per lane; only of groups that serve low latency
  uint64_t low_latency_bytes = 0;  // of one
  uint64_t handles = 0;
  uint64_t handle_bytes = 0;
  uint64_t handle_rows = 0;  // inside a handle: behind its count matrix
  uint32_t handle_count = 0;
  uint64_t total_bytes = 0;
};
/// Pure; at least one handle, and no more than fit kMaxHandleTableBytes. `shape.low_latency` asks for the buffers.
GroupLayout group_layout(const engine::GroupShape& shape, uint32_t handle_limit);
/// Where things lie in the exchange window of a rank: what low latency needs, then what high throughput needs, each
/// only where the group serves it and has a shape for it.
struct CopyLayout {
  expertd_exchange_layout low_latency{};
  expertd_exchange_ht_layout ht{};
  uint64_t ht_offset = 0;
  uint64_t total_bytes = 0;
};
/// Pure.
CopyLayout copy_layout(const engine::GroupShape& shape);
/// Bytes of pinned host memory that takes the place of the shared tables behind the relay.
uint64_t pinned_bytes(const GroupLayout& layout);
/// What a rank takes. All its tables lie in one allocation of `allocated_bytes`, at least layout.total_bytes; what the
/// device rounds up counts as tables. `relayed`: a GPU of the group does not reach the rank's.
GroupMemory group_memory(const GroupLayout& layout, uint64_t allocated_bytes, bool relayed);

}  // namespace expertd::device::cuda
