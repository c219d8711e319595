// SPDX-License-Identifier: Apache-2.0
// The sums between nodes: what a rank sums on behalf of a rank of another node, and the end of a combine with what
// other nodes summed. The GPU form of host/node_serve.cc and host/combine.cc; the bytes: kernels/node_message.h.
#include "daemon/kernels/cuda/combine_rows.cuh"
#include "daemon/kernels/cuda/node_rows.cuh"

namespace expertd::kernels::cuda {
namespace {

static_assert(kFitsParameters<ServePullsJob> && kFitsParameters<CombineNodesJob>);

struct ServeShared {
  PullShared pull;
  uint32_t token;
  bool good;
};

/// The row that an entry names in lane `lane` of its row numbers. False where it names none that there is: then, with
/// `row` not negative, the entry is bad.
__device__ bool served_source(const PartParams& p, const ServePullsJob& job, uint32_t lane, int32_t id, int32_t row,
                              Source* source) {
  const OpShape& shape = p.op.shape;
  const bool by_lane = per_expert_rows(shape);
  if (row < 0 || (by_lane && (id < 0 || !id_in_range(shape, id)))) {
    return false;
  }
  source->rank = by_lane ? static_cast<uint32_t>(id) / shape.local_experts : job.place_rank[lane];
  source->lane = lane;
  source->row = static_cast<uint32_t>(row);
  if (shape.kind == OpKind::kLlCombine) {
    source->row += uint64_t{static_cast<uint32_t>(id) % shape.local_experts} * shape.slots_per_expert;
  }
  const PeerView& peer = p.peers.views[source->rank];
  source->x = reinterpret_cast<const uint4*>(static_cast<const char*>(peer.in_x) + source->row * shape.hidden * 2);
  return rank_active(shape, source->rank) && ((job.local_ranks >> source->rank) & 1u) != 0 && peer.in_x != nullptr &&
         source->row < peer.in_rows;
}

/// Reads and checks a pull and collects its rows in the order of addition; warp 0 only.
__device__ void collect_served(const PartParams& p, const ServePullsJob& job, const ServePullsJob::Message& message,
                               const char* pull, ServeShared* s) {
  const OpShape& shape = p.op.shape;
  const EntryLayout& layout = job.pulls;
  const uint32_t lane = threadIdx.x;
  const bool low_latency = shape.kind == OpKind::kLlCombine;
  const uint32_t token = *reinterpret_cast<const uint32_t*>(pull);
  const int32_t row = lane < layout.rows ? reinterpret_cast<const int32_t*>(pull + layout.rows_at)[lane] : -1;
  const int32_t id = lane < shape.top_k ? reinterpret_cast<const int32_t*>(pull + layout.topk_at)[lane] : -1;
  Source source{};
  source.weight = 1.0f;
  if (low_latency && lane < shape.top_k && layout.weights_at != 0) {
    source.weight = reinterpret_cast<const float*>(pull + layout.weights_at)[lane];
  }
  const bool wanted = served_source(p, job, lane, id, row, &source);
  bool bad = token >= shape.max_tokens || !id_in_range(shape, id) || (row >= 0 && !wanted);
  bad = __any_sync(kFullWarp, bad) != 0;
  int32_t order = 0;
  if ((message.flags & kMessageLastLane) != 0 && !low_latency && !bad) {
    order = last_lane_of(p, id, wanted ? source.rank : 0) + 1;
  }
  order_sources(source, wanted && !bad, order, &s->pull);
  if (lane == 0) {
    s->token = token;
    s->good = !bad;
    if (bad) {
      mark_bad(job.totals, message.source);
    }
  }
}

// node_serve_pulls. Grid: blocks of 256 threads, at most 4 per multiprocessor, the pulls of all messages strided over
// blocks. Warp 0 reads a pull over PCIe, checks it and collects its rows in the order of addition; then every thread
// takes 16-byte pieces: loads from all rows, sums in float32, one rounding, one store into pinned memory of the host.
// Pulls are untrusted: only rows that ranks of this node gave are read, and a bad pull marks its source. Runs behind
// the routed flags of the own node's ranks; reads no flag. Every thread fences at system scope at the end. Bytes per
// pull: H * 2 per row read, H * 2 written. Bound: PCIe for the sums, the link for the rows.
__global__ __launch_bounds__(kNodeThreads) void node_serve_pulls(const __grid_constant__ PartParams p,
                                                                 const __grid_constant__ ServePullsJob job) {
  __shared__ ServeShared s;
  if (block_is_gated(p)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  const bool low_latency = shape.kind == OpKind::kLlCombine;
  uint32_t m = 0;
  uint32_t index = 0;
  for (uint64_t item = blockIdx.x; find_entry(job.message, job.messages, item, &m, &index); item += gridDim.x) {
    const ServePullsJob::Message& message = job.message[m];
    const EntryLayout& layout = message.layout;
    char* sum_entry = message.sums + uint64_t{index} * layout.stride;
    if (threadIdx.x < 32) {
      collect_served(p, job, message, message.pulls + uint64_t{index} * job.pulls.stride, &s);
    }
    __syncthreads();
    const uint32_t head_pieces = s.good ? layout.payload_at / 16 : 0;
    for (uint32_t piece = threadIdx.x; piece < head_pieces; piece += kNodeThreads) {
      reinterpret_cast<uint4*>(sum_entry)[piece] = tables_piece(
          layout, shape.top_k, s.token, piece, [](uint32_t) { return -1; }, [](uint32_t) { return -1; },
          [&](uint32_t lane) { return low_latency ? 0.0f : pulled_weight(p, lane, s.pull); });
    }
    auto* out = reinterpret_cast<uint4*>(sum_entry + layout.payload_at);
    const uint32_t pieces = s.good ? shape.hidden / 8 : 0;
    for (uint32_t piece = threadIdx.x; piece < pieces; piece += kNodeThreads) {
      float sum[8] = {};
      sum_piece(s.pull, piece, low_latency, sum);
      out[piece] = rounded(sum);
    }
    __syncthreads();
  }
  fence_sys();
}

/// What the other nodes made of one token, in the order of the nodes.
struct PartialsShared {
  PullShared pull;
  const char* entry[kMaxGpuNodes];
  uint32_t count;
};

/// Finds the token's sums; warp 0 only. One of another token marks the rank that summed and is left out.
__device__ void collect_partials(const NodeTable& nodes, const CombineNodesJob& job, uint32_t token,
                                 PartialsShared* s) {
  const uint32_t lane = threadIdx.x;
  const char* entry = nullptr;
  if (lane < nodes.nodes && lane != nodes.own_node && job.sums[lane] != nullptr) {
    const int32_t position = job.positions[uint64_t{token} * nodes.nodes + lane];
    entry = position >= 0 ? job.sums[lane] + static_cast<uint64_t>(position) * job.layout.stride : nullptr;
  }
  if (entry != nullptr && *reinterpret_cast<const uint32_t*>(entry) != token) {
    mark_bad(job.totals, job.server[lane]);
    entry = nullptr;
  }
  const uint32_t ballot = __ballot_sync(kFullWarp, entry != nullptr);
  if (entry != nullptr) {
    s->entry[__popc(ballot & lanes_below())] = entry;
  }
  if (lane == 0) {
    s->count = __popc(ballot);
  }
}

/// Adds the other nodes' sums, four loads in flight.
__device__ void add_partials(const PartialsShared& s, const EntryLayout& layout, uint32_t piece, float* sum) {
  for (uint32_t first = 0; first < s.count; first += 4) {
    uint4 v[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      v[i] =
          first + i < s.count ? reinterpret_cast<const uint4*>(s.entry[first + i] + layout.payload_at)[piece] : uint4{};
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (first + i >= s.count) {
        break;
      }
      const Bf16x8 values = to_bf16x8(v[i]);
#pragma unroll
      for (uint32_t c = 0; c < 8; ++c) {
        sum[c] = __fadd_rn(sum[c], element(values, c));
      }
    }
  }
}

/// The weights of the own node's rows and those that the other nodes summed; one thread per lane.
__device__ void write_weights(const PartParams& p, const EntryLayout& layout, uint32_t token, uint32_t lane,
                              const PartialsShared& s) {
  if (!writes_weight(p, lane)) {
    return;
  }
  float sum = pulled_weight(p, lane, s.pull);
  for (uint32_t i = 0; layout.weights_at != 0 && i < s.count; ++i) {
    sum = __fadd_rn(sum, reinterpret_cast<const float*>(s.entry[i] + layout.weights_at)[lane]);
  }
  p.op.out.topk_weights[uint64_t{token} * p.op.shape.top_k + lane] = sum;
}

// node_combine. Grid: blocks of 256 threads, at most 4 per multiprocessor, the job's tokens strided over blocks. As
// combine_pull, with the sums of other nodes, in device memory, added behind the rows of this one: warp 0 collects
// both, then every thread takes 16-byte pieces, sums in float32, rounds once and stores once. Reads the handle's
// tables, the inputs of the own node's ranks (behind their routed flags) and no flag; writes only this rank's outputs.
// A sum of another token marks its server. Bytes per token: H * 2 per row and per node, H * 2 written. Bound: HBM and
// the link.
__global__ __launch_bounds__(kNodeThreads) void node_combine(const __grid_constant__ PartParams p,
                                                             const __grid_constant__ NodeTable nodes,
                                                             const __grid_constant__ CombineNodesJob job) {
  __shared__ PartialsShared s;
  if (block_is_gated(p)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  if (threadIdx.x == 0) {
    s.pull.local_rows = 0;
    s.pull.remote_rows = 0;
  }
  __syncwarp();
  const bool weighted = shape.kind == OpKind::kLlCombine;
  const uint32_t pieces = shape.hidden / 8;
  for (uint32_t token = job.begin + blockIdx.x; token < job.end; token += gridDim.x) {
    if (threadIdx.x < 32) {
      collect_sources(p, token, &s.pull);
      collect_partials(nodes, job, token, &s);
    }
    __syncthreads();
    for (uint32_t piece = threadIdx.x; piece < pieces && p.op.out.x != nullptr; piece += kNodeThreads) {
      const uint64_t at = uint64_t{token} * pieces + piece;
      float sum[8] = {};
      start_sum(p, at, sum);
      sum_piece(s.pull, piece, weighted, sum);
      add_partials(s, job.layout, piece, sum);
      static_cast<uint4*>(p.op.out.x)[at] = rounded(sum);
    }
    write_weights(p, job.layout, token, threadIdx.x, s);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    atomicAdd(&p.scratch.plan->pulled_local_rows, s.pull.local_rows);
    atomicAdd(&p.scratch.plan->pulled_remote_rows, s.pull.remote_rows);
  }
  fence_sys();
}

}  // namespace

cudaError_t launch_node_serve_pulls(const PartParams& params, const NodeTable& /*nodes*/, const ServePullsJob& job,
                                    cudaStream_t stream) {
  const uint32_t blocks = node_blocks(params, count_entries(job.message, job.messages));
  node_serve_pulls<<<blocks, kNodeThreads, 0, stream>>>(params, job);
  return cudaGetLastError();
}

cudaError_t launch_node_combine(const PartParams& params, const NodeTable& nodes, const CombineNodesJob& job,
                                cudaStream_t stream) {
  const uint32_t blocks = node_blocks(params, job.end > job.begin ? job.end - job.begin : 0);
  node_combine<<<blocks, kNodeThreads, 0, stream>>>(params, nodes, job);
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
