/* SPDX-License-Identifier: Apache-2.0 */
/* High throughput by copy engines: the part of a rank's exchange window that its dispatches and combines use, and the
 * words by which a slot's parts follow each other. Daemon and client compute the layout by this one function. Rows of a
 * dispatch go from the `rows` of the source's window straight into the outputs of the others, what is beside them as
 * records into their windows; rows of a combine go from the owners' inputs into the `rows` of the origin's window. The
 * client reads and writes all of it, and what the daemon takes from it, the counts, it checks before one of them
 * becomes an address or a size. Two buffers, taken in turn by the number of the group's operation; behind them a table
 * per handle, for the client alone. Regions start at multiples of 256 bytes. Compiles as C11 and C++20, any thread. */
#ifndef EXPERTD_EXCHANGE_HT_V1_H_
#define EXPERTD_EXCHANGE_HT_V1_H_

#include <stddef.h>
#include <stdint.h>

#include "exchange_v1.h"

/* The daemon launches operation n when all parts of n - 2 have ended. */
#define EXPERTD_HT_BUFFERS 2u
/* A source counts its rows by eighths of its tokens, so that copies may begin with the first ones. */
#define EXPERTD_HT_SLICES 8u
/* Of a dispatch: the slices in front of this one are copied first, then all others. */
#define EXPERTD_HT_FIRST_SLICES 2u
#define EXPERTD_HT_PIECES 2u
/* Of a combine: chunks by slices. Few, since each leaves the links idle for about 6 us, and ever smaller: nothing hides
 * the sum of the last one, and the sum of each other one has to be over when the next one is there. On two H100 a slice
 * of 4096 tokens of 14 KiB is on its way for 20 us and summed in about 8. */
#define EXPERTD_HT_CHUNKS 3u
#define EXPERTD_HT_CHUNK_ENDS \
  { 4u, 7u, 8u }
#define EXPERTD_HT_TOKENS_MAX 65536u
#define EXPERTD_HT_HANDLES_MAX 512u
#define EXPERTD_HT_HANDLES_BYTES (UINT64_C(128) << 20)

/* Words of a slot, on the flag page behind those of ring_v1.h. `progress` of rank j: how much of what comes from it is
 * here, the slot's sequence times 8 plus a number: chunks that have arrived, BESIDE (the records of a dispatch) or ALL;
 * of the own rank ALL when everything that the others get has left. `plan`: what the daemon decided is here. These two
 * are written by the daemon and waited for by the client's stream, as are `active`, `voided` (a rank was aborted before
 * its copies; the sequence), `verdict` (a Reason, 0: rows move) and `rows` of rank j (how many rows of it a combine may
 * take; of the own rank also the first one, in the upper half). `packed` of a piece and `ended` are written by the
 * client. */
#define EXPERTD_HT_STEP_STRIDE 512u
#define EXPERTD_HT_STEP_OFFSET(slot) (EXPERTD_FLAG_PAGE_BYTES + UINT64_C(1) * (slot)*EXPERTD_HT_STEP_STRIDE)
#define EXPERTD_HT_STEP_PROGRESS 0u
#define EXPERTD_HT_STEP_PLAN 128u
#define EXPERTD_HT_STEP_ACTIVE 136u
#define EXPERTD_HT_STEP_VERDICT 144u
#define EXPERTD_HT_STEP_VOIDED 152u
#define EXPERTD_HT_STEP_ENDED 160u /* copied to the host together with `voided` */
#define EXPERTD_HT_STEP_PACKED 168u
#define EXPERTD_HT_STEP_ROWS 256u
#define EXPERTD_HT_FLAG_PAGE_BYTES EXPERTD_HT_STEP_OFFSET(EXPERTD_RING_SLOTS_MAX)
#define EXPERTD_HT_BESIDE 1u
#define EXPERTD_HT_ALL 7u
#define EXPERTD_HT_PROGRESS(seq, steps) (UINT64_C(8) * (seq) + (steps))

struct expertd_exchange_ht_shape {
  uint32_t ranks;       /* R, 1..16 */
  uint32_t num_experts; /* E, a multiple of R, at most 2048 */
  uint32_t hidden;      /* H, a multiple of 128, at most 16384 */
  uint32_t max_tokens;  /* M, 1..65536 */
  uint32_t top_k;       /* K, 1..32 */
};

