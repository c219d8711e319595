// SPDX-License-Identifier: Apache-2.0
// The move step: what every rank decides alike from the count matrix, and then dispatch or combine over a token range.
#include <algorithm>
#include <limits>

#include "daemon/kernels/host/host_ops.h"
#include "daemon/kernels/host/node_ops.h"
#include "daemon/kernels/host/tables.h"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::kernels::host {
namespace {

/// Errors in the rows of the active ranks: the source reports its own, the others the lowest source that has one.
bool find_error(const OpShape& shape, const int32_t* matrix, OpReport* report) {
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    const int32_t* error = matrix_row(shape, matrix, source) + shape.ranks + shape.experts;
    if (is_active(shape, source) && error[0] != 0 && report->reason == 0) {
      report->reason = EXPERTD_REASON_PEER_REJECTED;
      report->rank = static_cast<int32_t>(source);
    }
  }
  const int32_t* own = matrix_row(shape, matrix, shape.rank) + shape.ranks + shape.experts;
  if (own[0] != 0) {
    report->reason = static_cast<uint32_t>(own[0]);
    report->value =
        static_cast<int64_t>((uint64_t{static_cast<uint32_t>(own[2])} << 32) | static_cast<uint32_t>(own[1]));
    report->rank = -1;
    if (report->reason == EXPERTD_REASON_STALE_HANDLE) {
      report->argument = EXPERTD_ARGUMENT_HANDLE;
    }
    if (report->reason == EXPERTD_REASON_EXPERT_OUT_OF_RANGE) {
      report->argument = EXPERTD_ARGUMENT_EXPERT_ID;
      report->minimum = -1;
      report->maximum = static_cast<int64_t>(shape.experts) - 1;
    }
  }
  return report->reason != 0;
}

bool exceeds(uint64_t rows, uint32_t capacity, uint32_t rank, OpReport* report) {
  // Row numbers are int32, so a larger capacity is not usable.
  const uint64_t limit = std::min<uint64_t>(capacity, std::numeric_limits<int32_t>::max());
  if (rows <= limit) {
    return false;
  }
  report->reason = EXPERTD_REASON_CAPACITY_EXCEEDED;
  report->argument = EXPERTD_ARGUMENT_RECV_ROWS;
  report->value = static_cast<int64_t>(rows);
  report->minimum = 0;
  report->maximum = static_cast<int64_t>(limit);
  report->rank = static_cast<int32_t>(rank);
  return true;
}

/// LL: ids that stand twice in a token's top-k can send an expert more rows than it has slots.
bool experts_exceed_slots(const OpShape& shape, const Totals& totals, uint32_t rank, OpReport* report) {
  for (uint32_t expert = rank * shape.local_experts; expert < (rank + 1) * shape.local_experts; ++expert) {
    if (exceeds(totals.rows[expert], shape.slots_per_expert, rank, report)) {
      return true;
    }
  }
  return false;
}

}  // namespace

uint32_t check_announced(const OpParams& params, OpReport* report) {
  (void)find_error(params.shape, params.counts, report);
  return report->reason;
}

uint32_t check_matrix(const OpParams& params, const PeerView* peers, OpReport* report) {
  const OpShape& shape = params.shape;
  if (!is_dispatch(shape)) {
    return report->reason;
  }
  const int32_t* matrix = matrix_of(params);
  if (shape.cached == 0 && find_error(shape, matrix, report)) {
    return report->reason;
  }
  const Totals totals(shape, matrix);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (!is_active(shape, rank)) {
      continue;
    }
    const bool exceeded = is_ll(shape)
                              ? experts_exceed_slots(shape, totals, rank, report)
                              : exceeds(received_rows(shape, totals, rank), peers[rank].capacity_rows, rank, report);
    if (exceeded) {
      return report->reason;
    }
  }
  return report->reason;
}

bool move_range(const OpParams& params, const PeerView* peers, uint32_t token_begin, uint32_t token_end,
                OpReport* report) {
  if (report->reason != 0) {
    return false;
  }
  const uint32_t end = std::min(token_end, params.shape.tokens);
  switch (params.shape.kind) {
    case OpKind::kDispatch:
    case OpKind::kLlDispatch:
      dispatch_range(params, peers, {token_begin, end}, nullptr, report);
      break;
    case OpKind::kCombine:
      combine_range(params, peers, {token_begin, end}, nullptr, report);
      break;
    case OpKind::kLlCombine:
      ll_combine_range(params, peers, {token_begin, end}, nullptr, report);
      break;
    case OpKind::kBarrier:
    case OpKind::kLayout:
      break;
  }
  return true;
}

void move(const OpParams& params, const PeerView* peers, OpReport* report) {
  if (check_matrix(params, peers, report) == 0) {
    move_range(params, peers, 0, params.shape.tokens, report);
  }
}

}  // namespace expertd::kernels::host
