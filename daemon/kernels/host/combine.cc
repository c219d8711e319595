// SPDX-License-Identifier: Apache-2.0
// Combine, high throughput and low latency: pulls the rows that this rank's tokens have at their destinations and sums
// them in float32, with what other nodes made of those that are there.
#include <algorithm>
#include <array>

#include "daemon/kernels/host/node_ops.h"
#include "daemon/kernels/host/tables.h"
#include "daemon/kernels/host/token_sum.h"

namespace expertd::kernels::host {
namespace {

const uint16_t* bias_row(const void* bias, const OpShape& shape, uint32_t token) {
  return bias == nullptr ? nullptr : static_cast<const uint16_t*>(bias) + size_t{token} * shape.hidden;
}

uint16_t* out_row(const OpParams& params, uint32_t token) {
  return static_cast<uint16_t*>(params.out.x) + size_t{token} * params.shape.hidden;
}

/// What other nodes made of a token, and their weights added.
struct TokenPartials {
  uint32_t count = 0;
  std::array<const uint16_t*, base::kMaxNodes> sums;

  void take(const OpShape& shape, NodePartials* partials, uint32_t token, float* weights) {
    count = 0;
    for (size_t i = 0; partials != nullptr && i < partials->messages.size(); ++i) {
      NodePartials::Message& message = partials->messages[i];
      if (message.next == message.entries.count) {
        continue;
      }
      const std::byte* entry = message.entries.at(partials->layout, message.next);
      if (entry_token(entry) != token) {
        continue;
      }
      ++message.next;
      sums[count++] = entry_table<const uint16_t>(entry, partials->layout.payload_at);
      const float* in = entry_table<const float>(entry, partials->layout.weights_at);
      for (uint32_t lane = 0; weights != nullptr && partials->layout.weights_at != 0 && lane < shape.top_k; ++lane) {
        weights[lane] += in[lane];
      }
    }
  }
  std::span<const uint16_t* const> span() const { return {sums.data(), count}; }
};

}  // namespace

void combine_range(const OpParams& params, const PeerView* peers, const TokenRange& tokens, NodePartials* partials,
                   OpReport* report) {
  const OpShape& shape = params.shape;
  TokenRows rows;
  TokenPartials others;
  for (uint32_t token = tokens.begin; token < tokens.end; ++token) {
    const size_t first_lane = size_t{token} * shape.top_k;
    TokenRouting routing;
    routing.rank_rows = params.routing.token_rank + size_t{token} * shape.ranks;
    routing.lane_rows = params.routing.token_expert + first_lane;
    routing.topk = params.routing.topk == nullptr ? nullptr : params.routing.topk + first_lane;
    if (params.out.topk_weights != nullptr) {
      routing.weights = params.out.topk_weights + first_lane;
      std::fill_n(routing.weights, shape.top_k, 0.0f);
    }
    collect_rows(shape, peers, routing, &rows, report);
    others.take(shape, partials, token, routing.weights);
    sum_rows(shape, rows,
             {bias_row(params.in.bias0, shape, token), bias_row(params.in.bias1, shape, token), others.span()},
             out_row(params, token));
  }
}

void ll_combine_range(const OpParams& params, const PeerView* peers, const TokenRange& tokens, NodePartials* partials,
                      OpReport* report) {
  const OpShape& shape = params.shape;
  TokenRows rows;
  TokenPartials others;
  std::array<int32_t, base::kMaxTopK> lane_rows;
  for (uint32_t token = tokens.begin; token < tokens.end; ++token) {
    const size_t first_lane = size_t{token} * shape.top_k;
    wanted_lane_rows(params, token, lane_rows.data());
    TokenRouting routing;
    routing.lane_rows = lane_rows.data();
    routing.topk = params.routing.topk + first_lane;
    routing.lane_weights = params.in.topk_weights == nullptr ? nullptr : params.in.topk_weights + first_lane;
    collect_lanes(shape, peers, routing, &rows, report);
    others.take(shape, partials, token, nullptr);
    sum_lanes(shape, rows, {nullptr, nullptr, others.span()}, out_row(params, token));
  }
}

}  // namespace expertd::kernels::host
