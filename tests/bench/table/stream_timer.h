// SPDX-License-Identifier: Apache-2.0
// Times what a rank enqueues on its stream, at once with the other ranks. Belongs to the rank's thread, whose current
// device stays the one of the rank; all ranks call time_us() together.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <functional>

#include "client/ctl/bench_rendezvous.h"
#include "tests/bench/table/gate.h"
#include "tests/bench/table/stamps.h"

namespace expertd::bench {

/// Whether a stream waits for the host until everything is enqueued. Hundreds of kernels cannot be: where a queue is
/// full the host waits for the stream, and this one for the host.
enum class Start { kAtTheGate, kAtOnce };

/// What begin and end are read from.
enum class TimerClock {
  /// Of the stream. Their times are taken in the context of this process, which the GPU has to switch to and back
  /// where another process works in between without MPS.
  kEvents,
  /// The host's clock, from its store that opens the gate until it sees a word that the stream writes at the end. No
  /// context is needed for either; the way of both words is in the time. Only at the gate.
  kMemoryWords,
  /// The GPU's timer, read by kernels of one thread: with MPS the other two wait, beside other kernels of this process,
  /// for one of those to end.
  kKernels
};

/// As rows say it.
const char* name_of(TimerClock clock);

struct Timing {
  TimerClock clock = TimerClock::kEvents;
  Start start = Start::kAtTheGate;
  std::chrono::nanoseconds arm{0};
  /// Enqueues what comes between the flush and the gate, untimed. May be empty.
  std::function<void()> before{};
};

class StreamTimer {
 public:
  /// Bytes written before every timing, several times an L2 cache.
  static constexpr uint64_t kFlushBytes = 128ull << 20;

  /// The current device is the rank's. Throws std::runtime_error, as all of this.
  explicit StreamTimer(Gate* gate);
  ~StreamTimer();
  StreamTimer(const StreamTimer&) = delete;
  StreamTimer& operator=(const StreamTimer&) = delete;

  /// Non-blocking, of the highest priority.
  cudaStream_t stream() const { return stream_; }
  /// Smallest step of the GPU's timer, which kKernels reads.
  uint64_t gpu_timer_step_ns() const { return gpu_timer_step_ns_; }
  /// Before a run of timings: where the ranks meet and which of them opens the gate.
  void begin(ctl::BenchRendezvous* meeting, bool leads);
  /// Flushes L2, parks the stream, enqueues, lets the arming time pass once all ranks got there, opens the gate. At
  /// once: enqueues when all ranks have flushed.
  double time_us(const Timing& timing, const std::function<void()>& enqueue);

 private:
  void use_all_once();
  double time_round(const Timing& timing, uint32_t round, const std::function<void()>& enqueue);
  void park(TimerClock clock, uint32_t round);
  void stamp_begin(TimerClock clock);
  void stamp_end(TimerClock clock, uint32_t round);
  void wait_arrived(const Timing& timing, uint32_t round) const;
  double wait_ended(TimerClock clock, uint32_t round) const;
  void wait_for(cudaEvent_t event, const char* what) const;
  uint64_t wait_word(uint32_t* word, uint32_t round, const char* what) const;

  Gate* const gate_;
  ctl::BenchRendezvous* meeting_ = nullptr;
  bool leads_ = false;
  uint32_t round_ = 0;
  uint64_t gpu_timer_step_ns_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t flushed_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  void* flush_ = nullptr;
  StreamMarks* marks_ = nullptr;         // pinned
  StreamMarks* device_marks_ = nullptr;  // the same as the device sees them
  uint64_t* begin_ns_ = nullptr;         // of the device
};

}  // namespace expertd::bench
