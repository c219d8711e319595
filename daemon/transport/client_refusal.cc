// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/client_refusal.h"

#include <algorithm>
#include <iterator>

#include "daemon/base/status.h"

namespace expertd::transport {

namespace {

constexpr uint32_t kArguments[] = {
#define EXPERTD_ARGUMENT_NUMBER(name, number, text) number,
    EXPERTD_ARGUMENTS(EXPERTD_ARGUMENT_NUMBER)
#undef EXPERTD_ARGUMENT_NUMBER
};
constexpr uint32_t kReasons[] = {
#define EXPERTD_REASON_NUMBER(name, number, code, retryable, sentence) number,
    EXPERTD_REASONS(EXPERTD_REASON_NUMBER)
#undef EXPERTD_REASON_NUMBER
};
static_assert(kReasons[0] == EXPERTD_REASON_NONE);

bool argument_known(uint32_t number) {
  return std::find(std::begin(kArguments), std::end(kArguments), number) != std::end(kArguments);
}

}  // namespace

bool has_client_refusal(const expertd_slot& slot) {
  return slot.refused_reason != 0 || slot.refused_argument != 0 || slot.refused_value != 0 ||
         slot.refused_minimum != 0 || slot.refused_maximum != 0;
}

bool take_client_refusal(const expertd_slot& slot, TensorCheck* check) {
  if (slot.op == EXPERTD_OP_LAYOUT) {  // local: there are no peers to tell
    return check->refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_FLAGS, slot.flags, 0,
                         EXPERTD_SLOT_FLAGS_ALL & ~EXPERTD_SLOT_REFUSED);
  }
  if (slot.flags != EXPERTD_SLOT_REFUSED) {
    return check->refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_FLAGS, slot.flags, EXPERTD_SLOT_REFUSED,
                         EXPERTD_SLOT_REFUSED);
  }
  const bool reason_fits =
      slot.refused_reason != EXPERTD_REASON_NONE && base::reason_known(static_cast<int>(slot.refused_reason));
  if (!reason_fits) {
    return check->refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_REFUSED_REASON, slot.refused_reason,
                         kReasons[1], *std::max_element(std::begin(kReasons), std::end(kReasons)));
  }
  if (!argument_known(slot.refused_argument)) {
    return check->refuse(EXPERTD_REASON_DESCRIPTOR_MALFORMED, EXPERTD_ARGUMENT_REFUSED_ARGUMENT, slot.refused_argument,
                         EXPERTD_ARGUMENT_NONE, *std::max_element(std::begin(kArguments), std::end(kArguments)));
  }
  return check->refuse(slot.refused_reason, slot.refused_argument, slot.refused_value, slot.refused_minimum,
                       slot.refused_maximum);
}

}  // namespace expertd::transport
