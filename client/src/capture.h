// SPDX-License-Identifier: Apache-2.0
// Operations on a stream that is being captured into a CUDA graph (D14): the daemon keeps the operation and tells its
// entry; into the graph go a write of the entry into a doorbell and a wait for a completion word, both of which reset
// themselves. Callers' threads.
#pragma once

#include "client/src/group.h"
#include "client/src/op_request.h"
#include "client/src/session.h"

namespace expertd::client {

/// UNSUPPORTED for what cannot be captured, with what to do.
Status check_capture(const Group& group, uint32_t op);

/// A low latency operation, eagerly or into the graph that the stream is captured in.
Status issue_low_latency(Group* group, OpRequest* request, expertd_stream_t stream, expertd_event_t* event);

/// Events of captured operations stand for every replay: a stream may be made to wait for them, and nothing else.
bool is_captured_event(uint64_t event);
uint32_t capture_words_of(uint64_t event);

}  // namespace expertd::client
