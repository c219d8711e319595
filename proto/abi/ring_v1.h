/* SPDX-License-Identifier: Apache-2.0 */
/* Shared-memory layout of one session's ring: the memfd that the daemon creates, hands over the attach socket and maps
 * beside the client. Byte-level spec: ring_v1.md; golden vectors: tests/abi. Fixed-width little-endian integers,
 * natural alignment, offsets instead of pointers, 64-bit indices that only grow. Reserved bytes are zero and are
 * checked. Compiles as C11 and C++20. A change of any offset is a new major version. */
#ifndef EXPERTD_RING_V1_H_
#define EXPERTD_RING_V1_H_

#include <stddef.h>
#include <stdint.h>

#define EXPERTD_RING_MAGIC 0x31474e5244505845ULL /* "EXPDRNG1" read as little-endian */
#define EXPERTD_ABI_MAJOR 1u
/* 1: EXPERTD_SLOT_REFUSED. 2: executor and sms of a completion. 3: token_bound of a slot; EXPERTD_SLOT_CAPTURED and the
 * words of captured operations; EXPERTD_SLOT_COPY_ENGINE and EXPERTD_SLOT_SPLIT; end_reason of the header. 4:
 * rank_mask_more of a completion. A client reads the daemon's in the header and uses nothing that is newer. */
#define EXPERTD_ABI_MINOR 4u

#define EXPERTD_RING_HEADER_BYTES 4096u
#define EXPERTD_SLOT_BYTES 512u
#define EXPERTD_COMPLETION_BYTES 2048u
#define EXPERTD_RING_SLOTS_MAX 64u
#define EXPERTD_TENSOR_COUNT 18u
#define EXPERTD_COMPLETION_EXPERTS 256u
#define EXPERTD_COMPLETION_MASK_WORDS 7u /* behind rank_mask */
/* Sequences live in [1, 2^62); this word releases every waiter and is never a sequence. */
#define EXPERTD_ABORT_WORD 0x7fffffffffffffffULL
/* Doorbell and completion words of slot i on the GPU flag page, for devices that have one. */
#define EXPERTD_FLAG_STRIDE 128u
#define EXPERTD_DOORBELL_OFFSET(slot) (UINT64_C(2) * (slot)*EXPERTD_FLAG_STRIDE)
#define EXPERTD_COMPLETION_WORD_OFFSET(slot) ((UINT64_C(2) * (slot) + 1u) * EXPERTD_FLAG_STRIDE)
/* A device-readable result word behind each completion word: the Reason of the operation (0 = ok). */
#define EXPERTD_RESULT_WORD_OFFSET(slot) (EXPERTD_COMPLETION_WORD_OFFSET(slot) + 8u)
/* Behind them, for operations by copy engines (1.3): of each slot the words by which its parts follow each other, all
 * of them carrying the slot's sequence. `arrived` [2 steps, 16 ranks]: what rank j copies in this step is here, written
 * by the daemon. `active`: the ranks that take part, a mask, written by the daemon before the own rank's arrived word.
 * `rung`: the client's second doorbell, in front of its partial sums. `ended`: the client's kernels are through.
 * `voided`: a rank's part was aborted before its copies, so its arrived words say nothing; written by the daemon. */
#define EXPERTD_STEP_STRIDE 512u
#define EXPERTD_STEP_RANKS 16u
#define EXPERTD_STEP_OFFSET(slot) \
  (UINT64_C(2) * EXPERTD_RING_SLOTS_MAX * EXPERTD_FLAG_STRIDE + UINT64_C(1) * (slot)*EXPERTD_STEP_STRIDE)
#define EXPERTD_STEP_ARRIVED_OFFSET(slot, step, rank) \
  (EXPERTD_STEP_OFFSET(slot) + UINT64_C(8) * ((step)*EXPERTD_STEP_RANKS + (rank)))
