// SPDX-License-Identifier: Apache-2.0
#include "client/src/handle_table.h"

#include <algorithm>

#include "proto/abi/ring_v1.h"

namespace expertd::client {
namespace {

// The daemon's number sizes a table here.
constexpr uint32_t kMaxHandles = 65536;

uint32_t next_generation(uint32_t generation) {
  return generation == UINT32_MAX ? 1 : generation + 1;
}

}  // namespace

void HandleTable::reset(uint32_t capacity) {
  const std::lock_guard lock(mutex_);
  places_.resize(std::min(capacity, kMaxHandles));
  free_.clear();
  for (size_t i = places_.size(); i > 0; --i) {
    places_[i - 1].owner = 0;
    free_.push_back(static_cast<uint32_t>(i - 1));
  }
}

uint32_t HandleTable::capacity() const {
  const std::lock_guard lock(mutex_);
  return static_cast<uint32_t>(places_.size());
}

Status HandleTable::take(uint64_t owner, expertd_handle_t* handle) {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) {
    const int64_t limit = static_cast<int64_t>(places_.size());
    return about(
        error(EXPERTD_REASON_HANDLE_LIMIT, "live handles = %zu, allowed 0..%zu; free some with expertd_handle_free",
              places_.size(), places_.size()),
        {EXPERTD_ARGUMENT_HANDLE, limit, 0, limit});
  }
  const uint32_t index = free_.back();
  free_.pop_back();
  Place& place = places_[index];
  place.owner = owner;
  place.generation = next_generation(place.generation);
  *handle = {index, place.generation};
  return {};
}

expertd_handle_t HandleTable::renew(uint32_t index) {
  const std::lock_guard lock(mutex_);
  if (index >= places_.size()) {
    return {0, 0};
  }
  places_[index].generation = next_generation(places_[index].generation);
  return {index, places_[index].generation};
}

void HandleTable::set_copies(expertd_handle_t handle) {
  const std::lock_guard lock(mutex_);
  if (handle.index < places_.size()) {
    places_[handle.index].copies_generation = handle.generation;
  }
}

bool HandleTable::is_of_copies(expertd_handle_t handle) const {
  const std::lock_guard lock(mutex_);
  return handle.generation != 0 && handle.index < places_.size() &&
         places_[handle.index].copies_generation == handle.generation;
}

Status HandleTable::check_locked(uint64_t owner, expertd_handle_t handle) const {
  if (handle.generation == 0) {
    return missing_argument("handle");
  }
  if (handle.index >= places_.size()) {
    const int64_t last = static_cast<int64_t>(places_.size()) - 1;
    return about(range_error(EXPERTD_REASON_STALE_HANDLE, "handle.index", handle.index, 0, last),
                 {EXPERTD_ARGUMENT_HANDLE, handle.index, 0, last});
  }
  const Place& place = places_[handle.index];
  if (place.owner != owner) {
    return about(error(EXPERTD_REASON_STALE_HANDLE, "handle %u was freed or belongs to another group", handle.index),
                 {EXPERTD_ARGUMENT_HANDLE, handle.generation});
  }
  if (place.generation != handle.generation) {
    return about(error(EXPERTD_REASON_STALE_HANDLE, "handle %u has generation %u, its place is now at %u", handle.index,
                       handle.generation, place.generation),
                 {EXPERTD_ARGUMENT_HANDLE, handle.generation, place.generation, place.generation});
  }
  return {};
}

Status HandleTable::check(uint64_t owner, expertd_handle_t handle) const {
  const std::lock_guard lock(mutex_);
  return check_locked(owner, handle);
}

Status HandleTable::give_back(uint64_t owner, expertd_handle_t handle) {
  const std::lock_guard lock(mutex_);
  Status status = check_locked(owner, handle);
  if (status.ok()) {
    places_[handle.index].owner = 0;
    free_.push_back(handle.index);
  }
  return status;
}

void HandleTable::give_back_all(uint64_t owner) {
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < places_.size(); ++i) {
    if (owner != 0 && places_[i].owner == owner) {
      places_[i].owner = 0;
      free_.push_back(static_cast<uint32_t>(i));
    }
  }
}

}  // namespace expertd::client
