// SPDX-License-Identifier: Apache-2.0
// A client that is busy: large BF16 GEMMs back to back on a stream of the lowest priority, from a thread of its own, on
// every multiprocessor of a GPU. cuBLAS where it can be loaded ($EXPERTD_CUBLAS_LIBRARY, else libcublas.so.13 or .12),
// else tensor-core kernels of about a millisecond. Made, started and stopped by one thread. Failures are thrown as
// std::runtime_error; those of its thread by stop().
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>

namespace expertd::bench {

class Gemm;

/// What else runs while a GEMM does, for the mean of its time.
/// kMarks: everything of a timing but the operation (flush, gate, begin and end).
enum class LoadPhase : uint32_t { kOther, kAlone, kOperations, kMarks };

class GemmLoad {
 public:
  /// The current device's.
  explicit GemmLoad(int device);
  ~GemmLoad();
  GemmLoad(const GemmLoad&) = delete;
  GemmLoad& operator=(const GemmLoad&) = delete;

  /// "cuBLAS" or "kernel".
  const char* kind() const;
  /// Forgets the times of before.
  void start();
  void set_phase(LoadPhase phase) { phase_.store(phase, std::memory_order_relaxed); }
  void stop();
  /// Mean time of a GEMM in a phase over the one alone; 0 where either was not seen.
  double slowdown(LoadPhase phase) const;

 private:
  static constexpr size_t kPhases = 4;
  static constexpr size_t kInFlight = 3;

  void run();
  void loop();

  const int device_;
  std::unique_ptr<Gemm> gemm_;
  cudaStream_t stream_ = nullptr;
  std::array<cudaEvent_t, kInFlight + 1> events_{};
  std::thread thread_;
  std::atomic<bool> running_{false};
  std::atomic<LoadPhase> phase_{LoadPhase::kOther};
  // Of the thread; read when it has ended.
  std::array<double, kPhases> times_ms_{};
  std::array<uint64_t, kPhases> counts_{};
  std::string failure_;
};

}  // namespace expertd::bench
