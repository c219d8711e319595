// SPDX-License-Identifier: Apache-2.0
// Half operations as rows of the table: the send half is a whole issue with EXPERTD_ASYNC, behind which the stream is
// free again; the receive half is expertd_event_stream_wait when everything has arrived. On a rank's thread.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "client/ctl/bench_operation.h"
#include "tests/bench/table/stream_timer.h"

namespace expertd::bench {

/// Makes `timing` issue the operation, which is asynchronous, between the flush and the gate, and leave it time to
/// arrive before the gate opens. Returns what is timed. What is given outlives the timing.
std::function<void()> time_receive_half(ctl::BenchRank* rank, ctl::BenchOperation* operation, expertd_event_t* event,
                                        Timing* timing);

}  // namespace expertd::bench
