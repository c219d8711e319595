// SPDX-License-Identifier: Apache-2.0
// Admission: the only gate between bytes a client wrote and the house. Takes a private copy of a slot and the session's
// tables, yields a Request with resolved tensors, or a refusal that names the argument, its value and the allowed
// range. Pure; the loop thread. No value of the slot is used before it is checked.
#pragma once

#include <cstdint>

#include "daemon/engine/ports.h"
#include "daemon/session/session_tables.h"
#include "proto/abi/ring_v1.h"

namespace expertd::transport {

struct AdmitContext {
  uint32_t slot_index = 0;
  uint64_t seq = 0;  // what the slot's seq must be
  uint64_t now_ns = 0;
  uint64_t default_timeout_ns = 0;
};

/// Fills `request` in any case: refused ones carry rejected_*. Returns the rank whose operation it is, of refused ones
/// too, which count as the rank's operation; null for local operations and where no joined group is named.
engine::RankState* admit(const expertd_slot& slot, const AdmitContext& context, session::SessionTables* tables,
                         engine::Request* request);

}  // namespace expertd::transport
