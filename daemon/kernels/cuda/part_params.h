// SPDX-License-Identifier: Apache-2.0
// What one rank's part of an operation is made of on a CUDA device, beside OpParams: the peers, the words that the part
// reads and writes, its scratch. Filled by device/cuda on the loop thread, passed by value to every kernel of the part;
// owns nothing. The structs of the second half lie in memory shared with other GPUs, the stream or the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "daemon/base/limits.h"
#include "daemon/kernels/op_params.h"

namespace expertd::kernels::cuda {

/// Tokens numbered by one block of the route kernels. 64: two warps of ballots, and 65536 tokens give 1024 chunks.
inline constexpr uint32_t kRouteChunkTokens = 64;

/// One exchange page of one rank, in its own device memory; every peer writes its own index. The stream of the owner
/// waits for routed[s] >= n and moved[s] >= n. The times are the writer's %globaltimer, for wait statistics only.
struct SyncPage {
  uint64_t routed[base::kMaxGpuRanks];
  uint64_t moved[base::kMaxGpuRanks];
  uint64_t routed_time_ns[base::kMaxGpuRanks];
  uint64_t moved_time_ns[base::kMaxGpuRanks];
};
static_assert(sizeof(SyncPage) == 512);

/// Words of one part in device memory. They carry part numbers, so that nothing of an earlier part has to be reset.
struct PartState {
  uint64_t aborted_part;   // written by the rescue stream: this part is to become a no-op
  uint64_t verdict;        // part * 4 + 1 (go) or + 2 (aborted): decided once, by the first block of finish
  uint32_t finish_blocks;  // atomicInc wraps to 0 with the last block
  uint32_t layout_error;   // layout: position of the first bad id, reset by its first kernel
  uint64_t reserved[13];
};
static_assert(sizeof(PartState) == 128);

inline constexpr uint64_t kVerdictGo = 1;
inline constexpr uint64_t kVerdictAborted = 2;

/// Facts of one part in pinned host memory. The host zeroes them before launch and reads the rest after `done`.
struct PartFacts {
  uint64_t done;      // the part's number when finish ended
  uint64_t verdict;   // kVerdict...
  uint64_t start_ns;  // %globaltimer of the first kernel, 0 before
  uint64_t end_ns;
  uint64_t rescued;   // written by the rescue stream: the part's number when its waits were released
  uint64_t restored;  // written by the rescue stream: the part's number when its words are as after a normal end
  uint64_t reserved[2];
  OpReport report;
};

/// How far the own rank's parts of one group came, in pinned host memory: read by the peers' missing().
struct Progress {
  uint64_t routed;
  uint64_t moved;
};

/// What the plan kernel decides from the count matrix, once per part, for move and finish. Device memory.
struct Plan {
  uint32_t reason;  // expertd_reason: with one, no rank moves anything
  uint32_t argument;
  int64_t value;
  int64_t maximum;
  int32_t rank;              // that the Reason names, -1 for none
  uint32_t recv_rows;        // of this rank: plain or expanded
  uint64_t sent_local_rows;  // dispatch
  uint64_t sent_remote_rows;
  unsigned long long pulled_local_rows;  // combine: counted while pulling (the type that atomicAdd takes)
  unsigned long long pulled_remote_rows;
  int32_t rank_base[base::kMaxGpuRanks];
  int32_t expert_base[base::kMaxExperts];
  int32_t local_start[base::kMaxLocalExperts];    // expanded: first row of each local expert
  int32_t local_count[base::kMaxLocalExperts];    // rows that arrive
  int32_t local_rounded[base::kMaxLocalExperts];  // expanded or HT: rounded up to the alignment; LL: the count
};

struct PeerTable {
  PeerView views[base::kMaxGpuRanks];
  SyncPage* pages[base::kMaxGpuRanks];  // each rank's page of this operation; null for inactive ranks
};

struct PartWords {
  uint64_t part = 0;      // this part's number
  uint64_t group_op = 0;  // n of the exchange flags
  uint64_t seq = 0;       // of the completion word
  PartState* state = nullptr;
  PartFacts* facts = nullptr;      // as the device sees it
  Progress* progress = nullptr;    // as the device sees it; null for local operations
  uint64_t* completion = nullptr;  // null: no words (the caller has none)
  uint64_t* result = nullptr;
};

struct PartScratch {
  Plan* plan = nullptr;
  int32_t* chunk_counts = nullptr;   // [chunks, R + E]
  uint32_t* chunk_errors = nullptr;  // [chunks]: first bad (token, lane) position, ~0 for none
};

struct PartParams {
  OpParams op;
  PeerTable peers{};
  PartWords words;
  PartScratch scratch;
  uint32_t table_top_k = 0;     // K of the group: the stride of the handle's tables
  uint32_t refused_reason = 0;  // this rank's routing counts as an error with this Reason
  uint32_t null_operation = 0;  // the launch at start that loads the kernel: returns at once
  uint32_t multiprocessors = 1;
};
static_assert(std::is_trivially_copyable_v<PartParams>);
static_assert(sizeof(PartParams) <= 4096 - 64, "kernel parameters are limited to 4 KiB on sm_80");

inline constexpr uint32_t route_chunks(uint32_t tokens) {
  return tokens == 0 ? 1 : (tokens + kRouteChunkTokens - 1) / kRouteChunkTokens;
}

/// Empty when the parameters can be launched, else what is wrong with them. Host side; kernels trust it.
const char* validate(const PartParams& params);

}  // namespace expertd::kernels::cuda
