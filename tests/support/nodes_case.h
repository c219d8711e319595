// SPDX-License-Identifier: Apache-2.0
// NodesCase: a random case as one node and as several run it, and whether both did the same. One thread; tests only.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "daemon/kernels/numerics.h"
#include "tests/support/combine_bound.h"
#include "tests/support/node_world.h"
#include "tests/support/random_case_host.h"

namespace expertd::support {

namespace nodes_case {

inline bool active(const base::RankSet& ranks, uint32_t rank) {
  return ranks.contains(rank);
}

inline std::string fault(const char* what, uint64_t rank) {
  return std::string(what) + " of rank " + std::to_string(rank);
}

inline bool same_bytes(const PoisonedBuffer& a, const PoisonedBuffer& b) {
  return a.bytes() == b.bytes() && (a.bytes() == 0 || std::memcmp(a.as<uint8_t>(), b.as<uint8_t>(), a.bytes()) == 0);
}

inline bool same_end(const kernels::OpReport& a, const kernels::OpReport& b) {
  return a.reason == b.reason && a.argument == b.argument && a.value == b.value && a.minimum == b.minimum &&
         a.maximum == b.maximum && a.rank == b.rank;
}

inline bool same_report(const kernels::OpReport& a, const kernels::OpReport& b) {
  return same_end(a, b) && a.recv_rows == b.recv_rows && a.local_bytes == b.local_bytes &&
         a.remote_bytes == b.remote_bytes && a.expert_count_entries == b.expert_count_entries &&
         std::equal(a.expert_counts, a.expert_counts + a.expert_count_entries, b.expert_counts);
}

inline std::string describe(const kernels::OpReport& report) {
  return "reason " + std::to_string(report.reason) + " argument " + std::to_string(report.argument) + " value " +
         std::to_string(report.value) + " rank " + std::to_string(report.rank) + " rows " +
         std::to_string(report.recv_rows) + " bytes " + std::to_string(report.local_bytes) + " + " +
         std::to_string(report.remote_bytes);
}

/// Everything that a dispatch wrote, and what it left alone.
inline std::string compare_dispatch(const kernels::OpShape& shape, const GroupMemory& nodes, const GroupMemory& one) {
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    const RankMemory& a = nodes.ranks[rank];
    const RankMemory& b = one.ranks[rank];
    if (!same_bytes(a.x, b.x)) {
      return fault("payload", rank);
    }
    if (!same_bytes(a.out_side, b.out_side)) {
      return fault("side", rank);
    }
    if (!same_bytes(a.out_topk_idx, b.out_topk_idx) || !same_bytes(a.out_topk_weights, b.out_topk_weights)) {
      return fault("top-k", rank);
    }
    if (!same_bytes(a.expert_counts, b.expert_counts) || !same_bytes(a.rank_prefix, b.rank_prefix) ||
        !same_bytes(a.layout_range, b.layout_range) || !same_bytes(a.stats, b.stats)) {
      return fault("counts", rank);
    }
    if (!same_bytes(a.src_info, b.src_info)) {
      return fault("src_info", rank);
    }
    if (active(shape.active_ranks, rank) && !same_report(nodes.reports[rank], one.reports[rank])) {
      return fault("report", rank) + ": " + describe(nodes.reports[rank]) + ", not " + describe(one.reports[rank]);
    }
  }
  return guards_intact(nodes) ? "" : "memory around an output was written";
}

inline float value_of(const PoisonedBuffer& rows, size_t at) {
  return kernels::bf16_to_float(rows.as<uint16_t>()[at]);
}

/// A case as one node and as several run it.
struct NodesCase {
  /// One in twenty has more ranks than a word has bits.
  NodesCase(uint64_t seed, kernels::OpKind kind)
      : NodesCase(seed, make_random_case(seed, kind, seed % 20 == 7 ? 72 + static_cast<uint32_t>(seed % 25) : 0)) {}
  NodesCase(uint64_t seed, RandomCase made)
      : random(~seed),
        dispatch(std::move(made)),
        handles(make_handles(dispatch)),
        nodes(dispatch.shape.ranks < 2    ? 0
              : dispatch.shape.ranks > 64 ? random.between(9, 12)
                                          : random.between(2, std::min(4U, dispatch.shape.ranks))) {
    if (nodes != 0) {
      world = std::make_unique<test::NodeWorld>(dispatch, nodes, seed + 11);
    }
    settings.low_latency = dispatch.shape.kind == kernels::OpKind::kLlDispatch;
    for (const RankInput& input : dispatch.inputs) {
      settings.with_weights |= !input.topk_weights.empty();
    }
  }

  /// A dispatch, on one node at once, on several with finish().
  void start_dispatch(const RandomCase& random_case) {
    Pending& op = pending.emplace_back();
    op.random_case = random_case;
    op.one = make_dispatch(op.random_case, &handles);
    drive(Drive::kWhole, &op.one);
    auto unused = make_handles(op.random_case);
    op.many = make_dispatch(op.random_case, &unused);
    world->start(op.random_case, settings, nullptr, &op.many);
  }

  void start_cached() {
    RandomCase again = dispatch;
    refill_payload(again.seed, &again);
    again.shape.cached = 1;
    again.shape.active_ranks = again.later_active;
    start_dispatch(again);
  }

