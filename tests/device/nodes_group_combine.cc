// SPDX-License-Identifier: Apache-2.0
// A combine of a NodesGroup: pulls of every rank, sums that a rank of another node makes for it, and the end with them.
#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "daemon/kernels/host/node_ops.h"
#include "tests/device/nodes_group.h"

namespace expertd::device_test {

using namespace kernels::cuda;
using kernels::OpShape;

namespace {

constexpr uint32_t kNoNode = ~0u;

bool by_lane(const OpShape& shape) {
  return shape.kind == OpKind::kLlCombine || shape.expanded != 0;
}

}  // namespace

kernels::MessageHead NodesGroup::pulls_head(uint32_t rank) const {
  const Params& params = params_[rank];
  kernels::MessageHead head;
  const bool weights = params.op.shape.kind == OpKind::kCombine && params.op.out.topk_weights != nullptr;
  head.flags = weights ? kernels::kMessageWeights : 0;
  head.flags |= params.op.shape.order_last_lane != 0 ? kernels::kMessageLastLane : 0;
  return head;
}

void NodesGroup::run_combine(const CaseStep& step) {
  signal(SignalStep::kRouted);
  each_of("plan", launch_plan);
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    if (active(rank)) {
      SCOPED_TRACE("rank " + std::to_string(rank));
      pack_pulls(rank, step);
    }
  }
  serve_all();
  for (const Pull& pull : pulls_) {
    if (pull.count != 0 && random_->chance(30)) {
      serve_bad_entries(pull);
    }
    if (pull.count != 0 && garbage) {
      serve_garbage(pull);
    }
  }
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    // The windows of a rank's pulls are those of its sums.
    uint32_t end = 0;
    for (const Pull& pull : pulls_) {
      if (pull.rank == rank && pull.begin == end && pull.end != end) {
        EXPECT_EQ(0u, combine(rank, pull.begin, pull.end, kNoNode));
        end = pull.end;
      }
    }
  }
  signal(SignalStep::kMoved);
  each_of("finish", launch_finish);
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    if (active(rank)) {
      combine_with_bad_sums(rank);
    }
  }
}

void NodesGroup::pack_pulls(uint32_t rank, const CaseStep& step) {
  const OpShape& shape = params_[rank].op.shape;
  const size_t first = pulls_.size();
  for (uint32_t begin = 0; begin < shape.tokens;) {
    const uint32_t end = std::min(shape.tokens, begin + random_->between(1, kMostPullTokens));
    for (uint32_t node = 0; node < nodes_; ++node) {
      if (node == placement_.node_of[rank]) {
        continue;
      }
      const size_t bytes = size_t{end - begin} * kernels::pulls_layout(shape, node_ranks(node)).stride;
      char* entries = exchanges(rank, node) ? take_pinned(bytes) : nullptr;  // null: the window has none for the node
      pulls_.push_back({.rank = rank, .node = node, .begin = begin, .end = end, .entries = entries});
    }
    begin = end;
  }
  std::vector<Pull*> packed;
  for (size_t i = first; i < pulls_.size(); ++i) {
    if (pulls_[i].entries != nullptr) {
      packed.push_back(&pulls_[i]);
    }
  }
  for (size_t next = 0; next < packed.size();) {
    PackPullsJob job;
    job.positions = positions_[rank]->at<int32_t>();
    const size_t before = next;
    for (uint32_t most = random_->between(1, kPullWindows); job.windows < most && next < packed.size(); ++next) {
      const Pull& pull = *packed[next];
      auto* count = reinterpret_cast<uint32_t*>(take_pinned(sizeof(uint32_t)));
      job.window[job.windows++] = {
          pull.node, pull.begin, pull.end, kernels::pulls_layout(shape, node_ranks(pull.node)), pull.entries, count};
    }
    ran("node_pack_pulls", launch_node_pack_pulls(params_[rank], table_of(rank), job, stream_));
    for (size_t i = before; i < next; ++i) {
      packed[i]->count = *job.window[i - before].packed;
      ASSERT_LE(packed[i]->count, packed[i]->end - packed[i]->begin);
      expect_host_pulls(*packed[i], step);
    }
  }
}

