// SPDX-License-Identifier: Apache-2.0
// How large the messages of a group on GPUs are. Pure; any thread.
#pragma once

#include <cstdint>

#include "daemon/engine/ports.h"

namespace expertd::device {

/// Tokens of a combine that are pulled together at most.
inline constexpr uint32_t kMostWindowTokens = 256;

/// Bytes of a message that hold the worst case of a low latency operation for one other node: rows of bf16, or sums, of
/// all tokens of a rank, of kMostWindowTokens at most. So an operation of so few tokens has one message of its counts
/// and one of rows, or of pulls and of sums, for each node. 0: the group has no such operations. The same on all nodes.
uint64_t low_latency_message_bytes(const engine::GroupShape& shape, const engine::Placement& placement);

/// Windows of a combine that may be under way at once, of `most`: no more than hold all tokens of a rank.
uint32_t windows_of(const engine::GroupShape& shape, uint64_t message_bytes, uint32_t most);

}  // namespace expertd::device
