// SPDX-License-Identifier: Apache-2.0
// Words of pinned memory that kernels and streams write and a loop reads.
#pragma once

#include <atomic>
#include <cstdint>

namespace expertd::device::cuda {

/// Acquire: pairs with the kernels' and the stream's release, so that the facts behind the word are there.
inline uint64_t load_word(const uint64_t& word) {
  return std::atomic_ref<uint64_t>(const_cast<uint64_t&>(word)).load(std::memory_order_acquire);
}

}  // namespace expertd::device::cuda
