// SPDX-License-Identifier: Apache-2.0
// What a rank of a group keeps for high throughput by copy engines: the pinned places that its copies fill and empty,
// what it tells the loops of the other ranks, and the routing of its handles. Made with the group and freed with it.
// Its own loop thread writes; the loops of the group's other ranks read `published`.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/device/cuda/ht_plan.h"
#include "daemon/device/cuda/memory.h"
#include "proto/abi/exchange_ht_v1.h"

namespace expertd::device::cuda {

struct HtGroup {
  /// Whoever sees the operation's number sees the row. Written again two operations later, when every part that may
  /// read it has ended.
  struct Published {
    std::atomic<uint64_t> op{0};
    HtRow row;
  };
  struct Handle {
    uint32_t generation = 0;  // 0: none that succeeded
    HtTable table;
  };

  expertd_exchange_ht_layout layout{};
  uint64_t window_offset = 0;  // of the layout in the exchange window
  std::unique_ptr<PinnedMemory> pinned;
  std::array<Published, EXPERTD_HT_BUFFERS> published;
  std::vector<Handle> handles;

  /// Enough for the largest group, so that the next group can have what this one had.
  static constexpr uint64_t kPinnedBytes =
      EXPERTD_HT_BUFFERS * (sizeof(expertd_exchange_ht_plan) + EXPERTD_EXCHANGE_ALIGNMENT +
                            sizeof(expertd_exchange_ht_counts) + 4ull * EXPERTD_HT_SLICES * base::kMaxExperts);
  /// Offsets in the pinned memory.
  uint64_t plan_at(uint64_t op) const { return op % EXPERTD_HT_BUFFERS * sizeof(expertd_exchange_ht_plan); }
  uint64_t counts_at(uint64_t op) const {
    return EXPERTD_HT_BUFFERS * sizeof(expertd_exchange_ht_plan) +
           op % EXPERTD_HT_BUFFERS * expertd_exchange_align(layout.counts_bytes);
  }
};

}  // namespace expertd::device::cuda
