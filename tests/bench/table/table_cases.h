// SPDX-License-Identifier: Apache-2.0
// Which operations in which shapes the table has, and in which order they run. Pure values, any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "client/ctl/bench_operation.h"

namespace expertd::bench {

/// What the table is asked for, besides how it runs.
struct TableSelection {
  uint32_t ranks = 2;
  uint32_t experts = 256;
  bool quick = false;                     // the main shape only
  std::vector<std::string> operations{};  // empty: all
  std::vector<uint32_t> tokens{};         // empty: all
  bool captured = true;                   // operations in CUDA graphs
  bool eager = true;                      // all others
  bool copies = false;                    // those of the main low latency by copy engines besides, in groups of them
};

/// An operation in a shape. Everything about it that the client sees.
struct TableCase {
  std::string operation;  // dispatch, combine, layout, empty, pair, layer or overlap
  std::string dtype;      // fp8 or bf16; empty: the operation has none
  bool low_latency = false;
  ctl::BenchShape shape;
  std::string half = "both";  // or send or receive, of low latency
  bool captured = false;      // in a CUDA graph that is replayed
  std::string executor{};     // that its group asks for; empty: the run's

  /// An operation with both halves that can be compared with others; a double batch is compared with itself.
  bool is_whole() const { return half == "both" && operation != "overlap"; }
  /// Beside GEMMs the others are measured less often.
  bool has_main_shape() const;
  /// "ht" or "ll".
  const char* mode() const { return low_latency ? "ll" : "ht"; }
  /// "dispatch ht fp8, 4096 tokens, hidden 7168, top 8".
  std::string name() const;
  /// Whether both run in one group.
  bool shares_group(const TableCase& other) const;
};

/// The operations that a table can have.
const std::vector<std::string>& table_operations();
/// By importance, and groups behind one another: what has a target, other sizes, layers.
std::vector<TableCase> table_cases(const TableSelection& selection);
/// What makes the operation of a case, other than a layer and a double batch, which need a GPU.
ctl::BenchRowSpec row_spec(const TableCase& it);

}  // namespace expertd::bench
