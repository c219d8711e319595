// SPDX-License-Identifier: Apache-2.0
// TensorCheck: resolves the tensor references of one slot against the session's buffers, and records the first refusal
// of the slot in its Request. Pure; the loop thread.
#pragma once

#include <cstdint>

#include "daemon/engine/ports.h"
#include "daemon/session/session_tables.h"
#include "proto/abi/ring_v1.h"

namespace expertd::transport {

class TensorCheck {
 public:
  TensorCheck(const expertd_slot& slot, const session::SessionTables& tables, engine::Request* request)
      : slot_(slot), tables_(tables), request_(request) {}

  /// Records a refusal; always false, so that checks read as `return refuse(...)`.
  template <typename Value, typename Minimum, typename Maximum>
  bool refuse(uint32_t reason, uint32_t argument, Value value, Minimum minimum, Maximum maximum) {
    request_->rejected_reason = reason;
    request_->rejected_argument = argument;
    request_->rejected_value = static_cast<int64_t>(value);
    request_->rejected_minimum = static_cast<int64_t>(minimum);
    request_->rejected_maximum = static_cast<int64_t>(maximum);
    return false;
  }

  /// Resolves tensor `index` of `bytes` bytes. Missing is an error only when it is required and has bytes at all.
  bool input(uint32_t index, uint64_t bytes, bool required) { return resolve(index, bytes, required); }
  bool output(uint32_t index, uint64_t bytes, bool required) { return resolve(index, bytes, required); }

 private:
  bool resolve(uint32_t index, uint64_t bytes, bool required);

  const expertd_slot& slot_;
  const session::SessionTables& tables_;
  engine::Request* request_;
};

}  // namespace expertd::transport
