// SPDX-License-Identifier: Apache-2.0
// What the movers of a link dispatch do: each warp takes one token after the other through its place in shared memory
// to the token's row at every rank. Device code only, for sm_90, but for the sizes; included by link_dispatch.cu; no
// state.
#pragma once

#include "daemon/kernels/cuda/link_route.cuh"
#include "daemon/kernels/cuda/timeline.cuh"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kBlockThreads = 1024;
constexpr uint32_t kBlockWarps = kBlockThreads / 32;
constexpr uint32_t kMostMovers = kBlockWarps - 1;  // beside the clerk
constexpr uint32_t kNoToken = 0xffffffffu;

/// Bytes of a side row when it can be moved by the copy unit wherever it lies; 0: by threads.
__host__ __device__ constexpr uint32_t side_bytes(const OpShape& shape) {
  const uint32_t bytes = shape.side_elements * shape.side_element_bytes;
  return bytes % 16 == 0 ? bytes : 0;
}

/// Shared memory of one row in flight: the row and its side row.
__host__ __device__ constexpr uint32_t place_bytes(const OpShape& shape) {
  return bulk_row_stride(shape.row_bytes) + bulk_row_stride(side_bytes(shape));
}

/// Warps of a block that move rows: as many as rows fit into its shared memory.
__host__ __device__ constexpr uint32_t movers_of(const OpShape& shape) {
  const uint32_t fit = kBulkSharedBytes / place_bytes(shape);
  return fit < kMostMovers ? fit : kMostMovers;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// What every mover knows of the plan: lane j holds that of rank j.
struct MoverPlan {
  int32_t base = 0;    // the first of this rank's rows there: those of lower sources
  uint32_t total = 0;  // rows that it receives
  bool moves = false;  // the operation moves rows: every rank finds the same
};

/// Rows of source s at rank j: of the handle, or as the sources said.
__device__ int32_t rows_of(const PartParams& p, const RowCounts& rows, uint32_t s, uint32_t j) {
  return p.op.shape.cached != 0 ? p.op.routing.counts[uint64_t{s} * matrix_row_ints(p.op.shape) + j]
                                : static_cast<int32_t>(rows.of[s][j] & kRowWordRows);
}

/// The first of this rank's rows at the lane's rank, and the decision that plan.cuh words. Whole warp.
__device__ MoverPlan plan_of_warp(const PartParams& p, const RowCounts& rows) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const bool active = lane < shape.ranks && rank_active(shape, lane);
  int64_t total = 0;
  int64_t before = 0;
  for (uint32_t s = 0; lane < shape.ranks && s < shape.ranks; ++s) {
    before = s == shape.rank ? total : before;
    total += rows_of(p, rows, s, lane);
  }
  const bool rejected = active && shape.cached == 0 && (rows.of[lane][shape.rank] & kRowWordRejects) != 0;
  const bool over = active && total > static_cast<int64_t>(p.peers.views[lane].capacity_rows);
  return {shape.cached != 0 ? 0 : static_cast<int32_t>(before), static_cast<uint32_t>(total),
          __any_sync(kFullWarp, rejected || over) == 0};
}

/// Which rows a block moves: those for this rank or those for the others, or both, of the tokens of its part of the
/// cluster. Clusters with the same work take the tokens in turns.
struct BlockWork {
  uint64_t ranks;  // bit per destination
  uint32_t first;  // of the block's tokens, for its first mover
  uint32_t end;
  uint32_t step;
};

/// One cluster moves the rows that stay, the others those that leave: a multiprocessor whose copy unit waits for a link
/// would hold up the rows that need none. With one cluster every block does both.
__device__ BlockWork work_of_block(const PartParams& p, const TokenSpan& span, uint32_t blocks, uint32_t movers) {
  const uint32_t clusters = gridDim.x / blocks;
  const uint32_t cluster = blockIdx.x / blocks;
  const uint64_t active = active_bits(p.op.shape);
  const uint64_t own = uint64_t{1} << p.op.shape.rank;
  const uint32_t end = span.first + span.tokens;
  const uint32_t warp = threadIdx.x / 32;
  if (clusters == 1 || active == own) {
    return {active, span.first + cluster * movers + warp, end, clusters * movers};
  }
  if (cluster == 0) {
    return {own, span.first + warp, end, movers};
  }
  return {active & ~own, span.first + (cluster - 1) * movers + warp, end, (clusters - 1) * movers};
}

/// Lane k's index and weight of the token that is moved.
struct LaneMeta {
  int64_t expert = -1;
  float weight = 0.0f;
};

