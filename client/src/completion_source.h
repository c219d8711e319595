// SPDX-License-Identifier: Apache-2.0
// CompletionSource: where the ends of operations appear: a session's ring, or the records of local work. Any thread.
#pragma once

#include <cstdint>

#include "proto/abi/ring_v1.h"

namespace expertd::client {

enum class WaitEnd { kComplete, kClosed, kDeadline };

class CompletionSource {
 public:
  CompletionSource() = default;
  CompletionSource(const CompletionSource&) = delete;
  CompletionSource& operator=(const CompletionSource&) = delete;
  virtual ~CompletionSource() = default;

  virtual uint32_t slot_index(uint64_t seq) const = 0;
  /// Copies the completion of seq if it is there.
  virtual bool try_read(uint64_t seq, expertd_completion* completion) const = 0;
};

}  // namespace expertd::client
