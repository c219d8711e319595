// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/slowest.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "client/ctl/format.h"

namespace expertd::ctl {

namespace {

using nlohmann::json;

struct Sums {
  uint64_t last = 0;
  std::vector<uint64_t> waits_ns;  // of other ranks
};

uint64_t quantile(const std::vector<uint64_t>& sorted, size_t hundredths) {
  return sorted.empty() ? 0 : sorted[std::min(sorted.size() - 1, sorted.size() * hundredths / 100)];
}

std::string percent_text(double share) {
  return std::to_string(std::lround(share * 100)) + " %";
}

bool counts_unseen(const v1::ListWaitsResponse& waits) {
  return std::any_of(waits.waits().begin(), waits.waits().end(), [](const auto& wait) { return !wait.counts(); });
}

}  // namespace

// Of an operation the longest wait counts: a rank that comes last itself still waits a little for what the others sent.
std::vector<SlowRank> slow_ranks(const v1::ListWaitsResponse& waits) {
  std::map<std::pair<uint64_t, uint64_t>, const v1::OperationWait*> longest;  // by group and operation
  for (const v1::OperationWait& wait : waits.waits()) {
    const v1::OperationWait*& known = longest[{wait.group_id(), wait.number()}];
    known = known == nullptr || wait.waited_ns() > known->waited_ns() ? &wait : known;
  }
  std::map<uint64_t, uint64_t> seen;                       // by group
  std::map<std::pair<uint64_t, uint32_t>, Sums> of_ranks;  // by group and last rank
  for (const auto& [operation, wait] : longest) {
    ++seen[wait->group_id()];
    Sums& sums = of_ranks[{wait->group_id(), wait->last_rank()}];
    ++sums.last;
    if (wait->rank() != wait->last_rank()) {
      sums.waits_ns.push_back(wait->waited_ns());
    }
  }
  std::vector<SlowRank> ranks;
  for (auto& [key, sums] : of_ranks) {
    SlowRank rank;
    rank.rank = key.second;
    for (const v1::GroupRanks& group : waits.groups()) {
      if (group.id() == key.first) {
        rank.group = group.name();
        rank.node = key.second < static_cast<uint32_t>(group.rank_nodes_size())
                        ? group.rank_nodes(static_cast<int>(key.second))
                        : waits.node();
      }
    }
    std::sort(sums.waits_ns.begin(), sums.waits_ns.end());
    rank.last = sums.last;
    rank.seen = seen[key.first];
    rank.waits = sums.waits_ns.size();
    rank.p50_ns = quantile(sums.waits_ns, 50);
    rank.p99_ns = quantile(sums.waits_ns, 99);
    ranks.push_back(std::move(rank));
  }
  std::stable_sort(ranks.begin(), ranks.end(), [](const SlowRank& left, const SlowRank& right) {
    return left.group != right.group ? left.group < right.group : left.share() > right.share();
  });
  return ranks;
}

std::string slowest_text(const v1::ListWaitsResponse& waits) {
  const std::vector<SlowRank> ranks = slow_ranks(waits);
  if (ranks.empty()) {
    return "no operations of groups yet\n";
  }
  Table table({{"GROUP"},
               {"RANK", Align::kRight},
               {"NODE"},
               {"LAST", Align::kRight},
               {"SHARE", Align::kRight},
               {"WAITS", Align::kRight},
               {"P50", Align::kRight},
               {"P99", Align::kRight}});
  for (const SlowRank& rank : ranks) {
    table.add({rank.group, std::to_string(rank.rank), rank.node.empty() ? "-" : rank.node,
               std::to_string(rank.last) + "/" + std::to_string(rank.seen), percent_text(rank.share()),
               std::to_string(rank.waits), rank.waits == 0 ? "-" : duration_text(rank.p50_ns),
               rank.waits == 0 ? "-" : duration_text(rank.p99_ns)});
  }
  std::string out = table.text();
  out += "As the ranks of this daemon saw it; other nodes see their own waits.\n";
  if (counts_unseen(waits)) {
    out += "Of ranks on GPUs: who submitted last. Whose rows came last is not known there.\n";
  }
  return out;
}

json slowest_json(const v1::ListWaitsResponse& waits) {
  json list = json::array();
  for (const SlowRank& rank : slow_ranks(waits)) {
    list.push_back({{"group", rank.group},
                    {"rank", rank.rank},
                    {"node", rank.node},
                    {"last", rank.last},
                    {"seen", rank.seen},
                    {"share", rank.share()},
                    {"waits", rank.waits},
                    {"p50_ns", rank.p50_ns},
                    {"p99_ns", rank.p99_ns}});
  }
  return {{"node", waits.node()}, {"submissions_alone", counts_unseen(waits)}, {"ranks", std::move(list)}};
}

}  // namespace expertd::ctl
