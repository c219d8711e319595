// SPDX-License-Identifier: Apache-2.0
// The layout operation: counts per rank, node and expert and the token x rank mask of one rank's ids, without any other
// rank. Also the launch of every kernel as a null operation and the check of parameters.
#include "daemon/kernels/cuda/device_common.cuh"
#include "daemon/kernels/cuda/launch.h"
#include "daemon/kernels/cuda/node_jobs.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kLayoutThreads = 256;
constexpr uint32_t kLayoutTokens = 64;  // of one block
constexpr uint32_t kMaskRanks = base::kMaxLocalRanks;

__device__ uint32_t ranks_of_node(const OpShape& shape) {
  return shape.ranks_per_node == 0 ? shape.ranks : shape.ranks_per_node;
}

// layout_clear. Grid: one block of 256 threads. Stamps the start, zeroes the counts and the word of the first bad id.
// No flags; launch-bound.
__global__ __launch_bounds__(kLayoutThreads) void layout_clear(const __grid_constant__ PartParams p) {
  if (block_is_gated(p)) {
    return;
  }
  tell_start(p);
  const OpShape& shape = p.op.shape;
  const uint32_t nodes = (shape.ranks + ranks_of_node(shape) - 1) / ranks_of_node(shape);
  for (uint32_t i = threadIdx.x; i < shape.experts; i += kLayoutThreads) {
    if (p.op.out.expert_counts != nullptr) {
      p.op.out.expert_counts[i] = 0;
    }
  }
  for (uint32_t i = threadIdx.x; i < shape.ranks; i += kLayoutThreads) {
    if (p.op.out.rank_prefix != nullptr) {
      p.op.out.rank_prefix[i] = 0;
    }
  }
  for (uint32_t i = threadIdx.x; i < nodes; i += kLayoutThreads) {
    if (p.op.out.layout_range != nullptr) {
      reinterpret_cast<int32_t*>(p.op.out.layout_range)[i] = 0;
    }
  }
  if (threadIdx.x == 0) {
    p.words.state->layout_error = 0xffffffffu;
  }
}

/// Owner ranks of a token as bits. Ranks of layout go up to 64 here: they are numbers, not GPUs of this node.
__device__ uint64_t owners_of(const PartParams& p, uint32_t token) {
  const OpShape& shape = p.op.shape;
  const uint32_t per_rank = shape.experts / shape.ranks;
  uint64_t owners = 0;
  for (uint32_t k = 0; k < shape.top_k; ++k) {
    const int32_t expert = lane_expert(p, token, k);
    const uint32_t owner = expert >= 0 ? static_cast<uint32_t>(expert) / per_rank : shape.ranks;
    owners |= owner < shape.ranks ? uint64_t{1} << owner : 0;
  }
  return owners;
}

