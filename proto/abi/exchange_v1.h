/* SPDX-License-Identifier: Apache-2.0 */
/* Layout of a rank's exchange window: where the client library's kernels put what copy engines carry to the other ranks
 * and find what came, in a group that is executed by copy engines. Daemon and client compute it by this one function.
 * Memory of the GPU that the daemon owns: the rank's client reads and writes all of it, the copies of other ranks write
 * the `in_` regions, each its own part, and nobody takes an address or a size from it. Four buffers lie one behind the
 * other, taken in turn by the number of the group's operation; an operation is one dispatch or one combine, so what the
 * two need lies at the same place. Behind them are the tables that a dispatch leaves for its combine, for the client
 * alone. Every region starts at a multiple of 256 bytes. Compiles as C11 and C++20, any thread. */
#ifndef EXPERTD_EXCHANGE_V1_H_
#define EXPERTD_EXCHANGE_V1_H_

#include <stdint.h>

#include "ring_v1.h"

/* The daemon launches operation n when all parts of n - 4 have ended, so nobody reads what the copies of n write. */
#define EXPERTD_EXCHANGE_BUFFERS 4u
#define EXPERTD_EXCHANGE_HANDLES 4u
#define EXPERTD_EXCHANGE_RANKS_MAX 16u
#define EXPERTD_EXCHANGE_ALIGNMENT 256u
/* Room for scales, or for a side of rows of bytes, behind the largest payload of 2H bytes. */
#define EXPERTD_EXCHANGE_SIDE_BYTES 256u

/* R ranks, E experts, H hidden, M max_tokens, K top_k. */
struct expertd_exchange_shape {
  uint32_t ranks;       /* R, 1..16 */
  uint32_t num_experts; /* E, a multiple of R, at most 2048 */
  uint32_t hidden;      /* H, a multiple of 128, at most 16384 */
  uint32_t max_tokens;  /* M, 1..4096 */
  uint32_t top_k;       /* K, 1..32 */
};

/* In front of a block of either kind. */
struct expertd_exchange_header {
  uint32_t tokens;      /* of the source */
  uint32_t error;       /* expertd_reason of the source's routing, or 0 */
  int64_t error_value;  /* what that is about */
  uint64_t reserved[6]; /* 0 */
};

/* One (token, lane) as its source numbered it. */
struct expertd_exchange_lane {
  int32_t expert; /* global, -1 for none */
  int32_t row;    /* among the source's rows for the expert, -1 for none */
};

/* What the client's kernels tell of an operation, at the start of its buffer. The daemon copies it into the completion
 * and believes no more of it than what a completion may say. */
struct expertd_exchange_report {
  uint32_t reason; /* 0, EXPERT_OUT_OF_RANGE, PEER_REJECTED or CAPACITY_EXCEEDED */
  int32_t rank;    /* that the Reason names, -1 for none */
  int64_t value;   /* the bad id, or the rows that are too many */
  uint32_t recv_rows;
  uint32_t local_rows;  /* sent to experts of the own rank, or summed of them */
  uint32_t remote_rows; /* the same of other ranks */
  uint32_t expert_count_entries;
  uint32_t expert_counts[256];
};

/* In front of a handle's tables. */
struct expertd_exchange_handle {
  uint64_t active; /* ranks that took part in the dispatch */
  uint32_t tokens[EXPERTD_EXCHANGE_RANKS_MAX];
  uint64_t reserved[7];
};

/* Offsets; all zero when the shape is outside its limits. */
struct expertd_exchange_layout {
  /* In a dispatch block. Its counts [E] i32 follow the header. */
  uint64_t lanes;      /* [M,K] expertd_exchange_lane */
  uint64_t rows;       /* [M] rows of the operation's stride: payload, then scales or side */
  uint64_t row_stride; /* the largest */
  uint64_t block_bytes;
  /* In a weights block. */
  uint64_t masks;   /* [M] u32: bit k is set where the caller took lane k away */
  uint64_t weights; /* [M,K] f32 */
  uint64_t weights_bytes;
  /* In a buffer, behind its report. Dispatch: */
  uint64_t out_block;
  uint64_t in_blocks; /* [R sources] of block_bytes */
  /* Combine: */
  uint64_t out_weights;
  uint64_t in_weights; /* [R origins] of weights_bytes */
  uint64_t out_sums;   /* [R origins, M, H] bf16 */
  uint64_t in_sums;    /* [R owners, M, H] bf16 */
  uint64_t buffer_bytes;
  /* In the window. */
  uint64_t handles;      /* [EXPERTD_EXCHANGE_HANDLES] of handle_bytes */
  uint64_t handle_slots; /* in a handle: [R sources, M, K] i32, the row of a lane in this rank's [L,N], or -1 */
  uint64_t handle_lanes; /* in a handle: [M,K] i32, the experts of the own lanes, or -1 */
  uint64_t handle_bytes;
  uint64_t total_bytes;
};

