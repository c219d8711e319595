// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/token_bound.h"

#include <algorithm>

namespace expertd::transport {

bool take_token_bound(const expertd_slot& slot, const engine::GroupSettings& settings, TensorCheck* check,
                      engine::Request* request) {
  const uint32_t bound = slot.token_bound;
  const uint32_t minimum = std::max(slot.tokens, 1U);
  const bool dynamic = settings.dynamic_ll_tokens != 0;
  if ((dynamic || bound != 0) && (bound < minimum || bound > settings.shape.max_tokens)) {
    return check->refuse(EXPERTD_REASON_ARGUMENT_RANGE, EXPERTD_ARGUMENT_TOKEN_BOUND, bound, minimum,
                         settings.shape.max_tokens);
  }
  const bool low_latency = slot.op == EXPERTD_OP_LL_DISPATCH || slot.op == EXPERTD_OP_LL_COMBINE;
  const bool latency = dynamic ? bound <= settings.dynamic_ll_tokens : low_latency;
  request->token_bound = bound;
  request->traffic = latency ? engine::Traffic::kLatency : engine::Traffic::kThroughput;
  return true;
}

}  // namespace expertd::transport
