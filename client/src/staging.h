// SPDX-License-Identifier: Apache-2.0
// Staging: windows of the library through which tensors at unknown host pointers travel. A chunk belongs to one
// operation from its submission until its completion was collected. Any thread; bounded in number and bytes.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <vector>

#include "client/src/memory.h"
#include "client/src/status.h"

namespace expertd::client {

inline constexpr uint64_t kMaxStagingBytes = uint64_t{4} << 30;

class Staging {
 public:
  explicit Staging(Memory* memory) : memory_(memory) {}

  /// A chunk of at least `bytes` bytes; made when none fits, in place of idle ones when it has to be.
  Status take(uint64_t bytes, int32_t* chunk, Buffer** buffer);
  void give_back(int32_t chunk);
  /// After a re-attach: nothing is in flight any more.
  void give_back_all();

 private:
  struct Chunk {
    Buffer* buffer = nullptr;
    bool busy = false;
  };

  static uint64_t bytes_of(const Chunk& chunk) { return chunk.buffer == nullptr ? 0 : chunk.buffer->bytes; }
  Chunk* best_fit_locked(uint64_t bytes);
  Chunk* idle_locked(bool made);
  uint64_t idle_bytes_locked() const;
  Chunk* make_room_locked(uint64_t bytes, std::vector<Buffer*>* replaced);
  Status replace(Chunk* place, const std::vector<Buffer*>& replaced, uint64_t bytes);

  Memory* const memory_;
  std::mutex mutex_;
  // One for each operation that can be in flight.
  std::array<Chunk, EXPERTD_RING_SLOTS_MAX> chunks_{};
  uint64_t total_bytes_ = 0;
};

}  // namespace expertd::client