__device__ LaneMeta load_meta(const PartParams& p, uint32_t token) {
  const OpShape& shape = p.op.shape;
  const uint32_t k = threadIdx.x & 31;
  LaneMeta meta;
  if (k < shape.top_k && shape.cached == 0) {
    const uint64_t at = uint64_t{token} * shape.top_k + k;
    if (p.op.in.topk_idx != nullptr) {
      meta.expert = load_id(p.op.in.topk_idx, shape.topk_idx_bytes, at);
    }
    if (p.op.in.topk_weights != nullptr) {
      meta.weight = p.op.in.topk_weights[at];
    }
  }
  return meta;
}

/// Index, weight and source token of one row at `rank`. Whole warp.
__device__ void store_meta(const PartParams& p, uint32_t token, uint32_t rank, uint64_t row, const LaneMeta& meta) {
  const OpShape& shape = p.op.shape;
  const PeerView& peer = p.peers.views[rank];
  const uint32_t k = threadIdx.x & 31;
  if (k == 0 && peer.out_src_info != nullptr) {
    peer.out_src_info[row] = static_cast<int32_t>(token);
  }
  if (k >= shape.top_k) {
    return;
  }
  const int64_t first = static_cast<int64_t>(rank) * shape.local_experts;
  const bool local = meta.expert >= first && meta.expert < first + shape.local_experts;
  const uint64_t at = row * shape.top_k + k;
  if (peer.out_topk_idx != nullptr) {
    store_id(peer.out_topk_idx, shape.topk_idx_bytes, at, local ? meta.expert - first : -1);
  }
  if (peer.out_topk_weights != nullptr && p.op.in.topk_weights != nullptr) {
    peer.out_topk_weights[at] = !local && shape.zero_foreign_weights != 0 ? 0.0f : meta.weight;
  }
}

/// Whether the copy unit may load this rank's side rows: whole rows of 16-byte pieces.
__device__ bool side_in_bulk(const PartParams& p) {
  const OpShape& shape = p.op.shape;
  return side_bytes(shape) != 0 && p.op.in.side != nullptr && shape.side_element_stride == shape.side_element_bytes &&
         shape.side_row_stride % 16 == 0 && reinterpret_cast<uintptr_t>(p.op.in.side) % 16 == 0;
}

/// The side row of one token to one rank by threads, whatever its strides. Whole warp.
__device__ void copy_side(const PartParams& p, uint32_t token, uint32_t rank, uint64_t row) {
  const OpShape& shape = p.op.shape;
  const uint32_t bytes = shape.side_element_bytes;
  const char* in = static_cast<const char*>(p.op.in.side) + static_cast<int64_t>(token) * shape.side_row_stride;
  char* out = static_cast<char*>(p.peers.views[rank].out_side) + row * shape.side_elements * bytes;
  for (uint32_t i = threadIdx.x & 31; i < shape.side_elements; i += 32) {
    const char* from = in + static_cast<int64_t>(i) * shape.side_element_stride;
    char* to = out + uint64_t{i} * bytes;
    if (bytes == 4) {
      *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
    } else if (bytes == 2) {
      *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
    } else {
      *to = *from;
    }
  }
}

/// A mover's own place in shared memory and its barrier.
struct Place {
  char* row;
  char* side;
  uint64_t* loaded;
  bool bulk_side;  // the side row goes through the place too
  uint32_t parity = 0;
  uint32_t token = kNoToken;  // whose loads were started before the exchange
};

/// Starts the loads of one token into the place; one lane.
__device__ void load_place(const PartParams& p, uint32_t token, const Place& place) {
  const OpShape& shape = p.op.shape;
  const uint32_t beside = place.bulk_side ? side_bytes(shape) : 0;
  bulk_wait_read();  // the stores of the token before have left the place
  barrier_expect(place.loaded, shape.row_bytes + beside);
  bulk_load(place.row, static_cast<const char*>(p.op.in.x) + uint64_t{token} * shape.row_bytes, shape.row_bytes,
            place.loaded);
  if (place.bulk_side) {
    bulk_load(place.side, static_cast<const char*>(p.op.in.side) + static_cast<int64_t>(token) * shape.side_row_stride,
              beside, place.loaded);
  }
}

/// Starts the stores of a loaded place to one row of one rank; one lane. A side tensor that begins off 16 bytes is left
/// to threads.
__device__ void store_place(const PartParams& p, uint32_t rank, uint64_t row, const Place& place) {
  const OpShape& shape = p.op.shape;
  const PeerView& peer = p.peers.views[rank];
  bulk_store(static_cast<char*>(peer.out_x) + row * shape.row_bytes, place.row, shape.row_bytes);
  if (place.bulk_side && peer.out_side != nullptr && reinterpret_cast<uintptr_t>(peer.out_side) % 16 == 0) {
    bulk_store(static_cast<char*>(peer.out_side) + row * side_bytes(shape), place.side, side_bytes(shape));
  }
}