  /// Runs what was started on several nodes; empty when both did the same.
  std::string finish() {
    std::string found = world->finish();
    for (const Pending& op : pending) {
      if (found.empty()) {
        found = op.combines ? compare_combine(op) : compare_dispatch(op.random_case.shape, op.many, op.one);
      }
    }
    pending.clear();
    return found;
  }
  std::string run_dispatch(const RandomCase& random_case) {
    start_dispatch(random_case);
    return finish();
  }
  std::string run_cached() {
    start_cached();
    return finish();
  }
  std::string run_combine() {
    start_combine();
    return finish();
  }

  RandomCase combine_case() {
    RandomCase combine = dispatch;
    combine.shape.active_ranks = combine.later_active;
    if (settings.low_latency) {
      combine.shape.kind = kernels::OpKind::kLlCombine;
      for (RankInput& input : combine.inputs) {
        for (int64_t& id : input.topk_idx) {
          id = random.chance(10) ? -1 : id;  // a caller may drop lanes of its dispatch
        }
      }
      return combine;
    }
    combine.shape.kind = kernels::OpKind::kCombine;
    combine.shape.order_last_lane = combine.order_last_lane ? 1 : 0;
    return combine;
  }

  void start_combine() {
    Pending& op = pending.emplace_back();
    op.combines = true;
    op.random_case = combine_case();
    const RandomCase& combine = op.random_case;
    const size_t width = combine.shape.expanded != 0 ? 1 : combine.shape.top_k;
    op.rows.resize(combine.shape.ranks);
    op.in_rows = combine.capacities;
    for (uint32_t rank = 0; rank < combine.shape.ranks; ++rank) {
      uint32_t& in_rows = op.in_rows[rank];
      in_rows = random.chance(5) ? in_rows / 2 : in_rows;
      op.rows[rank].x = random_rows(&random, size_t{in_rows} * combine.shape.hidden);
      for (size_t i = 0; combine.combine_weights && i < in_rows * width; ++i) {
        op.rows[rank].weights.push_back(static_cast<float>(random.unit()));
      }
    }
    op.one = make_combine(combine, &handles, op.rows, op.in_rows);
    drive(Drive::kWhole, &op.one);
    for (uint32_t node = 0; node < nodes; ++node) {
      op.partials.push_back(partial_of(op, node));
    }
    op.many = make_combine(combine, &handles, op.rows, op.in_rows);
    test::NodeOpSettings with = settings;
    with.with_weights = combine.combine_weights;
    world->start(combine, with, &op.in_rows, &op.many);
  }

  struct Pending {
    bool combines = false;
    RandomCase random_case;
    std::vector<CombineInput> rows;
    std::vector<uint32_t> in_rows;
    GroupMemory one;
    GroupMemory many;
    std::vector<GroupMemory> partials;  // per node: what its ranks hold
  };

  GroupMemory partial_of(const Pending& op, uint32_t node) {
    std::vector<uint32_t> of_node = op.in_rows;
    RandomCase plain = op.random_case;
    for (uint32_t rank = 0; rank < plain.shape.ranks; ++rank) {
      of_node[rank] = world->placement().node_of[rank] == node ? of_node[rank] : 0;
      plain.inputs[rank].bias0.clear();
      plain.inputs[rank].bias1.clear();
    }
    GroupMemory memory = make_combine(plain, &handles, op.rows, of_node);
    drive(Drive::kWhole, &memory);
    return memory;
  }

  /// Empty when a channel of rank `rank` is what one node makes of it, but for the rounding between nodes.
  std::string compare_channel(const Pending& op, uint32_t rank, size_t at) const {
    float elsewhere = 0;
    for (uint32_t node = 0; node < nodes; ++node) {
      const bool own = node == world->placement().node_of[rank];
      elsewhere += own ? 0 : std::abs(value_of(op.partials[node].ranks[rank].x, at));
    }
    const float got = value_of(op.many.ranks[rank].x, at);
    const float wanted = value_of(op.one.ranks[rank].x, at);
    const float bound = nodes_combine_bound(elsewhere, got, wanted);
    return std::abs(got - wanted) <= bound ? ""
                                           : fault("channel", rank) + " at " + std::to_string(at) + ": " +
                                                 std::to_string(got) + ", not " + std::to_string(wanted);
  }

  std::string compare_combine(const Pending& op) const {
    for (uint32_t rank = 0; rank < op.random_case.shape.ranks; ++rank) {
      const RankMemory& got = op.many.ranks[rank];
      const RankMemory& wanted = op.one.ranks[rank];
      if (!active(op.random_case.shape.active_ranks, rank)) {
        if (!outputs_untouched(got)) {
          return fault("output of a masked rank", rank);
        }
        continue;
      }
      for (size_t at = 0; at < got.x.bytes() / 2; ++at) {
        const std::string found = compare_channel(op, rank, at);
        if (!found.empty()) {
          return found;
        }
      }
      for (size_t at = 0; at < got.out_topk_weights.bytes() / 4; ++at) {
        if (std::abs(got.out_topk_weights.as<float>()[at] - wanted.out_topk_weights.as<float>()[at]) >
            kNodesWeightBound) {
          return fault("weights", rank);
        }
      }
      if (!same_report(op.many.reports[rank], op.one.reports[rank])) {
        return fault("report", rank) + ": " + describe(op.many.reports[rank]) + ", not " +
               describe(op.one.reports[rank]);
      }
    }
    return guards_intact(op.many) ? "" : "memory around an output was written";
  }

  Random random;
  RandomCase dispatch;
  std::vector<HandleTables> handles;
  uint32_t nodes;
  std::unique_ptr<test::NodeWorld> world;
  test::NodeOpSettings settings;
  std::deque<Pending> pending;
};

}  // namespace nodes_case

using nodes_case::NodesCase;

}  // namespace expertd::support