static inline uint64_t expertd_exchange_align(uint64_t bytes) {
  const uint64_t mask = EXPERTD_EXCHANGE_ALIGNMENT - 1u;
  return (bytes + mask) & ~mask;
}

static inline uint64_t expertd_exchange_place(uint64_t* cursor, uint64_t bytes) {
  const uint64_t offset = *cursor;
  *cursor = expertd_exchange_align(offset + bytes);
  return offset;
}

/* From one row of an operation to the next: its payload, what travels beside it, up to a whole line of 128 bytes. */
static inline uint64_t expertd_exchange_row_stride(uint64_t payload_bytes, uint64_t side_bytes) {
  return (payload_bytes + side_bytes + 127u) & ~UINT64_C(127);
}

static inline int expertd_exchange_shape_ok(const struct expertd_exchange_shape* shape) {
  return shape->ranks >= 1u && shape->ranks <= EXPERTD_EXCHANGE_RANKS_MAX && shape->num_experts >= shape->ranks &&
         shape->num_experts <= 2048u && shape->num_experts % shape->ranks == 0u &&
         shape->num_experts / shape->ranks <= 256u && shape->hidden >= 128u && shape->hidden <= 16384u &&
         shape->hidden % 128u == 0u && shape->max_tokens >= 1u && shape->max_tokens <= 4096u && shape->top_k >= 1u &&
         shape->top_k <= 32u;
}

/* With the limits above nothing exceeds 2^43 bytes. */
static inline struct expertd_exchange_layout expertd_exchange_layout_of(const struct expertd_exchange_shape* shape) {
  struct expertd_exchange_layout layout = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  uint64_t lanes, sums, cursor = 0, combine;
  if (!expertd_exchange_shape_ok(shape)) {
    return layout;
  }
  lanes = UINT64_C(1) * shape->max_tokens * shape->top_k;
  sums = UINT64_C(2) * shape->ranks * shape->max_tokens * shape->hidden;
  cursor = expertd_exchange_align(sizeof(struct expertd_exchange_header) + UINT64_C(4) * shape->num_experts);
  layout.lanes = expertd_exchange_place(&cursor, lanes * sizeof(struct expertd_exchange_lane));
  layout.row_stride = expertd_exchange_row_stride(UINT64_C(2) * shape->hidden, EXPERTD_EXCHANGE_SIDE_BYTES);
  layout.rows = expertd_exchange_place(&cursor, shape->max_tokens * layout.row_stride);
  layout.block_bytes = cursor;
  layout.masks = sizeof(struct expertd_exchange_header);
  cursor = layout.masks + UINT64_C(4) * shape->max_tokens;
  layout.weights = (cursor + 15u) & ~UINT64_C(15);
  layout.weights_bytes = expertd_exchange_align(layout.weights + lanes * 4u);
  cursor = expertd_exchange_align(sizeof(struct expertd_exchange_report));
  combine = cursor;
  layout.out_block = expertd_exchange_place(&cursor, layout.block_bytes);
  layout.in_blocks = expertd_exchange_place(&cursor, shape->ranks * layout.block_bytes);
  layout.out_weights = expertd_exchange_place(&combine, layout.weights_bytes);
  layout.in_weights = expertd_exchange_place(&combine, shape->ranks * layout.weights_bytes);
  layout.out_sums = expertd_exchange_place(&combine, sums);
  layout.in_sums = expertd_exchange_place(&combine, sums);
  layout.buffer_bytes = cursor > combine ? cursor : combine;
  cursor = expertd_exchange_align(sizeof(struct expertd_exchange_handle));
  layout.handle_slots = expertd_exchange_place(&cursor, shape->ranks * lanes * 4u);
  layout.handle_lanes = expertd_exchange_place(&cursor, lanes * 4u);
  layout.handle_bytes = cursor;
  layout.handles = EXPERTD_EXCHANGE_BUFFERS * layout.buffer_bytes;
  layout.total_bytes = layout.handles + EXPERTD_EXCHANGE_HANDLES * layout.handle_bytes;
  return layout;
}

/* Bytes of a block that travel for `tokens` rows. */
static inline uint64_t expertd_exchange_block_copy(const struct expertd_exchange_layout* layout, uint64_t tokens,
                                                   uint64_t row_stride) {
  return layout->rows + tokens * row_stride;
}

static inline uint64_t expertd_exchange_weights_copy(const struct expertd_exchange_layout* layout, uint64_t tokens,
                                                     uint64_t top_k) {
  return (layout->weights + tokens * top_k * 4u + 15u) & ~UINT64_C(15);
}

EXPERTD_ABI_ASSERT(sizeof(struct expertd_exchange_header) == 64, "exchange header");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_exchange_lane) == 8, "exchange lane");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_exchange_report) == 1056, "exchange report");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_exchange_handle) == 128, "exchange handle");

#endif /* EXPERTD_EXCHANGE_V1_H_ */
