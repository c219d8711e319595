// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/executor_check.h"

#include "proto/abi/exchange_ht_v1.h"
#include "proto/abi/exchange_v1.h"

namespace expertd::transport {

namespace {

/// Whether an operation of a group with copy engines goes by them: of what all ranks give alike, as the client library
/// reckons it too (goes_by_copies()).
bool goes_by_copies(const expertd_slot& slot, const engine::GroupShape& group, const kernels::OpShape& shape) {
  if (slot.op == EXPERTD_OP_LL_DISPATCH || slot.op == EXPERTD_OP_LL_COMBINE) {
    return (slot.flags & EXPERTD_SLOT_CAPTURED) == 0;  // captured ones are the daemon's kernels
  }
  const expertd_exchange_ht_shape exchanged{group.ranks, group.experts, group.hidden, group.max_tokens, group.top_k};
  const expertd_exchange_ht_layout layout = expertd_exchange_ht_layout_of(&exchanged);
  const uint64_t side = uint64_t{shape.side_elements} * shape.side_element_bytes;
  return (slot.op == EXPERTD_OP_DISPATCH || slot.op == EXPERTD_OP_COMBINE) && shape.expanded == 0 &&
         expertd_exchange_ht_fits(&layout, shape.row_bytes, side) != 0;
}

}  // namespace

bool check_executor(const expertd_slot& slot, const engine::GroupShared* group, uint64_t number, TensorCheck* check,
                    engine::Request* request) {
  const bool expected = group != nullptr && group->settings().shape.copy_engine &&
                        goes_by_copies(slot, group->settings().shape, request->shape);
  request->by_copies = expected;
  // Neither the client's kernels nor the daemon's copies do anything without the other.
  if (((slot.flags & EXPERTD_SLOT_COPY_ENGINE) != 0) != expected) {
    return check->refuse(EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_FLAGS, slot.flags, 0, EXPERTD_SLOT_FLAGS_ALL);
  }
  const uint64_t buffer = expected ? number % EXPERTD_EXCHANGE_BUFFERS : 0;
  return slot.exchange_buffer == buffer ||
         check->refuse(expected ? EXPERTD_REASON_BAD_STATE : EXPERTD_REASON_DESCRIPTOR_MALFORMED,
                       EXPERTD_ARGUMENT_EXCHANGE_BUFFER, slot.exchange_buffer, buffer, buffer);
}

}  // namespace expertd::transport
