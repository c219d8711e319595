// SPDX-License-Identifier: Apache-2.0
// Times what a rank enqueues on its stream, between two events of that stream, at once with the other ranks. Belongs to
// the rank's thread, whose current device stays the one of the rank; all ranks call time_us() together.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <functional>

#include "client/ctl/bench_rendezvous.h"
#include "tests/bench/table/gate.h"

namespace expertd::bench {

/// Whether a stream waits for the host until everything is enqueued. Hundreds of kernels cannot be: where a queue is
/// full the host waits for the stream, and this one for the host.
enum class Start { kAtTheGate, kAtOnce };

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
  /// Before a run of timings: where the ranks meet and which of them opens the gate.
  void begin(ctl::BenchRendezvous* meeting, bool leads);
  /// Flushes L2, parks the stream, enqueues, lets `arm` pass once all ranks got there, opens the gate. At once:
  /// enqueues when all ranks have flushed.
  double time_us(Start start, std::chrono::nanoseconds arm, const std::function<void()>& enqueue);

 private:
  void time_at_once(const std::function<void()>& enqueue);
  void time_round(uint32_t round, std::chrono::nanoseconds arm, const std::function<void()>& enqueue);
  void wait_for(cudaEvent_t event, const char* what) const;

  Gate* const gate_;
  ctl::BenchRendezvous* meeting_ = nullptr;
  bool leads_ = false;
  uint32_t round_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t flushed_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  void* flush_ = nullptr;
};

}  // namespace expertd::bench
