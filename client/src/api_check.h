// SPDX-License-Identifier: Apache-2.0
// Checks that every function of the C interface makes on its arguments before anything else. Pure, any thread.
#pragma once

#include <cstddef>

#include "client/src/status.h"

namespace expertd::client {

/// A struct that is older than the oldest known is refused by size; a newer one is read as far as this library knows
/// it.
template <typename Struct>
Status check_struct(const Struct* given, const char* name) {
  if (given == nullptr) {
    return missing_argument(name);
  }
  if (given->struct_size < sizeof(Struct)) {
    return error(EXPERTD_REASON_ARGUMENT_RANGE, "%s.struct_size = %zu, allowed %zu and more", name, given->struct_size,
                 sizeof(Struct));
  }
  return {};
}

inline Status check_given(const void* given, const char* name) {
  return given == nullptr ? missing_argument(name) : Status();
}

/// The first failure of two checks.
inline Status both(Status first, Status second) {
  return first.ok() ? std::move(second) : std::move(first);
}

}  // namespace expertd::client
