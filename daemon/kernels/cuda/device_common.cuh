// SPDX-License-Identifier: Apache-2.0
// Small pieces that every kernel of a part uses: the gate, ids of either width, pieces of rows. Device code only,
// included by the kernels' .cu files; no state.
#pragma once

#include <cstdint>

#include "daemon/kernels/cuda/part_params.h"
#include "daemon/kernels/cuda/ptx.cuh"
#include "daemon/kernels/numerics.h"

namespace expertd::kernels::cuda {

inline constexpr uint32_t kFullWarp = 0xffffffffu;

/// True when the block is to do nothing: a null launch, or the part was aborted. One thread reads and all threads of
/// the block take its answer, so that no two of them disagree before a barrier. Every kernel calls it first.
__device__ __forceinline__ bool block_is_gated(const PartParams& p) {
  if (p.null_operation != 0) {
    return true;
  }
  int gated = 0;
  if (threadIdx.x == 0) {
    gated = ld_acquire_sys(&p.words.state->aborted_part) == p.words.part ? 1 : 0;
  }
  return __syncthreads_or(gated) != 0;
}

/// The first kernel of a part says when it started. In memory of the device, because a fence behind it would wait for a
/// store to the host.
__device__ __forceinline__ void mark_start_at(const PartParams& p, uint64_t begin_ns) {
  p.words.state->start_ns = begin_ns;
  p.words.state->started_part = p.words.part;
}

__device__ __forceinline__ void mark_start(const PartParams& p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    mark_start_at(p, global_timer_ns());
  }
}

/// Tells the host when the part started; `facts` was zeroed by it. One thread, ordered behind mark_start().
__device__ __forceinline__ void publish_start(const PartParams& p) {
  if (p.words.state->started_part == p.words.part) {
    st_relaxed_sys(&p.words.facts->start_ns, p.words.state->start_ns);
  }
}

/// Both, at the beginning of a chain of several kernels.
__device__ __forceinline__ void tell_start(const PartParams& p) {
  mark_start(p);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    publish_start(p);
  }
}

/// Of at most kMaxGpuRanks.
__device__ __forceinline__ uint64_t active_bits(const OpShape& shape) {
  return shape.active_ranks.words[0];
}

__device__ __forceinline__ bool rank_active(const OpShape& shape, uint32_t rank) {
  return ((active_bits(shape) >> rank) & 1) != 0;
}

__device__ __forceinline__ int64_t load_id(const void* ids, uint32_t bytes, uint64_t position) {
  return bytes == 4 ? static_cast<const int32_t*>(ids)[position] : static_cast<const int64_t*>(ids)[position];
}

__device__ __forceinline__ void store_id(void* ids, uint32_t bytes, uint64_t position, int64_t value) {
  if (bytes == 4) {
    static_cast<int32_t*>(ids)[position] = static_cast<int32_t>(value);
  } else {
    static_cast<int64_t*>(ids)[position] = value;
  }
}

/// The expert of a lane of the own tokens, -1 for none and for ids outside [0, E).
__device__ __forceinline__ int32_t lane_expert(const PartParams& p, uint32_t token, uint32_t lane) {
  const OpShape& shape = p.op.shape;
  if (p.op.in.topk_idx == nullptr || lane >= shape.top_k) {
    return -1;
  }
  const int64_t id = load_id(p.op.in.topk_idx, shape.topk_idx_bytes, uint64_t{token} * shape.top_k + lane);
  return id >= 0 && id < static_cast<int64_t>(shape.experts) ? static_cast<int32_t>(id) : -1;
}

__device__ __forceinline__ uint32_t count_columns(const OpShape& shape) {
  return shape.ranks + shape.experts;
}

/// Integers of one row of the count matrix; count_row_ints() is a host function to nvcc.
__device__ __forceinline__ uint32_t matrix_row_ints(const OpShape& shape) {
  return shape.ranks + shape.experts + kCountRowErrorInts;
}

/// The last integer of the first row of a handle's matrix is always zero in the matrix that travels; in the handle it
/// keeps the dispatch's expert_alignment, which a combine is not told.
__device__ __forceinline__ uint32_t handle_alignment_at(const OpShape& shape) {
  return matrix_row_ints(shape) - 1;
}

__device__ __forceinline__ int64_t round_up(int64_t value, uint32_t alignment) {
  const int64_t unit = alignment == 0 ? 1 : alignment;
  return (value + unit - 1) / unit * unit;
}

/// Whether this rank and `rank` exchange through the relay.
__device__ __forceinline__ bool relayed(const PartParams& p, uint32_t rank) {
  return ((p.relay.ranks >> rank) & 1) != 0;
}

__device__ __forceinline__ bool per_expert_rows(const OpShape& shape) {
  return shape.kind == OpKind::kLlDispatch || shape.kind == OpKind::kLlCombine || shape.expanded != 0;
}

__device__ __forceinline__ uint32_t lanes_below() {
  return (1u << (threadIdx.x & 31)) - 1u;
}

/// The threads that share one piece of work: a grid, a block or one warp.
struct Crew {
  uint32_t first;  // this thread
  uint32_t step;   // all of them
};

/// Where row `i` of a block that moves rows of `row_bytes` in bulk lies in shared memory: at i times this.
__host__ __device__ constexpr uint32_t bulk_row_stride(uint32_t row_bytes) {
  return (row_bytes + 127) / 128 * 128;
}

/// How many rows of that many bytes a block keeps in flight.
__host__ __device__ constexpr uint32_t bulk_rows(uint32_t row_bytes) {
  const uint32_t fit = kBulkSharedBytes / bulk_row_stride(row_bytes);
  return fit < kBulkRows ? fit : kBulkRows;
}

/// Eight bf16 of one 16-byte access.
struct Bf16x8 {
  uint32_t words[4];
};

__device__ __forceinline__ Bf16x8 to_bf16x8(const uint4& v) {
  return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ float element(const Bf16x8& v, uint32_t i) {
  const uint32_t word = v.words[i / 2];
  return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

/// The scale of 128 channels from their largest magnitude, in the form asked for.
__device__ __forceinline__ float fp8_scale(float amax, ScaleForm form) {
  const float scale = group_scale(amax);
  return form == ScaleForm::kFloat32 ? scale : round_scale(scale);
}

}  // namespace expertd::kernels::cuda
