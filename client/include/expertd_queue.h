/* SPDX-License-Identifier: Apache-2.0 */
/* A send/receive buffer pair with an ordered queue of events: a part of expertd.h, which includes it. */
#ifndef EXPERTD_QUEUE_H_
#define EXPERTD_QUEUE_H_

#include "expertd.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef void (*expertd_hook_t)(expertd_status_t status, const expertd_op_result_t* result, void* user);

/* Two buffers of `elements` elements of dtype, and a queue of at most 64 recorded events. */
EXPERTD_API expertd_status_t expertd_buffer_create(expertd_session_t* session, uint64_t elements,
                                                   expertd_data_type_t dtype, expertd_buffer_pair_t** pair);
EXPERTD_API expertd_status_t expertd_buffer_pair_destroy(expertd_buffer_pair_t* pair);
EXPERTD_API void* expertd_buffer_send(const expertd_buffer_pair_t* pair);
EXPERTD_API void* expertd_buffer_receive(const expertd_buffer_pair_t* pair);
/* Appends an event; the hook (may be NULL) runs once, on the thread that takes the event off the queue. */
EXPERTD_API expertd_status_t expertd_queue_record(expertd_buffer_pair_t* pair, expertd_event_t event,
                                                  expertd_hook_t hook, void* user);
/* Makes `stream` wait for every recorded event. */
EXPERTD_API expertd_status_t expertd_queue_stream_wait(expertd_buffer_pair_t* pair, expertd_stream_t stream);
/* Number of recorded events not yet taken off. */
EXPERTD_API expertd_status_t expertd_queue_query(expertd_buffer_pair_t* pair, uint32_t* pending);
/* Takes finished events off the front, in order, running hooks; returns the first failure among them. */
EXPERTD_API expertd_status_t expertd_queue_poll(expertd_buffer_pair_t* pair, uint32_t* taken);
/* Waits for all recorded events, in order, at most timeout_ns. */
EXPERTD_API expertd_status_t expertd_queue_synchronize(expertd_buffer_pair_t* pair, uint64_t timeout_ns);

#ifdef __cplusplus
}
#endif

#endif /* EXPERTD_QUEUE_H_ */
