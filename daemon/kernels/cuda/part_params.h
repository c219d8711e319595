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
/// waits for routed[s] >= n and moved[s] >= n, its kernels also for counted[s]. The times are the writer's
/// %globaltimer, for wait statistics only. Behind `moved` stands which captured operation the rank replays.
struct SyncPage {
  uint64_t routed[base::kMaxGpuRanks];
  uint64_t moved[base::kMaxGpuRanks];
  uint64_t routed_time_ns[base::kMaxGpuRanks];
  uint64_t moved_time_ns[base::kMaxGpuRanks];
  uint64_t counted[base::kMaxGpuRanks];   // link dispatch: the rank's rows per expert are in the matrix too
  uint64_t captured[base::kMaxGpuRanks];  // number of the captured operation
  // Link dispatch, by source and destination: the source's rows for the destination (link_rows.cuh).
  uint64_t rows[base::kMaxGpuRanks][base::kMaxGpuRanks];
};
static_assert(sizeof(SyncPage) == 768 + 2048);

/// Words of one part in device memory. They carry part numbers, so that nothing of an earlier part has to be reset.
struct PartState {
  uint64_t aborted_part;   // written by the rescue stream: this part is to become a no-op
  uint64_t verdict;        // part * 4 + 1 (go) or + 2 (aborted): decided once, by the first block of finish
  uint32_t finish_blocks;  // atomicInc wraps to 0 with the last block
  uint32_t layout_error;   // layout: position of the first bad id, reset by its first kernel
  // By exchange (SignalStep): part * 4 + kPassed or kLeft, decided once for all blocks of the kernel that waits for the
  // exchange itself. What it leaves is done by the kernel behind the stream's wait for the same exchange.
  uint64_t passed[2];
  uint64_t start_ns;        // %globaltimer of the first kernel
  uint64_t started_part;    // whose start that is
  uint32_t blocks_done;     // of a step of a link kernel; its last block sets it back to 0
  uint32_t claimed_tokens;  // by the blocks of link_combine; its last block sets it back to 0
  uint64_t taken_entry;     // captured: part << 16 | entry that the doorbell named, or kNoEntry; decided once
  uint32_t blocks_through;  // captured: blocks at the end of the first kernel; its last one sets it back to 0
  uint32_t unused;
  uint64_t reserved[6];
};
static_assert(sizeof(PartState) == 128);

inline constexpr uint64_t kVerdictGo = 1;
inline constexpr uint64_t kVerdictAborted = 2;
inline constexpr uint64_t kVerdictCancelled = 3;  // captured: the arm was taken back before its doorbell rang
inline constexpr uint64_t kPassed = 1;
inline constexpr uint64_t kLeft = 2;

/// Facts of one part in pinned host memory. The host zeroes them before launch and reads the rest after `done`.
struct PartFacts {
  uint64_t done;      // the part's number when finish ended
  uint64_t verdict;   // kVerdict...
  uint64_t start_ns;  // %globaltimer of the first kernel, 0 before
  uint64_t end_ns;
  uint64_t rescued;   // written by the rescue stream: the part's number when its waits were released
  uint64_t restored;  // written by the rescue stream: the part's number when its words are as after a normal end
  uint64_t settled;   // written by the rescue stream: the part's number when its caller's words are written
  uint64_t entry;     // captured: what the doorbell named; 0 before
  uint64_t left;      // captured: the part's number when blocks of its first kernel left work behind
  uint64_t reserved[7];
  OpReport report;
};
static_assert(offsetof(PartFacts, report) == 128);

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
  // Of a combine through the relay, for every expert of its owner's rows: first row with and without the alignment
  // gaps.
  int32_t aligned_start[base::kMaxExperts];
  int32_t packed_start[base::kMaxExperts];
};

/// What is between the matrix and the plan; in shared memory, or in scratch where one warp plans beside others that
/// move.
struct PlanWork {
  int64_t rank_rows[base::kMaxGpuRanks];      // Nr
  int64_t expanded_rows[base::kMaxGpuRanks];  // Ne
  int32_t first_over_slots[base::kMaxGpuRanks];
  int32_t expert_count[base::kMaxExperts];
  int32_t expert_before[base::kMaxExperts];  // rows of lower sources
  int64_t expert_start[base::kMaxExperts];
};

/// The relay is memory of the host that every GPU of a group reaches: what a rank publishes in it is read by the ranks
/// whose GPU cannot reach its memory. Dispatch publishes inputs and row numbers, and the destination moves the rows;
/// combine publishes the experts' rows, packed. All offsets are from the start of a rank's relay, where x lies.
struct RelayLayout {
  uint64_t weights = 0;       // dispatch [M,K] f32; combine: of each packed row [K], expanded [1]
  uint64_t topk = 0;          // dispatch [M,K of the group] i32: global experts
  uint64_t token_rank = 0;    // dispatch [M,R] i32
  uint64_t token_expert = 0;  // dispatch [M,K of the group] i32
  uint64_t side = 0;          // dispatch [M,S], row-major; last, because S is that of the publishing rank
  uint64_t bytes = 0;         // of everything before it and the own side
  uint64_t rows = 0;          // combine: packed rows that fit
};

struct RelayPeer {
  const char* base = nullptr;
  uint32_t tokens = 0;  // dispatch
  uint32_t side_elements = 0;
  uint32_t has_weights = 0;
};

struct RelayTable {
  char* own = nullptr;  // null: no rank of the group needs one of this rank
  uint64_t ranks = 0;   // active ranks that this rank exchanges with through the relay
  RelayLayout layout;
  RelayPeer peers[base::kMaxGpuRanks];
};

