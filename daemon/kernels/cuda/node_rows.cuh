// SPDX-License-Identifier: Apache-2.0
// What the kernels for groups over several nodes share: which rows of a token are elsewhere, and the tables of an
// entry. Device code only, included by the node_* kernels' .cu files; no state.
#pragma once

#include "daemon/kernels/cuda/device_common.cuh"
#include "daemon/kernels/cuda/node_jobs.h"

namespace expertd::kernels::cuda {

inline constexpr uint32_t kNodeThreads = 256;
inline constexpr uint32_t kNodeBlocksPerMultiprocessor = 4;
static_assert(kMaxGpuNodes <= 32 && base::kMaxTopK <= 32, "one lane of a warp per node, rank or top-k lane");

/// Parameters above 4 KiB, which CUDA 12.1 brought, end at 32764 bytes.
template <typename Job>
inline constexpr bool kFitsParameters = sizeof(PartParams) + sizeof(NodeTable) + sizeof(Job) < 32 * 1024 - 64;

/// Blocks that stride over so many tokens or entries.
inline uint32_t node_blocks(const PartParams& params, uint64_t items) {
  const uint64_t most = uint64_t{params.multiprocessors} * kNodeBlocksPerMultiprocessor;
  return static_cast<uint32_t>(items < 1 ? 1 : (items < most ? items : most));
}

/// A row that a token has at an active rank of another node.
struct AwayRow {
  uint32_t owner;
  int32_t row;
  uint32_t place;  // in the row numbers of an entry for the owner's node
};

/// The one of `lane`: a lane of the top-k where rows are numbered per expert, else a rank. False for none.
__device__ inline bool away_row(const PartParams& p, const NodeTable& nodes, uint32_t token, uint32_t lane,
                                AwayRow* away) {
  const OpShape& shape = p.op.shape;
  if (per_expert_rows(shape)) {
    if (lane >= shape.top_k) {
      return false;
    }
    const uint64_t at = uint64_t{token} * p.table_top_k + lane;
    const int32_t expert = p.op.routing.topk[at];
    if (expert < 0 || expert >= static_cast<int32_t>(shape.experts)) {
      return false;
    }
    away->row = p.op.routing.token_expert[at];
    away->owner = static_cast<uint32_t>(expert) / shape.local_experts;
    away->place = lane;
  } else {
    if (lane >= shape.ranks) {
      return false;
    }
    away->row = p.op.routing.token_rank[uint64_t{token} * shape.ranks + lane];
    away->owner = lane;
    away->place = nodes.index_of[lane];
  }
  return away->row >= 0 && rank_active(shape, away->owner) && nodes.node_of[away->owner] != nodes.own_node;
}

/// Sixteen bytes of an entry's tables, from byte 16 * piece on, zero behind them. row(i), id(lane) and weight(lane) are
/// asked for what is in it.
template <typename Row, typename Id, typename Weight>
__device__ uint4 tables_piece(const EntryLayout& layout, uint32_t top_k, uint32_t token, uint32_t piece, const Row& row,
                              const Id& id, const Weight& weight) {
  uint32_t words[4] = {};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t at = piece * 4 + i;  // in words, as everything below
    const uint32_t of_rows = at - layout.rows_at / 4;
    const uint32_t of_ids = at - layout.topk_at / 4;
    const uint32_t of_weights = at - layout.weights_at / 4;  // those before a table wrap to large numbers
    if (at == 0) {
      words[i] = token;
    } else if (of_rows < layout.rows) {
      words[i] = static_cast<uint32_t>(row(of_rows));
    } else if (layout.topk_at != 0 && of_ids < top_k) {
      words[i] = static_cast<uint32_t>(id(of_ids));
    } else if (layout.weights_at != 0 && of_weights < top_k) {
      words[i] = __float_as_uint(weight(of_weights));
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

/// An entry that no honest rank sends.
__device__ inline void mark_bad(NodeTotals* totals, uint32_t source) {
  atomicOr(&totals->bad_ranks, 1u << source);
}

/// Whether an id of an entry is an expert or none.
__device__ inline bool id_in_range(const OpShape& shape, int32_t id) {
  return id >= -1 && id < static_cast<int32_t>(shape.experts);
}

/// Where an entry stands among those of a launch's messages; each block's items come in ascending order. False: behind
/// the last.
template <typename Message>
__device__ bool find_entry(const Message* messages, uint32_t count, uint64_t item, uint32_t* message, uint32_t* entry) {
  for (uint32_t m = 0; m < count; ++m) {
    if (item < messages[m].count) {
      *message = m;
      *entry = static_cast<uint32_t>(item);
      return true;
    }
    item -= messages[m].count;
  }
  return false;
}

/// All entries of a launch's messages.
template <typename Message>
uint64_t count_entries(const Message* messages, uint32_t count) {
  uint64_t entries = 0;
  for (uint32_t m = 0; m < count; ++m) {
    entries += messages[m].count;
  }
  return entries;
}

}  // namespace expertd::kernels::cuda
