// SPDX-License-Identifier: Apache-2.0
// What a rank packs for other nodes: rows of a dispatch and pulls of a combine. The GPU form of host/node_pack.cc; the
// bytes: kernels/node_message.h.
#include "daemon/kernels/cuda/dispatch_rows.cuh"
#include "daemon/kernels/cuda/node_rows.cuh"

namespace expertd::kernels::cuda {
namespace {

static_assert(kFitsParameters<PackRowsJob> && kFitsParameters<PackPullsJob>);
static_assert(kNodeThreads == kMoveThreads, "copy_row() and quantise_row() are for blocks of this size");
static_assert(kMostPullTokens <= kNodeThreads, "a thread per token of a window");

/// The entries of one token, one per node that gets it.
struct PackShared {
  uint32_t count;
  uint32_t node[kMaxGpuNodes];
  char* entry[kMaxGpuNodes];
  int32_t rows[kMaxGpuNodes][base::kMaxTopK];
  int32_t topk[base::kMaxTopK];
  float weights[base::kMaxTopK];
};
static_assert(base::kMaxGpuRanks <= base::kMaxTopK, "row numbers per rank fit too");

/// Finds the token's rows at other nodes and takes an entry for each node; warp 0 only.
__device__ void collect_entries(const PartParams& p, const NodeTable& nodes, const PackRowsJob& job, uint32_t token,
                                PackShared* s) {
  const OpShape& shape = p.op.shape;
  const uint32_t lane = threadIdx.x;
  AwayRow away{};
  const bool goes = away_row(p, nodes, token, lane, &away);
  const uint32_t node = goes ? nodes.node_of[away.owner] : kMaxGpuNodes;
  uint32_t count = 0;
  uint32_t own = 0;  // the node whose entry this lane takes
  for (uint32_t n = 0; n < nodes.nodes; ++n) {
    if (__any_sync(kFullWarp, node == n) == 0) {
      continue;
    }
    s->rows[count][lane] = -1;
    __syncwarp();
    if (node == n) {
      s->rows[count][away.place] = away.row;
    }
    own = lane == count ? n : own;
    ++count;
  }
  if (lane < count) {
    const uint32_t k = atomicAdd(&job.counters[own], 1u);
    const uint32_t per_message = job.per_message[own];
    s->node[lane] = own;
    s->entry[lane] =
        job.buffers[job.first_buffer[own] + k / per_message] + uint64_t{k % per_message} * job.layout[own].stride;
  }
  const bool has_weight = lane < shape.top_k && p.op.in.topk_weights != nullptr;
  s->topk[lane] = lane < shape.top_k ? p.op.routing.topk[uint64_t{token} * p.table_top_k + lane] : -1;
  s->weights[lane] = has_weight ? p.op.in.topk_weights[uint64_t{token} * shape.top_k + lane] : 0.0f;
  if (lane == 0) {
    s->count = count;
  }
}

/// The tables of all entries.
__device__ void pack_tables(const PartParams& p, const PackRowsJob& job, uint32_t token, const PackShared& s) {
  for (uint32_t t = 0; t < s.count; ++t) {
    const EntryLayout& layout = job.layout[s.node[t]];
    for (uint32_t piece = threadIdx.x; piece < layout.payload_at / 16; piece += kNodeThreads) {
      reinterpret_cast<uint4*>(s.entry[t])[piece] = tables_piece(
          layout, p.op.shape.top_k, token, piece, [&](uint32_t i) { return s.rows[t][i]; },
          [&](uint32_t lane) { return s.topk[lane]; }, [&](uint32_t lane) { return s.weights[lane]; });
    }
  }
}

/// Stores the scales of the four groups of one warp step as they land; all lanes of the warp.
__device__ void pack_scales(const OpShape& shape, const PackRowsJob& job, const PackShared& s, uint32_t channel,
                            float scale) {
  const uint32_t groups = shape.hidden / kScaleGroup;
  const uint32_t first = __shfl_sync(kFullWarp, channel, 0) / kScaleGroup;
  const bool writes = (threadIdx.x & 31) == 0;
  const bool four_bytes = shape.scale == ScaleForm::kUe8m0;
  const uint32_t exponents = pack_ue8m0(scale);
  uint32_t words[4] = {};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t word = __shfl_sync(kFullWarp, __float_as_uint(scale), static_cast<int>(i * 8));
    words[i] = first + i < groups ? word : 0;
  }
  for (uint32_t t = 0; writes && t < s.count; ++t) {
    char* side = s.entry[t] + job.layout[s.node[t]].side_at;
    if (four_bytes) {
      reinterpret_cast<uint32_t*>(side)[first / 4] = exponents;
    } else {
      // Behind the last group there is room up to a multiple of 16 bytes.
      reinterpret_cast<uint4*>(side)[first / 4] = {words[0], words[1], words[2], words[3]};
    }
  }
}

/// Sixteen bytes of a token's side, dense, zero behind its end.
template <typename Element>
__device__ uint4 side_piece(const TokenSource& source, uint32_t piece) {
  constexpr uint32_t kPerWord = 4 / sizeof(Element);
  uint32_t words[4] = {};
#pragma unroll
  for (uint32_t i = 0; i < 4 * kPerWord; ++i) {
    const uint32_t at = piece * 4 * kPerWord + i;
    const char* from = source.side + static_cast<int64_t>(at) * source.side_element_stride;
    const uint32_t value = at < source.side_elements ? *reinterpret_cast<const Element*>(from) : 0;
    words[i / kPerWord] |= value << (8 * sizeof(Element) * (i % kPerWord));
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ uint4 any_side_piece(const OpShape& shape, const TokenSource& source, uint32_t piece) {
  switch (shape.side_element_bytes) {
    case 1:
      return side_piece<uint8_t>(source, piece);
    case 2:
      return side_piece<uint16_t>(source, piece);
    case 4:
      return side_piece<uint32_t>(source, piece);
    default:
      return {};
  }
}

__device__ void pack_side(const PartParams& p, const PackRowsJob& job, const TokenSource& source, const PackShared& s) {
  const uint32_t bytes = job.head.side_elements * job.head.side_element_bytes;
  for (uint32_t piece = threadIdx.x; piece < (bytes + 15) / 16; piece += kNodeThreads) {
    const uint4 v = source.side == nullptr ? uint4{} : any_side_piece(p.op.shape, source, piece);
    for (uint32_t t = 0; t < s.count; ++t) {
      reinterpret_cast<uint4*>(s.entry[t] + job.layout[s.node[t]].side_at)[piece] = v;
    }
  }
}

/// One token into all its entries; whole block.
__device__ void pack_token(const PartParams& p, const PackRowsJob& job, uint32_t token, const PackShared& s) {
  const OpShape& shape = p.op.shape;
  const TokenSource source = own_token(p, token);
  const auto payload = [&](uint32_t t) { return s.entry[t] + job.layout[s.node[t]].payload_at; };
  pack_tables(p, job, token, s);
  if (shape.payload == Payload::kFp8) {
    quantise_row(shape, source.x, s.count, payload,
                 [&](uint32_t channel, float scale) { pack_scales(shape, job, s, channel, scale); });
  } else {
    copy_row(source.x, shape.row_bytes, s.count, payload);
    pack_side(p, job, source, s);
  }
}

/// Counts this block as done, and writes how many entries there are when it is the last. With a block that an abort
/// kept from its work there are none.
__device__ void end_packing(const NodeTable& nodes, const PackRowsJob& job, bool gated) {
  constexpr uint32_t kGated = 1u << 16;  // above the number of blocks
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  fence_sys();
  const uint32_t before = atomicAdd(&job.counters[nodes.nodes], gated ? 1u + kGated : 1u);
  if (before % kGated != gridDim.x - 1) {
    return;
  }
  fence_sys();  // for what all blocks wrote before they counted
  const bool complete = before / kGated == 0 && !gated;
  for (uint32_t n = 0; n < nodes.nodes; ++n) {
    const uint32_t entries = atomicExch(&job.counters[n], 0u);
    *static_cast<volatile uint32_t*>(&job.packed[n]) = complete ? entries : 0;
  }
  job.counters[nodes.nodes] = 0;
  fence_sys();
}

// node_pack_rows. Grid: blocks of 256 threads, at most 4 per multiprocessor, the job's tokens strided over blocks. Warp
// 0 finds the token's rows at other nodes and takes an entry per node with one atomic addition each; then all warps
// read the row once (16 bytes per access; FP8: quantised here) and store it to every entry, in pinned memory of the
// host. Behind dispatch_move, which made the handle's rows final; reads the plan, no flag. With a Reason in the plan
// nothing is packed. Every thread fences at system scope before its block counts; the last block writes `packed`. An
// aborted block counts too, so that the counters are zero for the next launch. Bound: PCIe, an entry per token and
// node.
__global__ __launch_bounds__(kNodeThreads) void node_pack_rows(const __grid_constant__ PartParams p,
                                                               const __grid_constant__ NodeTable nodes,
                                                               const __grid_constant__ PackRowsJob job) {
  __shared__ PackShared s;
  const bool gated = block_is_gated(p);
  if (p.null_operation != 0) {
    return;
  }
  const bool packs = !gated && p.op.in.x != nullptr && p.scratch.plan->reason == 0;
  for (uint32_t token = job.begin + blockIdx.x; packs && token < job.end; token += gridDim.x) {
    if (threadIdx.x < 32) {
      collect_entries(p, nodes, job, token, &s);
    }
    __syncthreads();
    if (s.count != 0) {
      pack_token(p, job, token, s);
    }
    __syncthreads();
  }
  fence_sys();
  end_packing(nodes, job, gated);
}

/// The tokens of a window that have rows at its node, in ascending order.
struct PullsShared {
  uint32_t warp_entries[kNodeThreads / 32];
  uint32_t rows;                         // of all entries
  uint32_t rank_at[base::kMaxGpuRanks];  // by place of the node: its rank
  uint32_t token[kMostPullTokens];
  uint32_t places[kMostPullTokens];  // bits: row numbers that are not -1
};

/// Which row numbers of the token's entry for the node are not -1: those whose rows the peer gave.
__device__ uint32_t pulled_places(const PartParams& p, const NodeTable& nodes, uint32_t node, uint32_t token) {
  const OpShape& shape = p.op.shape;
  const bool low_latency = shape.kind == OpKind::kLlCombine;
  const uint32_t lanes = per_expert_rows(shape) ? shape.top_k : shape.ranks;
  uint32_t places = 0;
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    AwayRow away;
    if (!away_row(p, nodes, token, lane, &away) || nodes.node_of[away.owner] != node) {
      continue;
    }
    uint64_t row = static_cast<uint32_t>(away.row);
    if (low_latency) {
      if (p.op.in.topk_idx != nullptr && lane_expert(p, token, lane) < 0) {
        continue;  // the caller took the lane away
      }
      const auto expert = static_cast<uint32_t>(p.op.routing.topk[uint64_t{token} * p.table_top_k + lane]);
      row += uint64_t{expert % shape.local_experts} * shape.slots_per_expert;
    }
    places |= row < p.peers.views[away.owner].in_rows ? 1u << away.place : 0u;
  }
  return places;
}

/// Numbers the window's entries and keeps which token each is; a thread per token, whole block. Returns how many.
__device__ uint32_t number_pulls(const PartParams& p, const NodeTable& nodes, const PackPullsJob& job,
                                 const PackPullsJob::Window& window, PullsShared* s) {
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t token = window.begin + threadIdx.x;
  const bool valid = threadIdx.x < kMostPullTokens && token < window.end;
  const uint32_t places = valid ? pulled_places(p, nodes, window.node, token) : 0;
  const uint32_t ballot = __ballot_sync(kFullWarp, places != 0);
  if ((threadIdx.x & 31) == 0) {
    s->warp_entries[warp] = __popc(ballot);
  }
  __syncthreads();
  uint32_t before = 0;
  uint32_t all = 0;
  for (uint32_t w = 0; w < kNodeThreads / 32; ++w) {
    before += w < warp ? s->warp_entries[w] : 0;
    all += s->warp_entries[w];
  }
  const uint32_t position = before + __popc(ballot & lanes_below());
  if (places != 0) {
    s->token[position] = token;
    s->places[position] = places;
    atomicAdd(&s->rows, static_cast<uint32_t>(__popc(places)));
  }
  if (valid) {
    job.positions[uint64_t{token} * nodes.nodes + window.node] = places != 0 ? static_cast<int32_t>(position) : -1;
  }
  __syncthreads();
  return all;
}

__device__ uint4 pull_piece(const PartParams& p, const EntryLayout& layout, const PullsShared& s, uint32_t entry,
                            uint32_t piece) {
  const OpShape& shape = p.op.shape;
  const uint32_t token = s.token[entry];
  const uint32_t places = s.places[entry];
  const bool by_lane = per_expert_rows(shape);
  const int32_t* rows = by_lane ? p.op.routing.token_expert + uint64_t{token} * p.table_top_k
                                : p.op.routing.token_rank + uint64_t{token} * shape.ranks;
  const float* weights = p.op.in.topk_weights;
  return tables_piece(
      layout, shape.top_k, token, piece,
      [&](uint32_t i) { return ((places >> i) & 1u) != 0 ? rows[by_lane ? i : s.rank_at[i]] : -1; },
      [&](uint32_t lane) { return p.op.routing.topk[uint64_t{token} * p.table_top_k + lane]; },
      [&](uint32_t lane) { return weights != nullptr ? weights[uint64_t{token} * shape.top_k + lane] : 1.0f; });
}

// node_pack_pulls. Grid: one block of 256 threads per window. A thread per token finds its rows at the window's node;
// ballots number the tokens that have some in ascending order; then all threads write the entries, 16 bytes per store
// and one behind the other, into pinned memory of the host. Reads the handle, what the caller took away and no flag;
// runs behind the plan, whose counter of pulled rows it adds to. Every thread fences at system scope before thread 0
// writes `packed`. Bytes per token: R or 2K integers read, an entry written. Bound: latency.
__global__ __launch_bounds__(kNodeThreads) void node_pack_pulls(const __grid_constant__ PartParams p,
                                                                const __grid_constant__ NodeTable nodes,
                                                                const __grid_constant__ PackPullsJob job) {
  __shared__ PullsShared s;
  if (block_is_gated(p) || blockIdx.x >= job.windows) {
    return;
  }
  const PackPullsJob::Window& window = job.window[blockIdx.x];
  if (threadIdx.x == 0) {
    s.rows = 0;
  }
  if (threadIdx.x < p.op.shape.ranks && nodes.node_of[threadIdx.x] == window.node) {
    s.rank_at[nodes.index_of[threadIdx.x]] = threadIdx.x;
  }
  __syncthreads();
  const uint32_t entries = number_pulls(p, nodes, job, window, &s);
  const uint32_t pieces = window.layout.stride / 16;
  for (uint32_t i = threadIdx.x; i < entries * pieces; i += kNodeThreads) {
    reinterpret_cast<uint4*>(window.entries)[i] = pull_piece(p, window.layout, s, i / pieces, i % pieces);
  }
  fence_sys();
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(&p.scratch.plan->pulled_remote_rows, s.rows);
    *static_cast<volatile uint32_t*>(window.packed) = entries;
    fence_sys();
  }
}

}  // namespace

cudaError_t launch_node_pack_rows(const PartParams& params, const NodeTable& nodes, const PackRowsJob& job,
                                  cudaStream_t stream) {
  const uint32_t blocks = node_blocks(params, job.end > job.begin ? job.end - job.begin : 0);
  node_pack_rows<<<blocks, kNodeThreads, 0, stream>>>(params, nodes, job);
  return cudaGetLastError();
}

cudaError_t launch_node_pack_pulls(const PartParams& params, const NodeTable& nodes, const PackPullsJob& job,
                                   cudaStream_t stream) {
  node_pack_pulls<<<job.windows == 0 ? 1 : job.windows, kNodeThreads, 0, stream>>>(params, nodes, job);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
