/* SPDX-License-Identifier: Apache-2.0 */
/* The fields of the shared structs and the numbers of the window, as both compilers are asked for them. */
#ifndef EXPERTD_TESTS_ABI_LAYOUT_FACTS_H_
#define EXPERTD_TESTS_ABI_LAYOUT_FACTS_H_

#include <stddef.h>
#include <stdint.h>

#include "proto/abi/attach_v1.h"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ll_window_v1.h"
#include "proto/abi/ring_v1.h"

#define EXPERTD_TEST_FIELDS(X)                   \
  X(expertd_ring_header, magic)                  \
  X(expertd_ring_header, abi_major)              \
  X(expertd_ring_header, abi_minor)              \
  X(expertd_ring_header, header_bytes)           \
  X(expertd_ring_header, slot_count)             \
  X(expertd_ring_header, slot_bytes)             \
  X(expertd_ring_header, completion_bytes)       \
  X(expertd_ring_header, feature_bits)           \
  X(expertd_ring_header, session_id)             \
  X(expertd_ring_header, generation)             \
  X(expertd_ring_header, slots_offset)           \
  X(expertd_ring_header, completions_offset)     \
  X(expertd_ring_header, total_bytes)            \
  X(expertd_ring_header, reserved0)              \
  X(expertd_ring_header, submit_tail)            \
  X(expertd_ring_header, reserved1)              \
  X(expertd_ring_header, submit_head)            \
  X(expertd_ring_header, reserved2)              \
  X(expertd_ring_header, daemon_sleeping)        \
  X(expertd_ring_header, reserved3)              \
  X(expertd_ring_header, client_waiters)         \
  X(expertd_ring_header, reserved4)              \
  X(expertd_ring_header, completion_futex)       \
  X(expertd_ring_header, session_flags)          \
  X(expertd_ring_header, end_reason)             \
  X(expertd_ring_header, reserved5)              \
  X(expertd_ring_header, reserved6)              \
  X(expertd_tensor_ref, buffer)                  \
  X(expertd_tensor_ref, reserved)                \
  X(expertd_tensor_ref, offset)                  \
  X(expertd_slot, seq)                           \
  X(expertd_slot, op)                            \
  X(expertd_slot, flags)                         \
  X(expertd_slot, group)                         \
  X(expertd_slot, timeout_ns)                    \
  X(expertd_slot, submit_ns)                     \
  X(expertd_slot, trace_id)                      \
  X(expertd_slot, tokens)                        \
  X(expertd_slot, top_k)                         \
  X(expertd_slot, hidden)                        \
  X(expertd_slot, dtype)                         \
  X(expertd_slot, row_bytes)                     \
  X(expertd_slot, topk_idx_bytes)                \
  X(expertd_slot, side_elements)                 \
  X(expertd_slot, side_element_bytes)            \
  X(expertd_slot, side_row_stride)               \
  X(expertd_slot, side_element_stride)           \
  X(expertd_slot, capacity_rows)                 \
  X(expertd_slot, expert_alignment)              \
  X(expertd_slot, handle_index)                  \
  X(expertd_slot, handle_generation)             \
  X(expertd_slot, num_experts)                   \
  X(expertd_slot, num_ranks)                     \
  X(expertd_slot, token_bound)                   \
  X(expertd_slot, capture_lane)                  \
  X(expertd_slot, exchange_buffer)               \
  X(expertd_slot, reserved)                      \
  X(expertd_slot, refused_reason)                \
  X(expertd_slot, refused_argument)              \
  X(expertd_slot, refused_value)                 \
  X(expertd_slot, refused_minimum)               \
  X(expertd_slot, refused_maximum)               \
  X(expertd_slot, tensors)                       \
  X(expertd_completion, seq)                     \
  X(expertd_completion, reason)                  \
  X(expertd_completion, flags)                   \
  X(expertd_completion, argument)                \
  X(expertd_completion, missing)                 \
  X(expertd_completion, value)                   \
  X(expertd_completion, minimum)                 \
  X(expertd_completion, maximum)                 \
  X(expertd_completion, rank)                    \
  X(expertd_completion, peer_reason)             \
  X(expertd_completion, group_op)                \
  X(expertd_completion, epoch)                   \
  X(expertd_completion, rank_mask)               \
  X(expertd_completion, recv_rows)               \
  X(expertd_completion, expert_count_entries)    \
  X(expertd_completion, admit_ns)                \
  X(expertd_completion, launch_ns)               \
  X(expertd_completion, start_ns)                \
  X(expertd_completion, end_ns)                  \
  X(expertd_completion, complete_ns)             \
  X(expertd_completion, local_bytes)             \
  X(expertd_completion, remote_bytes)            \
  X(expertd_completion, executor)                \
  X(expertd_completion, sms)                     \
  X(expertd_completion, capture_entry)           \
  X(expertd_completion, capture_words)           \
  X(expertd_completion, rank_mask_more)          \
  X(expertd_completion, reserved)                \
  X(expertd_completion, expert_counts)           \
  X(expertd_completion, reserved_tail)           \
  X(expertd_attach_hello, magic)                 \
  X(expertd_attach_hello, type)                  \
  X(expertd_attach_hello, abi_major)             \
  X(expertd_attach_hello, abi_minor)             \
  X(expertd_attach_hello, local_pid)             \
  X(expertd_attach_hello, feature_bits)          \
  X(expertd_attach_hello, device)                \
  X(expertd_attach_hello, name)                  \
  X(expertd_attach_hello, reserved)              \
  X(expertd_attach_welcome, magic)               \
  X(expertd_attach_welcome, type)                \
  X(expertd_attach_welcome, abi_major)           \
  X(expertd_attach_welcome, abi_minor)           \
  X(expertd_attach_welcome, reason)              \
  X(expertd_attach_welcome, local_pid)           \
  X(expertd_attach_welcome, device_kind)         \
  X(expertd_attach_welcome, device_index)        \
  X(expertd_attach_welcome, fd_count)            \
  X(expertd_attach_welcome, mps_active)          \
  X(expertd_attach_welcome, session_id)          \
  X(expertd_attach_welcome, generation)          \
  X(expertd_attach_welcome, ring_bytes)          \
  X(expertd_attach_welcome, flag_page_bytes)     \
  X(expertd_attach_welcome, handles_per_session) \
  X(expertd_attach_welcome, reserved0)           \
  X(expertd_attach_welcome, op_timeout_ns)       \
  X(expertd_attach_welcome, reserved)            \
  X(expertd_attach_welcome, message)             \
  X(expertd_attach_fd, magic)                    \
  X(expertd_attach_fd, type)                     \
  X(expertd_attach_fd, reason)                   \
  X(expertd_attach_fd, token)                    \
  X(expertd_attach_fd, bytes)                    \
  X(expertd_ll_window_shape, ranks)              \
  X(expertd_ll_window_shape, num_experts)        \
  X(expertd_ll_window_shape, hidden)             \
  X(expertd_ll_window_shape, max_tokens)         \
  X(expertd_ll_window_layout, recv_x)            \
  X(expertd_ll_window_layout, recv_scales)       \
  X(expertd_ll_window_layout, combine_x)         \
  X(expertd_ll_window_layout, src_info)          \
  X(expertd_ll_window_layout, layout_range)      \
  X(expertd_ll_window_layout, expert_counts)     \
  X(expertd_ll_window_layout, set_bytes)         \
  X(expertd_ll_window_layout, total_bytes)

