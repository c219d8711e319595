// SPDX-License-Identifier: Apache-2.0
// Kernels of one thread that stand in a stream around what is timed, where events and stream memory operations would
// wait for other kernels of the same process. Enqueued by a rank's thread whose device is current. Failures are thrown
// as std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace expertd::bench {

/// Words of pinned host memory that say how far a stream got. Rounds count up, so that nothing is reset between them.
struct StreamMarks {
  uint32_t arrived;  // round whose gate the stream reached
  uint32_t ended;    // round whose timed part is over; the times are those of this round
  uint64_t begin_ns;
  uint64_t end_ns;
};

/// Waits until `word`, of pinned host memory, counts to `round`, having said so in `marks`. Ends by itself after a
/// minute, when the host has long given up.
void enqueue_gate(cudaStream_t stream, uint32_t* word, StreamMarks* marks, uint32_t round);
/// `begin_ns`, of the device, takes the GPU's timer.
void enqueue_begin(cudaStream_t stream, uint64_t* begin_ns);
/// The marks take both times, and then the round.
void enqueue_end(cudaStream_t stream, const uint64_t* begin_ns, StreamMarks* marks, uint32_t round);
/// Smallest step of the GPU's timer; `scratch` is of the device. Blocks.
uint64_t timer_step_ns(cudaStream_t stream, uint64_t* scratch);

}  // namespace expertd::bench
