// SPDX-License-Identifier: Apache-2.0
// How long operations over several nodes would take, from figures of links: an analytic model, nothing is measured
// here. Pure functions of values, any thread. tests/scale/README.md states the assumptions and holds the model to
// measurements.
#pragma once

#include <cstdint>
#include <string>

namespace expertd::ctl {

struct PlanLink {
  double nic_gb_per_s = 47;      // of each GPU's NIC, each way
  double nvlink_gb_per_s = 158;  // of each GPU, each way
  double latency_us = 5;         // one way between nodes, of a small message
  double message_us = 1;         // what a message takes its sender, whatever its size
  double operation_us = 15;      // submission to completion of an operation that moves nothing
  uint32_t message_bytes = 256 * 1024;
  uint32_t gpus_per_node = 8;
};

struct PlanShape {
  uint32_t hidden = 7168;
  uint32_t top_k = 8;
  uint32_t experts = 256;
  uint32_t tokens = 4096;             // per rank, high throughput
  uint32_t low_latency_tokens = 128;  // per rank
  bool fp8 = true;                    // dispatched rows: FP8 with a float32 scale per 128 channels, else bf16
  // Group-limited routing: a token takes experts of `groups_per_token` of `expert_groups` groups; equal: uniform
  // routing.
  uint32_t expert_groups = 1;
  uint32_t groups_per_token = 1;
};

/// What is wrong with figures and shape, with what to do, or empty. Everything below wants it empty.
std::string plan_problem(const PlanLink& link, const PlanShape& shape);

/// The shape for so many ranks: each has at least one expert.
PlanShape plan_shape_of(const PlanShape& shape, uint32_t ranks);

/// Probability that `draws` different ones of `pool`, uniformly drawn, leave out `own` given ones:
/// C(pool - own, draws) / C(pool, draws).
double plan_left_out(double pool, double own, uint32_t draws);

/// Probability that a token has an expert at a given one of `places` equal parts of the experts, nodes or ranks. Exact
/// where parts hold whole groups, or groups whole parts; `places` and expert_groups are such.
double plan_reached(const PlanShape& shape, uint32_t places);
/// Whether the above holds.
bool plan_aligned(const PlanShape& shape, uint32_t places);

enum class PlanMode { kHighThroughput, kLowLatency };
enum class PlanOperation { kDispatch, kCombine };

/// One operation of one rank, modelled. Bytes are of rows alone.
struct PlanEstimate {
  double other_nodes = 0;   // per token, expected
  double link_bytes = 0;    // distinct-node bytes: rows that its NIC sends
  double nvlink_bytes = 0;  // rows that it sends to other GPUs of its node, its own and those that came for them
  double node_bytes = 0;    // one row per (token, node), its own node included
  double rank_bytes = 0;    // one row per (token, rank), its own rank included
  double expert_bytes = 0;  // one row per (token, expert)
  double link_us = 0;       // link_bytes at the rate of the NIC
  double slowest = 1;       // rows of the NIC that has most, against the mean
  double messages = 0;      // that it sends to other nodes
  double time_us = 0;       // of the slowest rank
  double efficiency = 0;    // link_us / time_us; of one node: nvlink_bytes at the rate of NVLink / time_us
};

/// `nodes` 1 or more.
PlanEstimate plan_estimate(const PlanLink& link, const PlanShape& shape, uint32_t nodes, PlanMode mode,
                           PlanOperation operation);

/// Expected maximum of `count` independent standard normal variables, as that of the Gumbel distribution that it tends
/// to: 3 % too much at 100, less above. 0 for one.
double plan_expected_maximum(double count);

}  // namespace expertd::ctl
