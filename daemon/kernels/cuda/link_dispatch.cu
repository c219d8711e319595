// SPDX-License-Identifier: Apache-2.0
// The move step of HT dispatch on sm_90: every rank fetches the rows that belong to it from all ranks' inputs, straight
// into their final places. Reading over the links was measured faster than writing, and needs fewer multiprocessors.
// Definitions: daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/finish_part.cuh"
#include "daemon/kernels/cuda/plan.cuh"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kMostMovers = 31;  // warps, beside the clerk

/// Bytes of a side row when it can be moved by the copy unit wherever it lies; 0: by threads.
__host__ __device__ constexpr uint32_t side_bytes(const OpShape& shape) {
  const uint32_t bytes = shape.side_elements * shape.side_element_bytes;
  return bytes % 16 == 0 ? bytes : 0;
}

/// Shared memory of one row in flight: the row and its side row.
__host__ __device__ constexpr uint32_t place_bytes(const OpShape& shape) {
  return bulk_row_stride(shape.row_bytes) + bulk_row_stride(side_bytes(shape));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// What every mover knows of the plan: lane s holds that of source s.
struct MoverPlan {
  int32_t base = 0;    // rows of lower sources at this rank
  bool moves = false;  // the operation moves rows: every rank finds the same
};

__device__ const int32_t* plan_matrix(const PartParams& p) {
  return p.op.shape.cached != 0 ? p.op.routing.counts : p.op.counts;
}

/// The first row of this warp's lane as a source at this rank, and the decision that plan.cuh words. Whole warp.
__device__ MoverPlan plan_of_warp(const PartParams& p) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const uint32_t row = matrix_row_ints(shape);
  const int32_t* matrix = plan_matrix(p);
  const bool counted = lane < shape.ranks;
  int64_t total = 0;
  for (uint32_t s = 0; counted && s < shape.ranks; ++s) {
    total += matrix[uint64_t{s} * row + lane];
  }
  const int32_t mine = counted ? matrix[uint64_t{lane} * row + shape.rank] : 0;
  int32_t inclusive = mine;
  for (uint32_t step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kFullWarp, inclusive, step);
    inclusive += lane >= step ? other : 0;
  }
  const bool active = counted && rank_active(shape, lane);
  const bool rejected = active && shape.cached == 0 && matrix[uint64_t{lane} * row + count_columns(shape)] != 0;
  const bool over = active && total > static_cast<int64_t>(p.peers.views[lane].capacity_rows);
  return {shape.cached != 0 ? 0 : inclusive - mine, __any_sync(kFullWarp, rejected || over) == 0};
}

/// One row to fetch: this rank's row `row` is token `token` of rank `source`. None: row < 0.
struct Fetch {
  uint32_t source;
  uint32_t token;
  int32_t row;
};

__device__ Fetch fetch_at(const PartParams& p, uint32_t item, int32_t base_of_lane) {
  const OpShape& shape = p.op.shape;
  Fetch fetch{item % shape.ranks, item / shape.ranks, -1};
  const PullPeer& peer = p.pulls.peers[fetch.source];
  const int32_t base = __shfl_sync(kFullWarp, base_of_lane, static_cast<int>(fetch.source));
  if (rank_active(shape, fetch.source) && fetch.token < peer.tokens && peer.x != nullptr) {
    const int32_t row = peer.rows[uint64_t{fetch.token} * shape.ranks + shape.rank];
    fetch.row = row < 0 || static_cast<uint32_t>(row + base) >= shape.capacity_rows ? -1 : row + base;
  }
  return fetch;
}

/// Lane k's index and weight of a token that is being fetched.
struct LaneMeta {
  int64_t expert = -1;
  float weight = 0.0f;
};

__device__ LaneMeta load_meta(const PartParams& p, const Fetch& fetch) {
  const OpShape& shape = p.op.shape;
  const PullPeer& peer = p.pulls.peers[fetch.source];
  const uint32_t k = threadIdx.x & 31;
  LaneMeta meta;
  if (k < shape.top_k && shape.cached == 0) {
    const uint64_t at = uint64_t{fetch.token} * shape.top_k + k;
    if (peer.topk_idx != nullptr && p.op.out.topk_idx != nullptr) {
      meta.expert = load_id(peer.topk_idx, shape.topk_idx_bytes, at);
    }
    if (peer.topk_weights != nullptr) {
      meta.weight = peer.topk_weights[at];
    }
  }
  return meta;
}

