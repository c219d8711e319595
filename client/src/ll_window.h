// SPDX-License-Identifier: Apache-2.0
// Where low-latency results lie when the caller gives no pointers: the client's name for the layout that it shares with
// the daemon. Pure, any thread.
#pragma once

#include "proto/abi/ll_window_v1.h"

namespace expertd::client {

using LlWindowShape = expertd_ll_window_shape;
using LlWindowLayout = expertd_ll_window_layout;

/// Of the window of a group that carries `payloads`: a set of expertd_payload, 0 for any.
inline LlWindowLayout ll_window_layout(const LlWindowShape& shape, uint32_t payloads, uint32_t set) {
  return expertd_ll_window_place_payloads(&shape, payloads, set);
}

}  // namespace expertd::client
