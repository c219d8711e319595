// SPDX-License-Identifier: Apache-2.0
// What one arm of a capture lane is made of: a kernel that stands behind a stream's wait for the lane's doorbell and
// does whatever captured operation the doorbell names (D14). Filled by device/cuda on the loop thread, passed by value;
// owns nothing. Which operation comes is known on the GPU alone, so its parameters lie in a table of the daemon there.
#pragma once

#include <cstdint>
#include <type_traits>

#include "daemon/kernels/cuda/part_params.h"

namespace expertd::kernels::cuda {

/// Captured operations of one lane. The doorbell names one by its place plus one; any other value is refused.
inline constexpr uint32_t kMostCapturedEntries = 2048;
/// In PartState.taken_entry: the arm runs nothing.
inline constexpr uint32_t kNoEntry = 0xffff;
static_assert(kMostCapturedEntries < kNoEntry);

/// Words of one lane in device memory of the daemon.
struct LaneState {
  uint64_t cancelled;  // generation of the arms that were taken back: block 0 of the first such arm writes it
  uint64_t broken;  // expertd_reason that every further operation of the lane ends with; written by the rescue stream
  uint64_t reserved[14];
};
static_assert(sizeof(LaneState) == 128);

struct ArmParams {
  PartWords words;                      // group_op: how many operations the lane had, this one included
  const PartParams* entries = nullptr;  // [kMostCapturedEntries], of the exchange page that this arm uses
  uint64_t* doorbell = nullptr;
  LaneState* lane = nullptr;
  uint64_t generation = 0;  // of the arms; a higher one than those that were cancelled
  uint32_t experts = 0;
  uint32_t multiprocessors = 1;
  uint32_t null_operation = 0;
  uint32_t after_wait = 0;  // await_arm or await_flags stands in front
};
static_assert(std::is_trivially_copyable_v<ArmParams>);

/// A compare-and-swap of a word that a client's stream may write meanwhile, and the host's word that says it is done.
struct SwapParams {
  uint64_t* word = nullptr;
  uint64_t expected = 0;
  uint64_t desired = 0;
  uint64_t* done = nullptr;  // as the device sees it; gets `mark`
  uint64_t mark = 0;
};

}  // namespace expertd::kernels::cuda
