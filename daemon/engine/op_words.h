// SPDX-License-Identifier: Apache-2.0
// The words of OpEntry (group_shared.h), as the files of GroupShared read and write them.
#pragma once

#include <cstdint>

namespace expertd::engine {

// OpEntry::verdict.
inline constexpr uint64_t kDeciding = 1;
inline constexpr uint64_t kLaunchTag = 2;
inline constexpr uint64_t kFailedTag = 3;

constexpr uint64_t word(uint64_t number, uint64_t tag) {
  return (number << 2) | tag;
}
constexpr uint64_t number_of(uint64_t verdict) {
  return verdict >> 2;
}
constexpr uint64_t tag_of(uint64_t verdict) {
  return verdict & 3;
}

// OpEntry::posted.
constexpr uint64_t submitted(uint64_t number) {
  return number << 1;
}
constexpr uint64_t withdrawn(uint64_t number) {
  return (number << 1) | 1;
}

}  // namespace expertd::engine
