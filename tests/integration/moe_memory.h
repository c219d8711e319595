// SPDX-License-Identifier: Apache-2.0
// Memory of one rank for one case: from expertd_alloc or from the heap, outputs full of poison. One thread; tests only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "tests/support/rank_threads.h"

namespace expertd::support {

class RankArena {
 public:
  RankArena(ClientSession* session, bool registered) : session_(session), registered_(registered) {}
  ~RankArena() {
    for (void* chunk : chunks_) {
      static_cast<void>(expertd_free(session_->get(), chunk));
    }
  }
  RankArena(const RankArena&) = delete;
  RankArena& operator=(const RankArena&) = delete;

  /// Poisoned bytes; null for none, as an empty tensor has.
  template <typename T>
  T* output(size_t count) {
    void* data = take(count * sizeof(T));
    if (data != nullptr) {
      std::memset(data, 0xab, count * sizeof(T));
    }
    return static_cast<T*>(data);
  }

  /// A copy of the values; null for none.
  template <typename T>
  T* input(const std::vector<T>& values) {
    void* data = take(values.size() * sizeof(T));
    if (data != nullptr) {
      std::memcpy(data, values.data(), values.size() * sizeof(T));
    }
    return static_cast<T*>(data);
  }

 private:
  static constexpr size_t kChunk = size_t{1} << 20;

  void* take(size_t bytes) {
    if (bytes == 0) {
      return nullptr;
    }
    if (!registered_) {
      return from_heap(bytes);
    }
    const size_t rounded = (bytes + 127) / 128 * 128;
    if (rounded > left_) {
      left_ = 0;
      next_ = static_cast<char*>(session_->alloc_bytes(std::max(rounded, kChunk)));
      if (next_ == nullptr) {
        return from_heap(bytes);  // the session has ended, which the operation will tell
      }
      left_ = std::max(rounded, kChunk);
      chunks_.push_back(next_);
    }
    char* place = next_;
    next_ += rounded;
    left_ -= rounded;
    return place;
  }

  void* from_heap(size_t bytes) {
    heap_.push_back(std::make_unique<char[]>(bytes));
    return heap_.back().get();
  }

  ClientSession* session_;
  bool registered_;
  std::vector<std::unique_ptr<char[]>> heap_;
  std::vector<void*> chunks_;
  char* next_ = nullptr;
  size_t left_ = 0;
};

}  // namespace expertd::support
