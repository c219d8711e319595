// SPDX-License-Identifier: Apache-2.0
// Sentences for the Reasons that completions carry: argument, value and allowed range, or rank and what was missing.
// Pure, any thread; it accepts any bytes.
#pragma once

#include "client/src/status.h"
#include "proto/abi/ring_v1.h"

namespace expertd::client {

const char* argument_name(uint32_t argument);
/// EXPERTD_ARGUMENT_NONE for a name that is not in the list.
uint32_t argument_number(const char* name);

/// The status of a completed operation; ok when its Reason is 0.
Status completion_status(const expertd_completion& completion);

}  // namespace expertd::client
