// SPDX-License-Identifier: Apache-2.0
// NodeNotice: what a rank tells all other nodes of its part of an operation before anything moves, so that all ranks
// decide alike whether it runs. Pure; loop threads.
#pragma once

#include <cstdint>
#include <span>
#include <type_traits>

#include "daemon/engine/agreement.h"
#include "daemon/kernels/op_params.h"

namespace expertd::device {

/// As it stands at the start of a counts message; behind it follow row_ints int32 of the rank's row of the count
/// matrix: all of them, or the error at its end alone where the operation routes nothing.
struct NodeNotice {
  base::RankSet active;  // ranks that take part, as the rank's node has it
  engine::AgreedValues agreed{};
  int64_t value = 0;  // of a refusal
  int64_t minimum = 0;
  int64_t maximum = 0;
  uint32_t reason = 0;  // the rank's own request was refused; 0: it was not
  uint32_t argument = 0;
  uint32_t capacity_rows = 0;
  uint32_t row_ints = 0;
};
static_assert(std::is_trivially_copyable_v<NodeNotice> && sizeof(NodeNotice) == 208);

/// The notice of a rank's request.
NodeNotice make_notice(const engine::Request& request, const base::RankSet& active, uint32_t row_ints);

/// Bytes of a counts message: what every message of a group must be able to hold.
uint64_t counts_message_bytes(uint32_t ranks, uint32_t experts);

struct Verdict {
  kernels::OpReport* report;
  uint32_t* peer_reason;  // with PEER_REJECTED
};
/// What follows from the notices of the active ranks (one per rank of the group) for rank `shape.rank`: false when the
/// operation ends, with the Reason in the report. CANCELLED: nodes disagree about who takes part.
bool notices_agree(std::span<const NodeNotice> notices, const kernels::OpShape& shape, const Verdict& verdict);

}  // namespace expertd::device
