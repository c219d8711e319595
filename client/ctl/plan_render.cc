// SPDX-License-Identifier: Apache-2.0
// What the model says, as tables beside the figures of the specification, and as JSON.
#include <cstdio>
#include <iterator>
#include <nlohmann/json.hpp>
#include <vector>

#include "client/ctl/format.h"
#include "client/ctl/plan.h"

namespace expertd::ctl {

namespace {

using nlohmann::json;

constexpr uint32_t kScaleNodes[] = {2, 4, 8, 16, 32, 64};
constexpr uint32_t kRankCounts[] = {8, 16, 32, 64, 128, 256};
constexpr double kBytesPerUsPerGb = 1e3;
constexpr double kPercent = 100;

/// Percent of the specification by nodes; 0: it says nothing.
double specified_efficiency(uint32_t nodes) {
  switch (nodes) {
    case 8:
      return 95;
    case 16:
      return 92;
    case 32:
      return 88;
    case 64:
      return 85;
    default:
      return 0;
  }
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", digits, value);
  return text;
}

struct Estimates {
  uint32_t nodes = 0;
  uint32_t ranks = 0;
  uint32_t experts = 0;
  PlanEstimate ht_dispatch, ht_combine, ll_dispatch, ll_combine;
};

Estimates estimates_of(const PlanLink& link, const PlanShape& shape, uint32_t nodes) {
  Estimates it;
  it.nodes = nodes;
  it.ranks = nodes * link.gpus_per_node;
  const PlanShape fitted = plan_shape_of(shape, it.ranks);
  it.experts = fitted.experts;
  using enum PlanMode;
  using enum PlanOperation;
  it.ht_dispatch = plan_estimate(link, fitted, nodes, kHighThroughput, kDispatch);
  it.ht_combine = plan_estimate(link, fitted, nodes, kHighThroughput, kCombine);
  it.ll_dispatch = plan_estimate(link, fitted, nodes, kLowLatency, kDispatch);
  it.ll_combine = plan_estimate(link, fitted, nodes, kLowLatency, kCombine);
  return it;
}

/// Numbers of nodes that groups of experts fit to.
std::vector<uint32_t> fitting_nodes(const PlanLink& link, const PlanShape& shape) {
  std::vector<uint32_t> nodes;
  for (const uint32_t count : kScaleNodes) {
    const uint32_t ranks = count * link.gpus_per_node;
    if (plan_aligned(shape, count) && plan_aligned(shape, ranks)) {
      nodes.push_back(count);
    }
  }
  return nodes;
}

json estimate_json(const PlanEstimate& it) {
  return {{"modelled", true},
          {"other_nodes_per_token", it.other_nodes},
          {"link_bytes", it.link_bytes},
          {"nvlink_bytes", it.nvlink_bytes},
          {"link_us", it.link_us},
          {"slowest_nic_to_mean", it.slowest},
          {"messages", it.messages},
          {"time_us", it.time_us},
          {"efficiency", it.efficiency}};
}

std::string percent(double share) {
  return fixed(share * kPercent, 1);
}

std::string scale_table(const PlanLink& link, const PlanShape& shape) {
  Table table({{"NODES", Align::kRight},
               {"EP", Align::kRight},
               {"OTHER NODES/TOKEN", Align::kRight},
               {"HT DISPATCH µs", Align::kRight},
               {"%", Align::kRight},
               {"HT COMBINE µs", Align::kRight},
               {"%", Align::kRight},
               {"SPECIFIED %", Align::kRight},
               {"LL DISPATCH µs", Align::kRight},
               {"%", Align::kRight},
               {"LL COMBINE µs", Align::kRight},
               {"%", Align::kRight}});
  for (const uint32_t nodes : fitting_nodes(link, shape)) {
    const Estimates it = estimates_of(link, shape, nodes);
    const double specified = specified_efficiency(nodes);
    table.add({std::to_string(nodes), std::to_string(it.ranks), fixed(it.ht_dispatch.other_nodes, 2),
               fixed(it.ht_dispatch.time_us, 0), percent(it.ht_dispatch.efficiency), fixed(it.ht_combine.time_us, 0),
               percent(it.ht_combine.efficiency), specified == 0 ? "-" : fixed(specified, 0),
               fixed(it.ll_dispatch.time_us, 1), percent(it.ll_dispatch.efficiency), fixed(it.ll_combine.time_us, 1),
               percent(it.ll_combine.efficiency)});
  }
  return table.text();
}

double gb_per_s(double bytes, const PlanEstimate& it) {
  return bytes / it.time_us / kBytesPerUsPerGb;
}

/// In the specification's counting: high throughput on one node counts every row delivered, over several one row per
/// (token, node), the own included; low latency one row per (token, expert).
double counted_bytes(const PlanEstimate& it, bool one_node, bool high_throughput) {
  if (!high_throughput) {
    return it.expert_bytes;
  }
  return one_node ? it.rank_bytes : it.node_bytes;
}

std::string specification_table(const PlanLink& link, const PlanShape& shape) {
  Table table({{"EP", Align::kRight},
               {"LINK"},
               {"HT GB/s SPECIFIED", Align::kRight},
               {"DISPATCH", Align::kRight},
               {"COMBINE", Align::kRight},
               {"LL GB/s SPECIFIED", Align::kRight},
               {"DISPATCH", Align::kRight},
               {"COMBINE", Align::kRight},
               {"LL µs SPECIFIED", Align::kRight},
               {"DISPATCH", Align::kRight},
               {"COMBINE", Align::kRight}});
  for (const uint32_t ranks : kRankCounts) {
    const uint32_t nodes = ranks / link.gpus_per_node;
    if (ranks % link.gpus_per_node != 0 || !plan_aligned(shape, nodes) || !plan_aligned(shape, ranks)) {
      continue;
    }
    const Estimates it = estimates_of(link, shape, nodes);
    const bool one = nodes == 1;
    const auto counted = [one](const PlanEstimate& of, bool high_throughput) {
      return fixed(gb_per_s(counted_bytes(of, one, high_throughput), of), 0);
    };
    table.add({std::to_string(ranks), one ? "NVLink" : "RDMA", one ? "158" : "47", counted(it.ht_dispatch, true),
               counted(it.ht_combine, true), one ? "124" : "42", counted(it.ll_dispatch, false),
               counted(it.ll_combine, false), one ? "-" : "163-194, 318", fixed(it.ll_dispatch.time_us, 0),
               fixed(it.ll_combine.time_us, 0)});
  }
  return table.text();
}

}  // namespace

std::string plan_text(const PlanLink& link, const PlanShape& shape) {
  char head[512];
  std::snprintf(head, sizeof(head),
                "All figures are modelled: NIC %.4g GB/s and NVLink %.4g GB/s per GPU, %.4g µs one way, %.4g µs a "
                "message, %.4g µs an operation;\n%u channels, %u of %u experts, %s dispatch, %u tokens per rank in HT, "
                "%u in LL, %u GPUs a node.\n\n",
                link.nic_gb_per_s, link.nvlink_gb_per_s, link.latency_us, link.message_us, link.operation_us,
                shape.hidden, shape.top_k, shape.experts, shape.fp8 ? "FP8" : "BF16", shape.tokens,
                shape.low_latency_tokens, link.gpus_per_node);
  return head + scale_table(link, shape) +
         "\n%: bytes of one row per (token, other node) / (rate of the NIC x time), modelled.\n\n" +
         specification_table(link, shape) +
         "\nSpecified beside modelled. GB/s as the specification counts: HT rows delivered (NVLink) or one row per "
         "(token, node), the own included\n(RDMA); LL one row per (token, expert), more than crosses.\n";
}

json plan_document(const PlanLink& link, const PlanShape& shape) {
  json rows = json::array();
  std::vector<uint32_t> nodes = fitting_nodes(link, shape);
  nodes.insert(nodes.begin(), 1);
  for (const uint32_t count : nodes) {
    const Estimates it = estimates_of(link, shape, count);
    const double specified = specified_efficiency(count);
    rows.push_back({{"nodes", count},
                    {"ranks", it.ranks},
                    {"experts", it.experts},
                    {"specified_efficiency", specified == 0 ? json() : json(specified / kPercent)},
                    {"ht_dispatch", estimate_json(it.ht_dispatch)},
                    {"ht_combine", estimate_json(it.ht_combine)},
                    {"ll_dispatch", estimate_json(it.ll_dispatch)},
                    {"ll_combine", estimate_json(it.ll_combine)}});
  }
  return {{"modelled", true},
          {"link",
           {{"nic_gb_per_s", link.nic_gb_per_s},
            {"nvlink_gb_per_s", link.nvlink_gb_per_s},
            {"latency_us", link.latency_us},
            {"message_us", link.message_us},
            {"operation_us", link.operation_us},
            {"message_bytes", link.message_bytes},
            {"gpus_per_node", link.gpus_per_node}}},
          {"shape",
           {{"hidden", shape.hidden},
            {"top_k", shape.top_k},
            {"experts", shape.experts},
            {"tokens", shape.tokens},
            {"ll_tokens", shape.low_latency_tokens},
            {"dtype", shape.fp8 ? "fp8" : "bf16"},
            {"expert_groups", shape.expert_groups},
            {"groups_per_token", shape.groups_per_token}}},
          {"rows", rows}};
}

}  // namespace expertd::ctl
