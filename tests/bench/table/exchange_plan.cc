// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/exchange_plan.h"

#include <map>
#include <utility>

namespace expertd::bench {

namespace {

using ctl::BenchRouting;
using ctl::BenchRow;
using ctl::BenchShape;

uint32_t as_row(uint64_t value) {
  return static_cast<uint32_t>(value);
}

/// A row that travels: where it lies at its sender.
using Sent = std::vector<uint32_t>;

/// What `from` sends to `to`, in the order in which it arrives.
using Route = Sent (*)(const BenchRouting&, uint32_t from, uint32_t to);

Sent tokens_for(const BenchRouting& routing, uint32_t from, uint32_t to) {
  Sent rows;
  for (uint32_t token = 0; token < routing.shape().tokens; ++token) {
    if (routing.delivered(from, token, to)) {
      rows.push_back(token);
    }
  }
  return rows;
}

/// Of the rows of a plain dispatch at `from` those that came from `to`.
Sent plain_rows_of(const BenchRouting& routing, uint32_t from, uint32_t to) {
  Sent rows;
  const std::vector<BenchRow> all = routing.plain_rows(from);
  for (size_t at = 0; at < all.size(); ++at) {
    if (all[at].source == static_cast<int32_t>(to)) {
      rows.push_back(as_row(at));
    }
  }
  return rows;
}

/// Rows of all experts of a rank behind one another.
std::vector<BenchRow> expert_rows(const BenchRouting& routing, uint32_t rank) {
  return routing.expanded_rows(rank, 1);
}

Sent expert_rows_of(const BenchRouting& routing, uint32_t from, uint32_t to) {
  Sent rows;
  const std::vector<BenchRow> all = expert_rows(routing, from);
  for (size_t at = 0; at < all.size(); ++at) {
    if (all[at].source == static_cast<int32_t>(to)) {
      rows.push_back(as_row(at));
    }
  }
  return rows;
}

/// Everything but what becomes of the rows that arrived.
ExchangePlan plan_exchange(const BenchRouting& routing, uint32_t rank, uint32_t row_bytes, Route route) {
  ExchangePlan plan;
  plan.row_bytes = row_bytes;
  const uint32_t ranks = routing.shape().ranks;
  uint32_t next = 0;
  std::vector<Sent> sent;
  for (uint32_t peer = 0; peer < ranks; ++peer) {
    sent.push_back(route(routing, rank, peer));
    const uint32_t count = peer == rank ? 0 : as_row(sent.back().size());
    plan.send.push_back({next, count});
    next += count;
  }
  for (uint32_t peer = 0; peer < ranks; ++peer) {
    const uint32_t count = as_row(peer == rank ? sent[peer].size() : route(routing, peer, rank).size());
    plan.receive.push_back({next, count});
    next += count;
  }
  plan.exchange_rows = next;
  for (uint32_t peer = 0; peer < ranks; ++peer) {
    uint32_t to = peer == rank ? plan.receive[peer].first : plan.send[peer].first;
    for (const uint32_t from : sent[peer]) {
      plan.pack.push_back({from, to++});
    }
  }
  // Nothing is received from oneself.
  plan.receive[rank].count = 0;
  return plan;
}

uint32_t first_arrived(const ExchangePlan& plan) {
  return plan.receive.front().first;
}

/// Place of each row in the exchange by (sender, row there).
std::map<std::pair<uint32_t, uint32_t>, uint32_t> places(const BenchRouting& routing, uint32_t rank,
                                                         const ExchangePlan& plan, Route route) {
  std::map<std::pair<uint32_t, uint32_t>, uint32_t> found;
  uint32_t next = first_arrived(plan);
  for (uint32_t peer = 0; peer < routing.shape().ranks; ++peer) {
    for (const uint32_t row : route(routing, peer, rank)) {
      found[{peer, row}] = next++;
    }
  }
  return found;
}

}  // namespace

ExchangePlan plan_dispatch(const BenchRouting& routing, uint32_t rank, uint32_t row_bytes) {
  ExchangePlan plan = plan_exchange(routing, rank, row_bytes, tokens_for);
  plan.input_rows = routing.shape().tokens;
  // Senders in order and tokens in order is the order of the output: what arrived is in its place.
  for (const BenchRow& row : routing.plain_rows(rank)) {
    plan.origins.push_back({static_cast<uint32_t>(row.source), static_cast<uint32_t>(row.token)});
  }
  plan.output_rows = as_row(plan.origins.size());
  return plan;
}

ExchangePlan plan_expert_dispatch(const BenchRouting& routing, uint32_t rank, uint32_t row_bytes) {
  ExchangePlan plan = plan_exchange(routing, rank, row_bytes, tokens_for);
  plan.input_rows = routing.shape().tokens;
  const auto where = places(routing, rank, plan, tokens_for);
  for (const BenchRow& row : expert_rows(routing, rank)) {
    const auto source = static_cast<uint32_t>(row.source);
    const auto token = static_cast<uint32_t>(row.token);
    plan.unpack.push_back({where.at({source, token}), plan.output_rows++});
    plan.origins.push_back({source, token});
  }
  return plan;
}

ExchangePlan plan_combine(const BenchRouting& routing, uint32_t rank, uint32_t row_bytes) {
  const BenchShape& shape = routing.shape();
  ExchangePlan plan = plan_exchange(routing, rank, row_bytes, plain_rows_of);
  plan.input_rows = as_row(routing.plain_rows(rank).size());
  plan.output_rows = shape.tokens;
  plan.lanes = shape.ranks;
  plan.terms.assign(uint64_t{shape.tokens} * plan.lanes, -1);
  plan.origins.assign(plan.terms.size(), {});
  uint32_t next = first_arrived(plan);
  for (uint32_t peer = 0; peer < shape.ranks; ++peer) {
    const Sent rows = plain_rows_of(routing, peer, rank);
    const Sent tokens = tokens_for(routing, rank, peer);
    for (size_t i = 0; i < rows.size(); ++i) {
      const uint64_t at = uint64_t{tokens[i]} * plan.lanes + peer;
      plan.terms[at] = static_cast<int32_t>(next++);
      plan.origins[at] = {peer, rows[i]};
    }
  }
  return plan;
}

ExchangePlan plan_expert_combine(const BenchRouting& routing, uint32_t rank, uint32_t row_bytes) {
  const BenchShape& shape = routing.shape();
  ExchangePlan plan = plan_exchange(routing, rank, row_bytes, expert_rows_of);
  plan.input_rows = as_row(expert_rows(routing, rank).size());
  plan.output_rows = shape.tokens;
  plan.lanes = shape.top_k;
  plan.terms.assign(uint64_t{shape.tokens} * plan.lanes, -1);
  plan.origins.assign(plan.terms.size(), {});
  uint32_t next = first_arrived(plan);
  for (uint32_t peer = 0; peer < shape.ranks; ++peer) {
    const std::vector<BenchRow> rows = expert_rows(routing, peer);
    for (const uint32_t row : expert_rows_of(routing, peer, rank)) {
      const uint64_t at = static_cast<uint64_t>(rows[row].token) * plan.lanes + static_cast<uint64_t>(rows[row].lane);
      plan.terms[at] = static_cast<int32_t>(next++);
      plan.origins[at] = {peer, row};
    }
  }
  return plan;
}

}  // namespace expertd::bench