#define EXPERTD_STEP_ACTIVE_OFFSET(slot) (EXPERTD_STEP_OFFSET(slot) + 256u)
#define EXPERTD_STEP_RUNG_OFFSET(slot) (EXPERTD_STEP_OFFSET(slot) + 384u)
#define EXPERTD_STEP_ENDED_OFFSET(slot) (EXPERTD_STEP_OFFSET(slot) + 392u)
#define EXPERTD_STEP_VOIDED_OFFSET(slot) (EXPERTD_STEP_OFFSET(slot) + 264u) /* beside `active` */
/* Behind those, words of the captured operations of lane i of the session (1.3). They reset themselves: the client's
 * graph writes the operation's entry (>= 1) into the doorbell, which the daemon takes back to 0; the daemon writes 1
 * into the completion word, which the graph takes back to 0. */
#define EXPERTD_CAPTURE_LANES_MAX 16u
#define EXPERTD_CAPTURE_DOORBELL_OFFSET(lane) \
  (EXPERTD_STEP_OFFSET(EXPERTD_RING_SLOTS_MAX) + UINT64_C(2) * (lane)*EXPERTD_FLAG_STRIDE)
#define EXPERTD_CAPTURE_COMPLETION_OFFSET(lane) (EXPERTD_CAPTURE_DOORBELL_OFFSET(lane) + EXPERTD_FLAG_STRIDE)
#define EXPERTD_CAPTURE_RESULT_OFFSET(lane) (EXPERTD_CAPTURE_COMPLETION_OFFSET(lane) + 8u)
#define EXPERTD_CAPTURE_RUNG_MAX 0xffffu             /* entries are 1 .. this */
#define EXPERTD_CAPTURE_CANCEL 0x4000000000000000ULL /* written by the daemon into a doorbell that is 0 */
#define EXPERTD_FLAG_PAGE_BYTES EXPERTD_CAPTURE_DOORBELL_OFFSET(EXPERTD_CAPTURE_LANES_MAX)

enum expertd_ring_session_flag {
  EXPERTD_SESSION_DRAINING = 1u, /* operations end that any rank had submitted; new ones are refused with DRAINING */
  EXPERTD_SESSION_CLOSED = 2u    /* the daemon ended the session; every wait returns end_reason, else UNAVAILABLE */
};

/* Page 0. Each line that one side writes while the other reads has 128 bytes of its own. */
struct expertd_ring_header {
  uint64_t magic;
  uint16_t abi_major;
  uint16_t abi_minor;
  uint32_t header_bytes;
  uint32_t slot_count; /* a power of two, 8..64 */
  uint32_t slot_bytes;
  uint32_t completion_bytes;
  uint32_t feature_bits;
  uint64_t session_id;
  uint64_t generation; /* of the daemon process: windows of another generation are stale */
  uint64_t slots_offset;
  uint64_t completions_offset;
  uint64_t total_bytes;
  uint8_t reserved0[56];
  /* 128: written by the client (release), read by the daemon (acquire): slots ever submitted. */
  uint64_t submit_tail;
  uint8_t reserved1[120];
  /* 256: written by the daemon: slots ever copied out. */
  uint64_t submit_head;
  uint8_t reserved2[120];
  /* 384: daemon: 1 while its loop sleeps; the client writes its wake eventfd after submitting when it reads 1. */
  uint32_t daemon_sleeping;
  uint8_t reserved3[124];
  /* 512: client: number of threads sleeping on completion_futex. */
  uint32_t client_waiters;
  uint8_t reserved4[124];
  /* 640: daemon: increments once per completion; a shared futex word. */
  uint32_t completion_futex;
  uint32_t session_flags;
  uint32_t end_reason; /* daemon: why it ends every session (1.3), written once before CLOSED; 0 = it said nothing */
  uint8_t reserved5[116];
  uint8_t reserved6[3328];
};

enum expertd_op {
  EXPERTD_OP_NONE = 0,
  EXPERTD_OP_BARRIER = 1,
  EXPERTD_OP_LAYOUT = 2,
  EXPERTD_OP_DISPATCH = 3,
  EXPERTD_OP_COMBINE = 4,
  EXPERTD_OP_LL_DISPATCH = 5,
  EXPERTD_OP_LL_COMBINE = 6,
  EXPERTD_OP_COUNT = 7
};