/// The entries are those that the host packs, in the same order.
void NodesGroup::expect_host_pulls(const Pull& pull, const CaseStep& step) {
  const kernels::OpParams& host = step.host.params[pull.rank];
  const kernels::host::NodeView view{placement_.node_of[pull.rank], placement_.node_of, placement_.index_of,
                                     placement_.ranks_of};
  const uint32_t stride = kernels::pulls_layout(host.shape, node_ranks(pull.node)).stride;
  uint32_t count = 0;
  for (uint32_t token = pull.begin; token < pull.end; ++token) {
    std::vector<std::byte> entry(stride);
    if (kernels::host::pack_pull(host, view, pull.node, *step.in_rows, token, entry.data()) == 0) {
      continue;
    }
    ASSERT_LT(count, pull.count) << "a pull of token " << token << " is missing";
    EXPECT_EQ(0, std::memcmp(entry.data(), pull.entries + size_t{count} * stride, stride))
        << "the pull of token " << token << " differs";
    ++count;
  }
  EXPECT_EQ(count, pull.count);
}

NodeTotals NodesGroup::serve(uint32_t server, const std::vector<const Pull*>& pulls) {
  const OpShape& shape = params_[server].op.shape;
  const uint32_t node = placement_.node_of[server];
  const Memory totals(sizeof(NodeTotals));
  for (size_t next = 0; next < pulls.size();) {
    ServePullsJob job;
    job.pulls = kernels::pulls_layout(shape, node_ranks(node));
    job.totals = totals.at<NodeTotals>();
    for (const uint32_t rank : placement_.ranks_of[node]) {
      job.local_ranks |= active(rank) ? 1u << rank : 0u;
      job.place_rank[placement_.index_of[rank]] = rank;
    }
    for (uint32_t most = random_->between(1, kNodeMessages); job.messages < most && next < pulls.size(); ++next) {
      const Pull& pull = *pulls[next];
      const kernels::MessageHead head = pulls_head(pull.rank);
      job.message[job.messages++] = {pull.entries, pull.count, pull.rank,
                                     head.flags,   pull.sums,  kernels::sums_layout(shape, head)};
    }
    ran("node_serve_pulls", launch_node_serve_pulls(params_[server], table_of(server), job, stream_));
  }
  return totals.get<NodeTotals>(1)[0];
}

void NodesGroup::serve_all() {
  std::map<uint32_t, std::vector<const Pull*>> served;
  for (Pull& pull : pulls_) {
    if (pull.count == 0) {
      continue;
    }
    const std::vector<uint32_t>& ranks = placement_.ranks_of[pull.node];
    do {
      pull.server = ranks[random_->below(static_cast<uint32_t>(ranks.size()))];
    } while (!active(pull.server));  // one is: only rows of active ranks are pulled
    const OpShape& shape = params_[pull.rank].op.shape;
    pull.sums = take_pinned(size_t{pull.count} * kernels::sums_layout(shape, pulls_head(pull.rank)).stride);
    served[pull.server].push_back(&pull);
  }
  for (const auto& [server, pulls] : served) {
    EXPECT_EQ(0u, serve(server, pulls).bad_ranks) << "of rank " << server;
  }
}

/// Pulls with one thing wrong: their source is marked, and no sum is written.
void NodesGroup::serve_bad_entries(const Pull& pull) {
  const OpShape& shape = params_[pull.server].op.shape;
  const kernels::EntryLayout layout = kernels::pulls_layout(shape, node_ranks(pull.node));
  const bool lanes = by_lane(shape);
  for (uint32_t wrong = 0; wrong < (lanes ? 6u : 5u); ++wrong) {
    Pull bad = pull;
    bad.count = 1;
    bad.entries = take_pinned(layout.stride);
    std::memcpy(bad.entries, pull.entries + size_t{random_->below(pull.count)} * layout.stride, layout.stride);
    const Pinned sums(kernels::sums_layout(shape, pulls_head(pull.rank)).stride);
    bad.sums = sums.at();
    auto* words = reinterpret_cast<int32_t*>(bad.entries);
    int32_t* topk = words + layout.topk_at / 4;
    int32_t* rows = words + layout.rows_at / 4;
    const uint32_t place = lanes ? 0 : placement_.index_of[pull.server];
    if (wrong < 2) {
      topk[random_->below(shape.top_k)] = wrong == 0 ? static_cast<int32_t>(shape.experts) : -7;
    } else if (wrong == 2) {
      words[0] = static_cast<int32_t>(shape.max_tokens);
    } else if (wrong < 5) {
      topk[0] = static_cast<int32_t>(pull.server * shape.local_experts);
      rows[place] =
          wrong == 3 ? INT32_MAX : static_cast<int32_t>(params_[pull.server].peers.views[pull.server].in_rows);
    } else {
      topk[0] = -1;
      rows[place] = 0;
    }
    EXPECT_EQ(1u << pull.rank, serve(pull.server, {&bad}).bad_ranks) << "bad pull " << wrong;
    EXPECT_TRUE(sums.untouched()) << "bad pull " << wrong;
  }
}

