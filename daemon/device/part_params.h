// SPDX-License-Identifier: Apache-2.0
// From a LaunchSpec to what kernels take: pointers as `device` sees them. Pure; loop threads. Shared by both kinds.
#pragma once

#include "daemon/engine/ports.h"
#include "daemon/kernels/op_params.h"

namespace expertd::device {

/// Shape, inputs and outputs of the spec's own rank; routing and counts are the device's business.
kernels::OpParams own_params(const engine::LaunchSpec& spec, base::DeviceIndex device);
/// What the own rank may touch of rank `rank`; all null for inactive ranks. `counts` is left to the device.
kernels::PeerView peer_view(const engine::LaunchSpec& spec, uint32_t rank, base::DeviceIndex device);

}  // namespace expertd::device
