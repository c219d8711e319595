// SPDX-License-Identifier: Apache-2.0
// Which operations a group keeps for replays of CUDA graphs, and in which lane. Pure; the loop thread.
#pragma once

#include "daemon/transport/tensor_check.h"
#include "proto/abi/ring_v1.h"

namespace expertd::transport {

/// Takes into the request whether the operation is captured, and in which of its group's `lanes`; false when that is
/// refused.
bool take_capture(const expertd_slot& slot, uint32_t lanes, TensorCheck* check, engine::Request* request);

}  // namespace expertd::transport