// layout_count. Grid: one block of 256 threads per 64 tokens. Histograms experts, ranks and nodes in shared memory and
// adds them to the outputs (sums of integers: the order does not matter), writes the mask rows. No flags. Bytes per
// token: K ids read twice, R bytes of mask.
__global__ __launch_bounds__(kLayoutThreads) void layout_count(const __grid_constant__ PartParams p) {
  __shared__ int32_t experts[base::kMaxExperts];
  __shared__ int32_t ranks[kMaskRanks];
  __shared__ int32_t nodes[kMaskRanks];
  if (block_is_gated(p)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  for (uint32_t i = threadIdx.x; i < shape.experts; i += kLayoutThreads) {
    experts[i] = 0;
  }
  if (threadIdx.x < kMaskRanks) {
    ranks[threadIdx.x] = 0;
    nodes[threadIdx.x] = 0;
  }
  __syncthreads();
  const uint32_t first = blockIdx.x * kLayoutTokens;
  const uint32_t tokens = first < shape.tokens ? min(kLayoutTokens, shape.tokens - first) : 0;
  for (uint32_t i = threadIdx.x; i < tokens * shape.top_k; i += kLayoutThreads) {
    const uint32_t position = first * shape.top_k + i;
    const int64_t id = load_id(p.op.in.topk_idx, shape.topk_idx_bytes, position);
    if (id < -1 || id >= static_cast<int64_t>(shape.experts)) {
      atomicMin(&p.words.state->layout_error, position);
    } else if (id >= 0) {
      atomicAdd(&experts[id], 1);
    }
  }
  if (threadIdx.x < tokens) {
    const uint32_t token = first + threadIdx.x;
    const uint64_t owners = owners_of(p, token);
    uint64_t seen_nodes = 0;
    for (uint32_t j = 0; j < shape.ranks; ++j) {
      const bool owns = ((owners >> j) & 1) != 0;
      if (p.op.out.token_rank_mask != nullptr) {
        p.op.out.token_rank_mask[uint64_t{token} * shape.ranks + j] = owns ? 1 : 0;
      }
      if (owns) {
        atomicAdd(&ranks[j], 1);
        seen_nodes |= uint64_t{1} << (j / ranks_of_node(shape));
      }
    }
    for (; seen_nodes != 0; seen_nodes &= seen_nodes - 1) {
      atomicAdd(&nodes[__ffsll(static_cast<long long>(seen_nodes)) - 1], 1);
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < shape.experts; i += kLayoutThreads) {
    if (p.op.out.expert_counts != nullptr && experts[i] != 0) {
      atomicAdd(&p.op.out.expert_counts[i], experts[i]);
    }
  }
  if (threadIdx.x < kMaskRanks && threadIdx.x < shape.ranks) {
    if (p.op.out.rank_prefix != nullptr && ranks[threadIdx.x] != 0) {
      atomicAdd(&p.op.out.rank_prefix[threadIdx.x], ranks[threadIdx.x]);
    }
    if (p.op.out.layout_range != nullptr && nodes[threadIdx.x] != 0) {
      atomicAdd(&reinterpret_cast<int32_t*>(p.op.out.layout_range)[threadIdx.x], nodes[threadIdx.x]);
    }
  }
}

}  // namespace

const char* validate(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  const bool local = shape.kind == OpKind::kLayout;
  const bool barrier = shape.kind == OpKind::kBarrier;
  if (shape.ranks == 0 || shape.ranks > (local ? kMaskRanks : base::kMaxGpuRanks) ||
      (!local && shape.rank >= shape.ranks)) {
    return "ranks";
  }
  if (shape.tokens > base::kMaxTokens || shape.top_k > base::kMaxTopK) {
    return "tokens or top_k";
  }
  if (!barrier && (shape.experts == 0 || shape.experts > base::kMaxExperts || shape.experts < shape.ranks)) {
    return "experts";
  }
  if (barrier || local) {
    return nullptr;
  }
  if (shape.local_experts * shape.ranks != shape.experts || shape.local_experts > base::kMaxLocalExperts) {
    return "local_experts";
  }
  if (shape.tokens > shape.max_tokens || params.table_top_k > base::kMaxTopK || shape.top_k > params.table_top_k) {
    return "tokens or top_k of the group";
  }
  if (shape.hidden % kScaleGroup != 0 || shape.row_bytes % 16 != 0 || shape.out_row_bytes % 16 != 0) {
    return "row sizes";
  }
  return nullptr;
}

cudaError_t launch_layout_clear(const PartParams& params, cudaStream_t stream) {
  layout_clear<<<1, kLayoutThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

uint32_t layout_count_blocks(const PartParams& params) {
  const uint32_t tokens = params.op.shape.tokens;
  return tokens == 0 ? 1 : (tokens + kLayoutTokens - 1) / kLayoutTokens;
}

cudaError_t launch_layout_count(const PartParams& params, cudaStream_t stream) {
  layout_count<<<layout_count_blocks(params), kLayoutThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

namespace {

/// Of the kernels for groups over several nodes.
cudaError_t launch_node_null(const PartParams& null, cudaStream_t stream) {
  const cudaError_t errors[] = {launch_node_pack_rows(null, {}, {}, stream),
                                launch_node_spread_rows(null, {}, {}, stream),
                                launch_node_pack_pulls(null, {}, {}, stream),
                                launch_node_serve_pulls(null, {}, {}, stream),
                                launch_node_combine(null, {}, {}, stream),
                                launch_take_doorbell(nullptr, nullptr, 0, stream),
                                launch_swap_word({}, stream)};
  for (const cudaError_t error : errors) {
    if (error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_all_null(bool bulk_copies, cudaStream_t stream) {
  PartParams null{};
  null.null_operation = 1;
  null.bulk_copies = bulk_copies ? 1 : 0;
  using Launcher = cudaError_t (*)(const PartParams&, cudaStream_t);
  constexpr Launcher kLaunchers[] = {
      launch_route_count,  launch_route_scan, launch_route_number,  launch_plan,       launch_dispatch_move,
      launch_combine_pull, launch_relay_plan, launch_relay_publish, launch_relay_move, launch_layout_clear,
      launch_layout_count, launch_meet,       launch_finish};
  if (bulk_copies) {
    for (const auto launcher : {launch_link_dispatch, launch_link_combine}) {
      if (const cudaError_t error = launcher(null, Entry::kWaits, stream); error != cudaSuccess) {
        return error;
      }
    }
    if (const cudaError_t error = launch_link_ll_dispatch(null, Entry::kWaits, stream); error != cudaSuccess) {
      return error;
    }
    if (const cudaError_t error = launch_link_ll_combine(null, LowLatencyEntry::kWaits, stream); error != cudaSuccess) {
      return error;
    }
    ArmParams no_arm;
    no_arm.null_operation = 1;
    if (const cudaError_t error = launch_link_ll_captured(no_arm, LowLatencyEntry::kWaits, stream);
        error != cudaSuccess) {
      return error;
    }
    if (const cudaError_t error = launch_await_doorbell(nullptr, 0, stream); error != cudaSuccess) {
      return error;
    }
    if (const cudaError_t error = launch_await_arm(no_arm, stream); error != cudaSuccess) {
      return error;
    }
    if (const cudaError_t error = launch_await_flags({}, stream); error != cudaSuccess) {
      return error;
    }
    if (const cudaError_t error = launch_swap_word({}, stream); error != cudaSuccess) {
      return error;
    }
  }
  for (const Launcher launcher : kLaunchers) {
    if (const cudaError_t error = launcher(null, stream); error != cudaSuccess) {
      return error;
    }
  }
  if (const cudaError_t error = launch_node_null(null, stream); error != cudaSuccess) {
    return error;
  }
  return launch_signal(null, SignalStep::kRouted, stream);
}

}  // namespace expertd::kernels::cuda
