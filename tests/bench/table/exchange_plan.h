// SPDX-License-Identifier: Apache-2.0
// Which rows a rank gathers, sends, receives and places when an operation is done by an all-to-all with counts known
// beforehand: what a caller without this daemon would write. Rows travel once per destination rank in a dispatch, once
// per rank in a high throughput combine and once per lane in a low latency one. Pure values, any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "client/ctl/bench_routing.h"

namespace expertd::bench {

struct RowCopy {
  uint32_t from = 0;
  uint32_t to = 0;
};

struct RowRange {
  uint32_t first = 0;
  uint32_t count = 0;
};

/// Rows of three tensors: the input; the exchange, which has the rows to send first and those that arrive behind; the
/// output.
struct ExchangePlan {
  uint32_t row_bytes = 0;
  uint32_t input_rows = 0;
  uint32_t exchange_rows = 0;
  uint32_t output_rows = 0;
  std::vector<RowCopy> pack;      // input to exchange; own rows go straight to where they would arrive
  std::vector<RowRange> send;     // per peer, of the exchange; a rank sends itself nothing
  std::vector<RowRange> receive;  // per peer, of the exchange
  std::vector<RowCopy> unpack;    // exchange to output
  uint32_t lanes = 0;             // of sums; 0: there are none
  std::vector<int32_t> terms;     // [output_rows, lanes] rows of the exchange, -1: none; bf16
  /// Input row and rank that each output row (of sums: each term, -1 for none) comes from.
  std::vector<RowCopy> origins;  // {rank, input row}

  bool sums() const { return lanes != 0; }
};

/// A row for each token that a rank's experts want; the output is in the order of a plain dispatch.
ExchangePlan plan_dispatch(const ctl::BenchRouting& routing, uint32_t rank, uint32_t row_bytes);
/// The same exchange, then a row for each (local expert, token).
ExchangePlan plan_expert_dispatch(const ctl::BenchRouting& routing, uint32_t rank, uint32_t row_bytes);
/// The rows of a plain dispatch go back and are added per token.
ExchangePlan plan_combine(const ctl::BenchRouting& routing, uint32_t rank, uint32_t row_bytes);
/// The rows of experts go back and are added per token, weighted by lane.
ExchangePlan plan_expert_combine(const ctl::BenchRouting& routing, uint32_t rank, uint32_t row_bytes);

}  // namespace expertd::bench
