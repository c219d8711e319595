// SPDX-License-Identifier: Apache-2.0
#include "client/src/local_kernels/cuda_kernels.h"

#include <sched.h>

#include <cstring>

#include "client/src/clock.h"
#include "client/src/local_kernels/image.h"

namespace expertd::client {
namespace {

constexpr uint64_t kLoadNs = 5 * kNsPerS;
// By ExchangeKernel.
constexpr const char* kExchangeNames[kExchangeKernels] = {"expertd_exchange_dispatch", "expertd_exchange_combine"};
// By HtKernel.
constexpr const char* kHtNames[kHtKernels] = {"expertd_exchange_ht_route", "expertd_exchange_ht_move",
                                              "expertd_exchange_ht_reduce"};
constexpr uint64_t kCounterBytes = kExchangeCounterSets * kExchangeCounterWords * sizeof(uint64_t);
constexpr int kAllocationsMax = 64;  // one behind the other, that one tensor may lie in

Status check(const cuda::Driver& driver, const char* call, cuda::Result result) {
  return result == cuda::kSuccess ? Status() : cuda_error(driver, call, result);
}

}  // namespace

Status CudaKernels::create(const cuda::Driver* driver, cuda::Context context, cuda::Device device, cuda::Stream stream,
                           std::unique_ptr<CudaKernels>* kernels) {
  if (kernel_image() == nullptr) {
    return {EXPERTD_REASON_UNSUPPORTED, "the library was built without kernels"};
  }
  auto made = std::make_unique<CudaKernels>(Private(), driver, context, device, stream);
  const cuda::CurrentContext current(driver, context);
  Status status = made->load();
  if (status.ok()) {
    status = made->allocate();
  }
  if (status.ok()) {
    status = made->launch_all();
  }
  if (status.ok()) {
    *kernels = std::move(made);
  } else if (status.reason == EXPERTD_REASON_TIMEOUT) {
    // The launch may be on its way still: giving back what it uses could wait for it for ever.
    static_cast<void>(made.release());
  }
  return status;
}

CudaKernels::~CudaKernels() {
  const cuda::CurrentContext current(driver_, context_);
  for (const cuda::Pointer memory : {scratch_, counters_}) {
    if (memory != 0) {
      driver_->mem_free(memory);
    }
  }
  if (records_ != nullptr) {
    driver_->host_free(records_);
  }
  if (module_ != nullptr) {
    driver_->module_unload(module_);
  }
}

Status CudaKernels::load() {
  Status status = check(*driver_, "cuModuleLoadData", driver_->module_load(&module_, kernel_image()));
  if (status.ok()) {
    status =
        check(*driver_, "cuModuleGetFunction", driver_->module_function(&layout_, module_, "expertd_local_layout"));
  }
  // The form that the driver compiles, for GPUs later than the build, has not got these.
  exchanges_ = status.ok();
  for (uint32_t i = 0; i < kExchangeKernels && exchanges_; ++i) {
    exchanges_ = driver_->module_function(&exchange_[i], module_, kExchangeNames[i]) == cuda::kSuccess;
  }
  for (uint32_t i = 0; i < kHtKernels && exchanges_; ++i) {
    exchanges_ = driver_->module_function(&ht_[i], module_, kHtNames[i]) == cuda::kSuccess;
  }
  return status;
}

Status CudaKernels::allocate() {
  void* records = nullptr;
  Status status =
      check(*driver_, "cuMemHostAlloc", driver_->host_alloc(&records, kLocalSlots * sizeof(LocalRecord), 0));
  if (!status.ok()) {
    return status;
  }
  records_ = static_cast<LocalRecord*>(records);
  std::memset(records, 0, kLocalSlots * sizeof(LocalRecord));
  status = check(*driver_, "cuMemAlloc", driver_->mem_alloc(&scratch_, kLocalSlots * sizeof(LocalScratch)));
  if (status.ok()) {
    status = check(*driver_, "cuMemAlloc", driver_->mem_alloc(&counters_, kCounterBytes));
  }
  if (status.ok()) {
    status = check(*driver_, "cuMemsetD8Async",
                   driver_->memset_async(scratch_, 0, kLocalSlots * sizeof(LocalScratch), stream_));
  }
  return status.ok() ? check(*driver_, "cuMemsetD8Async", driver_->memset_async(counters_, 0, kCounterBytes, stream_))
                     : status;
}

// Of no tokens, without outputs, and with the sequence that no operation has.
Status CudaKernels::launch_all() {
  Status status = launch_layout(LayoutParams(), 0, stream_);
  for (uint32_t i = 0; i < kExchangeKernels && exchanges_ && status.ok(); ++i) {
    status = launch_exchange(static_cast<ExchangeKernel>(i), ExchangeParams(), stream_);
  }
  for (uint32_t i = 0; i < kHtKernels && exchanges_ && status.ok(); ++i) {
    status = launch_ht(static_cast<HtKernel>(i), HtParams(), stream_);
  }
  const uint64_t deadline_ns = deadline_after(kLoadNs);
  while (status.ok()) {
    const cuda::Result result = driver_->stream_query(stream_);
    if (result != cuda::kNotReady) {
      return check(*driver_, "cuStreamQuery", result);
    }
    if (now_ns() >= deadline_ns) {
      return {EXPERTD_REASON_TIMEOUT, "the first launch of the library's kernels has not ended"};
    }
    sched_yield();
  }
  return status;
}

LocalScratch* CudaKernels::scratch(uint32_t slot) const {
  return reinterpret_cast<LocalScratch*>(scratch_) + slot;
}

const void* CudaKernels::word(uint32_t slot) const {
  return &scratch(slot)->seq;
}

Status CudaKernels::launch_layout(const LayoutParams& params, uint32_t slot, expertd_stream_t stream) {
  LayoutParams filled = params;
  filled.scratch = scratch(slot);
  filled.record = record(slot);
  void* arguments[] = {&filled};
  const cuda::CurrentContext current(driver_, context_);
  return check(*driver_, "cuLaunchKernel",
               driver_->launch(layout_, layout_blocks(params.tokens), 1, 1, kLayoutThreads, 1, 1, 0,
                               static_cast<cuda::Stream>(stream), arguments, nullptr));
}

void CudaKernels::begin_exchange(ExchangeParams* params) {
  params->number = exchange_number_.fetch_add(1, std::memory_order_relaxed) + 1;
  params->counters =
      reinterpret_cast<uint64_t*>(counters_) + params->number % kExchangeCounterSets * kExchangeCounterWords;
}

Status CudaKernels::launch_exchange(ExchangeKernel kernel, const ExchangeParams& params, expertd_stream_t stream) {
  void* arguments[] = {const_cast<ExchangeParams*>(&params)};
  const cuda::CurrentContext current(driver_, context_);
  return check(*driver_, "cuLaunchKernel",
               driver_->launch(exchange_[static_cast<uint32_t>(kernel)], exchange_blocks(kernel, params), 1, 1,
                               kExchangeThreads, 1, 1, 0, static_cast<cuda::Stream>(stream), arguments, nullptr));
}

Status CudaKernels::launch_ht(HtKernel kernel, const HtParams& params, expertd_stream_t stream) {
  void* arguments[] = {const_cast<HtParams*>(&params)};
  const uint32_t threads = kernel == HtKernel::kRoute ? kHtRouteThreads : kHtThreads;
  const cuda::CurrentContext current(driver_, context_);
  return check(*driver_, "cuLaunchKernel",
               driver_->launch(ht_[static_cast<uint32_t>(kernel)], ht_blocks(kernel, params), 1, 1, threads, 1, 1, 0,
                               static_cast<cuda::Stream>(stream), arguments, nullptr));
}

// A tensor may lie in several allocations that were mapped one behind the other.
bool CudaKernels::reaches(const Extent& bytes, Extent* known) {
  if (known->contains(bytes)) {
    return true;
  }
  const cuda::CurrentContext current(driver_, context_);
  Extent found = {bytes.begin, bytes.begin};
  for (int i = 0; i < kAllocationsMax && (i == 0 || found.end < bytes.end); ++i) {
    cuda::Pointer base = 0;
    size_t size = 0;
    int ordinal = -1;
    if (driver_->mem_address_range(&base, &size, found.end) != cuda::kSuccess ||
        driver_->pointer_attribute(&ordinal, cuda::kAttributeDeviceOrdinal, found.end) != cuda::kSuccess ||
        ordinal != device_) {
      return false;
    }
    found.begin = i == 0 ? base : found.begin;
    found.end = base + size;
  }
  *known = found;
  return found.contains(bytes);
}

// Another thread of the process may be capturing in the mode in which a query would end its capture.
Status CudaKernels::health() {
  const cuda::CurrentContext current(driver_, context_);
  int mode = cuda::kCaptureModeRelaxed;
  const bool exchanged = driver_->exchange_capture_mode(&mode) == cuda::kSuccess;
  const cuda::Result result = driver_->stream_query(stream_);
  if (exchanged) {
    driver_->exchange_capture_mode(&mode);
  }
  return result == cuda::kNotReady ? Status() : check(*driver_, "cuStreamQuery", result);
}

}  // namespace expertd::client
