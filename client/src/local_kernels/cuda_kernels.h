// SPDX-License-Identifier: Apache-2.0
// CudaKernels: the library's kernels, loaded into one context through the driver, with the memory that they need beside
// the caller's: a record and a scratch per slot, and counters of operations by copy engines. Everything is loaded,
// allocated and launched once by create(), at the first attach: what loads or allocates later may hang beside a stream
// that waits. Any thread; owned by CudaSide, whose driver it borrows, and gone before the context is given back.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "client/src/cuda_driver.h"
#include "client/src/local_kernels/local_kernels.h"

namespace expertd::client {

class CudaKernels final : public LocalKernels {
  struct Private {
    explicit Private() = default;
  };

 public:
  /// `stream` is one of the library's own. UNSUPPORTED in a build without kernels.
  static Status create(const cuda::Driver* driver, cuda::Context context, cuda::Device device, cuda::Stream stream,
                       std::unique_ptr<CudaKernels>* kernels);
  /// Only for create().
  CudaKernels(Private, const cuda::Driver* driver, cuda::Context context, cuda::Device device, cuda::Stream stream)
      : driver_(driver), context_(context), device_(device), stream_(stream) {}
  /// Nothing that was launched is on its way any more.
  ~CudaKernels() override;

  LocalRecord* record(uint32_t slot) override { return records_ + slot; }
  const void* word(uint32_t slot) const override;
  Status launch_layout(const LayoutParams& params, uint32_t slot, expertd_stream_t stream) override;
  bool exchanges() const override { return exchanges_; }
  void begin_exchange(ExchangeParams* params) override;
  Status launch_exchange(ExchangeKernel kernel, const ExchangeParams& params, expertd_stream_t stream) override;
  Status launch_ht(HtKernel kernel, const HtParams& params, expertd_stream_t stream) override;
  bool reaches(const Extent& bytes, Extent* known) override;
  Status health() override;

 private:
  Status load();
  Status allocate();
  Status launch_all();
  LocalScratch* scratch(uint32_t slot) const;

  const cuda::Driver* const driver_;
  const cuda::Context context_;
  const cuda::Device device_;
  const cuda::Stream stream_;
  cuda::Module module_ = nullptr;
  cuda::Function layout_ = nullptr;
  std::array<cuda::Function, kExchangeKernels> exchange_{};
  std::array<cuda::Function, kHtKernels> ht_{};
  bool exchanges_ = false;
  LocalRecord* records_ = nullptr;  // pinned
  cuda::Pointer scratch_ = 0;
  cuda::Pointer counters_ = 0;  // [kExchangeCounterSets, kExchangeCounterWords]
  std::atomic<uint64_t> exchange_number_{0};
};

}  // namespace expertd::client