struct expertd_exchange_ht_error {
  uint32_t reason; /* of the slice's first bad id, or 0 */
  uint32_t reserved;
  int64_t value;
};

/* At the start of a buffer: what a source counted. Rows per global expert follow, [slices, E] i32. */
struct expertd_exchange_ht_counts {
  struct expertd_exchange_ht_error errors[EXPERTD_HT_SLICES];
  int32_t rows[EXPERTD_HT_SLICES][EXPERTD_EXCHANGE_RANKS_MAX]; /* by destination */
};

/* What the daemon tells of a dispatch that moves rows. Copied to the GPU as a whole, and far larger than it need be:
 * small copies from the host wait for the compute engine. */
struct expertd_exchange_ht_plan {
  uint32_t recv_rows;
  uint32_t own_base; /* the first of the own rows in the own output */
  uint64_t reserved0;
  uint32_t expert_counts[256];
  int32_t rank_prefix[EXPERTD_EXCHANGE_RANKS_MAX * EXPERTD_EXCHANGE_RANKS_MAX]; /* [R,R], inclusive over sources */
  uint8_t reserved[32768 - 16 - 2048];
};

/* In front of a handle's table: rows by slice and destination, as the source counted them. */
struct expertd_exchange_ht_handle {
  int32_t rows[EXPERTD_HT_SLICES][EXPERTD_EXCHANGE_RANKS_MAX];
};

/* Offsets; all zero when the shape is outside its limits. Regions of the other ranks have R - 1 places: rank j's is j,
 * or j - 1 behind the own rank. */
struct expertd_exchange_ht_layout {
  uint64_t row_bytes_max;  /* of a payload */
  uint64_t side_bytes_max; /* of a row's side */
  /* In a buffer. */
  uint64_t counts_bytes; /* with the experts behind them */
  uint64_t plan;
  uint64_t rows;      /* of rows_bytes: payloads, one behind the other */
  uint64_t beside;    /* of beside_bytes: records of a dispatch for the others */
  uint64_t beside_in; /* of beside_bytes: those of the others */
  uint64_t weights;   /* of weights_bytes: [M,K] f32, of a combine */
  uint64_t rows_bytes;
  uint64_t beside_bytes;
  uint64_t weights_bytes;
  uint64_t buffer_bytes;
  /* In the window. */
  uint64_t handles;
  uint64_t handle_numbers; /* in a handle: [M,R] i32, the token's number among the slice's rows for the rank, or -1 */
  uint64_t handle_owners;  /* in a handle: [M,K] u8, the rank of each lane, 255 for none */
  uint64_t handle_bytes;
  uint64_t handle_count;
  uint64_t total_bytes;
};

static inline int expertd_exchange_ht_shape_ok(const struct expertd_exchange_ht_shape* shape) {
  return shape->ranks >= 1u && shape->ranks <= EXPERTD_EXCHANGE_RANKS_MAX && shape->num_experts >= shape->ranks &&
         shape->num_experts <= 2048u && shape->num_experts % shape->ranks == 0u &&
         shape->num_experts / shape->ranks <= 256u && shape->hidden >= 128u && shape->hidden <= 16384u &&
         shape->hidden % 128u == 0u && shape->max_tokens >= 1u && shape->max_tokens <= EXPERTD_HT_TOKENS_MAX &&
         shape->top_k >= 1u && shape->top_k <= 32u;
}

/* A record is what travels beside a row of a dispatch, so that it is one copy: the side, at the next multiple of 4 K
 * expert numbers of the destination (i32, -1 for none), K weights (f32) and the source's token, with TOKEN_WEIGHTED if
 * it gave weights. A cached dispatch has the side alone. Records are in the order of the rows. */
#define EXPERTD_HT_TOKEN_WEIGHTED UINT32_C(0x80000000)
/* A multiple of 16; 0: nothing travels beside the rows, and BESIDE is not told. */
static inline uint64_t expertd_exchange_ht_record_bytes(uint64_t side_bytes, uint32_t top_k, int cached) {
  const uint64_t routing = cached != 0 ? 0u : UINT64_C(8) * top_k + 4u;
  return (((side_bytes + 3u) & ~UINT64_C(3)) + routing + 15u) & ~UINT64_C(15);
}

