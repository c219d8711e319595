// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/host_group.h"

#include <algorithm>

namespace expertd::device {

namespace {

// Handles that exist from the join on, so that low-latency operations, which rotate over four, never allocate.
constexpr uint32_t kHandlesAtJoin = 4;

}  // namespace

HostGroupTables::HostGroupTables(const engine::GroupShape& shape)
    : id_(shape.id),
      ranks_(shape.ranks),
      experts_(shape.experts),
      top_k_(shape.top_k),
      max_tokens_(shape.max_tokens),
      matrix_ints_(uint64_t{shape.ranks} * kernels::count_row_ints(shape.ranks, shape.experts)),
      counts_(matrix_ints_ * engine::kExchangePages, 0),
      per_rank_(shape.ranks) {}

void HostGroupTables::allocate(Handle& handle) const {
  const uint64_t ints = uint64_t{max_tokens_} * ranks_ + uint64_t{max_tokens_} * top_k_ * 2 + matrix_ints_;
  handle.storage = std::make_unique<int32_t[]>(ints);
}

void HostGroupTables::add_rank(uint32_t rank, uint32_t handle_limit) {
  RankTables& tables = per_rank_[rank];
  tables.present = true;
  tables.handles.resize(handle_limit);
  for (uint32_t i = 0; i < std::min(kHandlesAtJoin, handle_limit); ++i) {
    allocate(tables.handles[i]);
  }
}

bool HostGroupTables::remove_rank(uint32_t rank) {
  per_rank_[rank].present = false;
  return std::none_of(per_rank_.begin(), per_rank_.end(), [](const RankTables& tables) { return tables.present; });
}

void HostGroupTables::clear_inactive_rows(uint32_t page, uint64_t active_ranks) {
  const uint64_t row_ints = kernels::count_row_ints(ranks_, experts_);
  for (uint32_t rank = 0; rank < ranks_; ++rank) {
    if ((active_ranks >> rank & 1) == 0) {
      std::fill_n(counts(page) + rank * row_ints, row_ints, 0);
    }
  }
}

kernels::Routing HostGroupTables::routing(uint32_t rank, uint32_t handle_index) {
  RankTables& tables = per_rank_[rank];
  if (handle_index >= tables.handles.size()) {
    return {};
  }
  Handle& handle = tables.handles[handle_index];
  if (handle.storage == nullptr) {
    allocate(handle);
  }
  kernels::Routing routing;
  routing.token_rank = handle.storage.get();
  routing.token_expert = routing.token_rank + uint64_t{max_tokens_} * ranks_;
  routing.topk = routing.token_expert + uint64_t{max_tokens_} * top_k_;
  routing.counts = routing.topk + uint64_t{max_tokens_} * top_k_;
  return routing;
}

uint64_t HostGroupTables::bytes() const {
  return counts_.size() * sizeof(int32_t);
}

}  // namespace expertd::device