void NodesGroup::serve_garbage(const Pull& pull) {
  const OpShape& shape = params_[pull.server].op.shape;
  const kernels::EntryLayout layout = kernels::pulls_layout(shape, node_ranks(pull.node));
  Pull any = pull;
  any.entries = take_pinned(size_t{pull.count} * layout.stride);
  any.sums = take_pinned(size_t{pull.count} * kernels::sums_layout(shape, pulls_head(pull.rank)).stride);
  std::memcpy(any.entries, pull.entries, size_t{pull.count} * layout.stride);
  for (uint32_t i = 0; i < pull.count; ++i) {
    auto* words = reinterpret_cast<int32_t*>(any.entries + size_t{i} * layout.stride);
    for (uint32_t row = 0; row < layout.rows; ++row) {
      words[layout.rows_at / 4 + row] = static_cast<int32_t>(
          random_->chance(80) ? random_->below(shape.capacity_rows + 2) : static_cast<uint32_t>(random_->next()));
    }
    for (uint32_t lane = 0; lane < shape.top_k; ++lane) {
      words[layout.topk_at / 4 + lane] = static_cast<int32_t>(random_->below(shape.experts + 1));
    }
  }
  (void)serve(pull.server, {&any});
}

/// Combines a window of a rank's tokens; returns the ranks that were marked. The first sum of `spoiled_node` is one of
/// another token.
uint32_t NodesGroup::combine(uint32_t rank, uint32_t begin, uint32_t end, uint32_t spoiled_node) {
  const Memory totals(sizeof(NodeTotals));
  std::vector<std::unique_ptr<Memory>> sums;
  CombineNodesJob job;
  job.begin = begin;
  job.end = end;
  job.layout = kernels::sums_layout(params_[rank].op.shape, pulls_head(rank));
  job.positions = positions_[rank]->at<int32_t>();
  job.totals = totals.at<NodeTotals>();
  for (const Pull& pull : pulls_) {
    if (pull.rank != rank || pull.begin != begin || pull.count == 0) {
      continue;
    }
    std::vector<char> entries(pull.sums, pull.sums + size_t{pull.count} * job.layout.stride);
    if (pull.node == spoiled_node) {
      entries[0] = static_cast<char>(entries[0] + 1);
    }
    sums.push_back(std::make_unique<Memory>(entries.size()));
    sums.back()->put(entries);
    job.sums[pull.node] = sums.back()->at();
    job.server[pull.node] = pull.server;
  }
  ran("node_combine", launch_node_combine(params_[rank], table_of(rank), job, stream_));
  return totals.get<NodeTotals>(1)[0].bad_ranks;
}

/// Once the report is written: a sum of another token marks who made it. Behind it everything is as before.
void NodesGroup::combine_with_bad_sums(uint32_t rank) {
  for (const Pull& pull : pulls_) {
    if (pull.rank == rank && pull.count != 0 && random_->chance(30)) {
      EXPECT_EQ(1u << pull.server, combine(rank, pull.begin, pull.end, pull.node)) << "rank " << rank;
      EXPECT_EQ(0u, combine(rank, pull.begin, pull.end, kNoNode)) << "rank " << rank;
    }
  }
}

}  // namespace expertd::device_test
