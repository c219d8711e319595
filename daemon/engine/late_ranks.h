// SPDX-License-Identifier: Apache-2.0
// Whom an operation that runs names when its deadline passes. Pure; loop threads.
#pragma once

#include <cstdint>

#include "daemon/base/rank_set.h"
#include "daemon/engine/fabric_port.h"
#include "daemon/engine/group_shared.h"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::engine {

/// The TIMEOUT of an operation that misses something of `ranks`, some of `active`. A node's parts start when all its
/// ranks have submitted: where no counts came of any of them, one may be late and the others wait for it as we do.
/// Nobody of such a node is named while somebody else is missing, and where nobody is, the rank is -1 and minimum to
/// maximum are those of that node, of the first where there are several. `placement` is null on one node.
inline Failure late_failure(const Placement* placement, const base::RankSet& active, uint32_t missing,
                            const base::RankSet& ranks) {
  Failure failure{.reason = EXPERTD_REASON_TIMEOUT, .missing = missing};
  base::RankSet certain = ranks;
  base::RankSet first_node;
  for (uint32_t node = 0; placement != nullptr && missing == EXPERTD_MISSING_COUNTS && node < placement->nodes();
       ++node) {
    base::RankSet of_node;
    for (const uint32_t rank : placement->ranks_of[node]) {
      of_node.add(rank);
    }
    of_node &= active;
    if (node != placement->own_node && of_node.count() > 1 && (of_node - ranks).empty()) {
      certain -= of_node;
      first_node = first_node.empty() ? of_node : first_node;
    }
  }
  if (certain.any()) {
    failure.rank = certain.lowest();
  } else if (first_node.any()) {
    failure.minimum = first_node.lowest();
    for (const uint32_t rank : first_node) {
      failure.maximum = rank;
    }
  }
  return failure;
}

}  // namespace expertd::engine
