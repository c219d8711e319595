// SPDX-License-Identifier: Apache-2.0
// Runs the client library's kernels of operations by copy engines with all ranks on one GPU and one kernel at a time:
// the copies and words of the daemon's chains are the test's, and all that a kernel would wait for is there before it.
// Every tensor is an allocation of its own, of exactly its size. Device tests only, one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "client/src/local_kernels/cuda_kernels.h"
#include "daemon/device/cuda/ht_plan.h"
#include "tests/device/placed_tensors.h"

namespace expertd::device_test {

/// One rank: its flag page, its exchange window, and the tensors of the operation at hand.
struct CopiesRank {
  CopiesRank(uint64_t page_bytes, uint64_t window_bytes) : page(page_bytes), window(window_bytes) {}

  uint64_t word(uint64_t offset) const { return page.get<uint64_t>(1, offset)[0]; }
  void set_word(uint64_t offset, uint64_t value);

  Memory page;
  Memory window;
  Tensors tensors;
};

/// Low latency: exchange_dispatch and exchange_combine.
class SerialLowLatency {
 public:
  SerialLowLatency(client::CudaKernels* kernels, const kernels::OpShape& shape);

  /// Whether a window has room for such rows.
  static bool serves(const kernels::OpShape& shape);
  /// Runs one operation of all ranks, either in halves or in one kernel that finds all its words; outputs come back
  /// into step.gpu.
  void run(const CaseStep& step, bool halves);
  /// Of the last operation.
  uint64_t result(uint32_t rank) const;
  bool ended(uint32_t rank) const;

 private:
  client::ExchangeParams params_of(const CaseStep& step, uint32_t rank) const;
  void launch(const CaseStep& step, uint32_t stages);
  void carry(const CaseStep& step);
  void carry_sums(const CaseStep& step);
  void hear();
  char* buffer(const CaseStep& step, uint32_t rank) const;

  client::CudaKernels* const kernels_;
  const expertd_exchange_layout layout_;
  std::vector<std::unique_ptr<CopiesRank>> ranks_;
  std::vector<client::ExchangeParams> params_;
  PlacedTensors placed_;
  uint64_t seq_ = 0;
};

/// High throughput: exchange_ht_route, exchange_ht_move and exchange_ht_reduce.
class SerialHighThroughput {
 public:
  SerialHighThroughput(client::CudaKernels* kernels, const kernels::OpShape& shape);

  static bool serves(const kernels::OpShape& shape);
  void run(const CaseStep& step);
  uint64_t result(uint32_t rank) const;

 private:
  client::HtParams params_of(const CaseStep& step, uint32_t rank) const;
  void launch(client::HtKernel kernel, client::HtParams* params);
  void route(const CaseStep& step);
  void dispatch(const CaseStep& step);
  void carry_rows(const CaseStep& step, uint32_t source, uint32_t rank);
  void carry_inputs(const CaseStep& step, uint32_t owner, uint32_t origin);
  void tell_rows(const CaseStep& step, uint32_t rank);
  void tell(uint32_t rank, uint64_t verdict);
  char* buffer(uint32_t rank) const;

  client::CudaKernels* const kernels_;
  const expertd_exchange_ht_layout layout_;
  std::vector<std::unique_ptr<CopiesRank>> ranks_;
  std::vector<client::HtParams> params_;
  std::vector<device::cuda::HtRow> rows_;
  std::vector<device::cuda::HtTable> tables_;  // of the handle
  PlacedTensors placed_;
  uint64_t seq_ = 0;
};

}  // namespace expertd::device_test
