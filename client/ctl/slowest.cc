// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/slowest.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "client/ctl/format.h"

namespace expertd::ctl {

namespace {

using nlohmann::json;

struct Sums {
  uint64_t last = 0;
  std::vector<uint64_t> waits_ns;  // of other ranks
};

struct GroupSums {
  const v1::GroupRanks* facts = nullptr;
  uint64_t seen = 0;
  uint64_t held_ns = 0;
  std::map<uint32_t, Sums> ranks;
};

uint64_t quantile(const std::vector<uint64_t>& sorted, size_t hundredths) {
  return sorted.empty() ? 0 : sorted[std::min(sorted.size() - 1, sorted.size() * hundredths / 100)];
}

double share_of(uint64_t part, uint64_t all) {
  return all == 0 ? 0 : static_cast<double>(part) / static_cast<double>(all);
}

std::string percent_text(double share) {
  return std::to_string(std::lround(share * 100)) + " %";
}

bool counts_unseen(const v1::ListWaitsResponse& waits) {
  return std::any_of(waits.waits().begin(), waits.waits().end(), [](const auto& wait) { return !wait.counts(); });
}

std::string node_of(const v1::GroupRanks* group, uint32_t rank, const std::string& own) {
  return group != nullptr && rank < static_cast<uint32_t>(group->rank_nodes_size())
             ? group->rank_nodes(static_cast<int>(rank))
             : own;
}

// Low-latency operations go by one lane and all others by the other.
const char* lane_of(const std::string& op) {
  return op.rfind("ll_", 0) == 0 ? "latency" : "throughput";
}

std::vector<SlowPart> parts_of(const std::map<std::string, uint64_t>& held) {
  const uint64_t all = std::accumulate(held.begin(), held.end(), uint64_t{0},
                                       [](uint64_t sum, const auto& of) { return sum + of.second; });
  std::vector<SlowPart> parts;
  for (const auto& [name, held_ns] : held) {
    parts.push_back({name, held_ns, share_of(held_ns, all)});
  }
  std::stable_sort(parts.begin(), parts.end(),
                   [](const SlowPart& left, const SlowPart& right) { return left.held_ns > right.held_ns; });
  return parts;
}

SlowRank rank_of(uint32_t number, Sums sums, const GroupSums& group, const std::string& own_node) {
  SlowRank rank;
  rank.rank = number;
  rank.group = group.facts == nullptr ? "" : group.facts->name();
  rank.node = node_of(group.facts, number, own_node);
  std::sort(sums.waits_ns.begin(), sums.waits_ns.end());
  rank.last = sums.last;
  rank.seen = group.seen;
  rank.waits = sums.waits_ns.size();
  rank.held_ns = std::accumulate(sums.waits_ns.begin(), sums.waits_ns.end(), uint64_t{0});
  rank.share = share_of(rank.held_ns, group.held_ns);
  rank.p50_ns = quantile(sums.waits_ns, 50);
  rank.p99_ns = quantile(sums.waits_ns, 99);
  return rank;
}

std::string parts_text(const char* title, const std::vector<SlowPart>& parts) {
  std::string out;
  for (const SlowPart& part : parts) {
    out += (out.empty() ? std::string(title) : std::string(", ")) + part.name + " " + percent_text(part.share);
  }
  return out.empty() ? out : out + "\n";
}

json parts_json(const std::vector<SlowPart>& parts) {
  json list = json::array();
  for (const SlowPart& part : parts) {
    list.push_back({{"name", part.name}, {"held_ns", part.held_ns}, {"share", part.share}});
  }
  return list;
}

}  // namespace

// Of an operation the longest wait counts: a rank that comes last itself still waits a little for what the others sent.
Slowest slowest_of(const v1::ListWaitsResponse& waits) {
  std::map<std::pair<uint64_t, uint64_t>, const v1::OperationWait*> longest;  // by group and operation
  for (const v1::OperationWait& wait : waits.waits()) {
    const v1::OperationWait*& known = longest[{wait.group_id(), wait.number()}];
    known = known == nullptr || wait.waited_ns() > known->waited_ns() ? &wait : known;
  }
  std::map<uint64_t, GroupSums> groups;
  for (const v1::GroupRanks& group : waits.groups()) {
    groups[group.id()].facts = &group;
  }
  std::map<std::string, uint64_t> nodes;
  std::map<std::string, uint64_t> lanes;
  for (const auto& [operation, wait] : longest) {
    GroupSums& group = groups[wait->group_id()];
    ++group.seen;
    Sums& sums = group.ranks[wait->last_rank()];
    ++sums.last;
    if (wait->rank() == wait->last_rank()) {
      continue;
    }
    sums.waits_ns.push_back(wait->waited_ns());
    group.held_ns += wait->waited_ns();
    if (group.facts != nullptr && group.facts->rank_nodes_size() != 0) {
      nodes[node_of(group.facts, wait->last_rank(), waits.node())] += wait->waited_ns();
      lanes[lane_of(wait->op())] += wait->waited_ns();
    }
  }
  Slowest slowest{{}, parts_of(nodes), parts_of(lanes)};
  for (auto& [id, group] : groups) {
    for (auto& [number, sums] : group.ranks) {
      slowest.ranks.push_back(rank_of(number, std::move(sums), group, waits.node()));
    }
  }
  std::stable_sort(slowest.ranks.begin(), slowest.ranks.end(), [](const SlowRank& left, const SlowRank& right) {
    return left.group != right.group ? left.group < right.group : left.held_ns > right.held_ns;
  });
  return slowest;
}

std::string slowest_text(const v1::ListWaitsResponse& waits) {
  const Slowest slowest = slowest_of(waits);
  if (slowest.ranks.empty()) {
    return "no operations of groups yet\n";
  }
  Table table({{"GROUP"},
               {"RANK", Align::kRight},
               {"NODE"},
               {"SHARE", Align::kRight},
               {"HELD UP", Align::kRight},
               {"LAST", Align::kRight},
               {"P50", Align::kRight},
               {"P99", Align::kRight}});
  for (const SlowRank& rank : slowest.ranks) {
    const bool waited = rank.waits != 0;
    table.add({rank.group, std::to_string(rank.rank), rank.node.empty() ? "-" : rank.node, percent_text(rank.share),
               waited ? duration_text(rank.held_ns) : "-", std::to_string(rank.last) + "/" + std::to_string(rank.seen),
               waited ? duration_text(rank.p50_ns) : "-", waited ? duration_text(rank.p99_ns) : "-"});
  }
  std::string out = table.text();
  out += parts_text("By node: ", slowest.nodes);
  out += parts_text("By lane: ", slowest.lanes);
  out += "SHARE is of all the time waited, as the ranks of this daemon saw it; other nodes see their own waits.\n";
  if (counts_unseen(waits)) {
    out += "Of ranks on GPUs: who submitted last. Whose rows came last is not known there.\n";
  }
  return out;
}

json slowest_json(const v1::ListWaitsResponse& waits) {
  const Slowest slowest = slowest_of(waits);
  json list = json::array();
  for (const SlowRank& rank : slowest.ranks) {
    list.push_back({{"group", rank.group},
                    {"rank", rank.rank},
                    {"node", rank.node},
                    {"last", rank.last},
                    {"seen", rank.seen},
                    {"share", rank.share},
                    {"waits", rank.waits},
                    {"held_ns", rank.held_ns},
                    {"p50_ns", rank.p50_ns},
                    {"p99_ns", rank.p99_ns}});
  }
  return {{"node", waits.node()},
          {"submissions_alone", counts_unseen(waits)},
          {"ranks", std::move(list)},
          {"nodes", parts_json(slowest.nodes)},
          {"lanes", parts_json(slowest.lanes)}};
}

}  // namespace expertd::ctl
