// SPDX-License-Identifier: Apache-2.0
// What the rows of a dispatch or combine are. Pure; the loop thread.
#pragma once

#include "daemon/transport/tensor_check.h"
#include "proto/abi/ring_v1.h"

namespace expertd::transport {

/// Takes payload, row sizes and form of the scales into the request, whose hidden is known; false when they are
/// refused.
bool take_payload(const expertd_slot& slot, bool fp8_allowed, TensorCheck* check, engine::Request* request);

}  // namespace expertd::transport
