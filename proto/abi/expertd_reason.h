/* SPDX-License-Identifier: Apache-2.0 */
/* The one numbered list of Reasons. The same number appears in ring completions, gRPC error details, metric labels,
 * log lines and language bindings. Numbers are never reused; a removed Reason leaves a hole. Plain C11, no dependency.
 * X(NAME, number, CODE, retryable, sentence): CODE is one of EXPERTD_CODE_*; the sentence says what happened and, where
 * there is something, what to do. */
#ifndef EXPERTD_REASON_H_
#define EXPERTD_REASON_H_

/* Codes have the numbers of the gRPC status codes of the same name. */
enum expertd_code {
  EXPERTD_CODE_OK = 0,
  EXPERTD_CODE_CANCELLED = 1,
  EXPERTD_CODE_UNKNOWN = 2,
  EXPERTD_CODE_INVALID_ARGUMENT = 3,
  EXPERTD_CODE_DEADLINE_EXCEEDED = 4,
  EXPERTD_CODE_NOT_FOUND = 5,
  EXPERTD_CODE_ALREADY_EXISTS = 6,
  EXPERTD_CODE_PERMISSION_DENIED = 7,
  EXPERTD_CODE_RESOURCE_EXHAUSTED = 8,
  EXPERTD_CODE_FAILED_PRECONDITION = 9,
  EXPERTD_CODE_ABORTED = 10,
  EXPERTD_CODE_OUT_OF_RANGE = 11,
  EXPERTD_CODE_UNIMPLEMENTED = 12,
  EXPERTD_CODE_INTERNAL = 13,
  EXPERTD_CODE_UNAVAILABLE = 14
};

