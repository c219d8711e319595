// SPDX-License-Identifier: Apache-2.0
#include "client/src/staging.h"

#include <bit>
#include <utility>

namespace expertd::client {
namespace {

constexpr uint64_t kMinChunkBytes = 64 << 10;

}  // namespace

Status Staging::take(uint64_t bytes, int32_t* chunk, Buffer** buffer) {
  if (bytes > kMaxStagingBytes) {
    return error(EXPERTD_REASON_POOL_EXHAUSTED,
                 "bytes of tensors outside every buffer = %llu, allowed 0..%llu; use expertd_alloc",
                 static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(kMaxStagingBytes));
  }
  const uint64_t wanted = std::bit_ceil(bytes < kMinChunkBytes ? kMinChunkBytes : bytes);
  Chunk* place = nullptr;
  Buffer* replaced = nullptr;
  {
    const std::lock_guard lock(mutex_);
    place = best_fit_locked(bytes);
    if (place == nullptr) {
      place = smallest_idle_locked();
      if (place == nullptr || total_bytes_ - bytes_of(*place) + wanted > kMaxStagingBytes) {
        return error(EXPERTD_REASON_POOL_EXHAUSTED, "staged bytes in flight = %llu, allowed 0..%llu; use expertd_alloc",
                     static_cast<unsigned long long>(total_bytes_ + wanted),
                     static_cast<unsigned long long>(kMaxStagingBytes));
      }
      total_bytes_ = total_bytes_ - bytes_of(*place) + wanted;
      replaced = std::exchange(place->buffer, nullptr);
    }
    place->busy = true;
  }
  *chunk = static_cast<int32_t>(place - chunks_.data());
  if (place->buffer == nullptr) {
    // Without the lock: the place is busy and therefore this thread's.
    Status status = replace(place, replaced, wanted);
    if (!status.ok()) {
      return status;
    }
  }
  *buffer = place->buffer;
  return {};
}

Staging::Chunk* Staging::best_fit_locked(uint64_t bytes) {
  Chunk* best = nullptr;
  for (Chunk& it : chunks_) {
    const bool fits = it.buffer != nullptr && !it.busy && it.buffer->bytes >= bytes;
    if (fits && (best == nullptr || it.buffer->bytes < best->buffer->bytes)) {
      best = &it;
    }
  }
  return best;
}

// An empty place first, then the smallest chunk, which the new one replaces.
Staging::Chunk* Staging::smallest_idle_locked() {
  Chunk* smallest = nullptr;
  for (Chunk& it : chunks_) {
    if (!it.busy && (smallest == nullptr || bytes_of(it) < bytes_of(*smallest))) {
      smallest = &it;
    }
  }
  return smallest;
}

Status Staging::replace(Chunk* place, Buffer* replaced, uint64_t bytes) {
  Status status;
  if (replaced != nullptr) {
    status = memory_->release(replaced);
  }
  Buffer* made = nullptr;
  if (status.ok()) {
    status = memory_->create_window(bytes, &made);
  }
  const std::lock_guard lock(mutex_);
  place->buffer = made;
  if (!status.ok()) {
    total_bytes_ -= bytes;
    place->busy = false;
  }
  return status;
}

void Staging::give_back(int32_t chunk) {
  const std::lock_guard lock(mutex_);
  chunks_[static_cast<size_t>(chunk) % chunks_.size()].busy = false;
}

void Staging::give_back_all() {
  const std::lock_guard lock(mutex_);
  for (Chunk& it : chunks_) {
    it.busy = false;
  }
}

}  // namespace expertd::client
