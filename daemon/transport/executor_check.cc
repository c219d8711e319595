// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/executor_check.h"

#include "proto/abi/exchange_ht_v1.h"
#include "proto/abi/exchange_v1.h"
#include "proto/abi/executor_v1.h"

namespace expertd::transport {
namespace {

bool has(const expertd_slot& slot, uint32_t flag) {
  return (slot.flags & flag) != 0;
}

/// High throughput has forms that copy engines do not execute in any group.
bool is_served(const expertd_slot& slot, const engine::GroupShape& group) {
  if (slot.op != EXPERTD_OP_DISPATCH && slot.op != EXPERTD_OP_COMBINE) {
    return true;
  }
  const expertd_exchange_ht_shape shape{group.ranks, group.experts, group.hidden, group.max_tokens, group.top_k};
  const expertd_exchange_ht_layout layout = expertd_exchange_ht_layout_of(&shape);
  return expertd_exchange_ht_serves(&layout, &slot) != 0;
}

/// Dispatches by the group's rule. What uses the routing of a handle has the flag of the dispatch that left it, which
/// the look-up of the handle made sure of; kinds that no rule has could have no such handle.
bool expects_copies(const expertd_slot& slot, const engine::GroupShared& group) {
  const engine::GroupSettings& settings = group.settings();
  const bool captured = has(slot, EXPERTD_SLOT_CAPTURED);  // those are the daemon's kernels
  if (settings.executor_rule.copies == 0 || !is_served(slot, settings.shape)) {
    return false;
  }
  if (expertd_executor_follows(slot.op, slot.flags) != 0) {
    const uint32_t kinds = slot.op == EXPERTD_OP_LL_COMBINE ? EXPERTD_COPIES_LL : EXPERTD_COPIES_HT;
    return has(slot, EXPERTD_SLOT_COPY_ENGINE) && !captured && (settings.executor_rule.copies & kinds) != 0;
  }
  const uint32_t bound = expertd_executor_bound(slot.token_bound, settings.shape.max_tokens);
  return expertd_executor_of(&settings.executor_rule, slot.op, captured ? 1 : 0, has(slot, EXPERTD_SLOT_SPLIT) ? 1 : 0,
                             bound) == EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE;
}

}  // namespace

bool take_executor(const expertd_slot& slot, const engine::GroupShared* group, uint64_t number, TensorCheck* check,
                   engine::Request* request) {
  const bool dispatch = slot.op == EXPERTD_OP_DISPATCH || slot.op == EXPERTD_OP_LL_DISPATCH;
  const bool expected = group != nullptr && expects_copies(slot, *group);
  // Neither the client's kernels nor the daemon's copies do anything without the other.
  if (has(slot, EXPERTD_SLOT_COPY_ENGINE) != expected || (has(slot, EXPERTD_SLOT_SPLIT) && !dispatch)) {
    return check->refuse(EXPERTD_REASON_UNSUPPORTED, EXPERTD_ARGUMENT_FLAGS, slot.flags, 0, EXPERTD_SLOT_FLAGS_ALL);
  }
  const uint64_t buffer = expected ? number % EXPERTD_EXCHANGE_BUFFERS : 0;
  request->copies = expected;
  return slot.exchange_buffer == buffer ||
         check->refuse(expected ? EXPERTD_REASON_BAD_STATE : EXPERTD_REASON_DESCRIPTOR_MALFORMED,
                       EXPERTD_ARGUMENT_EXCHANGE_BUFFER, slot.exchange_buffer, buffer, buffer);
}

}  // namespace expertd::transport