enum expertd_slot_flag {
  EXPERTD_SLOT_CACHED = 1u,               /* dispatch: take the routing of the handle, move data only */
  EXPERTD_SLOT_EXPANDED = 2u,             /* dispatch/combine: one row per (token, local expert) */
  EXPERTD_SLOT_WORST_TOKENS = 4u,         /* dispatch: rows behind the last get index -1, no host in the loop */
  EXPERTD_SLOT_ZERO_FOREIGN_WEIGHTS = 8u, /* dispatch: weight 0 where the index is -1 */
  EXPERTD_SLOT_ORDER_LAST_LANE = 16u,     /* combine: ranks in the order of the token's last top-k lane */
  EXPERTD_SLOT_QUANTISE_FP8 = 32u,        /* ll_dispatch: bf16 in, e4m3 + scales out */
  EXPERTD_SLOT_ROUND_SCALE = 64u,         /* with QUANTISE_FP8: scales are powers of two */
  EXPERTD_SLOT_UE8M0 = 128u,              /* with ROUND_SCALE: scales as packed exponent bytes */
  EXPERTD_SLOT_RUNG = 256u,               /* the doorbell has rung: do not wait for the GPU word */
  EXPERTD_SLOT_REFUSED = 512u,            /* alone: the rank refused its operation itself, refused_* say why (1.1) */
  EXPERTD_SLOT_CAPTURED = 1024u,          /* ll_dispatch, ll_combine: keep it for replays, run nothing now (1.3) */
  EXPERTD_SLOT_COPY_ENGINE = 2048u,       /* ll_*: the client's kernels do the local work (1.3) */
  EXPERTD_SLOT_SPLIT = 4096u,             /* dispatch, ll_dispatch: the caller computes meanwhile (1.3) */
  EXPERTD_SLOT_FLAGS_ALL = 8191u
};

enum expertd_dtype {
  EXPERTD_DTYPE_NONE = 0,
  EXPERTD_DTYPE_BF16 = 1,  /* 2 bytes */
  EXPERTD_DTYPE_BYTES = 2, /* already quantised rows: row_bytes bytes each, side tensor beside them */
  EXPERTD_DTYPE_FP8_E4M3 = 3,
  EXPERTD_DTYPE_F32 = 4,
  EXPERTD_DTYPE_I32 = 5,
  EXPERTD_DTYPE_I64 = 6,
  EXPERTD_DTYPE_U8 = 7,
  EXPERTD_DTYPE_COUNT = 8
};

/* What the rows of a dispatch or ll_dispatch are, as bits: BF16 and BYTES are the dtypes of these names, FP8 is BF16
 * with EXPERTD_SLOT_QUANTISE_FP8. A group may be joined with a set of them (0: any), which its dispatches are held to.
 */
#define EXPERTD_PAYLOADS(X) \
  X(BF16, 1, "bf16")        \
  X(BYTES, 2, "bytes")      \
  X(FP8, 4, "fp8")

enum expertd_payload {
#define EXPERTD_PAYLOAD_ENUM(name, bit, text) EXPERTD_PAYLOAD_##name = bit,
  EXPERTD_PAYLOADS(EXPERTD_PAYLOAD_ENUM)
#undef EXPERTD_PAYLOAD_ENUM
      EXPERTD_PAYLOADS_ALL = 7
};

/* Index into expertd_slot.tensors. R ranks, E experts, L = E/R, T tokens, K top-k, H hidden, N = R * max_tokens,
 * C = capacity_rows, S = side_elements. Element types in brackets; idx = int32 or int64 by topk_idx_bytes. */
