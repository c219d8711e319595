// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/part_params.h"

namespace expertd::device {

kernels::OpParams own_params(const engine::LaunchSpec& spec, base::DeviceIndex device) {
  const engine::Request& own = *spec.own;
  const auto at = [&](uint32_t tensor) { return own.tensors[tensor].on(device); };
  kernels::OpParams params;
  params.shape = own.shape;
  params.shape.active_ranks = spec.active_ranks;
  params.in.x = at(EXPERTD_IN_X);
  params.in.topk_idx = at(EXPERTD_IN_TOPK_IDX);
  params.in.topk_weights = static_cast<const float*>(at(EXPERTD_IN_TOPK_WEIGHTS));
  params.in.side = at(EXPERTD_IN_SIDE);
  params.in.bias0 = at(EXPERTD_IN_BIAS0);
  params.in.bias1 = at(EXPERTD_IN_BIAS1);
  params.in.token_rank_mask = static_cast<const uint8_t*>(at(EXPERTD_IN_TOKEN_RANK_MASK));
  params.out.x = at(EXPERTD_OUT_X);
  params.out.side = at(EXPERTD_OUT_SIDE);
  params.out.topk_idx = at(EXPERTD_OUT_TOPK_IDX);
  params.out.topk_weights = static_cast<float*>(at(EXPERTD_OUT_TOPK_WEIGHTS));
  params.out.expert_counts = static_cast<int32_t*>(at(EXPERTD_OUT_EXPERT_COUNTS));
  params.out.rank_prefix = static_cast<int32_t*>(at(EXPERTD_OUT_RANK_PREFIX));
  params.out.src_info = static_cast<int32_t*>(at(EXPERTD_OUT_SRC_INFO));
  params.out.layout_range = static_cast<int64_t*>(at(EXPERTD_OUT_LAYOUT_RANGE));
  params.out.stats = static_cast<int32_t*>(at(EXPERTD_OUT_STATS));
  params.out.wait_stats = static_cast<int64_t*>(at(EXPERTD_OUT_WAIT_STATS));
  params.out.token_rank_mask = static_cast<uint8_t*>(at(EXPERTD_OUT_TOKEN_RANK_MASK));
  return params;
}

kernels::PeerView peer_view(const engine::LaunchSpec& spec, uint32_t rank, base::DeviceIndex device) {
  kernels::PeerView view;
  const engine::Request* request = spec.request_of(rank);
  if (request == nullptr) {
    return view;
  }
  const auto at = [&](uint32_t tensor) { return request->tensors[tensor].on(device); };
  view.in_x = at(EXPERTD_IN_X);
  view.in_topk_weights = static_cast<const float*>(at(EXPERTD_IN_TOPK_WEIGHTS));
  view.out_x = at(EXPERTD_OUT_X);
  view.out_side = at(EXPERTD_OUT_SIDE);
  view.out_topk_idx = at(EXPERTD_OUT_TOPK_IDX);
  view.out_topk_weights = static_cast<float*>(at(EXPERTD_OUT_TOPK_WEIGHTS));
  view.out_src_info = static_cast<int32_t*>(at(EXPERTD_OUT_SRC_INFO));
  view.capacity_rows = request->shape.capacity_rows;
  view.in_rows = request->shape.capacity_rows;
  return view;
}

}  // namespace expertd::device
