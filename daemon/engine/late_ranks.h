// SPDX-License-Identifier: Apache-2.0
// Whom an operation that runs names when its deadline passes. Pure; loop threads.
#pragma once

#include <bit>
#include <cstdint>

#include "daemon/engine/fabric_port.h"
#include "daemon/engine/group_shared.h"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::engine {

/// The TIMEOUT of an operation that misses something of `ranks`, some of `active`. A node's parts start when all its
/// ranks have submitted: where no counts came of any of them, one may be late and the others wait for it as we do.
/// Nobody of such a node is named while somebody else is missing, and where nobody is, the rank is -1 and minimum to
/// maximum are those of that node, of the first where there are several. `placement` is null on one node.
inline Failure late_failure(const Placement* placement, uint64_t active, uint32_t missing, uint64_t ranks) {
  Failure failure{.reason = EXPERTD_REASON_TIMEOUT, .missing = missing};
  uint64_t certain = ranks;
  uint64_t first_node = 0;
  for (uint32_t node = 0; placement != nullptr && missing == EXPERTD_MISSING_COUNTS && node < placement->nodes();
       ++node) {
    uint64_t of_node = 0;
    for (const uint32_t rank : placement->ranks_of[node]) {
      of_node |= active & uint64_t{1} << rank;
    }
    if (node != placement->own_node && std::popcount(of_node) > 1 && (of_node & ~ranks) == 0) {
      certain &= ~of_node;
      first_node = first_node == 0 ? of_node : first_node;
    }
  }
  if (certain != 0) {
    failure.rank = std::countr_zero(certain);
  } else if (first_node != 0) {
    failure.minimum = std::countr_zero(first_node);
    failure.maximum = std::bit_width(first_node) - 1;
  }
  return failure;
}

}  // namespace expertd::engine