enum expertd_tensor {
  EXPERTD_IN_X = 0,               /* dispatch [T] rows of row_bytes; combine [C,H] bf16; ll_combine [L,N,H] bf16 */
  EXPERTD_IN_TOPK_IDX = 1,        /* [T,K] idx */
  EXPERTD_IN_TOPK_WEIGHTS = 2,    /* dispatch, ll_combine [T,K] f32; combine [C,K] f32 (expanded: [C]) */
  EXPERTD_IN_SIDE = 3,            /* [T,S] elements of side_element_bytes, any strides */
  EXPERTD_IN_BIAS0 = 4,           /* [T,H] bf16 */
  EXPERTD_IN_BIAS1 = 5,           /* [T,H] bf16 */
  EXPERTD_IN_TOKEN_RANK_MASK = 6, /* [T,R] u8 */
  EXPERTD_OUT_X = 7,              /* dispatch [C] rows; combine [T,H] bf16; ll_dispatch [L,N] rows */
  EXPERTD_OUT_SIDE = 8,           /* dispatch [C,S]; ll_dispatch scales [L,S,N] (f32) or [L,N,S] (bytes in) */
  EXPERTD_OUT_TOPK_IDX = 9,       /* [C,K] i32 or i64 as the input; expanded [C]: local expert or -1 */
  EXPERTD_OUT_TOPK_WEIGHTS = 10,  /* dispatch [C,K] f32 (expanded [C]); combine [T,K] f32 */
  EXPERTD_OUT_EXPERT_COUNTS = 11, /* [L] i32; layout: [E] i32 */
  EXPERTD_OUT_RANK_PREFIX = 12,   /* dispatch [R,R] i32 inclusive over sources; layout: tokens per rank [R] i32 */
  EXPERTD_OUT_SRC_INFO = 13,      /* dispatch [C] i32, ll_dispatch [L,N] i32: token index on the source rank */
  EXPERTD_OUT_LAYOUT_RANGE = 14,  /* ll_dispatch [L,R] i64 (begin << 32) | count; layout: tokens per node [nodes] i32 */
  EXPERTD_OUT_STATS = 15,         /* ll_dispatch [L] i32, rows are added */
  EXPERTD_OUT_WAIT_STATS = 16,    /* [R] i64, nanoseconds waited for each rank are added */
  EXPERTD_OUT_TOKEN_RANK_MASK = 17 /* layout [T,R] u8 */
};

/* Where a tensor lies: a buffer or window of the session and an offset into it. buffer 0 = not given. */
struct expertd_tensor_ref {
  uint32_t buffer;
  uint32_t reserved;
  uint64_t offset;
};

struct expertd_slot {
  uint64_t seq; /* position in the ring plus one */
  uint32_t op;
  uint32_t flags;
  uint64_t group;       /* 0 for layout */
  uint64_t timeout_ns;  /* 0 = the group's */
  uint64_t submit_ns;   /* CLOCK_MONOTONIC at submission */
  uint8_t trace_id[16]; /* opaque, returned in logs and dumps */
  uint32_t tokens;
  uint32_t top_k;
  uint32_t hidden;
  uint32_t dtype; /* expertd_dtype of x */
  uint32_t row_bytes;
  uint32_t topk_idx_bytes; /* 4 or 8 */
  uint32_t side_elements;
  uint32_t side_element_bytes; /* 1, 2 or 4 */
  int64_t side_row_stride;     /* bytes */
  int64_t side_element_stride; /* bytes */
  uint32_t capacity_rows;
  uint32_t expert_alignment;
  uint32_t handle_index;
  uint32_t handle_generation; /* >= 1 */
  uint32_t num_experts;       /* layout only */
  uint32_t num_ranks;         /* layout only */
  uint32_t token_bound;       /* most tokens that any rank passes with this operation (1.3); 0 = not given */
  uint32_t capture_lane;      /* with EXPERTD_SLOT_CAPTURED: 0 .. the group's capture_lanes - 1 (1.3) */
  uint32_t exchange_buffer;   /* with COPY_ENGINE: number of the group's operation modulo 4 (1.3) */
  uint8_t reserved[52];
  /* With EXPERTD_SLOT_REFUSED, else zero: what the client told its caller, as a completion says it. */
  uint32_t refused_reason;   /* expertd_reason, not NONE */
  uint32_t refused_argument; /* expertd_argument */
  int64_t refused_value;
  int64_t refused_minimum;
  int64_t refused_maximum;
  struct expertd_tensor_ref tensors[EXPERTD_TENSOR_COUNT];
};

