// SPDX-License-Identifier: Apache-2.0
// NodeMemory: places of equal size for what a rank keeps of messages from other nodes, so that it holds none of the
// fabric's buffers, which all ranks of the node share, while it waits for something else. Taken when the rank joins;
// the kernel hands its pages out at the first use, so a group on one node has none of them. Loop thread of the rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "daemon/engine/fabric_port.h"

namespace expertd::device {

class NodeMemory {
 public:
  /// `place_bytes` is rounded up to keep places aligned.
  NodeMemory(uint64_t places, uint64_t place_bytes)
      : place_bytes_((place_bytes + 63) / 64 * 64),
        bytes_(
            static_cast<std::byte*>(std::aligned_alloc(kPage, (places * place_bytes_ + kPage - 1) / kPage * kPage))) {}

  bool ok() const { return bytes_ != nullptr; }
  uint64_t place_bytes() const { return place_bytes_; }
  /// Puts a copy of what arrived into a place and makes it the arrival's data; false: it is too large.
  bool keep(uint64_t place, engine::Arrival* arrival) {
    if (arrival->bytes > place_bytes_) {
      return false;
    }
    std::byte* to = bytes_.get() + place * place_bytes_;
    std::memcpy(to, arrival->data, arrival->bytes);
    arrival->data = to;
    return true;
  }

 private:
  static constexpr uint64_t kPage = 4096;
  struct Free {
    void operator()(std::byte* bytes) const { std::free(bytes); }
  };
  uint64_t place_bytes_;
  std::unique_ptr<std::byte[], Free> bytes_;
};

}  // namespace expertd::device
