// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench_routing.h"

#include <algorithm>
#include <span>

namespace expertd::ctl {

BenchRouting::BenchRouting(const BenchShape& shape, const BenchInput& input)
    : shape_(shape), topk_(shape.worst_rows() * shape.top_k) {
  for (uint64_t source = 0; source < shape.ranks; ++source) {
    for (uint64_t token = 0; token < shape.tokens; ++token) {
      const std::span<int32_t> lanes(topk_.data() + (source * shape.tokens + token) * shape.top_k, shape.top_k);
      input.experts_of(source, token, shape.tokens, shape.experts, lanes);
    }
  }
}

bool BenchRouting::delivered(uint64_t source, uint64_t token, uint32_t rank) const {
  for (uint32_t lane = 0; lane < shape_.top_k; ++lane) {
    if (this->rank(source, token, lane) == static_cast<int32_t>(rank)) {
      return true;
    }
  }
  return false;
}

BenchCrossings BenchRouting::crossings(const std::vector<uint32_t>& node_of) const {
  BenchCrossings sum;
  std::vector<int32_t> ranks;
  for (uint64_t source = 0; source < shape_.ranks; ++source) {
    for (uint64_t token = 0; token < shape_.tokens; ++token) {
      ranks.clear();
      for (uint32_t lane = 0; lane < shape_.top_k; ++lane) {
        const int32_t to = this->rank(source, token, lane);
        if (to >= 0 && node_of[static_cast<size_t>(to)] != node_of[source]) {
          ranks.push_back(to);
        }
      }
      sum.lanes += static_cast<double>(ranks.size());
      std::sort(ranks.begin(), ranks.end());
      ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
      sum.ranks += static_cast<double>(ranks.size());
      std::transform(ranks.begin(), ranks.end(), ranks.begin(),
                     [&](int32_t to) { return static_cast<int32_t>(node_of[static_cast<size_t>(to)]); });
      std::sort(ranks.begin(), ranks.end());
      sum.nodes += static_cast<double>(std::unique(ranks.begin(), ranks.end()) - ranks.begin());
    }
  }
  const auto tokens = static_cast<double>(shape_.worst_rows());
  return {sum.nodes / tokens, sum.ranks / tokens, sum.lanes / tokens};
}

std::vector<BenchRow> BenchRouting::plain_rows(uint32_t rank) const {
  std::vector<BenchRow> rows;
  for (uint32_t source = 0; source < shape_.ranks; ++source) {
    for (uint32_t token = 0; token < shape_.tokens; ++token) {
      if (delivered(source, token, rank)) {
        rows.push_back({static_cast<int32_t>(source), static_cast<int32_t>(token), -1, -1});
      }
    }
  }
  return rows;
}

std::vector<std::vector<BenchRow>> BenchRouting::expert_rows(uint32_t rank) const {
  std::vector<std::vector<BenchRow>> rows(shape_.local_experts());
  const auto first = static_cast<int32_t>(rank * shape_.local_experts());
  for (uint32_t source = 0; source < shape_.ranks; ++source) {
    for (uint32_t token = 0; token < shape_.tokens; ++token) {
      for (uint32_t lane = 0; lane < shape_.top_k; ++lane) {
        if (this->rank(source, token, lane) == static_cast<int32_t>(rank)) {
          const int32_t id = expert(source, token, lane);
          rows[static_cast<size_t>(id - first)].push_back(
              {static_cast<int32_t>(source), static_cast<int32_t>(token), static_cast<int32_t>(lane), id});
        }
      }
    }
  }
  return rows;
}

std::vector<BenchRow> BenchRouting::expanded_rows(uint32_t rank, uint32_t alignment) const {
  std::vector<BenchRow> rows;
  for (const std::vector<BenchRow>& of_expert : expert_rows(rank)) {
    rows.insert(rows.end(), of_expert.begin(), of_expert.end());
    while (rows.size() % alignment != 0) {
      rows.push_back({});
    }
  }
  return rows;
}

std::vector<int32_t> BenchRouting::rank_prefix() const {
  std::vector<int32_t> prefix(uint64_t{shape_.ranks} * shape_.ranks);
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    int32_t rows = 0;
    for (uint32_t source = 0; source < shape_.ranks; ++source) {
      for (uint32_t token = 0; token < shape_.tokens; ++token) {
        rows += delivered(source, token, rank) ? 1 : 0;
      }
      prefix[uint64_t{source} * shape_.ranks + rank] = rows;
    }
  }
  return prefix;
}

}  // namespace expertd::ctl