#define EXPERTD_TEST_STRUCTS(X) \
  X(expertd_ring_header)        \
  X(expertd_tensor_ref)         \
  X(expertd_slot)               \
  X(expertd_completion)         \
  X(expertd_attach_hello)       \
  X(expertd_attach_welcome)     \
  X(expertd_attach_fd)          \
  X(expertd_ll_window_shape)    \
  X(expertd_ll_window_layout)

#ifdef __cplusplus
extern "C" {
#endif

struct expertd_test_field {
  const char* structure;
  const char* field; /* null: the whole struct */
  uint64_t offset;
  uint64_t bytes;
};

/* As the C compiler sees them; a null structure ends the list. */
const struct expertd_test_field* expertd_test_c_fields(void);
struct expertd_ll_window_layout expertd_test_c_window(struct expertd_ll_window_shape shape, uint32_t payloads,
                                                      uint32_t set);

#ifdef __cplusplus
}
#endif

#ifdef __cplusplus
#define EXPERTD_TEST_FIELD_BYTES(structure, field) sizeof(structure::field)
#else
#define EXPERTD_TEST_FIELD_BYTES(structure, field) sizeof(((struct structure*)0)->field)
#endif
#define EXPERTD_TEST_FIELD_ROW(structure, field) \
  {#structure, #field, offsetof(struct structure, field), EXPERTD_TEST_FIELD_BYTES(structure, field)},
#define EXPERTD_TEST_STRUCT_ROW(structure) {#structure, 0, 0, sizeof(struct structure)},

#endif /* EXPERTD_TESTS_ABI_LAYOUT_FACTS_H_ */
