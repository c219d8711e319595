// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/nodes/node_notice.h"

#include "proto/abi/expertd_reason.h"

namespace expertd::device {

namespace {

bool is_active(const kernels::OpShape& shape, uint32_t rank) {
  return shape.active_ranks.contains(rank);
}

bool same_ranks(std::span<const NodeNotice> notices, const kernels::OpShape& shape, kernels::OpReport* report) {
  const NodeNotice* first = nullptr;
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (!is_active(shape, rank)) {
      continue;
    }
    if (first == nullptr) {
      first = &notices[rank];
    }
    if (notices[rank].active != first->active) {
      report->reason = EXPERTD_REASON_CANCELLED;
      report->rank = static_cast<int32_t>(rank);
      return false;
    }
  }
  return true;
}

bool none_refused(std::span<const NodeNotice> notices, const kernels::OpShape& shape, const Verdict& verdict) {
  const NodeNotice& own = notices[shape.rank];
  if (own.reason != 0) {
    verdict.report->reason = own.reason;
    verdict.report->argument = own.argument;
    verdict.report->value = own.value;
    verdict.report->minimum = own.minimum;
    verdict.report->maximum = own.maximum;
    return false;
  }
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    if (is_active(shape, rank) && notices[rank].reason != 0) {
      verdict.report->reason = EXPERTD_REASON_PEER_REJECTED;
      verdict.report->rank = static_cast<int32_t>(rank);
      *verdict.peer_reason = notices[rank].reason;
      return false;
    }
  }
  return true;
}

bool same_values(std::span<const NodeNotice> notices, const kernels::OpShape& shape, kernels::OpReport* report) {
  for (uint32_t i = 0; i < engine::kAgreements; ++i) {
    int64_t expected = engine::kAgreesWithAny;
    for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
      const int64_t given = is_active(shape, rank) ? notices[rank].agreed[i] : engine::kAgreesWithAny;
      if (expected == engine::kAgreesWithAny) {
        expected = given;
      }
      if (given != engine::kAgreesWithAny && given != expected) {
        report->reason = EXPERTD_REASON_OP_MISMATCH;
        report->argument = engine::agreed_argument(i);
        report->rank = static_cast<int32_t>(rank);
        report->value = given;
        report->minimum = expected;
        report->maximum = expected;
        return false;
      }
    }
  }
  return true;
}

}  // namespace

NodeNotice make_notice(const engine::Request& request, const base::RankSet& active, uint32_t row_ints) {
  NodeNotice notice;
  notice.active = active;
  notice.agreed = engine::agreed_values(request);
  notice.reason = request.rejected_reason;
  notice.argument = request.rejected_argument;
  notice.value = request.rejected_value;
  notice.minimum = request.rejected_minimum;
  notice.maximum = request.rejected_maximum;
  notice.capacity_rows = request.shape.capacity_rows;
  notice.row_ints = row_ints;
  return notice;
}

uint64_t counts_message_bytes(uint32_t ranks, uint32_t experts) {
  return sizeof(NodeNotice) + uint64_t{kernels::count_row_ints(ranks, experts)} * sizeof(int32_t);
}

bool notices_agree(std::span<const NodeNotice> notices, const kernels::OpShape& shape, const Verdict& verdict) {
  return same_ranks(notices, shape, verdict.report) && none_refused(notices, shape, verdict) &&
         same_values(notices, shape, verdict.report);
}

}  // namespace expertd::device
