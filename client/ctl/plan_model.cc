// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/plan_model.h"

#include <algorithm>
#include <cmath>

namespace expertd::ctl {

namespace {

constexpr double kBytesPerUsPerGb = 1e3;  // 1 GB/s is so many bytes per microsecond
constexpr uint32_t kScaleChannels = 128;
constexpr uint32_t kScaleBytes = 4;
constexpr uint32_t kBf16Bytes = 2;
// Per (peer, phase) of a low latency operation: counts with the rows, or ahead of them.
constexpr double kLowLatencyMessages = 2;

double row_bytes(const PlanShape& shape, PlanOperation operation) {
  if (operation == PlanOperation::kDispatch && shape.fp8) {
    return shape.hidden + shape.hidden / kScaleChannels * double{kScaleBytes};
  }
  return double{kBf16Bytes} * shape.hidden;
}

double binomial(uint32_t n, uint32_t k) {
  double value = 1;
  for (uint32_t i = 0; i < k; ++i) {
    value *= double(n - i) / double(k - i);
  }
  return k > n ? 0 : value;
}

/// Rows of the busiest NIC against the mean: each gets a row of a token with the same probability, so that its rows are
/// binomial, and the slowest of all NICs is the expected maximum.
double slowest_nic(double rows, double reached, double nics) {
  if (rows <= 0) {
    return 1;
  }
  return 1 + plan_expected_maximum(nics) * std::sqrt(rows * (1 - reached)) / rows;
}

}  // namespace

std::string plan_problem(const PlanLink& link, const PlanShape& shape) {
  if (!(link.nic_gb_per_s > 0) || !(link.nvlink_gb_per_s > 0)) {
    return "rates of links must be above 0 GB/s";
  }
  if (link.latency_us < 0 || link.message_us < 0 || link.operation_us < 0) {
    return "times must not be below 0";
  }
  if (link.message_bytes == 0 || link.gpus_per_node == 0 || shape.hidden == 0 || shape.top_k == 0 ||
      shape.tokens == 0 || shape.low_latency_tokens == 0) {
    return "message size, GPUs, channels, experts of a token and tokens must be at least 1";
  }
  if (shape.expert_groups == 0 || shape.experts % shape.expert_groups != 0 || shape.groups_per_token == 0 ||
      shape.groups_per_token > shape.expert_groups) {
    return "experts must be a multiple of the groups, and a token takes 1 to all of these; change the groups or the "
           "experts";
  }
  if (shape.top_k > shape.experts / shape.expert_groups * shape.groups_per_token) {
    return "a token's groups have fewer experts than it takes; lower the experts of a token or allow more groups";
  }
  return "";
}

PlanShape plan_shape_of(const PlanShape& shape, uint32_t ranks) {
  PlanShape fitted = shape;
  if (fitted.experts < ranks) {
    const uint32_t groups = shape.expert_groups;
    fitted.experts = (ranks + groups - 1) / groups * groups;
  }
  return fitted;
}

double plan_left_out(double pool, double own, uint32_t draws) {
  double probability = 1;
  for (uint32_t i = 0; i < draws; ++i) {
    probability *= std::max(0.0, pool - own - i) / (pool - i);
  }
  return probability;
}

bool plan_aligned(const PlanShape& shape, uint32_t places) {
  return shape.groups_per_token == shape.expert_groups || places % shape.expert_groups == 0 ||
         shape.expert_groups % places == 0;
}

double plan_reached(const PlanShape& shape, uint32_t places) {
  const double own = double(shape.experts) / places;
  const uint32_t groups = shape.expert_groups;
  const uint32_t chosen = shape.groups_per_token;
  if (chosen == groups) {
    return 1 - plan_left_out(shape.experts, own, shape.top_k);
  }
  const double per_group = double(shape.experts) / groups;
  const double pool = per_group * chosen;
  if (places >= groups) {  // a part lies in one group, which must be chosen first
    return double(chosen) / groups * (1 - plan_left_out(pool, own, shape.top_k));
  }
  const uint32_t held = groups / places;  // groups of a part, of which `m` are chosen
  double reached = 0;
  for (uint32_t m = 0; m <= std::min(held, chosen); ++m) {
    if (chosen - m <= groups - held) {
      const double odds = binomial(held, m) * binomial(groups - held, chosen - m) / binomial(groups, chosen);
      reached += odds * (1 - plan_left_out(pool, m * per_group, shape.top_k));
    }
  }
  return reached;
}

double plan_expected_maximum(double count) {
  if (count < 2) {
    return 0;
  }
  constexpr double kPi = 3.14159265358979323846;
  const double first = std::sqrt(2 * std::log(count));
  const double second = (std::log(std::log(count)) + std::log(4 * kPi)) / (2 * first);
  constexpr double kEuler = 0.57721566490153286;
  return std::max(0.0, first - second + kEuler / first);
}

PlanEstimate plan_estimate(const PlanLink& link, const PlanShape& shape, uint32_t nodes, PlanMode mode,
                           PlanOperation operation) {
  const bool high_throughput = mode == PlanMode::kHighThroughput;
  const double tokens = high_throughput ? shape.tokens : shape.low_latency_tokens;
  const double bytes = row_bytes(shape, operation);
  const uint32_t ranks = nodes * link.gpus_per_node;
  const double node = plan_reached(shape, nodes);
  const double rank = plan_reached(shape, ranks);
  PlanEstimate it;
  it.other_nodes = (nodes - 1) * node;
  it.link_bytes = tokens * it.other_nodes * bytes;
  it.node_bytes = tokens * nodes * node * bytes;
  it.rank_bytes = tokens * ranks * rank * bytes;
  it.expert_bytes = tokens * shape.top_k * bytes;
  // Rows of its own tokens for the GPUs beside it, and by symmetry as many rows as its own tokens have on other nodes,
  // which come to it and go on to those of its node's GPUs that are not itself.
  it.nvlink_bytes = tokens * nodes * (link.gpus_per_node - 1.0) * rank * bytes;
  it.slowest = slowest_nic(tokens * it.other_nodes, node, ranks);
  it.link_us = it.link_bytes / (link.nic_gb_per_s * kBytesPerUsPerGb);
  const double nvlink_us = it.nvlink_bytes / (link.nvlink_gb_per_s * kBytesPerUsPerGb);
  if (nodes == 1) {
    it.time_us = link.operation_us + nvlink_us;
    it.efficiency = nvlink_us / it.time_us;
    return it;
  }
  const double peers = nodes - 1;
  const double to_peer = it.link_bytes / peers;
  const double first_bytes = std::min<double>(link.message_bytes, to_peer);
  const double message_bytes_us = first_bytes / (link.nic_gb_per_s * kBytesPerUsPerGb);
  const double last_us = first_bytes / (link.nvlink_gb_per_s * kBytesPerUsPerGb);
  const double wire_us = it.link_us * it.slowest;
  if (high_throughput) {
    // Counts cross first, one message per peer; then rows go through NIC and NVLink at once, message by message, and
    // the last one passes NVLink alone.
    it.messages = peers * (1 + std::ceil(to_peer / link.message_bytes));
    const double counts_us = link.latency_us + peers * link.message_us;
    const double sending_us = (it.messages - peers) * link.message_us;
    it.time_us = link.operation_us + counts_us + link.latency_us +
                 std::max({wire_us + last_us, sending_us + last_us, nvlink_us + message_bytes_us});
  } else {
    // A peer's rows are one message, with what announces it; the last peer's are spread when they are there.
    it.messages = peers * kLowLatencyMessages;
    const double spread_us = nvlink_us / nodes;
    it.time_us = link.operation_us + link.latency_us + std::max(wire_us, it.messages * link.message_us) + spread_us;
  }
  it.efficiency = it.link_us / it.time_us;
  return it;
}

}  // namespace expertd::ctl
