// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/host_group.h"

#include <algorithm>
#include <new>
#include <string>

namespace expertd::device {

namespace {

// Handles whose pages exist from the join on, so that low-latency operations, which rotate over four, never fault. A
// group of more tokens than those may have gets its pages at the first use of each handle.
constexpr uint32_t kHandlesTouchedAtJoin = 4;
constexpr uint64_t kPageInts = 4096 / sizeof(int32_t);

// Volatile, because a compiler may know that calloc left zeros and drop writes of zero.
void touch(volatile int32_t* ints, uint64_t count) {
  for (uint64_t i = 0; i < count; i += kPageInts) {
    ints[i] = 0;
  }
}

uint64_t matrix_ints_of(const engine::GroupShape& shape) {
  return uint64_t{shape.ranks} * kernels::count_row_ints(shape.ranks, shape.experts);
}

uint64_t handle_ints_of(const engine::GroupShape& shape) {
  return uint64_t{shape.max_tokens} * (uint64_t{shape.ranks} + uint64_t{shape.top_k} * 2) + matrix_ints_of(shape);
}

uint32_t handles_that_fit(uint64_t handle_bytes, uint32_t limit) {
  const uint64_t fitting = std::max<uint64_t>(kMaxHandleTableBytes / handle_bytes, 1);
  return static_cast<uint32_t>(std::min<uint64_t>(std::max(limit, 1U), fitting));
}

}  // namespace

GroupMemory host_group_memory(const engine::GroupShape& shape, uint32_t handle_limit) {
  const uint64_t handle_bytes = handle_ints_of(shape) * sizeof(int32_t);
  GroupMemory memory;
  memory.table_bytes = matrix_ints_of(shape) * engine::kExchangePages * sizeof(int32_t);
  memory.handle_count = handles_that_fit(handle_bytes, handle_limit);
  memory.handle_bytes = memory.handle_count * handle_bytes;
  return memory;
}

HostGroupTables::HostGroupTables(const engine::GroupShape& shape)
    : id_(shape.id),
      ranks_(shape.ranks),
      experts_(shape.experts),
      top_k_(shape.top_k),
      max_tokens_(shape.max_tokens),
      matrix_ints_(matrix_ints_of(shape)),
      handle_ints_(handle_ints_of(shape)),
      counts_(allocate(matrix_ints_ * engine::kExchangePages)),
      notices_(size_t{shape.ranks} * engine::kExchangePages),
      per_rank_(shape.ranks) {}

HostGroupTables::Ints HostGroupTables::allocate(uint64_t ints) {
  return Ints(static_cast<int32_t*>(std::calloc(ints, sizeof(int32_t))));
}

std::unique_ptr<HostGroupTables> HostGroupTables::create(const engine::GroupShape& shape) {
  std::unique_ptr<HostGroupTables> tables(new (std::nothrow) HostGroupTables(shape));
  return tables == nullptr || tables->counts_ == nullptr ? nullptr : std::move(tables);
}

base::Status HostGroupTables::add_rank(uint32_t rank, uint32_t handle_limit) {
  const uint64_t handles = handles_that_fit(handle_bytes(), handle_limit);
  RankTables tables{allocate(handles * handle_ints()), {}, std::make_unique<NodeExchange>(ranks_, experts_), {}};
  if (!tables.exchange->ok()) {
    return base::Status(EXPERTD_REASON_POOL_EXHAUSTED, "no memory for what the rank keeps of other nodes' messages");
  }
  if (tables.handles == nullptr) {
    return base::Status(EXPERTD_REASON_POOL_EXHAUSTED, "no memory for " + std::to_string(handles) + " handles of " +
                                                           std::to_string(handle_bytes()) + " bytes");
  }
  if (max_tokens_ <= base::kMaxLlTokens) {
    touch(tables.handles.get(), std::min<uint64_t>(kHandlesTouchedAtJoin, handles) * handle_ints());
  }
  tables.uses.resize(handles);
  tables.peers.resize(size_t{ranks_} * engine::kExchangePages);
  per_rank_[rank] = std::move(tables);
  return base::Status::ok();
}

bool HostGroupTables::remove_rank(uint32_t rank) {
  per_rank_[rank] = RankTables{};
  return empty();
}

bool HostGroupTables::empty() const {
  return std::all_of(per_rank_.begin(), per_rank_.end(), [](const RankTables& tables) { return tables.uses.empty(); });
}

void HostGroupTables::clear_inactive_rows(uint32_t page, const base::RankSet& active_ranks) {
  const uint64_t row_ints = kernels::count_row_ints(ranks_, experts_);
  for (uint32_t rank = 0; rank < ranks_; ++rank) {
    if (!active_ranks.contains(rank)) {
      std::fill_n(counts(page) + rank * row_ints, row_ints, 0);
    }
  }
}

kernels::Routing HostGroupTables::routing(uint32_t rank, uint32_t handle_index) {
  RankTables& tables = per_rank_[rank];
  if (handle_index >= tables.uses.size()) {
    return {};
  }
  kernels::Routing routing;
  routing.token_rank = tables.handles.get() + handle_index * handle_ints();
  routing.token_expert = routing.token_rank + uint64_t{max_tokens_} * ranks_;
  routing.topk = routing.token_expert + uint64_t{max_tokens_} * top_k_;
  routing.counts = routing.topk + uint64_t{max_tokens_} * top_k_;
  return routing;
}

HandleUse* HostGroupTables::use(uint32_t rank, uint32_t handle_index) {
  std::vector<HandleUse>& uses = per_rank_[rank].uses;
  return handle_index < uses.size() ? &uses[handle_index] : nullptr;
}

HostGroupDirectory::~HostGroupDirectory() {
  for (std::atomic<HostGroupTables*>& entry : tables_) {
    delete entry.load(std::memory_order_acquire);
  }
}

HostGroupTables* HostGroupDirectory::find(base::GroupId group) const {
  HostGroupTables* tables = tables_[group.value % kMaxGroups].load(std::memory_order_acquire);
  return tables != nullptr && tables->id() == group ? tables : nullptr;
}

base::Status HostGroupDirectory::add_rank(const engine::GroupShape& shape, uint32_t handle_limit) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::atomic<HostGroupTables*>& entry = tables_[shape.id.value % kMaxGroups];
  HostGroupTables* tables = entry.load(std::memory_order_acquire);
  if (tables != nullptr && tables->id() != shape.id) {
    return base::Status(EXPERTD_REASON_GROUP_LIMIT);
  }
  if (tables != nullptr) {
    return tables->add_rank(shape.rank, handle_limit);
  }
  std::unique_ptr<HostGroupTables> created = HostGroupTables::create(shape);
  if (created == nullptr) {
    return base::Status(EXPERTD_REASON_POOL_EXHAUSTED, "no memory for the count matrices of a group");
  }
  EXPERTD_RETURN_IF_ERROR(created->add_rank(shape.rank, handle_limit));
  entry.store(created.release(), std::memory_order_release);  // pairs with find()
  return base::Status::ok();
}

uint64_t HostGroupDirectory::handle_table_bytes(base::GroupId group, base::Rank rank) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const HostGroupTables* tables = find(group);
  return tables == nullptr ? 0 : tables->handle_capacity(rank.value) * tables->handle_bytes();
}

void HostGroupDirectory::remove_rank(base::GroupId group, base::Rank rank) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::atomic<HostGroupTables*>& entry = tables_[group.value % kMaxGroups];
  HostGroupTables* tables = entry.load(std::memory_order_acquire);
  if (tables == nullptr || tables->id() != group || !tables->remove_rank(rank.value)) {
    return;
  }
  entry.store(nullptr, std::memory_order_release);
  delete tables;
}

}  // namespace expertd::device
