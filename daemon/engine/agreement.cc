// SPDX-License-Identifier: Apache-2.0
#include "daemon/engine/agreement.h"

#include <iterator>

namespace expertd::engine {

namespace {

/// What all ranks of a collective must have given alike, and the argument that names it.
struct Agreement {
  uint32_t argument;
  int64_t (*value)(const Request& request);
};

bool has_side(const Request& request) {
  // Peers write rows of their own side_elements into this output, so a rank that gave one must agree with them.
  return request.shape.tokens != 0 || request.shape.side_elements != 0 ||
         request.tensors[EXPERTD_OUT_SIDE].mapping != nullptr;
}

bool has_rows(const Request& request) {
  return request.shape.kind == kernels::OpKind::kCombine ? request.shape.capacity_rows != 0 : request.shape.tokens != 0;
}

constexpr Agreement kTable[] = {
    {EXPERTD_ARGUMENT_OP, [](const Request& r) { return static_cast<int64_t>(r.shape.kind); }},
    {EXPERTD_ARGUMENT_TOKEN_BOUND, [](const Request& r) { return static_cast<int64_t>(r.token_bound); }},
    {EXPERTD_ARGUMENT_CAPTURE_LANE,
     [](const Request& r) { return r.captured ? int64_t{r.capture_lane} : int64_t{-1}; }},
    {EXPERTD_ARGUMENT_DTYPE, [](const Request& r) { return static_cast<int64_t>(r.shape.payload); }},
    {EXPERTD_ARGUMENT_FLAGS,
     [](const Request& r) {
       return static_cast<int64_t>(r.shape.cached | (r.shape.expanded << 1) |
                                   (static_cast<uint32_t>(r.shape.scale) << 2));
     }},
    {EXPERTD_ARGUMENT_IN_TOPK_WEIGHTS,
     [](const Request& r) { return has_rows(r) ? static_cast<int64_t>(r.with_weights ? 1 : 0) : kAgreesWithAny; }},
    {EXPERTD_ARGUMENT_ROW_BYTES, [](const Request& r) { return static_cast<int64_t>(r.shape.row_bytes); }},
    {EXPERTD_ARGUMENT_TOP_K, [](const Request& r) { return static_cast<int64_t>(r.shape.top_k); }},
    {EXPERTD_ARGUMENT_TOPK_IDX_BYTES, [](const Request& r) { return static_cast<int64_t>(r.shape.topk_idx_bytes); }},
    {EXPERTD_ARGUMENT_SIDE_ELEMENTS,
     [](const Request& r) { return has_side(r) ? static_cast<int64_t>(r.shape.side_elements) : kAgreesWithAny; }},
    {EXPERTD_ARGUMENT_SIDE_ELEMENT_BYTES,
     [](const Request& r) { return has_side(r) ? static_cast<int64_t>(r.shape.side_element_bytes) : kAgreesWithAny; }},
    {EXPERTD_ARGUMENT_EXPERT_ALIGNMENT,
     [](const Request& r) { return static_cast<int64_t>(r.shape.expert_alignment); }},
    // Behind what the executor follows from, which names the cause.
    {EXPERTD_ARGUMENT_EXECUTOR,
     [](const Request& r) {
       return static_cast<int64_t>(r.copies ? EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE : EXPERTD_COMPLETION_EXECUTOR_SM);
     }},
};

static_assert(std::size(kTable) == kAgreements);

}  // namespace

AgreedValues agreed_values(const Request& request) {
  AgreedValues values{};
  for (uint32_t i = 0; i < kAgreements; ++i) {
    values[i] = kTable[i].value(request);
  }
  return values;
}

uint32_t agreed_argument(uint32_t index) {
  return kTable[index].argument;
}

}  // namespace expertd::engine
