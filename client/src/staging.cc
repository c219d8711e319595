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
  std::vector<Buffer*> replaced;
  {
    const std::lock_guard lock(mutex_);
    place = best_fit_locked(bytes);
    if (place == nullptr) {
      place = make_room_locked(wanted, &replaced);
      if (place == nullptr) {
        return error(EXPERTD_REASON_POOL_EXHAUSTED, "staged bytes in flight = %llu, allowed 0..%llu; use expertd_alloc",
                     static_cast<unsigned long long>(total_bytes_ - idle_bytes_locked() + wanted),
                     static_cast<unsigned long long>(kMaxStagingBytes));
      }
      total_bytes_ += wanted;
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

// The smallest idle chunk, or with made = false a place for a new one.
Staging::Chunk* Staging::idle_locked(bool made) {
  Chunk* smallest = nullptr;
  for (Chunk& it : chunks_) {
    const bool fits = !it.busy && (it.buffer != nullptr) == made;
    if (fits && (smallest == nullptr || bytes_of(it) < bytes_of(*smallest))) {
      smallest = &it;
    }
  }
  return smallest;
}

uint64_t Staging::idle_bytes_locked() const {
  uint64_t bytes = 0;
  for (const Chunk& it : chunks_) {
    bytes += it.busy ? 0 : bytes_of(it);
  }
  return bytes;
}

// A place for a chunk of `bytes` bytes; idle chunks that leave it no room are taken out. Null when operations in flight
// leave it none.
Staging::Chunk* Staging::make_room_locked(uint64_t bytes, std::vector<Buffer*>* replaced) {
  if (total_bytes_ - idle_bytes_locked() + bytes > kMaxStagingBytes) {
    return nullptr;
  }
  Chunk* place = idle_locked(false);
  while (place == nullptr || total_bytes_ + bytes > kMaxStagingBytes) {
    Chunk* idle = idle_locked(true);
    if (idle == nullptr) {
      return nullptr;
    }
    total_bytes_ -= bytes_of(*idle);
    replaced->push_back(std::exchange(idle->buffer, nullptr));
    place = place == nullptr ? idle : place;
  }
  return place;
}

Status Staging::replace(Chunk* place, const std::vector<Buffer*>& replaced, uint64_t bytes) {
  Status status;
  for (Buffer* it : replaced) {
    Status released = memory_->release(it);
    status = status.ok() ? std::move(released) : std::move(status);
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