enum expertd_completion_flag {
  EXPERTD_COMPLETION_DEGRADED = 1u /* computed under a rank mask */
};

/* What a TIMEOUT waited for. COUNTS with rank -1: of a whole node, whose ranks are minimum to maximum, and which of
   them is late is known there. */
enum expertd_missing {
  EXPERTD_MISSING_NONE = 0,
  EXPERTD_MISSING_SUBMISSION = 1,
  EXPERTD_MISSING_DOORBELL = 2,
  EXPERTD_MISSING_COUNTS = 3,
  EXPERTD_MISSING_ROWS = 4
};

/* What did the work of an operation (1.2). NONE: nothing was launched, or the daemon is older and does not tell. */
enum expertd_completion_executor {
  EXPERTD_COMPLETION_EXECUTOR_NONE = 0,
  EXPERTD_COMPLETION_EXECUTOR_HOST = 1,
  EXPERTD_COMPLETION_EXECUTOR_SM = 2,
  EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE = 3
};

/* Written by the daemon in place at the slot's index; seq is stored last (release). */
struct expertd_completion {
  uint64_t seq;
  uint32_t reason;
  uint32_t flags;
  /* What the Reason is about: argument (expertd_argument), its value and the allowed range, the rank it names. */
  uint32_t argument;
  uint32_t missing;
  int64_t value;
  int64_t minimum;
  int64_t maximum;
  int32_t rank; /* -1 = none */
  uint32_t peer_reason;
  uint64_t group_op;
  uint64_t epoch;
  uint64_t rank_mask; /* ranks 0..63 that took part, bit per rank */
  uint32_t recv_rows;
  uint32_t expert_count_entries;
  uint64_t admit_ns; /* CLOCK_MONOTONIC at each step; 0 = not reached */
  uint64_t launch_ns;
  uint64_t start_ns;
  uint64_t end_ns;
  uint64_t complete_ns;
  uint64_t local_bytes;
  uint64_t remote_bytes;
  uint32_t executor; /* expertd_completion_executor (1.2) */
  uint32_t sms;      /* multiprocessors that the operation's largest kernel takes (1.2); 0 without one */
  /* Of a captured operation (1.3): what its graph writes into the doorbell, and the place of its lane's words. */
  uint32_t capture_entry;
  uint32_t capture_words;
  uint64_t rank_mask_more[EXPERTD_COMPLETION_MASK_WORDS]; /* ranks 64..511 that took part (1.4) */
  uint8_t reserved[40];
  uint32_t expert_counts[EXPERTD_COMPLETION_EXPERTS]; /* dispatch: rows per local expert, rounded up as asked */
  uint8_t reserved_tail[768];
};

/* Names of the arguments a Reason can be about; numbers are stable. Of DISPATCH_DTYPE the value is the operation's
 * expertd_payload, and the maximum the set of them that its group was joined with; of EXECUTOR it is the operation's
 * expertd_completion_executor. */
