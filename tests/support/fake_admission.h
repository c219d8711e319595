// SPDX-License-Identifier: Apache-2.0
// A session with one group of two ranks and one large buffer, and slots of every operation that it admits.
#pragma once

#include "daemon/session/session_tables.h"
#include "daemon/transport/admit.h"
#include "tests/support/fake_engine_group.h"

namespace expertd::test {

struct AdmissionWorld {
  static constexpr uint64_t kGroup = 7;
  static constexpr uint32_t kBuffer = 1;  // large
  static constexpr uint32_t kExact = 2;   // of a size that the test sets
  static constexpr uint64_t kNow = 1'000;

  /// The group carries a set of expertd_payload; 0: any.
  explicit AdmissionWorld(uint32_t payloads = 0) : AdmissionWorld(settings(payloads)) {}
  explicit AdmissionWorld(const engine::GroupSettings& of_group) : shared(of_group), tables(base::SessionId{5}, 8) {
    large.bytes = 1U << 24;
    tables.buffers[kBuffer] = &large;
    tables.buffers[kExact] = &exact;
    tables.groups[0].id = base::GroupId{kGroup};
    tables.groups[0].rank = {&shared, 1, 1};
  }

  static engine::GroupSettings settings(uint32_t payloads = 0) {
    engine::GroupSettings made = group_settings(2, false);
    made.dispatch_dtypes = payloads;
    made.shape.hidden = 512;
    made.op_timeout_ns = 50;
    made.first_op_timeout_ns = 90;
    return made;
  }

  static expertd_slot slot(uint32_t op) {
    expertd_slot made{};
    made.seq = 1;
    made.op = op;
    made.group = op == EXPERTD_OP_LAYOUT ? 0 : kGroup;
    made.tokens = 64;
    made.top_k = 4;
    made.hidden = 512;
    made.dtype = EXPERTD_DTYPE_BF16;
    made.topk_idx_bytes = 8;
    made.capacity_rows = 100;
    made.handle_generation = 1;
    made.num_experts = 8;
    made.num_ranks = 2;
    const auto give = [&](uint32_t tensor) { made.tensors[tensor].buffer = kBuffer; };
    give(EXPERTD_IN_X);
    give(EXPERTD_IN_TOPK_IDX);
    give(EXPERTD_IN_TOPK_WEIGHTS);
    give(EXPERTD_OUT_X);
    give(EXPERTD_OUT_EXPERT_COUNTS);
    return made;
  }

  /// Bytes rows with a side tensor of 3 elements of 2 bytes.
  static expertd_slot slot_of_bytes(uint32_t op) {
    expertd_slot made = slot(op);
    made.dtype = EXPERTD_DTYPE_BYTES;
    made.row_bytes = 272;
    made.side_elements = 3;
    made.side_element_bytes = 2;
    made.side_row_stride = 16;
    made.side_element_stride = 2;
    made.tensors[EXPERTD_IN_SIDE].buffer = kBuffer;
    made.tensors[EXPERTD_OUT_SIDE].buffer = kBuffer;
    return made;
  }

  engine::RankState* admit(const expertd_slot& given) {
    request = engine::Request{};
    return transport::admit(given, {3, 1, kNow, 700}, &tables, &request);
  }
  bool admits(const expertd_slot& given) {
    (void)admit(given);
    return request.rejected_reason == 0;
  }
  /// Leaves a handle at index 0, generation 1, for combines and cached dispatches.
  void leave_handle(bool low_latency, uint32_t flags = 0) {
    expertd_slot dispatch = slot(low_latency ? EXPERTD_OP_LL_DISPATCH : EXPERTD_OP_DISPATCH);
    dispatch.flags = flags;
    (void)admit(dispatch);
  }

  engine::Mapping large;
  engine::Mapping exact;
  engine::GroupShared shared;
  session::SessionTables tables;
  engine::Request request;
};

}  // namespace expertd::test
