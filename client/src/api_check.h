// SPDX-License-Identifier: Apache-2.0
// Checks that every function of the C interface makes on its arguments before anything else. Pure, any thread.
#pragma once

#include <cstddef>

#include "client/src/status.h"

namespace expertd::client {

/// A struct that is older than the oldest known is refused by size; a newer one is read as far as this library knows
/// it. `oldest` is the size of the first version, for structs that have grown since: members behind it are there only
/// when struct_size says so.
template <typename Struct>
Status check_struct(const Struct* given, const char* name, size_t oldest = sizeof(Struct)) {
  if (given == nullptr) {
    return missing_argument(name);
  }
  if (given->struct_size < oldest) {
    return error(EXPERTD_REASON_ARGUMENT_RANGE, "%s.struct_size = %zu, allowed %zu and more", name, given->struct_size,
                 oldest);
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