static inline struct expertd_exchange_ht_layout expertd_exchange_ht_layout_of(
    const struct expertd_exchange_ht_shape* shape) {
  struct expertd_exchange_ht_layout at = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  uint64_t cursor = 0, lanes, others, fitting;
  if (!expertd_exchange_ht_shape_ok(shape)) {
    return at;
  }
  lanes = UINT64_C(1) * shape->max_tokens * shape->top_k;
  others = shape->ranks - 1u;
  at.row_bytes_max = UINT64_C(2) * shape->hidden;
  at.side_bytes_max =
      shape->hidden / 32u > EXPERTD_EXCHANGE_SIDE_BYTES ? shape->hidden / 32u : EXPERTD_EXCHANGE_SIDE_BYTES;
  at.counts_bytes = sizeof(struct expertd_exchange_ht_counts) + UINT64_C(4) * EXPERTD_HT_SLICES * shape->num_experts;
  at.rows_bytes = expertd_exchange_align(shape->max_tokens * at.row_bytes_max);
  at.beside_bytes =
      expertd_exchange_align(shape->max_tokens * expertd_exchange_ht_record_bytes(at.side_bytes_max, shape->top_k, 0));
  at.weights_bytes = expertd_exchange_align(lanes * 4u);
  (void)expertd_exchange_place(&cursor, at.counts_bytes);
  at.plan = expertd_exchange_place(&cursor, sizeof(struct expertd_exchange_ht_plan));
  at.rows = expertd_exchange_place(&cursor, others * at.rows_bytes);
  at.beside = expertd_exchange_place(&cursor, others * at.beside_bytes);
  at.beside_in = expertd_exchange_place(&cursor, others * at.beside_bytes);
  at.weights = expertd_exchange_place(&cursor, others * at.weights_bytes);
  at.buffer_bytes = cursor;
  at.handles = EXPERTD_HT_BUFFERS * at.buffer_bytes;
  cursor = expertd_exchange_align(sizeof(struct expertd_exchange_ht_handle));
  at.handle_numbers = expertd_exchange_place(&cursor, UINT64_C(4) * shape->max_tokens * shape->ranks);
  at.handle_owners = expertd_exchange_place(&cursor, lanes);
  at.handle_bytes = cursor;
  fitting = EXPERTD_HT_HANDLES_BYTES / at.handle_bytes;
  at.handle_count = fitting < 1u ? 1u : (fitting < EXPERTD_HT_HANDLES_MAX ? fitting : EXPERTD_HT_HANDLES_MAX);
  at.total_bytes = at.handles + at.handle_count * at.handle_bytes;
  return at;
}

/* Whether the window has room for rows of these sizes. */
static inline int expertd_exchange_ht_fits(const struct expertd_exchange_ht_layout* at, uint64_t row_bytes,
                                           uint64_t side_bytes) {
  return at->total_bytes != 0u && row_bytes >= 16u && row_bytes % 16u == 0u && row_bytes <= at->row_bytes_max &&
         side_bytes <= at->side_bytes_max;
}

/* Whether copy engines can execute a dispatch or combine of this form, of what all ranks give alike. Where the rule of
 * executor_v1.h says copies and this does not, the operation is one of the daemon's kernels, on all ranks. */
static inline int expertd_exchange_ht_serves(const struct expertd_exchange_ht_layout* at,
                                             const struct expertd_slot* slot) {
  const int bytes = slot->dtype == EXPERTD_DTYPE_BYTES;
  const uint64_t side = bytes ? UINT64_C(1) * slot->side_elements * slot->side_element_bytes : 0u;
  return (slot->flags & EXPERTD_SLOT_EXPANDED) == 0u &&
         expertd_exchange_ht_fits(at, bytes ? slot->row_bytes : at->row_bytes_max, side) != 0;
}

/* The first token of a slice; of slice EXPERTD_HT_SLICES the number of tokens, at most EXPERTD_HT_TOKENS_MAX. */
static inline uint32_t expertd_exchange_ht_slice(uint32_t tokens, uint32_t slice) {
  return tokens * slice / EXPERTD_HT_SLICES;
}

EXPERTD_ABI_ASSERT(sizeof(struct expertd_exchange_ht_counts) == 640, "exchange ht counts");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_exchange_ht_counts, rows) == 128, "exchange ht counts: rows");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_exchange_ht_plan) == 32768, "exchange ht plan");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_exchange_ht_handle) == 512, "exchange ht handle");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_exchange_ht_layout) == 144, "exchange ht layout");

#endif /* EXPERTD_EXCHANGE_HT_V1_H_ */
