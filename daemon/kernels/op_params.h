// SPDX-License-Identifier: Apache-2.0
// What one rank's part of an operation is made of: the shared layout header of the host and the CUDA implementations.
// Trivially copyable; filled by a device from an engine LaunchSpec; no ownership. A data operation has three steps per
// rank, and between them all ranks exchange flags:
//   route   read topk_idx (or the mask), number this rank's rows per destination, write row `rank` of the count matrix
//   move    read the whole count matrix; dispatch pushes rows into every destination's outputs, combine pulls them
//   finish  write what only this rank can know after all rows arrived: tails, counts, prefixes, statistics
// docs: daemon/kernels/README.md has the formulas.
#pragma once

#include <cstdint>

#include "daemon/base/limits.h"
#include "daemon/base/rank_set.h"

namespace expertd::kernels {

enum class OpKind : uint32_t {
  kBarrier = 1,
  kLayout = 2,
  kDispatch = 3,
  kCombine = 4,
  kLlDispatch = 5,
  kLlCombine = 6,
};

/// What the rows are. kFp8 quantises bf16 rows on the way (LL only).
enum class Payload : uint32_t { kBf16 = 0, kBytes = 1, kFp8 = 2 };
enum class ScaleForm : uint32_t { kFloat32 = 0, kRounded = 1, kUe8m0 = 2 };

/// Integers behind the R rank counts and E expert counts in a row of the count matrix: an error of the source rank
/// (Reason, and the offending value split in two), so that every rank ends the operation alike.
inline constexpr uint32_t kCountRowErrorInts = 4;  // reason, value low, value high, zero

struct OpShape {
  OpKind kind = OpKind::kBarrier;
  Payload payload = Payload::kBf16;
  ScaleForm scale = ScaleForm::kFloat32;
  uint32_t cached = 0;                // dispatch: the routing of the handle is used, route writes nothing
  uint32_t expanded = 0;              // HT: one row per (token, local expert), expert starts aligned
  uint32_t worst_tokens = 0;          // HT: rows behind the last get index -1 up to capacity_rows
  uint32_t zero_foreign_weights = 0;  // HT dispatch: weight 0 where the index is -1
  uint32_t order_last_lane = 0;       // HT combine: ranks in the order of the token's last top-k lane
  uint32_t ranks = 0;                 // R
  uint32_t rank = 0;                  // this rank
  uint32_t experts = 0;               // E
  uint32_t local_experts = 0;         // L = E / R
  uint32_t tokens = 0;                // T of this rank
  uint32_t top_k = 0;                 // K
  uint32_t hidden = 0;                // H
  uint32_t row_bytes = 0;             // bytes of an input row (bf16: 2H)
  uint32_t out_row_bytes = 0;         // bytes of an output row (fp8: H)
  uint32_t topk_idx_bytes = 8;        // 4 or 8
  uint32_t side_elements = 0;         // S of the side tensor that travels (kBytes)
  uint32_t side_element_bytes = 0;    // 1, 2 or 4
  uint32_t capacity_rows = 0;         // C of this rank's outputs
  uint32_t expert_alignment = 1;
  uint32_t slots_per_expert = 0;    // LL: N = R * max_tokens
  uint32_t max_tokens = 0;          // M
  uint32_t ranks_per_node = 0;      // layout: ranks r with equal r / ranks_per_node share a node; 0 = all of them
  int64_t side_row_stride = 0;      // bytes
  int64_t side_element_stride = 0;  // bytes
  base::RankSet active_ranks;       // the others are skipped (rank loss under `mask`)
};

/// This rank's inputs; null when not given. Element types and shapes: expertd_tensor in proto/abi/ring_v1.h.
struct OpInputs {
  const void* x = nullptr;
  const void* topk_idx = nullptr;
  const float* topk_weights = nullptr;
  const void* side = nullptr;
  const void* bias0 = nullptr;
  const void* bias1 = nullptr;
  const uint8_t* token_rank_mask = nullptr;
};

/// This rank's outputs; null when not wanted.
struct OpOutputs {
  void* x = nullptr;
  void* side = nullptr;
  void* topk_idx = nullptr;
  float* topk_weights = nullptr;
  int32_t* expert_counts = nullptr;
  int32_t* rank_prefix = nullptr;
  int32_t* src_info = nullptr;
  int64_t* layout_range = nullptr;
  int32_t* stats = nullptr;
  int64_t* wait_stats = nullptr;
  uint8_t* token_rank_mask = nullptr;
};

/// The routing that a dispatch leaves for its combine: one handle's tables in daemon memory of this rank's device.
/// `token_rank` holds the row of token t in rank j's output (HT, not expanded), -1 where j does not get it;
/// `token_expert` the row of (t, k) in the owner's output (expanded HT: absolute; LL: inside the expert's slots), -1
/// for none; `topk` the global expert ids, -1 for none. After route and before move the rows are still relative to the
/// source rank (index among this rank's rows for that destination); move adds the bases and stores the final rows.
struct Routing {
  int32_t* token_rank = nullptr;    // [max_tokens, R]
  int32_t* token_expert = nullptr;  // [max_tokens, K of the group]
  int32_t* topk = nullptr;          // [max_tokens, K of the group]
  int32_t* counts = nullptr;        // [R, R + E + kCountRowErrorInts]: the count matrix of the dispatch, for cached use
};

/// What a rank may touch of another rank. Pointers are valid on the device that executes.
struct PeerView {
  const void* in_x = nullptr;              // combine: rows to pull
  const float* in_topk_weights = nullptr;  // combine: weights to pull
  void* out_x = nullptr;
  void* out_side = nullptr;
  void* out_topk_idx = nullptr;
  float* out_topk_weights = nullptr;
  int32_t* out_src_info = nullptr;
  int32_t* counts = nullptr;  // the peer's copy of the count matrix (on the host all ranks share one)
  uint32_t capacity_rows = 0;
  uint32_t in_rows = 0;  // combine: rows behind in_x; pulls are clamped to it
};

struct OpParams {
  OpShape shape;
  OpInputs in;
  OpOutputs out;
  Routing routing;
  int32_t* counts = nullptr;  // this rank's copy of the count matrix [R, R + E + kCountRowErrorInts]
};

/// What a rank reports after finish; the device copies it into the completion.
struct OpReport {
  uint32_t reason = 0;    // expertd_reason
  uint32_t argument = 0;  // expertd_argument
  int64_t value = 0;
  int64_t minimum = 0;
  int64_t maximum = 0;
  int32_t rank = -1;  // the rank the Reason names
  uint32_t recv_rows = 0;
  uint64_t local_bytes = 0;
  uint64_t remote_bytes = 0;
  uint32_t expert_count_entries = 0;
  uint32_t expert_counts[base::kMaxLocalExperts] = {};
};

inline constexpr uint32_t count_row_ints(uint32_t ranks, uint32_t experts) {
  return ranks + experts + kCountRowErrorInts;
}

}  // namespace expertd::kernels
