// SPDX-License-Identifier: Apache-2.0
// LocalKernels: what a GPU session needs to do local work, which concerns only the caller's memory, by kernels of the
// library on the caller's stream. One per DeviceSide that can; CudaKernels is the one over the driver. Any thread; a
// slot is used by one operation at a time (LocalOps). It never waits for the GPU.
#pragma once

#include <cstdint>

#include "client/src/local_kernels/exchange_ht_params.h"
#include "client/src/local_kernels/exchange_params.h"
#include "client/src/local_kernels/layout_params.h"
#include "client/src/status.h"
#include "proto/abi/ring_v1.h"

namespace expertd::client {

/// As many local operations may be outstanding as ring slots.
inline constexpr uint32_t kLocalSlots = EXPERTD_RING_SLOTS_MAX;

/// Memory from `begin` up to `end`.
struct Extent {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  bool contains(const Extent& other) const { return begin <= other.begin && other.end <= end; }
  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

inline Extent extent_of(const void* data, uint64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {begin, begin + bytes};
}

class LocalKernels {
 public:
  LocalKernels() = default;
  LocalKernels(const LocalKernels&) = delete;
  LocalKernels& operator=(const LocalKernels&) = delete;
  virtual ~LocalKernels() = default;

  virtual LocalRecord* record(uint32_t slot) = 0;
  /// Reaches the sequence of the slot's operation when it has ended; for DeviceSide::wait_word.
  virtual const void* word(uint32_t slot) const = 0;
  /// Fills in the slot's scratch and record. `params` are within the limits of layout_params.h.
  virtual Status launch_layout(const LayoutParams& params, uint32_t slot, expertd_stream_t stream) = 0;
  /// Whether there are those of operations by copy engines.
  virtual bool exchanges() const { return false; }
  /// Once per operation, before its launches: its number and counters.
  virtual void begin_exchange(ExchangeParams* /*params*/) {}
  /// Does params.stages of the operation, at most kExchangeBlocks blocks.
  virtual Status launch_exchange(ExchangeKernel /*kernel*/, const ExchangeParams& /*params*/,
                                 expertd_stream_t /*stream*/) {
    return {EXPERTD_REASON_UNSUPPORTED, "the library has no kernels for copy engines"};
  }
  virtual Status launch_ht(HtKernel /*kernel*/, const HtParams& /*params*/, expertd_stream_t /*stream*/) {
    return {EXPERTD_REASON_UNSUPPORTED, "the library has no kernels for copy engines"};
  }
  /// Whether kernels reach these bytes. `known`, the allocation found last, answers for what lies in it.
  virtual bool reaches(const Extent& bytes, Extent* known) = 0;
  /// CUDA when the context is lost, in which nothing ends any more.
  virtual Status health() = 0;
};

}  // namespace expertd::client