/// Where things lie in the staging of one rank of a group that serves low latency, in one of its two buffers. A source
/// writes a token once per destination rank, and the destination expands it; an owner sums a token's rows, and the
/// origin adds the sums of the owners. All offsets are from the buffer's start.
struct LowLatencyLayout {
  uint64_t row_stride = 0;      // of a dispatched token: its payload and behind it its side row or scales
  uint64_t dispatch_rows = 0;   // [R sources, M] of row_stride
  uint64_t dispatch_lanes = 0;  // [R sources, M, K of the group] RoutedLane
  uint64_t combine_rows = 0;    // [R owners, M, H] bf16
  uint64_t bytes = 0;           // of one buffer
};

/// One (token, lane) of a dispatch as its source numbered it.
struct RoutedLane {
  int32_t expert;  // global, -1 for none
  int32_t row;     // among this source's rows for the expert, -1 for none
};

/// What the owners of a combine's rows read of their origin: two tables of its handle [M, K of the group], and what its
/// caller gave [T, K].
struct LaneTables {
  const int32_t* topk = nullptr;
  const int32_t* token_expert = nullptr;
  const uint32_t* topk_idx = nullptr;  // ids of `id_words` words, negative for lanes that are taken away; null: none is
  const float* topk_weights = nullptr;  // null: all are 1
  uint32_t top_k = 0;
  uint32_t id_words = 0;  // 1 or 2
};

struct LowLatencyTable {
  char* staging[base::kMaxGpuRanks];  // of every active rank: the operation's buffer; all null where none serves it
  uint32_t tokens[base::kMaxGpuRanks];
  LaneTables lanes[base::kMaxGpuRanks];  // combine: of every active rank
  LowLatencyLayout layout;
};

struct PeerTable {
  PeerView views[base::kMaxGpuRanks];
  SyncPage* pages[base::kMaxGpuRanks];  // each rank's page of this operation; null for inactive ranks and other nodes
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

/// Rows that one block of a combine pulled, or counted, for the report.
struct BlockRows {
  uint64_t local;
  uint64_t remote;
};

struct PartScratch {
  Plan* plan = nullptr;
  PlanWork* plan_work = nullptr;
  BlockRows* block_rows = nullptr;   // [kMostLinkSms]
  int32_t* chunk_counts = nullptr;   // [chunks, R + E]
  uint32_t* chunk_errors = nullptr;  // [chunks]: first bad (token, lane) position, ~0 for none
  int32_t* rows = nullptr;           // [M, R]: rows at each rank, relative to this rank's first
  uint64_t* left_blocks = nullptr;   // [kMostLinkSms]: by block, the exchange that it left last (low_latency_steps.cuh)
};

/// Of an operation that was captured in a CUDA graph; zero otherwise.
struct CapturedParams {
  uint64_t number = 0;      // of the operation in its group: the same on all ranks
  uint32_t blocks = 0;      // that work, of the grid that serves any operation
  uint32_t ends_chain = 0;  // the last block to end tells `done`: nothing is enqueued behind this kernel
};

struct alignas(16) PartParams {
  OpParams op;
  PeerTable peers{};
  RelayTable relay{};
  LowLatencyTable low_latency{};
  PartWords words;
  PartScratch scratch;
  uint32_t table_top_k = 0;     // K of the group: the stride of the handle's tables
  uint32_t refused_reason = 0;  // this rank's routing counts as an error with this Reason
  uint32_t null_operation = 0;  // the launch at start that loads the kernel: returns at once
  uint32_t multiprocessors = 1;
  uint32_t bulk_copies = 0;     // the context has the kernels with them
  uint32_t link_sms = 0;        // multiprocessors for the link kernels
  uint32_t after_doorbell = 0;  // for launchers: await_doorbell stands in front of the first kernel
  uint32_t after_flags = 0;     // and await_flags in front of those for which the low latency kernels wait
  CapturedParams captured;
};
static_assert(std::is_trivially_copyable_v<PartParams>);
static_assert(sizeof(PartParams) <= 4096 - 64, "kernel parameters are limited to 4 KiB on sm_80");

inline constexpr uint32_t route_chunks(uint32_t tokens) {
  return tokens == 0 ? 1 : (tokens + kRouteChunkTokens - 1) / kRouteChunkTokens;
}

/// Bytes of dynamic shared memory that the kernels with bulk copies ask for at most: 227 KiB less their static part.
inline constexpr uint32_t kBulkSharedBytes = 208 * 1024;
/// Blocks of a link kernel at most.
inline constexpr uint32_t kMostLinkSms = 256;
/// Rows in flight per block of those kernels.
inline constexpr uint32_t kBulkRows = 16;

/// Layout of the relay for one operation of a group; `table_top_k` is the group's. Pure.
RelayLayout relay_layout(const OpShape& shape, uint32_t table_top_k);
/// Bytes of a rank's relay that hold every combine and every dispatch with rows of at most max(2 * hidden, 4096) bytes
/// and a side of at most 4096 bytes per token.
uint64_t relay_bytes(const OpShape& shape, uint32_t table_top_k);

/// Layout of a low-latency buffer; `shape` has the group's ranks, hidden and max_tokens. Pure.
LowLatencyLayout low_latency_layout(const OpShape& shape, uint32_t table_top_k);
/// Whether a dispatch with rows of this shape, or a combine, fits such a buffer. Pure.
bool fits_low_latency(const OpShape& shape, const LowLatencyLayout& layout);

/// What a kernel waits for that stands for a stream's wait: flags [ranks] of at least `value`.
struct FlagWait {
  const uint64_t* flags = nullptr;
  uint64_t ranks = 0;  // as bits; none: a null operation
  uint64_t value = 0;
};

/// Empty when the parameters can be launched, else what is wrong with them. Host side; kernels trust it.
const char* validate(const PartParams& params);

}  // namespace expertd::kernels::cuda
