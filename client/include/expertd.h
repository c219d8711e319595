/* SPDX-License-Identifier: Apache-2.0 */
/* The C interface of expertd's client library. C11; the headers that it includes lie beside it.
 *
 * Threads: every function may be called from any thread; calls on one session serialise inside, waits do not hold
 * locks. Operations of a group are collective: all ranks issue the same ones in the same order, so one thread per group
 * issues. Fork: a forked child inherits nothing; every call on a parent's object returns EXPERTD_REASON_FORKED. Attach
 * anew. Streams: `stream` is a CUstream/cudaStream_t on GPU sessions (NULL: the legacy default stream). On host
 * sessions operations of a session run in the order of issue and `stream` is ignored. Errors: every function returns
 * expertd_status_t; reason 0 is success. expertd_last_message() explains the last failure of the calling thread. Sizes
 * are bytes, times are nanoseconds, a timeout of 0 means the default of the callee. Structs begin with struct_size: set
 * it to sizeof (EXPERTD_INIT does), so that later versions can grow them. */
#ifndef EXPERTD_H_
#define EXPERTD_H_

#include <stddef.h>
#include <stdint.h>

#include "expertd_communication.h"
#include "expertd_reason.h"

#if defined(__GNUC__)
#define EXPERTD_API __attribute__((visibility("default")))
#else
#define EXPERTD_API
#endif
#ifdef __cplusplus
extern "C" {
#endif
#define EXPERTD_CLIENT_ABI_MAJOR 1
#define EXPERTD_CLIENT_ABI_MINOR 0

/* A zeroed struct with its struct_size: expertd_op_result_t result = EXPERTD_INIT(expertd_op_result_t); */
#ifdef __cplusplus
#define EXPERTD_INIT(type)                     \
  ([] {                                        \
    type expertd_zeroed{};                     \
    expertd_zeroed.struct_size = sizeof(type); \
    return expertd_zeroed;                     \
  }())
#else
#define EXPERTD_INIT(type) ((type){.struct_size = sizeof(type)})
#endif

typedef struct expertd_status {
  int32_t code;   /* enum expertd_code */
  int32_t reason; /* enum expertd_reason */
} expertd_status_t;

typedef struct expertd_session expertd_session_t;
typedef struct expertd_group expertd_group_t;
typedef struct expertd_buffer expertd_buffer_t;
typedef struct expertd_buffer_pair expertd_buffer_pair_t;
typedef void* expertd_stream_t;

typedef enum expertd_data_type {
  EXPERTD_BF16 = 1,
  EXPERTD_BYTES = 2, /* already quantised rows of any format: row_bytes each */
  EXPERTD_FP8_E4M3 = 3,
  EXPERTD_F32 = 4,
  EXPERTD_I32 = 5,
  EXPERTD_I64 = 6,
  EXPERTD_U8 = 7
} expertd_data_type_t;

/* ---- Text and versions ---- */

/* Explains the last failure of this thread, naming argument, value and allowed range. Never NULL. */
EXPERTD_API const char* expertd_last_message(void);
/* "PEER_LOST" for EXPERTD_REASON_PEER_LOST; "UNKNOWN" for numbers not in the list. */
EXPERTD_API const char* expertd_reason_name(int32_t reason);
EXPERTD_API const char* expertd_reason_sentence(int32_t reason);
EXPERTD_API int expertd_reason_is_retryable(int32_t reason);
EXPERTD_API const char* expertd_version(void);

/* ---- Session ---- */

typedef struct expertd_attach_options {
  size_t struct_size;
  const char* socket_path; /* NULL: $EXPERTD_SOCKET, else /run/expertd/attach.sock */
  const char* device;      /* "host:0", "cuda:1" (CUDA ordinal of this process), or a GPU's "GPU-..." UUID */
  const char* name;        /* for people; NULL: the program's name */
  const char* traceparent; /* W3C trace context, or NULL */
  uint64_t timeout_ns;     /* 0: 5 s */
} expertd_attach_options_t;

typedef enum expertd_device_type { EXPERTD_HOST = 1, EXPERTD_CUDA = 2 } expertd_device_type_t;

typedef struct expertd_session_info_s {
  size_t struct_size;
  uint64_t session_id;
  expertd_device_type_t device_type;
  char device[64];     /* "host:0" or the GPU's UUID */
  int32_t mps_active;  /* the daemon runs under MPS; signal and wait are small kernels */
  uint32_t ring_slots; /* operations that may be outstanding */
  uint32_t handles_max;
  uint64_t generation; /* changes when the daemon restarts */
} expertd_session_info_t;

/* Attaches to the node's daemon. UNAVAILABLE when none answers, NO_SUCH_DEVICE, MIG_UNSUPPORTED, PROTOCOL_VERSION,
 * SESSION_LIMIT, PERMISSION, DRAINING. */
EXPERTD_API expertd_status_t expertd_attach(const expertd_attach_options_t* options, expertd_session_t** session);
/* Ends the session: in-flight operations are aborted, groups are left, memory returns. Frees every object of it. */
EXPERTD_API expertd_status_t expertd_detach(expertd_session_t* session);
/* After UNAVAILABLE or GPU_LOST: attaches the same session object to the restarted daemon and re-creates its windows
 * and registrations (buffer pointers may change: read them again; contents of windows are lost). Groups must be joined
 * anew. */
EXPERTD_API expertd_status_t expertd_reattach(expertd_session_t* session, uint64_t timeout_ns);
EXPERTD_API expertd_status_t expertd_session_info(expertd_session_t* session, expertd_session_info_t* info);
/* OK, UNAVAILABLE (daemon gone), GPU_LOST (it said so before it ended), DRAINING. */
EXPERTD_API expertd_status_t expertd_session_state(expertd_session_t* session);

/* ---- Memory ---- */

/* A window: memory of the daemon, mapped here. Both sides keep it until destroyed. */
EXPERTD_API expertd_status_t expertd_window_create(expertd_session_t* session, uint64_t bytes,
                                                   expertd_buffer_t** buffer);
/* Registers memory of the caller. GPU: cudaMalloc memory travels as a CUDA IPC handle (with offset and size), VMM
 * memory as a descriptor where it was allocated exportable (else IPC_HANDLE_VMM). Host: memory from expertd_alloc only.
 */
EXPERTD_API expertd_status_t expertd_register(expertd_session_t* session, void* data, uint64_t bytes,
                                              expertd_buffer_t** buffer);
/* Host: registers [offset, offset + bytes) of a memfd sealed with F_SEAL_SHRINK. */
EXPERTD_API expertd_status_t expertd_register_fd(expertd_session_t* session, int fd, uint64_t offset, uint64_t bytes,
                                                 expertd_buffer_t** buffer);
/* Unregisters or destroys; waits until no operation in flight uses it (BUFFER_BUSY after 5 s). */
EXPERTD_API expertd_status_t expertd_buffer_release(expertd_buffer_t* buffer);
EXPERTD_API void* expertd_buffer_data(const expertd_buffer_t* buffer);
EXPERTD_API uint64_t expertd_buffer_bytes(const expertd_buffer_t* buffer);
/* Memory that operations reach without a copy, freed by expertd_free or with the session. Host: a registered sealed
 * memfd; GPU: a window. Aligned to 128 bytes. Tensors that lie in no known buffer are copied through a window of the
 * library (counted in expertd_client_metrics_text); on host sessions such outputs are filled by expertd_event_wait. */
EXPERTD_API expertd_status_t expertd_alloc(expertd_session_t* session, uint64_t bytes, void** data);
EXPERTD_API expertd_status_t expertd_free(expertd_session_t* session, void* data);
/* Copies between memory of the session's device and the host, either way, without a CUDA toolkit in the caller. GPU: in
 * the order of `stream`. Host sessions copy at once; wait for the operations that the bytes depend on before. */
EXPERTD_API expertd_status_t expertd_copy(expertd_session_t* session, void* destination, const void* source,
                                          uint64_t bytes, expertd_stream_t stream);
/* GPU: blocks until everything issued on `stream` ended, at most timeout_ns (0: 100 s; TIMEOUT). Host sessions: waits
 * for every operation of the session issued so far and fills their staged outputs. */
EXPERTD_API expertd_status_t expertd_stream_synchronize(expertd_session_t* session, expertd_stream_t stream,
                                                        uint64_t timeout_ns);

/* ---- Groups ---- */

typedef enum expertd_group_mode {
  EXPERTD_MODE_NORMAL = 1,    /* training, prefill: dispatch/combine */
  EXPERTD_MODE_INFERENCE = 2, /* decode: ll_dispatch/ll_combine */
  EXPERTD_MODE_AUTO = 3       /* both */
} expertd_group_mode_t;

/* FAIL: operations that need a lost rank end with PEER_LOST; the ranks leave and join again. MASK: the lost rank is
 * skipped and results are DEGRADED; the operation that ran when the rank was lost may end with PEER_LOST on one rank
 * and well on another, after which every rank goes on with the operation that follows it. It may join again. */
typedef enum expertd_on_rank_loss { EXPERTD_RANK_LOSS_FAIL = 1, EXPERTD_RANK_LOSS_MASK = 2 } expertd_on_rank_loss_t;

/* What the rows of a dispatch are. Rows that come back (combine, ll_combine) are BF16 always. */
typedef enum expertd_dispatch_dtype {
  EXPERTD_DISPATCH_BF16 = 1,  /* EXPERTD_BF16 */
  EXPERTD_DISPATCH_BYTES = 2, /* EXPERTD_BYTES */
  EXPERTD_DISPATCH_FP8 = 4    /* EXPERTD_BF16 with EXPERTD_USE_FP8: quantised on the way, ll_dispatch only */
} expertd_dispatch_dtype_t;

/* What every dispatch of a dynamic group delivers, and with it which calls the group takes. LL: ll_dispatch and
 * ll_combine, rows packed per expert as [L,N,H] with expert_counts, recv_src_info and layout_range. HT: dispatch and
 * combine, rows by source with topk_idx and topk_weights, or one per (token, local expert) with EXPERTD_EXPANDED. */
typedef enum expertd_output_format {
  EXPERTD_FORMAT_LL = 1, /* needs max_tokens <= 4096, and mode 0, AUTO or INFERENCE */
  EXPERTD_FORMAT_HT = 2  /* needs mode 0, AUTO or NORMAL */
} expertd_output_format_t;
/* What executes the operations of a group. SM: kernels of the daemon. COPY_ENGINE: kernels of this library do the local
 * work on the caller's stream, and the daemon has copies between the GPUs and no kernel, which a client that fills its
 * GPU cannot hold up; dispatch and combine with EXPERTD_EXPANDED or rows of more than 2H bytes are SM's anyway.
 * AUTO: each dispatch by a rule that all ranks have in common. An operation's result tells which it was. */
typedef enum expertd_group_executor {
  EXPERTD_GROUP_EXECUTOR_AUTO = 0,
  EXPERTD_GROUP_EXECUTOR_SM = 1,
  EXPERTD_GROUP_EXECUTOR_COPY_ENGINE = 2
} expertd_group_executor_t;

typedef struct expertd_group_options {
  size_t struct_size;
  const char* name;                    /* the same on every rank; 1..64 characters */
  uint32_t rank;                       /* 0..expert_parallel_size-1 */
  uint32_t expert_parallel_size;       /* R, 1..64; over several nodes to 512 */
  uint32_t num_experts;                /* E, a multiple of R, <= 2048, E/R <= 256 */
  uint32_t hidden;                     /* H, a multiple of 128, <= 16384 */
  uint32_t top_k;                      /* K, 1..32 */
  uint32_t max_tokens;                 /* per rank: <= 4096 with INFERENCE or AUTO, <= 65536 with NORMAL */
  expertd_group_mode_t mode;           /* 0: AUTO */
  expertd_on_rank_loss_t on_rank_loss; /* 0: FAIL */
  uint64_t op_timeout_ns;              /* 0: 100 s */
  uint64_t first_op_timeout_ns;        /* 0: 30 min */
  uint64_t join_timeout_ns;            /* 0: 60 s */
  /* Set of expertd_dispatch_dtype that the group will carry; 0: any. A dispatch of another one ends with WRONG_DTYPE,
   * and the low-latency window has no room for it: FP8 alone takes about a quarter less than any. With NORMAL it cannot
   * be FP8 alone. A struct_size that ends before this member means 0. */
  uint32_t dispatch_dtypes;
  /* expertd_output_format_t: a dynamic group, which serves decode and prefill with the same calls and without joining
   * anew. Every dispatch and combine of it gives a token_bound, the same on all ranks. The format decides which kernels
   * run, since each of them delivers one: those of low latency for any bound up to max_tokens, or those of high
   * throughput for any bound. The bound decides how the operation is scheduled: as low latency when it is at most
   * dynamic_ll_tokens (engine.schedule). Calls of the other format are refused with MODE_MISMATCH. UNSUPPORTED with a
   * daemon of a ring version before 1.3. 0: not dynamic; AUTO serves both calls, each with its own format. */
  uint32_t output_format;
  uint32_t dynamic_ll_tokens; /* 1..max_tokens; 0: the lesser of 512 and max_tokens. Only with output_format */
  /* GPUs: how many low-latency operations of the group may be captured in CUDA graphs and outstanding at once, 0..2 (2:
   * both halves of a double batch); 0: none is captured. Each takes two more buffers of the group's low-latency staging
   * and 12 MiB per rank, and two of the GPU's armed streams. Not with NORMAL; UNSUPPORTED on host devices and over
   * nodes with more than one rank each. A struct_size that ends before this member means 0. */
  uint32_t capture_lanes;
  /* AUTO, where every rank of the group can: without MPS COPY_ENGINE; under MPS COPY_ENGINE for split dispatches
   * (EXPERTD_ASYNC; of high throughput from 16 MiB on, by token_bound or max_tokens), if that takes at most 1 GiB, and
   * SM for others. Ranks split the same dispatches there, else OP_MISMATCH about executor. Elsewhere SM. COPY_ENGINE
   * ends the join with UNSUPPORTED, naming what is missing, on host devices, on GPUs that do not reach each other, and
   * where a library has no kernels for its GPU. A combine, and a cached dispatch, have the executor of the dispatch
   * that left the handle, split or not (else STALE_HANDLE). Captured operations are executed by SM in any group, so the
   * handle of a captured combine is that of a dispatch by SM. A struct_size that ends before this member means AUTO. */
  uint32_t executor;                             /* expertd_group_executor_t */
  uint32_t reserved;                             /* not read */
  expertd_communication_pattern_t communication; /* a struct_size that ends before this member means all zero */
} expertd_group_options_t;

typedef struct expertd_group_plan_s {
  size_t struct_size;
  uint64_t window_bytes; /* low-latency window per rank, on the device of the session as everything but pinned_bytes */
  uint64_t table_bytes;  /* the daemon's tables per rank; host devices: once for all ranks of the group */
  uint64_t handle_bytes; /* all handles per rank */
  uint64_t worst_rows;   /* rows of a dispatch output that can never overflow (R * max_tokens) */
  uint64_t handles;      /* that a rank may have at once (HANDLE_LIMIT beyond): fewer for large groups */
  uint64_t pinned_bytes; /* of the host per rank, if a rank is on a GPU that this one does not reach; else 0 */
} expertd_group_plan_t;

/* What a rank of the group would take on the session's device, to the byte as it is allocated; nothing is.
 * ARGUMENT_RANGE where a join would be refused with it. A struct_size that ends before `handles` gets the members in
 * front of it. */
EXPERTD_API expertd_status_t expertd_group_plan(expertd_session_t* session, const expertd_group_options_t* options,
                                                expertd_group_plan_t* plan);
/* Blocks until every rank has joined. CONFIG_MISMATCH names field and both values; DUPLICATE_RANK; JOIN_TIMEOUT. Under
 * MASK a lost rank (host devices) joins while the others run, and begins with a later dispatch of theirs. */
EXPERTD_API expertd_status_t expertd_group_join(expertd_session_t* session, const expertd_group_options_t* options,
                                                expertd_group_t** group);
EXPERTD_API expertd_status_t expertd_group_leave(expertd_group_t* group);

/* ---- Operations ----
 * Each is issued on `stream` and returns an event at once; the stream waits for the completion unless EXPERTD_ASYNC is
 * given: then computation may follow, and expertd_event_stream_wait (the receive half, or "hook") makes a stream wait.
 * Notation and results: R ranks, E experts, L = E/R, T tokens, K top-k, H hidden, M max_tokens, N = R*M, C
 * capacity_rows. Data pointers are multiples of 16 bytes. Failures of an operation come with its event.
 *
 * A call that is refused hands out no event and puts nothing on the stream, but it counts: it is this rank's operation
 * of the group, refused. The other ranks' operation ends with PEER_REJECTED naming this rank and the Reason as soon as
 * they have issued it, and what every rank issues next is the same operation again. So a refused call is not repeated
 * by this rank alone; a refused send (EXPERTD_ASYNC) has used up the number of its operation and has no receive half.
 * As every issue it waits for a free slot of the ring. A call that fails with CUDA after its operation was published
 * counts too, and ends at its deadline. These do not count, because the daemon cannot be told or nothing was issued,
 * and may be made again:
 * - FORKED, UNAVAILABLE, GPU_LOST, NO_SUCH_GROUP, MISSING_ARGUMENT about the group: there is no session or no group;
 * - RING_OVERFLOW: no slot became free before the operation's deadline;
 * - UNSUPPORTED on a stream that is being captured;
 * - any refusal under a daemon of ring version 1.0, whose other ranks wait for their deadline.
 *
 * CUDA graphs: on a stream that is being captured, ll_dispatch and ll_combine of a group with capture_lanes are issued
 * by every replay of the graph, not by the call. All other operations, groups without lanes and daemons of a ring
 * version before 1.3 refuse such a stream with UNSUPPORTED; issue them before the capture begins.
 * - The call blocks until every rank has captured the operation, at most its deadline. All ranks capture the same
 *   operations in one order (else OP_MISMATCH, about capture_lane where a rank issued it eagerly), and replay them in
 *   one order. Eager operations of the group may be issued between replays, by all ranks alike.
 * - Captured operations use the lanes in turn, and each waits for its own: a lane has one outstanding at a time, so two
 *   (EXPERTD_ASYNC) need capture_lanes = 2, and graphs of one group are launched behind each other. The event is for
 *   expertd_event_stream_wait, once, in the same capture; on the host it is refused with UNSUPPORTED.
 * - Inputs are read anew with each replay, ids and weights too; tokens and pointers are those of the capture. A lane of
 *   topk_idx with -1 is no token, so a graph for 64 tokens serves fewer.
 * - Buffers of captured operations stay until the group is left; before, releasing one ends with BUFFER_BUSY. A graph
 * is not launched after its group was left. A lane keeps at most 2048 operations (HANDLE_LIMIT).
 * - A replay has no result on the host. One that failed (a rank late beyond the longest timeout_ns of the lane, dead,
 * or at another operation) leaves expert_counts of ll_dispatch 0 and lets the stream go on; so do all later replays of
 *   that lane on every rank, until the group is left. Daemon's log and metrics have the Reason; each replay counts
 * there.
 *
 * expertd_layout is no operation of a group; nobody hears of its refusals. On GPU sessions it is one kernel of this
 * library on `stream`, without the daemon: its memory need not be registered, and what was issued ends even when the
 * daemon does. It is in the order of the stream with EXPERTD_ASYNC too. At its deadline it is reported as TIMEOUT, but
 * stays on the stream; its result has no times. After EXPERT_OUT_OF_RANGE the counts are those of the other ids. Where
 * the library has no kernels for the GPU (expertd_client_sessions_without_kernels_total), and for arguments that are to
 * be refused, the daemon executes it as it does on host sessions. */

enum expertd_op_flag {
  EXPERTD_ASYNC = 1,                /* the stream does not wait; use the event */
  EXPERTD_WORST_TOKENS = 2,         /* dispatch: C = worst case, rows behind the last get index -1 */
  EXPERTD_EXPANDED = 4,             /* dispatch, combine: one row per (token, local expert) */
  EXPERTD_KEEP_FOREIGN_WEIGHTS = 8, /* dispatch: do not zero weights where the index is -1 */
  EXPERTD_ORDER_LAST_LANE = 16,     /* combine: ranks in the order of each token's last top-k lane */
  EXPERTD_USE_FP8 = 32,             /* ll_dispatch: quantise to E4M3 with scales per 128 channels */
  EXPERTD_ROUND_SCALE = 64,         /* with USE_FP8: scales are powers of two */
  EXPERTD_UE8M0 = 128               /* with ROUND_SCALE: packed exponent bytes; H % 512 = 0 */
};

/* The routing a dispatch leaves for its combine. Plain value; generation 0 is "none". */
typedef struct expertd_handle {
  uint32_t index;
  uint32_t generation;
} expertd_handle_t;

/* One issued operation. Plain value. */
typedef struct expertd_event {
  expertd_session_t* session;
  uint64_t seq;
} expertd_event_t;

/* What did the work of an operation. NONE: nothing was launched, or the daemon's ring is older than 1.2 and does not
 * tell. A newer daemon may have more. */
typedef enum expertd_executor {
  EXPERTD_EXECUTOR_NONE = 0,
  EXPERTD_EXECUTOR_HOST = 1,
  EXPERTD_EXECUTOR_SM = 2,
  EXPERTD_EXECUTOR_COPY_ENGINE = 3
} expertd_executor_t;

typedef struct expertd_op_result {
  size_t struct_size;
  expertd_status_t status;
  uint32_t recv_rows; /* dispatch: Nr (expanded: rows including alignment gaps) */
  uint32_t expert_count_entries;
  const uint32_t* expert_counts; /* dispatch, ll_dispatch: rows per local expert; valid until 64 more operations */
  int32_t degraded;              /* computed under a rank mask */
  uint64_t rank_mask;            /* ranks 0..63 that took part */
  uint64_t epoch;
  int32_t rank; /* the rank that the status names, or -1 */
  /* Submission to start, start to end, submission to completion; 0: not reached. On a GPU an operation starts with its
   * first kernel, when the caller's stream has come to it, and execute_ns is the GPU's own time to the end of the last
   * one, waits for other ranks included. */
  uint64_t queue_ns, execute_ns, total_ns;
  uint64_t local_bytes, remote_bytes;
  uint32_t executor; /* expertd_executor_t */
  uint32_t sms;      /* multiprocessors that its largest kernel takes; 0 on host devices */
  /* Ranks 64..511: rank 64 + 64 i + b is bit b of word i. Not there in a struct_size that ends before it. */
  uint64_t rank_mask_more[7];
} expertd_op_result_t;

typedef struct expertd_layout_args {
  size_t struct_size;
  const void* topk_idx;         /* [T,K] */
  expertd_data_type_t idx_type; /* EXPERTD_I64 or EXPERTD_I32 */
  uint32_t tokens, top_k, num_experts, num_ranks;
  int32_t* tokens_per_rank;   /* [R], each token once */
  int32_t* tokens_per_node;   /* [1] on one node, or NULL */
  int32_t* tokens_per_expert; /* [E] */
  uint8_t* token_rank_mask;   /* [T,R] */
  uint32_t flags;
  uint64_t timeout_ns;
} expertd_layout_args_t;

typedef struct expertd_dispatch_args {
  size_t struct_size;
  const void* x;                                /* [T] rows: bf16 [H], or row_bytes bytes */
  expertd_data_type_t dtype;                    /* EXPERTD_BF16 or EXPERTD_BYTES */
  uint32_t row_bytes;                           /* EXPERTD_BYTES: a multiple of 16 */
  const void* side;                             /* EXPERTD_BYTES: [T,S], may be NULL */
  uint32_t side_elements;                       /* S */
  uint32_t side_element_bytes;                  /* 1, 2, 4 */
  int64_t side_row_stride, side_element_stride; /* bytes; 0,0 = row-major */
  const void* topk_idx;                         /* [T,K]; -1 = none */
  expertd_data_type_t idx_type;
  const float* topk_weights;      /* [T,K] or NULL */
  const uint8_t* token_rank_mask; /* [T,R] or NULL: routing by mask, topk_idx only carried */
  uint32_t tokens;
  expertd_handle_t cached;   /* generation != 0: routing of that handle, topk_* NULL */
  uint32_t capacity_rows;    /* rows of the outputs below */
  uint32_t expert_alignment; /* 0 or 1: none */
  void* recv_x;              /* [C] rows */
  void* recv_side;           /* [C,S] row-major */
  void* recv_topk_idx;       /* [C,K] of idx_type (expanded [C]) */
  float* recv_topk_weights;  /* [C,K] (expanded [C]) */
  int32_t* recv_src_info;    /* [C] source token, or NULL */
  int32_t* expert_counts;    /* [L] on the device, or NULL */
  int32_t* rank_prefix;      /* [R,R], or NULL */
  int64_t* wait_stats;       /* [R] nanoseconds added, or NULL */
  uint32_t flags;
  uint64_t timeout_ns;
  /* The greatest number of tokens that any rank passes with this operation, the same on all ranks: tokens..max_tokens.
   * Other bounds end the operation on all ranks with OP_MISMATCH naming a rank, its bound and that of the ranks before
   * it; a bound outside that range is ARGUMENT_RANGE. 0: not given, which a dynamic group refuses. A struct_size that
   * ends before this member means 0. UNSUPPORTED with a daemon of a ring version before 1.3. */
  uint32_t token_bound;
} expertd_dispatch_args_t;

typedef struct expertd_combine_args {
  size_t struct_size;
  const void* x;             /* [C,H] bf16, rows as dispatched */
  uint32_t rows;             /* C */
  const float* topk_weights; /* [C,K] (expanded [C]) or NULL */
  const void* bias0;         /* [T,H] bf16 or NULL */
  const void* bias1;
  expertd_handle_t handle;
  uint32_t tokens;              /* T of the dispatch */
  void* combined_x;             /* [T,H] bf16 */
  float* combined_topk_weights; /* [T,K] or NULL */
  int64_t* wait_stats;
  uint32_t flags;
  uint64_t timeout_ns;
  uint32_t token_bound; /* see expertd_dispatch_args_t */
} expertd_combine_args_t;

typedef struct expertd_ll_dispatch_args {
  size_t struct_size;
  const void* x; /* [T,H] bf16, or rows of row_bytes */
  expertd_data_type_t dtype;
  uint32_t row_bytes;
  const void* side;
  uint32_t side_elements, side_element_bytes;
  int64_t side_row_stride, side_element_stride;
  const void* topk_idx;
  expertd_data_type_t idx_type;
  uint32_t tokens;
  void* recv_x;           /* [L,N] rows; NULL: the group's window, see expertd_ll_outputs */
  void* recv_scales;      /* f32 [L,H/128,N] or UE8M0 i32 [L,H/512,N]; BYTES: side [L,N,S] */
  int32_t* expert_counts; /* [L] */
  int32_t* recv_src_info; /* [L,N] */
  int64_t* layout_range;  /* [L,R] (begin << 32) | count */
  int32_t* stats;         /* [L] rows added, or NULL */
  int64_t* wait_stats;    /* [R] nanoseconds added, or NULL */
  uint32_t flags;
  uint64_t timeout_ns;
  uint32_t token_bound; /* see expertd_dispatch_args_t */
} expertd_ll_dispatch_args_t;

typedef struct expertd_ll_combine_args {
  size_t struct_size;
  const void* x;        /* [L,N,H] bf16; NULL: the group's window (zero copy), see expertd_ll_combine_input */
  const void* topk_idx; /* as dispatched; -1 lanes are skipped */
  expertd_data_type_t idx_type;
  const float* topk_weights; /* [T,K] */
  expertd_handle_t handle;
  uint32_t tokens;
  void* combined_x; /* [T,H] bf16 */
  int64_t* wait_stats;
  uint32_t flags;
  uint64_t timeout_ns;
  uint32_t token_bound; /* see expertd_dispatch_args_t */
} expertd_ll_combine_args_t;

/* Where ll_dispatch puts its results when the caller gives no pointers: fixed places in the group's window, two sets
 * used in turn. `x` is also where the expert may write its output for a zero-copy ll_combine (bf16 [L,N,H]). */
typedef struct expertd_ll_outputs {
  size_t struct_size;
  void* recv_x;
  void* recv_scales; /* NULL when the group carries BF16 only */
  int32_t* expert_counts;
  int32_t* recv_src_info;
  int64_t* layout_range;
  void* combine_x;
  uint32_t rows_per_expert; /* N */
} expertd_ll_outputs_t;

EXPERTD_API expertd_status_t expertd_barrier(expertd_group_t* group, expertd_stream_t stream, uint32_t flags,
                                             uint64_t timeout_ns, expertd_event_t* event);
EXPERTD_API expertd_status_t expertd_layout(expertd_session_t* session, const expertd_layout_args_t* args,
                                            expertd_stream_t stream, expertd_event_t* event);
EXPERTD_API expertd_status_t expertd_dispatch(expertd_group_t* group, const expertd_dispatch_args_t* args,
                                              expertd_stream_t stream, expertd_handle_t* handle,
                                              expertd_event_t* event);
EXPERTD_API expertd_status_t expertd_combine(expertd_group_t* group, const expertd_combine_args_t* args,
                                             expertd_stream_t stream, expertd_event_t* event);
EXPERTD_API expertd_status_t expertd_ll_dispatch(expertd_group_t* group, const expertd_ll_dispatch_args_t* args,
                                                 expertd_stream_t stream, expertd_handle_t* handle,
                                                 expertd_event_t* event);
EXPERTD_API expertd_status_t expertd_ll_combine(expertd_group_t* group, const expertd_ll_combine_args_t* args,
                                                expertd_stream_t stream, expertd_event_t* event);
/* Outputs of the ll_dispatch that left `handle`, valid until the second ll_dispatch after it. */
EXPERTD_API expertd_status_t expertd_ll_handle_outputs(expertd_group_t* group, expertd_handle_t handle,
                                                       expertd_ll_outputs_t* outputs);
/* A dispatch that fails leaves no handle: what is submitted with it afterwards is refused with STALE_HANDLE. */
/* Frees the handle's place (handles_max per session, HANDLE_LIMIT beyond). Low-latency handles are freed in turn. */
EXPERTD_API expertd_status_t expertd_handle_free(expertd_group_t* group, expertd_handle_t handle);

/* ---- Events ---- */

/* 1 in *done when the operation ended, well or not. */
EXPERTD_API expertd_status_t expertd_event_query(expertd_event_t event, int* done);
/* Blocks the calling thread until the operation ended; returns its status and fills result (may be NULL). TIMEOUT when
 * timeout_ns (0: its own deadline + 1 s) passes first. UNAVAILABLE or GPU_LOST within 200 ms of the daemon's end. */
EXPERTD_API expertd_status_t expertd_event_wait(expertd_event_t event, uint64_t timeout_ns,
                                                expertd_op_result_t* result);
/* Makes `stream` wait for the operation (the receive half). On host sessions this is a no-op: order is given. */
EXPERTD_API expertd_status_t expertd_event_stream_wait(expertd_event_t event, expertd_stream_t stream);

/* ---- Metrics ---- */

/* Prometheus text of this process's own view: submit-to-complete histogram per operation, bytes, staged copies,
 * re-attaches. Returns the bytes needed (without the terminating 0); writes at most `capacity`. */
EXPERTD_API size_t expertd_client_metrics_text(char* text, size_t capacity);

#ifdef __cplusplus
}
#endif

#include "expertd_masks.h"
#include "expertd_queue.h"

#endif /* EXPERTD_H_ */
