// SPDX-License-Identifier: Apache-2.0
// A slot that says that the client's library refused an operation of its group itself (EXPERTD_SLOT_REFUSED). What it
// claims is told to the rank's peers, so it is held against the lists of Reasons and arguments. Pure; the loop thread.
#pragma once

#include "daemon/transport/tensor_check.h"
#include "proto/abi/ring_v1.h"

namespace expertd::transport {

inline bool refused_by_client(const expertd_slot& slot) {
  return (slot.flags & EXPERTD_SLOT_REFUSED) != 0;
}
/// Any of the bytes that only such a slot may use.
bool has_client_refusal(const expertd_slot& slot);
/// Makes the claim the refusal of the slot's request, or DESCRIPTOR_MALFORMED when it cannot be made; always false.
bool take_client_refusal(const expertd_slot& slot, TensorCheck* check);

}  // namespace expertd::transport
