// SPDX-License-Identifier: Apache-2.0
// Who sends what to whom in one iteration, and where it lies there: the expectations that outputs are held to. Pure
// values, any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "client/ctl/bench_input.h"
#include "client/ctl/bench_options.h"

namespace expertd::ctl {

/// Where a row of a dispatch output comes from. Alignment gaps have source -1; whole tokens have lane and expert -1.
struct BenchRow {
  int32_t source = -1;
  int32_t token = -1;
  int32_t lane = -1;
  int32_t expert = -1;  // global
};

/// Per token, the mean over all tokens of all ranks: places on other nodes that its row is for.
struct BenchCrossings {
  double nodes = 0;  // the least that can cross: one row per (token, node)
  double ranks = 0;  // one row per (token, rank)
  double lanes = 0;  // one row per (token, expert)
};

class BenchRouting {
 public:
  BenchRouting(const BenchShape& shape, const BenchInput& input);

  const BenchShape& shape() const { return shape_; }
  /// Global expert of a lane, or -1.
  int32_t expert(uint64_t source, uint64_t token, uint64_t lane) const {
    return topk_[(source * shape_.tokens + token) * shape_.top_k + lane];
  }
  /// The rank of a lane's expert, or -1.
  int32_t rank(uint64_t source, uint64_t token, uint64_t lane) const {
    const int32_t id = expert(source, token, lane);
    return id < 0 ? -1 : id / static_cast<int32_t>(shape_.local_experts());
  }
  bool delivered(uint64_t source, uint64_t token, uint32_t rank) const;

  /// What crosses to nodes other than the source's, with `node_of` naming each rank's node.
  BenchCrossings crossings(const std::vector<uint32_t>& node_of) const;

  /// Rows of a plain dispatch at a rank.
  std::vector<BenchRow> plain_rows(uint32_t rank) const;
  /// Rows of an expanded dispatch, gaps included.
  std::vector<BenchRow> expanded_rows(uint32_t rank, uint32_t alignment) const;
  /// Rows for each expert of a rank, by source, then token.
  std::vector<std::vector<BenchRow>> expert_rows(uint32_t rank) const;
  /// Plain rows from each source at each rank, inclusive over sources: [R,R].
  std::vector<int32_t> rank_prefix() const;

 private:
  BenchShape shape_;
  std::vector<int32_t> topk_;  // [R,T,K]
};

}  // namespace expertd::ctl