__device__ void store_meta(const PartParams& p, const Fetch& fetch, const LaneMeta& meta) {
  const OpShape& shape = p.op.shape;
  const uint32_t k = threadIdx.x & 31;
  if (shape.cached != 0) {
    return;
  }
  if (k == 0 && p.op.out.src_info != nullptr) {
    p.op.out.src_info[fetch.row] = static_cast<int32_t>(fetch.token);
  }
  if (k >= shape.top_k) {
    return;
  }
  const int64_t first = static_cast<int64_t>(shape.rank) * shape.local_experts;
  const bool local = meta.expert >= first && meta.expert < first + shape.local_experts;
  const uint64_t at = static_cast<uint64_t>(fetch.row) * shape.top_k + k;
  if (p.op.out.topk_idx != nullptr) {
    store_id(p.op.out.topk_idx, shape.topk_idx_bytes, at, local ? meta.expert - first : -1);
  }
  if (p.op.out.topk_weights != nullptr && p.pulls.peers[fetch.source].topk_weights != nullptr) {
    p.op.out.topk_weights[at] = !local && shape.zero_foreign_weights != 0 ? 0.0f : meta.weight;
  }
}

/// Where the copy unit may move a source's side rows: whole rows of 16-byte pieces. The own tensor begins on 16 bytes.
__device__ bool side_in_bulk(const PartParams& p, const PullPeer& peer) {
  return side_bytes(p.op.shape) != 0 && p.op.out.side != nullptr && peer.side != nullptr &&
         peer.side_element_stride == p.op.shape.side_element_bytes && peer.side_row_stride % 16 == 0 &&
         reinterpret_cast<uintptr_t>(peer.side) % 16 == 0 && reinterpret_cast<uintptr_t>(p.op.out.side) % 16 == 0;
}

/// A side row by threads, whatever its strides. Whole warp.
__device__ void copy_side(const PartParams& p, const Fetch& fetch) {
  const OpShape& shape = p.op.shape;
  const PullPeer& peer = p.pulls.peers[fetch.source];
  const char* in = peer.side + static_cast<int64_t>(fetch.token) * peer.side_row_stride;
  const uint32_t bytes = shape.side_element_bytes;
  char* out = static_cast<char*>(p.op.out.side) + static_cast<uint64_t>(fetch.row) * shape.side_elements * bytes;
  for (uint32_t i = threadIdx.x & 31; i < shape.side_elements; i += 32) {
    const char* from = in + static_cast<int64_t>(i) * peer.side_element_stride;
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
  uint32_t parity = 0;
};

/// One row from its source through shared memory into its final place. Whole warp.
__device__ void move_row(const PartParams& p, const Fetch& fetch, Place* place) {
  const OpShape& shape = p.op.shape;
  const PullPeer& peer = p.pulls.peers[fetch.source];
  const bool lead = (threadIdx.x & 31) == 0;
  const bool bulk_side = side_in_bulk(p, peer);
  const uint32_t beside = bulk_side ? side_bytes(shape) : 0;
  if (lead) {
    bulk_wait_read();  // the stores of the row before have left the place
    barrier_expect(place->loaded, shape.row_bytes + beside);
    bulk_load(place->row, peer.x + uint64_t{fetch.token} * shape.row_bytes, shape.row_bytes, place->loaded);
    if (bulk_side) {
      bulk_load(place->side, peer.side + static_cast<int64_t>(fetch.token) * peer.side_row_stride, beside,
                place->loaded);
    }
  }
  const LaneMeta meta = load_meta(p, fetch);
  if (!bulk_side && peer.side != nullptr && p.op.out.side != nullptr) {
    copy_side(p, fetch);
  }
  if (lead) {
    barrier_wait(place->loaded, place->parity);
    bulk_store(static_cast<char*>(p.op.out.x) + static_cast<uint64_t>(fetch.row) * shape.row_bytes, place->row,
               shape.row_bytes);
    if (bulk_side) {
      bulk_store(static_cast<char*>(p.op.out.side) + static_cast<uint64_t>(fetch.row) * beside, place->side, beside);
    }
    bulk_commit();
  }
  place->parity ^= 1;
  store_meta(p, fetch, meta);
}

/// All rows of one mover: items of all sources in turns, so that links and memory are busy together; 32 row numbers are
/// read at a time.
__device__ void move_rows(const PartParams& p, Place place) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  const MoverPlan plan = plan_of_warp(p);
  if (!plan.moves || p.op.out.x == nullptr) {
    return;
  }
  uint64_t most = 0;
  for (uint32_t s = 0; s < shape.ranks; ++s) {
    most = max(most, p.pulls.peers[s].tokens);
  }
  const auto items = static_cast<uint32_t>(most * shape.ranks);  // at most 65536 * 16
  const uint32_t movers = gridDim.x * (blockDim.x / 32 - 1);
  for (uint32_t first = threadIdx.x / 32 * gridDim.x + blockIdx.x; first < items; first += 32 * movers) {
    const uint32_t item = first + lane * movers;
    const Fetch mine = fetch_at(p, item < items ? item : 0, plan.base);
    uint32_t wanted = __ballot_sync(kFullWarp, item < items && mine.row >= 0);
    for (; wanted != 0; wanted &= wanted - 1) {
      const int from = __ffs(static_cast<int>(wanted)) - 1;
      const Fetch fetch{__shfl_sync(kFullWarp, mine.source, from), __shfl_sync(kFullWarp, mine.token, from),
                        __shfl_sync(kFullWarp, mine.row, from)};
      move_row(p, fetch, &place);
    }
  }
  bulk_wait_written();
}