#define EXPERTD_ARGUMENTS(X)                      \
  X(NONE, 0, "argument")                          \
  X(OP, 1, "op")                                  \
  X(FLAGS, 2, "flags")                            \
  X(GROUP, 3, "group")                            \
  X(TIMEOUT, 4, "timeout_ns")                     \
  X(TOKENS, 5, "tokens")                          \
  X(TOP_K, 6, "top_k")                            \
  X(HIDDEN, 7, "hidden")                          \
  X(DTYPE, 8, "dtype")                            \
  X(ROW_BYTES, 9, "row_bytes")                    \
  X(TOPK_IDX_BYTES, 10, "topk_idx_bytes")         \
  X(SIDE_ELEMENTS, 11, "side_elements")           \
  X(SIDE_ELEMENT_BYTES, 12, "side_element_bytes") \
  X(SIDE_STRIDE, 13, "side_stride")               \
  X(CAPACITY_ROWS, 14, "capacity_rows")           \
  X(EXPERT_ALIGNMENT, 15, "expert_alignment")     \
  X(HANDLE, 16, "handle")                         \
  X(NUM_EXPERTS, 17, "num_experts")               \
  X(NUM_RANKS, 18, "num_ranks")                   \
  X(RESERVED, 19, "reserved bytes")               \
  X(SEQ, 20, "seq")                               \
  X(EXPERT_ID, 21, "topk_idx value")              \
  X(RECV_ROWS, 22, "received rows")               \
  X(REFUSED_REASON, 23, "refused_reason")         \
  X(REFUSED_ARGUMENT, 24, "refused_argument")     \
  X(DISPATCH_DTYPE, 25, "dispatch dtype")         \
  X(TOKEN_BOUND, 26, "token_bound")               \
  X(CAPTURE_LANE, 27, "capture_lane")             \
  X(EXCHANGE_BUFFER, 28, "exchange_buffer")       \
  X(EXECUTOR, 29, "executor")                     \
  X(IN_X, 32, "x")                                \
  X(IN_TOPK_IDX, 33, "topk_idx")                  \
  X(IN_TOPK_WEIGHTS, 34, "topk_weights")          \
  X(IN_SIDE, 35, "side")                          \
  X(IN_BIAS0, 36, "bias0")                        \
  X(IN_BIAS1, 37, "bias1")                        \
  X(IN_TOKEN_RANK_MASK, 38, "token_rank_mask")    \
  X(OUT_X, 39, "out")                             \
  X(OUT_SIDE, 40, "out_side")                     \
  X(OUT_TOPK_IDX, 41, "out_topk_idx")             \
  X(OUT_TOPK_WEIGHTS, 42, "out_topk_weights")     \
  X(OUT_EXPERT_COUNTS, 43, "out_expert_counts")   \
  X(OUT_RANK_PREFIX, 44, "out_rank_prefix")       \
  X(OUT_SRC_INFO, 45, "out_src_info")             \
  X(OUT_LAYOUT_RANGE, 46, "out_layout_range")     \
  X(OUT_STATS, 47, "out_stats")                   \
  X(OUT_WAIT_STATS, 48, "out_wait_stats")         \
  X(OUT_TOKEN_RANK_MASK, 49, "out_token_rank_mask")

enum expertd_argument {
#define EXPERTD_ARGUMENT_ENUM(name, number, text) EXPERTD_ARGUMENT_##name = number,
  EXPERTD_ARGUMENTS(EXPERTD_ARGUMENT_ENUM)
#undef EXPERTD_ARGUMENT_ENUM
};
/* The argument of tensor i of a slot. */
#define EXPERTD_ARGUMENT_OF_TENSOR(i) (32u + (i))

#ifdef __cplusplus
#define EXPERTD_ABI_ASSERT(condition, text) static_assert(condition, text)
#else
#define EXPERTD_ABI_ASSERT(condition, text) _Static_assert(condition, text)
#endif
EXPERTD_ABI_ASSERT(sizeof(struct expertd_ring_header) == EXPERTD_RING_HEADER_BYTES, "header: bump the major version");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_ring_header, submit_tail) == 128, "submit_tail");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_ring_header, submit_head) == 256, "submit_head");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_ring_header, daemon_sleeping) == 384, "daemon_sleeping");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_ring_header, client_waiters) == 512, "client_waiters");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_ring_header, completion_futex) == 640, "completion_futex");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_ring_header, end_reason) == 648, "end_reason");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_tensor_ref) == 16, "tensor_ref: bump the major version");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_slot) == EXPERTD_SLOT_BYTES, "slot: bump the major version");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_slot, token_bound) == 128, "token_bound");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_slot, reserved) == 140, "reserved");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_slot, refused_reason) == 192, "refused_reason");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_slot, tensors) == 224, "tensors");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_completion) == EXPERTD_COMPLETION_BYTES, "completion: bump the major version");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_completion, executor) == 144, "executor");
EXPERTD_ABI_ASSERT(offsetof(struct expertd_completion, expert_counts) == 256, "expert_counts");

#endif /* EXPERTD_RING_V1_H_ */