#define EXPERTD_REASONS(X)                                                                                        \
  X(NONE, 0, OK, 0, "ok")                                                                                         \
  X(INTERNAL, 1, INTERNAL, 0, "the daemon found its own state broken; report it with the log")                    \
  X(UNAVAILABLE, 2, UNAVAILABLE, 1, "the daemon is gone or not there; re-attach when it is back")                 \
  X(TIMEOUT, 3, DEADLINE_EXCEEDED, 1, "the deadline passed; the named rank had not delivered what is named")      \
  X(PEER_LOST, 4, ABORTED, 1, "the named rank of the group is gone; let it rejoin or close the group")            \
  X(PEER_REJECTED, 5, ABORTED, 0, "the named rank's part of the operation was refused; its own error says why")   \
  X(DRAINING, 6, UNAVAILABLE, 1, "the daemon is draining; attach again after its restart")                        \
  X(GPU_LOST, 7, UNAVAILABLE, 1, "the daemon lost the GPU context and restarts; re-attach")                       \
  X(CANCELLED, 8, CANCELLED, 1, "the caller or the end of its session cancelled the operation")                   \
  X(PROTOCOL_VERSION, 20, FAILED_PRECONDITION, 0, "client and daemon speak different protocol versions")          \
  X(BAD_MESSAGE, 21, INVALID_ARGUMENT, 0, "a control message has a wrong size, magic or type")                    \
  X(PERMISSION, 22, PERMISSION_DENIED, 0, "the peer's user or group may not use this daemon")                     \
  X(SESSION_LIMIT, 23, RESOURCE_EXHAUSTED, 1, "the limit of sessions is reached")                                 \
  X(NO_SUCH_SESSION, 24, NOT_FOUND, 0, "the session is not known or has ended")                                   \
  X(NO_SUCH_DEVICE, 25, NOT_FOUND, 0, "the device is not served by this daemon")                                  \
  X(MIG_UNSUPPORTED, 26, UNIMPLEMENTED, 0, "MIG instances cannot be used: peer access needs whole GPUs")          \
  X(NO_GPU, 27, UNAVAILABLE, 0, "a GPU was asked for and none can be used here")                                  \
  X(FORKED, 28, FAILED_PRECONDITION, 0, "the session belongs to the parent process; attach again after fork")     \
  X(CALL_LIMIT, 29, RESOURCE_EXHAUSTED, 1, "too many control calls of the session wait; let earlier ones end")    \
  X(DESCRIPTOR_MALFORMED, 40, INVALID_ARGUMENT, 0, "a ring descriptor has an unknown operation or a bad field")   \
  X(RING_OVERFLOW, 41, RESOURCE_EXHAUSTED, 1, "more operations were submitted than the ring has slots")           \
  X(NO_SUCH_BUFFER, 42, NOT_FOUND, 0, "the buffer id is not one of this session's")                               \
  X(OUT_OF_BOUNDS, 43, OUT_OF_RANGE, 0, "the tensor does not lie inside its buffer")                              \
  X(UNALIGNED, 44, INVALID_ARGUMENT, 0, "a pointer, offset, stride or row size is not a multiple of 16 bytes")    \
  X(MISSING_ARGUMENT, 45, INVALID_ARGUMENT, 0, "a tensor the operation needs was not given")                      \
  X(NO_SUCH_GROUP, 46, NOT_FOUND, 0, "the group is not one that this session joined")                             \
  X(WRONG_DTYPE, 47, INVALID_ARGUMENT, 0, "the dtype does not fit the operation or the group")                    \
  X(ARGUMENT_RANGE, 48, OUT_OF_RANGE, 0, "an argument lies outside its allowed range")                            \
  X(TOKENS_EXCEED_MAX, 49, OUT_OF_RANGE, 0, "more tokens were given than the group's max_tokens")                 \
  X(EXPERT_OUT_OF_RANGE, 50, OUT_OF_RANGE, 0, "an expert id is neither -1 nor below num_experts")                 \
  X(STALE_HANDLE, 51, FAILED_PRECONDITION, 0, "the handle was freed, overwritten or belongs to another group")    \
  X(HANDLE_LIMIT, 52, RESOURCE_EXHAUSTED, 0, "the session's limit of live handles is reached; free some")         \
  X(CAPACITY_EXCEEDED, 53, RESOURCE_EXHAUSTED, 0, "the output has fewer rows than would arrive; give more rows")  \
  X(OP_MISMATCH, 54, FAILED_PRECONDITION, 0, "the ranks of a group issued different operations or arguments")     \
  X(GROUP_FAILED, 55, FAILED_PRECONDITION, 0, "the group failed earlier and takes no operations; join it anew")   \
  X(MODE_MISMATCH, 56, FAILED_PRECONDITION, 0, "the operation does not belong to the group's mode")               \
  X(DUPLICATE_RANK, 60, ALREADY_EXISTS, 0, "the rank of the group is taken by another session")                   \
  X(CONFIG_MISMATCH, 61, FAILED_PRECONDITION, 0, "the ranks of a group gave different configurations")            \
  X(JOIN_TIMEOUT, 62, DEADLINE_EXCEEDED, 1, "not every rank joined the group before the deadline")                \
  X(DEVICE_TAKEN, 63, ALREADY_EXISTS, 0, "another rank of the group is on this device")                           \
  X(GROUP_LIMIT, 64, RESOURCE_EXHAUSTED, 0, "the limit of groups is reached")                                     \
  X(NODE_LIMIT, 65, RESOURCE_EXHAUSTED, 0, "the limit of nodes (fabric.max_nodes) is reached")                    \
  X(NODE_REPLACED, 66, FAILED_PRECONDITION, 0, "a daemon that started later has the same fabric.node_name")       \
  X(RENDEZVOUS_UNAVAILABLE, 67, UNAVAILABLE, 1, "no daemon of fabric.rendezvous answers as the rendezvous")       \
  X(CLUSTER_KEY, 68, PERMISSION_DENIED, 0, "the daemons have different cluster keys (fabric.cluster_key)")        \
  X(IPC_HANDLE_VMM, 70, FAILED_PRECONDITION, 0, "VMM memory has no IPC handle; pass its fd or use a window")      \
  X(IPC_SAME_PID, 71, FAILED_PRECONDITION, 0, "client and daemon have the same local pid; use a window or an fd") \
  X(IPC_OPEN_FAILED, 72, FAILED_PRECONDITION, 0, "the IPC handle could not be opened")                            \
  X(NO_SUCH_TOKEN, 73, NOT_FOUND, 0, "no descriptor with this token waits on the attach socket")                  \
  X(UNSEALED_MEMORY, 74, FAILED_PRECONDITION, 0, "shared memory must be a memfd sealed against shrinking")        \
  X(POOL_EXHAUSTED, 75, RESOURCE_EXHAUSTED, 1, "the device's pool (device.pool_max_bytes) is used up")            \
  X(BUFFER_LIMIT, 76, RESOURCE_EXHAUSTED, 0, "the session's limit of buffers is reached")                         \
  X(BUFFER_BUSY, 77, FAILED_PRECONDITION, 1, "an operation in flight uses the buffer; wait for it")               \
  X(WRONG_DEVICE_KIND, 78, INVALID_ARGUMENT, 0, "this kind of memory does not belong to the session's device")    \
  X(CONFIG_UNKNOWN_KEY, 90, INVALID_ARGUMENT, 0, "the configuration names a key that does not exist")             \
  X(CONFIG_BAD_VALUE, 91, INVALID_ARGUMENT, 0, "a configuration value has a wrong type or is out of range")       \
  X(CONFIG_UNREADABLE, 92, INVALID_ARGUMENT, 0, "the configuration file cannot be read or parsed")                \
  X(ADDRESS_IN_USE, 93, ALREADY_EXISTS, 0, "the socket or port is in use by another process")                     \
  X(RUNTIME_DIRECTORY, 94, PERMISSION_DENIED, 0, "the runtime directory cannot be written")                       \
  X(SYSTEM, 95, INTERNAL, 1, "a system call failed; errno is in the message")                                     \
  X(CUDA, 96, INTERNAL, 0, "a CUDA call failed; its name and error are in the message")                           \
  X(UNSUPPORTED, 97, UNIMPLEMENTED, 0, "this build or device cannot do that")                                     \
  X(DEADLINE_MISSING, 98, INVALID_ARGUMENT, 0, "control calls must carry a deadline")                             \
  X(BAD_STATE, 99, FAILED_PRECONDITION, 0, "the object is not in a state that allows this call")

enum expertd_reason {
#define EXPERTD_REASON_ENUM(name, number, code, retryable, sentence) EXPERTD_REASON_##name = number,
  EXPERTD_REASONS(EXPERTD_REASON_ENUM)
#undef EXPERTD_REASON_ENUM
};

#endif /* EXPERTD_REASON_H_ */