/// The clerk's work beside the movers: the handle's rows, absolute from now on, and in the first block the plan.
__device__ void keep_books(const PartParams& p) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x & 31;
  if (blockIdx.x == 0) {
    plan_dispatch(p, p.scratch.plan_work, {lane, 32}, [] { __syncwarp(); });
  }
  const uint32_t row = matrix_row_ints(shape);
  for (uint32_t j = 0; shape.cached == 0 && p.refused_reason == 0 && j < shape.ranks; ++j) {
    int32_t base = 0;
    for (uint32_t s = 0; s < shape.rank; ++s) {
      base += p.op.counts[uint64_t{s} * row + j];
    }
    for (uint32_t t = blockIdx.x * 32 + lane; t < shape.tokens; t += gridDim.x * 32) {
      const uint64_t at = uint64_t{t} * shape.ranks + j;
      const int32_t relative = p.scratch.rows[at];
      p.op.routing.token_rank[at] = relative < 0 ? -1 : relative + base;
    }
  }
}

#endif

// link_dispatch. Grid: at most link_sms blocks, one per multiprocessor; as many mover warps as rows fit into its shared
// memory, and a clerk. With a handle it is the first kernel and announces `routed`, else link_route did. Waits for the
// routed flags (kWaits) or runs behind the stream's wait for them. A mover takes the rows that belong to this rank one
// after the other, from all sources in turns: the copy unit loads row and side row from the source's input, the lanes
// load its ids and weights meanwhile, the copy unit stores both to their final places. The clerk writes the plan and
// the handle. The last block announces `moved` (this rank needs no input of others any more), waits for the others' and
// ends the part. Bytes per row: row + side + K * (id + 4) read, the same written. Bound: the links, at the rate of
// reads.
__global__ __launch_bounds__((kMostMovers + 1) * 32, 1) void link_dispatch(const __grid_constant__ PartParams p,
                                                                           Entry entry) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char places[];
  __shared__ uint64_t loaded[kMostMovers];
  if (p.null_operation != 0) {
    return;
  }
  if (p.op.shape.cached != 0 && entry == Entry::kWaits) {
    open_part(p);
  }
  if (!enters(p, SignalStep::kRouted, entry)) {
    return;
  }
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t movers = blockDim.x / 32 - 1;
  if (!block_is_gated(p)) {
    if (warp < movers) {
      if ((threadIdx.x & 31) == 0) {
        barrier_init(&loaded[warp], 1);
        fence_copy_unit();
      }
      __syncwarp();
      char* place = places + warp * place_bytes(p.op.shape);
      move_rows(p, {place, place + bulk_row_stride(p.op.shape.row_bytes), &loaded[warp]});
    } else {
      keep_books(p);
    }
  }
  if (!is_last_block(p)) {
    return;
  }
  if (!block_is_gated(p) && warp == 0) {
    announce(p, SignalStep::kMoved);
  }
  if (passes(p, SignalStep::kMoved, SignalStep::kMoved)) {
    finish_part(p, {threadIdx.x, blockDim.x});
  }
#endif
}

}  // namespace

bool serves_link(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  if (params.bulk_copies == 0 || params.link_sms == 0 || shape.expanded != 0) {
    return false;
  }
  if (shape.kind == OpKind::kDispatch) {
    return shape.payload != Payload::kFp8 && shape.row_bytes != 0 && place_bytes(shape) <= kBulkSharedBytes;
  }
  return shape.kind == OpKind::kCombine && shape.order_last_lane == 0 && shape.hidden != 0;
}

cudaError_t launch_link_dispatch(const PartParams& params, Entry entry, cudaStream_t stream) {
  if (params.null_operation != 0) {
    const cudaError_t allowed =
        cudaFuncSetAttribute(link_dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize, kBulkSharedBytes);
    if (allowed != cudaSuccess) {
      return allowed;
    }
  }
  const uint32_t bytes = params.null_operation != 0 ? 128 : place_bytes(params.op.shape);
  const uint32_t movers = std::min(kMostMovers, kBulkSharedBytes / bytes);
  const uint32_t blocks = std::clamp(params.link_sms, 1u, std::min(params.multiprocessors, kMostLinkSms));
  link_dispatch<<<blocks, (movers + 1) * 32, movers * bytes, stream>>>(params, entry);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
