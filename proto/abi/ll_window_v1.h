/* SPDX-License-Identifier: Apache-2.0 */
/* Layout of a rank's low-latency window: where ll_dispatch puts its results and where ll_combine reads, when the caller
 * gives no pointers. Daemon and client compute sizes and offsets by this one function. Two sets, used in turn, lie one
 * behind the other; every region starts at a multiple of 128 bytes. A group that was joined with a set of payloads has
 * no room for the others: rows quantised to FP8 on the way have half the bytes of BF16, and BF16 alone has nothing
 * beside its rows. Rows of bytes need room for the largest, because their size is first known with an operation.
 * Compiles as C11 and C++20, any thread. */
#ifndef EXPERTD_LL_WINDOW_V1_H_
#define EXPERTD_LL_WINDOW_V1_H_

#include <stdint.h>

#include "ring_v1.h"

#define EXPERTD_LL_WINDOW_SETS 2u
#define EXPERTD_LL_WINDOW_ALIGNMENT 128u
#define EXPERTD_LL_SCALE_CHANNELS 128u

/* R ranks, E experts, L = E/R, H hidden, M max_tokens, N = R * M. */
struct expertd_ll_window_shape {
  uint32_t ranks;       /* R, 1..512 */
  uint32_t num_experts; /* E, a multiple of R, at most 2048; L at most 256 */
  uint32_t hidden;      /* H, a multiple of 128, at most 16384 */
  uint32_t max_tokens;  /* M, 1..4096 */
};

/* Offsets from the start of the window; all zero when the shape is outside its limits. */
struct expertd_ll_window_layout {
  uint64_t recv_x;        /* [L,N] rows of 2H bytes; of H where only FP8 is carried */
  uint64_t recv_scales;   /* L * (H/128) * N * 4 bytes; none where only BF16 is carried */
  uint64_t combine_x;     /* [L,N,H] bf16 */
  uint64_t src_info;      /* [L,N] i32 */
  uint64_t layout_range;  /* [L,R] i64 */
  uint64_t expert_counts; /* [L] i32 */
  uint64_t set_bytes;     /* of one set */
  uint64_t total_bytes;   /* of the window: two sets */
};

static inline uint64_t expertd_ll_window_place(uint64_t* cursor, uint64_t bytes) {
  const uint64_t offset = *cursor;
  const uint64_t mask = EXPERTD_LL_WINDOW_ALIGNMENT - 1u;
  *cursor = (offset + bytes + mask) & ~mask;
  return offset;
}

static inline int expertd_ll_window_shape_ok(const struct expertd_ll_window_shape* shape) {
  return shape->ranks >= 1u && shape->ranks <= 512u && shape->num_experts >= shape->ranks &&
         shape->num_experts <= 2048u && shape->num_experts % shape->ranks == 0u &&
         shape->num_experts / shape->ranks <= 256u && shape->hidden >= 128u && shape->hidden <= 16384u &&
         shape->hidden % 128u == 0u && shape->max_tokens >= 1u && shape->max_tokens <= 4096u;
}

/* Bytes of a row of recv_x for a set of expertd_payload (0: any). */
static inline uint64_t expertd_ll_window_row_bytes(uint64_t hidden, uint32_t payloads) {
  return payloads == EXPERTD_PAYLOAD_FP8 ? hidden : hidden * 2u;
}

/* Bytes of a row of recv_scales for a set of expertd_payload (0: any). */
static inline uint64_t expertd_ll_window_scale_bytes(uint64_t hidden, uint32_t payloads) {
  return payloads == EXPERTD_PAYLOAD_BF16 ? 0u : hidden / EXPERTD_LL_SCALE_CHANNELS * 4u;
}

/* Offsets of set `set` (0 or 1) in the window of a group that carries `payloads` (set of expertd_payload, 0: any). With
 * the limits above nothing exceeds 2^43 bytes. */
static inline struct expertd_ll_window_layout expertd_ll_window_place_payloads(
    const struct expertd_ll_window_shape* shape, uint32_t payloads, uint32_t set) {
  struct expertd_ll_window_layout layout = {0, 0, 0, 0, 0, 0, 0, 0};
  uint64_t local_experts, rows, cursor = 0;
  if (!expertd_ll_window_shape_ok(shape) || set >= EXPERTD_LL_WINDOW_SETS) {
    return layout;
  }
  local_experts = shape->num_experts / shape->ranks;
  rows = local_experts * shape->ranks * shape->max_tokens;
  layout.recv_x = expertd_ll_window_place(&cursor, rows * expertd_ll_window_row_bytes(shape->hidden, payloads));
  layout.recv_scales = expertd_ll_window_place(&cursor, rows * expertd_ll_window_scale_bytes(shape->hidden, payloads));
  layout.combine_x = expertd_ll_window_place(&cursor, rows * 2u * shape->hidden);
  layout.src_info = expertd_ll_window_place(&cursor, rows * 4u);
  layout.layout_range = expertd_ll_window_place(&cursor, local_experts * shape->ranks * 8u);
  layout.expert_counts = expertd_ll_window_place(&cursor, local_experts * 4u);
  layout.set_bytes = cursor;
  layout.total_bytes = cursor * EXPERTD_LL_WINDOW_SETS;
  layout.recv_x += set * cursor;
  layout.recv_scales += set * cursor;
  layout.combine_x += set * cursor;
  layout.src_info += set * cursor;
  layout.layout_range += set * cursor;
  layout.expert_counts += set * cursor;
  return layout;
}

/* The same for a group that carries any payload. */
static inline struct expertd_ll_window_layout expertd_ll_window_place_all(const struct expertd_ll_window_shape* shape,
                                                                          uint32_t set) {
  return expertd_ll_window_place_payloads(shape, 0, set);
}

#endif /* EXPERTD_LL_WINDOW_V1_H_ */