/// One token from the input through shared memory into its row at every rank of `ranks`. `row`, `meta`: the lane's.
/// Whole warp.
__device__ void move_token(const PartParams& p, uint32_t token, uint32_t ranks, int32_t row, const LaneMeta& meta,
                           Place* place) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  if (lane == 0 && place->token != token) {
    load_place(p, token, *place);
  }
  if (lane == 0) {
    barrier_wait(place->loaded, place->parity);
  }
  place->parity ^= 1;
  for (uint32_t left = ranks; left != 0; left &= left - 1) {
    const uint32_t rank = __ffs(static_cast<int>(left)) - 1;
    const auto at = static_cast<uint64_t>(__shfl_sync(kFullWarp, row, static_cast<int>(rank)));
    if (lane == 0) {
      store_place(p, rank, at, *place);
    }
    const void* side = p.peers.views[rank].out_side;
    const bool in_place = place->bulk_side && reinterpret_cast<uintptr_t>(side) % 16 == 0;
    if (p.op.in.side != nullptr && side != nullptr && !in_place) {
      copy_side(p, token, rank, at);
    }
    if (shape.cached == 0) {
      store_meta(p, token, rank, at, meta);
    }
  }
  if (lane == 0) {
    bulk_commit();
  }
}

/// What one warp has to do after the exchange, and what it has asked for before.
struct Mover {
  BlockWork work;
  Place place;
  LaneMeta meta;     // of the first token
  int32_t row = -1;  // of the first token at the lane's rank, as the table has it
};

/// The number of a token's row at the lane's rank, if this block moves it there. Whole warp.
__device__ int32_t row_number(const PartParams& p, const BlockWork& work, uint32_t token) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const int32_t* table = shape.cached != 0 ? p.op.routing.token_rank : p.scratch.rows;
  const bool mine = ((work.ranks >> lane) & 1) != 0 && lane < shape.ranks && token < work.end;
  return mine ? table[uint64_t{token} * shape.ranks + lane] : -1;
}

/// Makes a mover's place and starts the loads of its first token, which depend on no other rank. Whole warp.
__device__ Mover prepare_mover(const PartParams& p, const TokenSpan& span, uint32_t cluster_blocks, char* places,
                               uint64_t* loaded) {
  const uint32_t warp = threadIdx.x / 32;
  char* row = places + warp * place_bytes(p.op.shape);
  Mover mover{work_of_block(p, span, cluster_blocks, movers_of(p.op.shape)),
              {row, row + bulk_row_stride(p.op.shape.row_bytes), &loaded[warp], side_in_bulk(p)}};
  const bool loads = mover.work.first < mover.work.end && p.op.in.x != nullptr && p.refused_reason == 0;
  if ((threadIdx.x & 31) == 0) {
    barrier_init(mover.place.loaded, 1);
    if (loads) {
      load_place(p, mover.work.first, mover.place);
    }
  }
  __syncwarp();
  mover.place.token = loads ? mover.work.first : kNoToken;
  if (loads) {
    mover.meta = load_meta(p, mover.work.first);
  }
  return mover;
}

/// Waits for loads that were started and are not wanted: nothing may arrive in a place when its block has ended.
__device__ void drop_place(const Place& place) {
  if (place.token != kNoToken && (threadIdx.x & 31) == 0) {
    barrier_wait(place.loaded, 0);
  }
}

/// All tokens of one mover. Lane j knows the row at rank j; row, index and weight are read one token ahead.
__device__ void move_tokens(const PartParams& p, const Mover& mover, const RowCounts& rows) {
  const BlockWork& work = mover.work;
  Place place = mover.place;
  const uint32_t lane = threadIdx.x & 31;
  const bool given = lane < p.op.shape.ranks && p.peers.views[lane].out_x != nullptr;
  const uint32_t limit = given ? p.peers.views[lane].capacity_rows : 0;
  int32_t next = mover.row;
  LaneMeta next_meta = mover.meta;
  const MoverPlan plan = plan_of_warp(p, rows);
  if (!plan.moves || place.token == kNoToken) {
    drop_place(place);
    return;
  }
  for (uint32_t token = work.first; token < work.end; token += work.step) {
    const int32_t number = next;
    const LaneMeta meta = next_meta;
    next = row_number(p, work, token + work.step);
    if (token + work.step < work.end) {
      next_meta = load_meta(p, token + work.step);
    }
    const int32_t row = number < 0 || static_cast<uint32_t>(number + plan.base) >= limit ? -1 : number + plan.base;
    const uint32_t ranks = __ballot_sync(kFullWarp, row >= 0);
    if (ranks != 0) {
      move_token(p, token, ranks, row, meta, &place);
      if (token == work.first && threadIdx.x < 32) {
        stamp(Stamp::kFirstRow);
      }
    } else if (place.token == token) {
      drop_place(place);
      place.parity ^= 1;
    }
  }
  stamp(Stamp::kLastIssued);
  bulk_wait_written();
  stamp(Stamp::kRowsDone);
}

#endif

}  // namespace
}  // namespace expertd::kernels::cuda
