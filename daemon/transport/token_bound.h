// SPDX-License-Identifier: Apache-2.0
// The bound that a slot gives for the tokens of all ranks, and the traffic that it makes the operation. Pure; the loop
// thread.
#pragma once

#include "daemon/engine/group_shared.h"
#include "daemon/transport/tensor_check.h"
#include "proto/abi/ring_v1.h"

namespace expertd::transport {

/// Takes the bound and the traffic of a dispatch or combine into the request; false when the bound is refused.
bool take_token_bound(const expertd_slot& slot, const engine::GroupSettings& settings, TensorCheck* check,
                      engine::Request* request);

}  // namespace expertd::transport
