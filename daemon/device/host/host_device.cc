// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/host_device.h"

#include <algorithm>

#include "daemon/base/clock.h"
#include "daemon/device/host/host_group.h"
#include "daemon/device/host/host_memory.h"
#include "daemon/device/part_params.h"
#include "daemon/kernels/host/host_ops.h"

namespace expertd::device {

namespace {

// Bytes that one slice of a move touches before the loop looks at aborts and other sessions again: about 50 us of copy.
constexpr uint64_t kSliceBytes = 512 * 1024;

bool is_dispatch(kernels::OpKind kind) {
  return kind == kernels::OpKind::kDispatch || kind == kernels::OpKind::kLlDispatch;
}

}  // namespace

HostGroupDirectory::HostGroupDirectory() = default;

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
  if (tables == nullptr) {
    auto created = std::make_unique<HostGroupTables>(shape);
    created->add_rank(shape.rank, handle_limit);
    entry.store(created.release(), std::memory_order_release);
    return base::Status::ok();
  }
  tables->add_rank(shape.rank, handle_limit);
  return base::Status::ok();
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

struct HostDevice::Part {
  engine::PartId id = 0;
  Step step = Step::kFree;
  uint32_t abort_reason = 0;
  bool routes = false;  // has a route step of its own
  engine::ExchangeFlags* flags = nullptr;
  uint64_t active = 0;
  uint32_t rank = 0;
  uint32_t token = 0;  // progress of the move
  uint32_t slice_tokens = 1;
  uint64_t start_ns = 0;
  uint64_t awaited_since_ns = 0;
  uint64_t arrived = 0;  // ranks whose waiting time is known (wait_stats)
  std::array<base::DeviceIndex, base::kMaxLocalRanks> devices{};
  kernels::OpParams params;
  kernels::OpReport report;
  std::array<kernels::PeerView, base::kMaxLocalRanks> peers{};
};

HostDevice::HostDevice(base::DeviceIndex index, uint32_t ordinal, HostGroupDirectory* groups, engine::WakePort* wake,
                       uint64_t pool_max_bytes)
    : index_(index), ordinal_(ordinal), groups_(groups), wake_(wake), pool_(pool_max_bytes), parts_(kMaxParts) {}

HostDevice::~HostDevice() = default;

DeviceInfo HostDevice::info() const {
  DeviceInfo info;
  info.uuid = "host:" + std::to_string(ordinal_);
  info.name = "host memory";
  info.doorbell_form = "host";
  info.kernels = "host";
  info.pool_used_bytes = pool_.used();
  info.window_bytes = info.pool_used_bytes;  // its tables are of the heap
  info.peer_access_mask = ~0ULL;
  return info;
}

base::Result<Window> HostDevice::create_window(uint64_t bytes) {
  return create_host_window(bytes, index_, &pool_);
}

base::Result<std::unique_ptr<HeldMemory>> HostDevice::import_fd(base::ScopedFd fd, uint64_t offset, uint64_t bytes,
                                                                uint64_t /*allocation_bytes*/) {
  return import_host_fd(std::move(fd), offset, bytes, index_);
}

base::Result<std::unique_ptr<HeldMemory>> HostDevice::import_ipc(const void* /*handle*/, uint64_t /*offset*/,
                                                                 uint64_t /*bytes*/) {
  return base::Status(EXPERTD_REASON_WRONG_DEVICE_KIND, "a CUDA IPC handle on a host device; pass a sealed memfd");
}

base::Result<SessionGrant> HostDevice::open_session(base::SessionId /*session*/) {
  return SessionGrant{};
}
void HostDevice::close_session(base::SessionId /*session*/) {}
void* HostDevice::session_flag_page(base::SessionId /*session*/) {
  return nullptr;
}

base::Status HostDevice::create_group(const engine::GroupShape& shape, uint32_t handle_limit) {
  return groups_->add_rank(shape, handle_limit);
}

void HostDevice::destroy_group(base::GroupId group, base::Rank rank) {
  groups_->remove_rank(group, rank);
}

uint32_t HostDevice::handle_capacity(base::GroupId group, base::Rank rank) const {
  const HostGroupTables* tables = groups_->find(group);
  return tables == nullptr ? 0 : tables->handle_capacity(rank.value);
}

HostDevice::Part* HostDevice::find(engine::PartId part) {
  Part& candidate = parts_[part % kMaxParts];
  return candidate.id == part && candidate.step != Step::kFree ? &candidate : nullptr;
}

void HostDevice::set_step(Part& part, Step step) {
  const auto runs = [](Step s) { return s == Step::kStart || s == Step::kMove; };
  runnable_ += static_cast<uint32_t>(runs(step)) - static_cast<uint32_t>(runs(part.step));
  part.step = step;
}

bool HostDevice::prepare(const engine::LaunchSpec& spec, Part& part) {
  part.params = own_params(spec, index_);
  part.active = spec.active_ranks;
  part.rank = spec.rank;
  part.flags = spec.flags;
  part.devices = spec.devices;
  const kernels::OpShape& shape = part.params.shape;
  part.routes = is_dispatch(shape.kind) && shape.cached == 0;
  if (spec.group.value == 0) {
    return true;
  }
  HostGroupTables* tables = groups_->find(spec.group);
  if (tables == nullptr) {
    return false;
  }
  part.params.counts = tables->counts(spec.page);
  if (shape.kind != kernels::OpKind::kBarrier) {
    part.params.routing = tables->routing(spec.rank, spec.own->handle_index);
    if (part.params.routing.token_rank == nullptr) {
      return false;
    }
  }
  if (part.routes && (spec.active_ranks & ((1ULL << spec.rank) - 1)) == 0) {
    tables->clear_inactive_rows(spec.page, spec.active_ranks);  // by the lowest rank, before its flag
  }
  for (uint32_t rank = 0; rank < spec.ranks; ++rank) {
    part.peers[rank] = peer_view(spec, rank, index_);
    part.peers[rank].counts = part.params.counts;
  }
  const uint64_t row_bytes = std::max<uint64_t>(1, uint64_t{shape.row_bytes} * std::max(1U, shape.top_k));
  part.slice_tokens = static_cast<uint32_t>(std::max<uint64_t>(1, kSliceBytes / row_bytes));
  return true;
}

bool HostDevice::launch(const engine::LaunchSpec& spec, const engine::SlotWords& /*words*/, engine::PartId* part_id) {
  Part* part = nullptr;
  for (uint32_t tries = 0; tries < kMaxParts && part == nullptr; ++tries, ++next_serial_) {
    Part& candidate = parts_[next_serial_ % kMaxParts];
    if (candidate.step == Step::kFree) {
      part = &candidate;
      part->id = next_serial_;
    }
  }
  if (part == nullptr) {
    return false;
  }
  part->abort_reason = 0;
  part->token = 0;
  part->start_ns = 0;
  part->arrived = 0;
  part->report = kernels::OpReport{};
  if (!prepare(spec, *part)) {
    part->abort_reason = EXPERTD_REASON_INTERNAL;
  }
  set_step(*part, Step::kStart);
  *part_id = part->id;
  return true;
}

void HostDevice::set_flag(Part& part, std::atomic<uint64_t>& flag) {
  const uint64_t bit = 1ULL << part.rank;
  // Release publishes this rank's rows and counts; the acquire that sees all bits is in advance().
  const uint64_t before = flag.fetch_or(bit, std::memory_order_seq_cst);
  if ((before | bit) != part.active) {
    return;
  }
  for (uint32_t rank = 0; rank < base::kMaxLocalRanks; ++rank) {
    if (rank != part.rank && (part.active >> rank & 1) != 0) {
      wake_->wake(part.devices[rank]);
    }
  }
}

void HostDevice::start(Part& part) {
  part.start_ns = base::now_ns();
  part.awaited_since_ns = part.start_ns;
  if (part.params.shape.kind == kernels::OpKind::kLayout) {
    kernels::host::layout(part.params, &part.report);
    return;
  }
  if (part.routes) {
    kernels::host::route(part.params);
  }
  set_flag(part, part.flags->routed);
  set_step(part, Step::kAwaitRouted);
}

void HostDevice::move_slice(Part& part) {
  const kernels::OpShape& shape = part.params.shape;
  const uint32_t end = std::min(shape.tokens, part.token + part.slice_tokens);
  kernels::host::move_range(part.params, part.peers.data(), part.token, end, &part.report);
  part.token = end;
}

namespace {

// A failed operation must not be mistaken for data by whoever reads the outputs without looking at the completion.
void clear_outputs(const kernels::OpParams& params) {
  const kernels::OpShape& shape = params.shape;
  if (!is_dispatch(shape.kind)) {
    return;
  }
  if (params.out.expert_counts != nullptr) {
    std::fill_n(params.out.expert_counts, shape.local_experts, 0);
  }
  if (shape.kind == kernels::OpKind::kDispatch && params.out.topk_idx != nullptr) {
    const uint64_t ids = uint64_t{shape.capacity_rows} * (shape.expanded != 0 ? 1 : shape.top_k);
    std::fill_n(static_cast<uint8_t*>(params.out.topk_idx), ids * shape.topk_idx_bytes, uint8_t{0xff});
  }
}

}  // namespace

// One step of a part; true when it ended.
bool HostDevice::advance(Part& part) {
  switch (part.step) {
    case Step::kFree:
      return true;
    case Step::kStart:
      start(part);
      return part.params.shape.kind == kernels::OpKind::kLayout;
    case Step::kAwaitRouted: {
      const uint64_t routed = part.flags->routed.load(std::memory_order_acquire);  // pairs with set_flag
      if (part.params.out.wait_stats != nullptr && (routed & ~part.arrived) != 0) {
        const int64_t waited = static_cast<int64_t>(base::now_ns() - part.awaited_since_ns);
        for (uint32_t rank = 0; rank < part.params.shape.ranks; ++rank) {
          part.params.out.wait_stats[rank] += ((routed & ~part.arrived) >> rank & 1) != 0 ? waited : 0;
        }
        part.arrived = routed;
      }
      if (routed != part.active) {
        return false;
      }
      if (part.params.shape.kind == kernels::OpKind::kBarrier) {
        return true;
      }
      if (kernels::host::check_matrix(part.params, part.peers.data(), &part.report) != 0) {
        part.token = part.params.shape.tokens;  // nobody moves anything; all ranks see the same matrix
      }
      set_step(part, Step::kMove);
      return false;
    }
    case Step::kMove:
      if (part.token < part.params.shape.tokens) {
        move_slice(part);
      }
      if (part.token >= part.params.shape.tokens) {
        set_flag(part, part.flags->moved);
        set_step(part, Step::kAwaitMoved);
      }
      return false;
    case Step::kAwaitMoved:
      if (part.flags->moved.load(std::memory_order_acquire) != part.active) {  // pairs with set_flag
        return false;
      }
      kernels::host::finish(part.params, part.peers.data(), &part.report);
      return true;
  }
  return true;
}

bool HostDevice::poll(engine::PartId part_id, engine::Outcome* outcome) {
  Part* part = find(part_id);
  if (part == nullptr) {
    return true;
  }
  bool ended = part->abort_reason != 0;
  Step before = Step::kFree;
  // Steps follow each other at once unless they wait; a move gives the loop back after each slice.
  while (!ended && part->step != before) {
    before = part->step;
    ended = advance(*part);
  }
  if (!ended) {
    return false;
  }
  if (part->abort_reason != 0) {
    part->report = kernels::OpReport{};
    part->report.reason = part->abort_reason;
  }
  if (part->report.reason != 0) {
    clear_outputs(part->params);
  }
  outcome->report = part->report;
  outcome->start_ns = part->start_ns;
  outcome->end_ns = base::now_ns();
  set_step(*part, Step::kFree);
  return true;
}

void HostDevice::abort(engine::PartId part_id, uint32_t reason) {
  Part* part = find(part_id);
  if (part != nullptr && part->abort_reason == 0) {
    part->abort_reason = reason;
  }
}

uint32_t HostDevice::missing(engine::PartId part_id, uint64_t* ranks) {
  const Part* part = find(part_id);
  *ranks = 0;
  if (part == nullptr || part->flags == nullptr) {
    return EXPERTD_MISSING_NONE;
  }
  const uint64_t routed = part->flags->routed.load(std::memory_order_acquire);
  if (routed != part->active) {
    *ranks = part->active & ~routed;
    return EXPERTD_MISSING_COUNTS;
  }
  *ranks = part->active & ~part->flags->moved.load(std::memory_order_acquire);
  return EXPERTD_MISSING_ROWS;
}

void HostDevice::release_words(const engine::SlotWords& /*words*/, uint32_t /*reason*/) {}

}  // namespace expertd::device
