// SPDX-License-Identifier: Apache-2.0
// Strong integer ids, so that a session is never passed where a group is meant. Value types.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>

namespace expertd::base {

template <typename Tag, typename Integer>
struct StrongId {
  Integer value = 0;
  friend auto operator<=>(const StrongId&, const StrongId&) = default;
};

using SessionId = StrongId<struct SessionTag, uint64_t>;
using GroupId = StrongId<struct GroupTag, uint64_t>;
using BufferId = StrongId<struct BufferTag, uint32_t>;
using DeviceIndex = StrongId<struct DeviceTag, uint32_t>;
using Rank = StrongId<struct RankTag, uint32_t>;

}  // namespace expertd::base

template <typename Tag, typename Integer>
struct std::hash<expertd::base::StrongId<Tag, Integer>> {
  size_t operator()(const expertd::base::StrongId<Tag, Integer>& id) const { return std::hash<Integer>()(id.value); }
};
