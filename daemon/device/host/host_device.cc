// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/host_device.h"

#include <algorithm>

#include "daemon/base/clock.h"
#include "daemon/device/host/host_memory.h"
#include "daemon/device/host/host_part.h"

namespace expertd::device {

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
  info.window_bytes = pool_.used();
  info.pool_used_bytes = info.window_bytes + handle_table_bytes_.load(std::memory_order_relaxed);
  info.peer_access_mask = ~0ULL;
  return info;
}

base::Result<Window> HostDevice::create_window(uint64_t bytes) {
  return create_host_window(bytes, index_, &pool_);
}

base::Result<uint64_t> HostDevice::window_size(uint64_t bytes) const {
  return host_window_size(bytes);
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
  if (shape.capture_lanes != 0) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED, "capture_lanes = " + std::to_string(shape.capture_lanes) +
                                                        ": host devices have no graphs to capture operations in");
  }
  EXPERTD_RETURN_IF_ERROR(groups_->add_rank(shape, handle_limit));
  handle_table_bytes_.fetch_add(groups_->handle_table_bytes(shape.id, base::Rank{shape.rank}),
                                std::memory_order_relaxed);
  return base::Status::ok();
}

base::Result<GroupMemory> HostDevice::plan_group(const engine::GroupShape& shape, uint32_t handle_limit) const {
  return host_group_memory(shape, handle_limit);
}

void HostDevice::destroy_group(base::GroupId group, base::Rank rank) {
  handle_table_bytes_.fetch_sub(groups_->handle_table_bytes(group, rank), std::memory_order_relaxed);
  groups_->remove_rank(group, rank);
}

uint32_t HostDevice::handle_capacity(base::GroupId group, base::Rank rank) const {
  const HostGroupTables* tables = groups_->find(group);
  return tables == nullptr ? 0 : tables->handle_capacity(rank.value);
}

HostPart* HostDevice::find(engine::PartId part) {
  return part != 0 && places_[part % kMaxParts].part == part ? &parts_[part % kMaxParts] : nullptr;
}

// The session's latest part in flight; 0 for none.
engine::PartId HostDevice::last_part(base::SessionId session) const {
  engine::PartId last = 0;
  for (uint32_t i = 0; i < kMaxParts && used_ != 0; ++i) {
    const Place& place = places_[i];
    last = place.session == session.value ? std::max(last, place.part) : last;
  }
  return last;
}

bool HostDevice::launch(const engine::LaunchSpec& spec, const engine::SlotWords& /*words*/, engine::PartId* part_id) {
  uint32_t tries = 0;
  while (tries < kMaxParts && places_[next_serial_ % kMaxParts].part != 0) {
    ++tries;
    ++next_serial_;
  }
  if (tries == kMaxParts) {
    return false;
  }
  const engine::PartId id = next_serial_++;
  const base::SessionId session = spec.own->session;
  HostPart& part = parts_[id % kMaxParts];
  part.begin(spec, index_, groups_, id, last_part(session));
  places_[id % kMaxParts] = {session.value, id};
  ++used_;
  runnable_ += part.runs() ? 1 : 0;
  *part_id = id;
  return true;
}

// Frees the part's place and lets the one behind it move up. A part may end before those in front of it (an abort), so
// the one behind then waits for what this one waited for.
void HostDevice::end(HostPart& part) {
  Place& ended = places_[part.id() % kMaxParts];
  --used_;
  for (uint32_t i = 0; i < kMaxParts && used_ != 0; ++i) {
    const Place& place = places_[i];
    HostPart& behind = parts_[place.part % kMaxParts];
    if (place.part == 0 || place.session != ended.session || behind.behind() != part.id()) {
      continue;
    }
    runnable_ -= behind.runs() ? 1 : 0;
    behind.follow(part.behind());
    runnable_ += behind.runs() ? 1 : 0;
  }
  ended = Place{};
  part.free();
}

bool HostDevice::poll(engine::PartId part_id, engine::Outcome* outcome) {
  HostPart* part = find(part_id);
  if (part == nullptr) {
    return true;
  }
  runnable_ -= part->runs() ? 1 : 0;
  bool ended = false;
  HostPart::Step before = HostPart::Step::kFree;
  // Steps follow each other at once unless they wait or have more slices. Of a part that is more than a few rows one
  // slice is done, since others may be waiting for this thread. A part that was behind another starts with the next
  // poll: so one pass of the loop takes a few slices of a session and not one of each of its parts.
  bool enough = false;
  bool sliced = false;
  do {
    before = part->step();
    sliced |= HostPart::takes_slices(before);
    ended = part->advance(wake_);
    enough = before == HostPart::Step::kReady || (sliced && !part->small() && part->runs());
  } while (!ended && part->step() != before && !enough);
  runnable_ += !ended && part->runs() ? 1 : 0;
  if (!ended) {
    return false;
  }
  outcome->report = part->report();
  outcome->peer_reason = part->peer_reason();
  outcome->exchanged = part->exchanged();
  outcome->executor = EXPERTD_COMPLETION_EXECUTOR_HOST;
  outcome->start_ns = part->start_ns();
  outcome->end_ns = base::now_ns();
  end(*part);
  return true;
}

bool HostDevice::works(engine::PartId part) const {
  return places_[part % kMaxParts].part == part && parts_[part % kMaxParts].runs();
}

void HostDevice::abort(engine::PartId part_id, uint32_t reason) {
  HostPart* part = find(part_id);
  if (part != nullptr) {
    runnable_ -= part->runs() ? 1 : 0;
    part->fail(reason);
    runnable_ += part->runs() ? 1 : 0;
  }
}

uint32_t HostDevice::missing(engine::PartId part_id, base::RankSet* ranks) {
  HostPart* part = find(part_id);
  *ranks = {};
  return part == nullptr ? uint32_t{EXPERTD_MISSING_NONE} : part->missing(ranks);
}

void HostDevice::release_words(const engine::SlotWords& /*words*/, uint32_t /*reason*/) {}

}  // namespace expertd::device
