// SPDX-License-Identifier: Apache-2.0
// Whether client and daemon mean the same executor, and with copy engines the same buffer. Pure, loop thread.
#pragma once

#include "daemon/engine/group_shared.h"
#include "daemon/transport/tensor_check.h"
#include "proto/abi/ring_v1.h"

namespace expertd::transport {

/// `group` is null for operations without one, `number` that of the operation, whose handle was held against the flags
/// before. False with a refusal in `check`; else `request` says which executor it is.
bool take_executor(const expertd_slot& slot, const engine::GroupShared* group, uint64_t number, TensorCheck* check,
                   engine::Request* request);

}  // namespace expertd::transport
