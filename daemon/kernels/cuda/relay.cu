// SPDX-License-Identifier: Apache-2.0
// What a rank publishes in its relay for the ranks whose GPUs cannot reach its memory (PCIe without peer access). A
// dispatch publishes tokens and row numbers, which the destinations move (dispatch.cu); a combine publishes the
// experts' rows packed, which the origins pull (combine.cu). Written before the routed flag, read after it, and written
// again only after every reader's moved flag. Definitions: daemon/kernels/README.md.
#include <algorithm>

#include "daemon/kernels/cuda/device_common.cuh"
#include "daemon/kernels/cuda/launch.h"

namespace expertd::kernels::cuda {
namespace {

constexpr uint32_t kPublishThreads = 256;
constexpr uint32_t kBlocksPerMultiprocessor = 4;
constexpr uint32_t kRelayPlanThreads = 1024;

__device__ bool is_combine(const OpShape& shape) {
  return shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine;
}

__device__ void copy_row(const void* from, void* to, uint32_t bytes) {
  for (uint32_t i = threadIdx.x; i < bytes / 16; i += kPublishThreads) {
    static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
  }
}

/// `count` 4-byte elements of one token.
template <typename Element>
__device__ void copy_elements(const Element* from, char* to, uint32_t token, uint32_t count) {
  auto* out = reinterpret_cast<Element*>(to) + uint64_t{token} * count;
  for (uint32_t i = threadIdx.x; i < count; i += kPublishThreads) {
    out[i] = from[uint64_t{token} * count + i];
  }
}

template <typename Element>
__device__ void copy_side(const PartParams& p, uint32_t token) {
  const OpShape& shape = p.op.shape;
  const char* in = static_cast<const char*>(p.op.in.side) + static_cast<int64_t>(token) * shape.side_row_stride;
  auto* out = reinterpret_cast<Element*>(p.relay.own + p.relay.layout.side) + uint64_t{token} * shape.side_elements;
  for (uint32_t i = threadIdx.x; i < shape.side_elements; i += kPublishThreads) {
    out[i] = *reinterpret_cast<const Element*>(in + static_cast<int64_t>(i) * shape.side_element_stride);
  }
}

__device__ void publish_side(const PartParams& p, uint32_t token) {
  if (p.op.in.side == nullptr || p.op.shape.payload == Payload::kFp8) {
    return;
  }
  if (p.op.shape.side_element_bytes == 1) {
    copy_side<uint8_t>(p, token);
  } else if (p.op.shape.side_element_bytes == 2) {
    copy_side<uint16_t>(p, token);
  } else if (p.op.shape.side_element_bytes == 4) {
    copy_side<uint32_t>(p, token);
  }
}

// relay_publish_tokens. Grid: blocks of 256 threads, at most 4 per multiprocessor, tokens strided over blocks. Copies
// every token's row, side, weights and row numbers into the relay, also of tokens that no rank behind it wants, so that
// a token's place is its index. Behind route_number. Bound: PCIe writes.
__global__ __launch_bounds__(kPublishThreads) void relay_publish_tokens(const __grid_constant__ PartParams p) {
  if (block_is_gated(p)) {
    return;
  }
  if (p.op.shape.cached != 0) {
    tell_start(p);  // nothing ran before it
  }
  if (p.op.in.x == nullptr) {
    return;
  }
  const OpShape& shape = p.op.shape;
  const RelayLayout& layout = p.relay.layout;
  for (uint32_t token = blockIdx.x; token < shape.tokens; token += gridDim.x) {
    const uint64_t at = uint64_t{token} * shape.row_bytes;
    copy_row(static_cast<const char*>(p.op.in.x) + at, p.relay.own + at, shape.row_bytes);
    publish_side(p, token);
    if (p.op.in.topk_weights != nullptr) {
      copy_elements(p.op.in.topk_weights, p.relay.own + layout.weights, token, shape.top_k);
    }
    copy_elements(p.op.routing.topk, p.relay.own + layout.topk, token, p.table_top_k);
    if (per_expert_rows(shape)) {
      copy_elements(p.op.routing.token_expert, p.relay.own + layout.token_expert, token, p.table_top_k);
    } else {
      copy_elements(p.op.routing.token_rank, p.relay.own + layout.token_rank, token, shape.ranks);
    }
  }
  fence_sys();
}

// relay_plan. Grid: one block. From the handle's count matrix, for every expert, the first of its rows at its owner
// with the alignment gaps of the dispatch and without them. One thread per rank walks that rank's experts: this is the
// slow path, and its time is that of PCIe.
__global__ __launch_bounds__(kRelayPlanThreads) void relay_plan(const __grid_constant__ PartParams p) {
  __shared__ int32_t counts[base::kMaxExperts];
  if (block_is_gated(p) || !is_combine(p.op.shape)) {
    return;
  }
  tell_start(p);
  if (!per_expert_rows(p.op.shape)) {
    return;
  }
  const OpShape& shape = p.op.shape;
  for (uint32_t e = threadIdx.x; e < shape.experts; e += kRelayPlanThreads) {
    int32_t rows = 0;
    for (uint32_t s = 0; s < shape.ranks; ++s) {
      rows += p.op.routing.counts[uint64_t{s} * matrix_row_ints(shape) + shape.ranks + e];
    }
    counts[e] = rows;
  }
  __syncthreads();
  if (threadIdx.x >= shape.ranks) {
    return;
  }
  const auto alignment = static_cast<uint32_t>(p.op.routing.counts[handle_alignment_at(shape)]);
  int64_t aligned = 0;
  int32_t packed = 0;
  for (uint32_t local = 0; local < shape.local_experts; ++local) {
    const uint32_t expert = threadIdx.x * shape.local_experts + local;
    p.scratch.plan->aligned_start[expert] = static_cast<int32_t>(aligned);
    p.scratch.plan->packed_start[expert] = packed;
    aligned += round_up(counts[expert], alignment);
    packed += counts[expert];
  }
}

/// A row of this rank's combine input.
struct PublishedRow {
  uint64_t row;     // in the input
  uint64_t packed;  // in the relay
  uint32_t source;  // the rank whose token it belongs to
};

/// The source rank of the `index`-th row counted in `column`, or `ranks` when there are fewer.
__device__ uint32_t source_of(const PartParams& p, uint32_t column, uint32_t index) {
  const OpShape& shape = p.op.shape;
  uint32_t end = 0;
  for (uint32_t s = 0; s < shape.ranks; ++s) {
    end += static_cast<uint32_t>(p.op.routing.counts[uint64_t{s} * matrix_row_ints(shape) + column]);
    if (index < end) {
      return s;
    }
  }
  return shape.ranks;
}

/// The packed row `index` of this rank; source == ranks when there is none.
__device__ PublishedRow published_row(const PartParams& p, uint32_t index) {
  const OpShape& shape = p.op.shape;
  if (!per_expert_rows(shape)) {
    return {index, index, source_of(p, shape.rank, index)};
  }
  const int32_t* starts = p.scratch.plan->packed_start + uint64_t{shape.rank} * shape.local_experts;
  uint32_t low = 0;  // the last local expert that starts at or before the index
  uint32_t high = shape.local_experts;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (starts[middle] <= static_cast<int32_t>(index) ? low : high) = middle;
  }
  const uint32_t expert = shape.rank * shape.local_experts + low;
  const uint32_t inside = index - static_cast<uint32_t>(starts[low]);
  const bool low_latency = shape.kind == OpKind::kLlCombine;
  const uint64_t first = low_latency ? uint64_t{low} * shape.slots_per_expert
                                     : static_cast<uint64_t>(p.scratch.plan->aligned_start[expert]);
  return {first + inside, index, source_of(p, shape.ranks + expert, inside)};
}

// relay_publish_rows. Grid as relay_publish_tokens, packed rows strided over blocks until one has no source. Copies the
// rows (and their weights) of tokens of ranks behind the relay; clamped to the input and the relay. Bound: PCIe writes.
__global__ __launch_bounds__(kPublishThreads) void relay_publish_rows(const __grid_constant__ PartParams p) {
  __shared__ PublishedRow row;
  if (block_is_gated(p) || p.op.in.x == nullptr) {
    return;
  }
  const OpShape& shape = p.op.shape;
  const uint32_t bytes = shape.hidden * 2;
  const uint32_t width = shape.expanded != 0 ? 1 : shape.top_k;
  const bool weights = p.op.in.topk_weights != nullptr && shape.kind == OpKind::kCombine;
  for (uint32_t index = blockIdx.x; index < p.relay.layout.rows; index += gridDim.x) {
    if (threadIdx.x == 0) {
      row = published_row(p, index);
    }
    __syncthreads();
    if (row.source >= shape.ranks) {
      break;
    }
    if (relayed(p, row.source) && row.row < p.peers.views[shape.rank].in_rows) {
      copy_row(static_cast<const char*>(p.op.in.x) + row.row * bytes, p.relay.own + row.packed * bytes, bytes);
      auto* out = reinterpret_cast<float*>(p.relay.own + p.relay.layout.weights) + row.packed * width;
      for (uint32_t i = threadIdx.x; weights && i < width; i += kPublishThreads) {
        out[i] = p.op.in.topk_weights[row.row * width + i];
      }
    }
    __syncthreads();
  }
  fence_sys();
}

}  // namespace

cudaError_t launch_relay_plan(const PartParams& params, cudaStream_t stream) {
  relay_plan<<<1, kRelayPlanThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

uint32_t relay_publish_blocks(const PartParams& params) {
  const OpShape& shape = params.op.shape;
  const uint32_t most = params.multiprocessors * kBlocksPerMultiprocessor;
  const bool rows = shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine;
  return rows ? most : std::clamp(shape.tokens, 1u, most);
}

cudaError_t launch_relay_publish(const PartParams& params, cudaStream_t stream) {
  const uint32_t blocks = relay_publish_blocks(params);
  const OpShape& shape = params.op.shape;
  if (params.null_operation != 0 || shape.kind == OpKind::kDispatch || shape.kind == OpKind::kLlDispatch) {
    relay_publish_tokens<<<blocks, kPublishThreads, 0, stream>>>(params);
  }
  if (params.null_operation != 0 || shape.kind == OpKind::kCombine || shape.kind == OpKind::kLlCombine) {
    relay_publish_rows<<<blocks, kPublishThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace expertd::kernels::cuda
