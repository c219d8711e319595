// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/case_plans.h"

#include "client/ctl/bench_numerics.h"

namespace expertd::bench {

namespace {

uint32_t row_bytes_of(const TableCase& it, bool quantised) {
  const uint32_t hidden = it.shape.hidden;
  constexpr uint32_t kScaleBytes = 4;
  return quantised ? hidden + hidden / ctl::kScaleChannels * kScaleBytes : hidden * 2;
}

}  // namespace

std::vector<ExchangePlan> plans_of(const TableCase& it, const ctl::BenchRouting& routing, uint32_t rank) {
  const bool is_layer = it.operation == "layer";
  const bool dispatches = it.operation == "dispatch" || it.operation == "pair" || is_layer;
  const bool combines = it.operation == "combine" || it.operation == "pair" || is_layer;
  // Experts want their rows one behind the other, which a token once per rank would have to be copied into.
  const bool row_per_expert = it.low_latency || is_layer;
  std::vector<ExchangePlan> plans;
  if (dispatches) {
    const uint32_t bytes = row_bytes_of(it, it.dtype == "fp8");
    plans.push_back(row_per_expert ? plan_expert_dispatch(routing, rank, bytes) : plan_dispatch(routing, rank, bytes));
  }
  if (combines) {
    const uint32_t bytes = row_bytes_of(it, false);
    plans.push_back(row_per_expert ? plan_expert_combine(routing, rank, bytes) : plan_combine(routing, rank, bytes));
  }
  return plans;
}

uint64_t least_link_bytes(const TableCase& it, const ctl::BenchRouting& routing, uint32_t own) {
  const bool dispatches = it.operation == "dispatch" || it.operation == "pair";
  const bool combines = it.operation == "combine" || it.operation == "pair";
  uint64_t bytes = 0;
  for (uint32_t peer = 0; it.low_latency && peer < it.shape.ranks; ++peer) {
    for (uint32_t token = 0; peer != own && token < it.shape.tokens; ++token) {
      bytes += dispatches && routing.delivered(peer, token, own) ? row_bytes_of(it, it.dtype == "fp8") : 0;
      bytes += combines && routing.delivered(own, token, peer) ? row_bytes_of(it, false) : 0;
    }
  }
  return bytes;
}

}  // namespace expertd::bench
