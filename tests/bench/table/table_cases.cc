// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/table_cases.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

namespace expertd::bench {

namespace {

using ctl::BenchRowSpec;
using ctl::BenchShape;

constexpr uint32_t kHidden = 7168;
constexpr uint32_t kTopK = 8;
constexpr uint32_t kTokens = 4096;
constexpr uint32_t kLowLatencyTokens = 128;

template <typename T>
bool wanted(const std::vector<T>& some, const T& value) {
  return some.empty() || std::find(some.begin(), some.end(), value) != some.end();
}

/// Those of a group that are asked for.
void add_wanted(const TableSelection& selection, const std::vector<TableCase>& of_group,
                std::vector<TableCase>* cases) {
  for (const TableCase& it : of_group) {
    const bool form = it.captured ? selection.captured : selection.eager;
    if (form && wanted(selection.operations, it.operation) && wanted(selection.tokens, it.shape.tokens)) {
      cases->push_back(it);
    }
  }
}

/// A group's low latency cases in CUDA graphs.
void add_captured(const TableSelection& selection, const BenchShape& shape, std::vector<TableCase>* cases) {
  add_wanted(selection,
             {{"dispatch", "fp8", true, shape, "both", true},
              {"combine", "bf16", true, shape, "both", true},
              {"pair", "fp8", true, shape, "both", true}},
             cases);
}

/// --quick has layers when they are asked for.
void add_layers(const TableSelection& selection, const BenchShape& prefill, const BenchShape& decode,
                std::vector<TableCase>* cases) {
  if (!selection.quick || !selection.operations.empty()) {
    add_wanted(selection,
               {{"layer", "bf16", true, decode, "both", true},
                {"layer", "bf16", true, decode},
                {"layer", "bf16", false, prefill}},
               cases);
  }
}

/// What is compared with copy engines where the run's executor may be another.
void add_copies(const TableSelection& selection, const BenchShape& shape, std::vector<TableCase>* cases) {
  if (selection.copies) {
    const std::string copies = "copy_engine";
    add_wanted(selection,
               {{"dispatch", "fp8", true, shape, "both", false, copies},
                {"combine", "bf16", true, shape, "both", false, copies},
                {"pair", "fp8", true, shape, "both", false, copies},
                {"overlap", "bf16", true, shape, "both", false, copies}},
               cases);
  }
}

/// The cases of a group.
void add_group(const TableSelection& selection, bool low_latency, const BenchShape& shape,
               std::vector<TableCase>* cases) {
  const bool main_shape = shape.hidden == kHidden && shape.top_k == kTopK;
  std::vector<TableCase> of_group;
  if (low_latency) {
    of_group = {{"dispatch", "fp8", true, shape}, {"combine", "bf16", true, shape}, {"pair", "fp8", true, shape}};
    if (main_shape && shape.tokens == kLowLatencyTokens) {
      of_group.push_back({"dispatch", "bf16", true, shape});
      for (const char* half : {"send", "receive"}) {
        of_group.push_back({"dispatch", "fp8", true, shape, half});
        of_group.push_back({"combine", "bf16", true, shape, half});
      }
    }
  } else {
    of_group = {{"dispatch", "fp8", false, shape}, {"combine", "bf16", false, shape}};
    if (main_shape) {
      of_group.push_back({"dispatch", "bf16", false, shape});
    }
    if (main_shape && shape.tokens == kTokens) {
      of_group.push_back({"layout", "", false, shape});
    }
  }
  add_wanted(selection, of_group, cases);
}

BenchRowSpec find(const std::vector<BenchRowSpec>& rows, const std::string& flags) {
  const auto found =
      std::find_if(rows.begin(), rows.end(), [&](const BenchRowSpec& row) { return row.flags == flags; });
  if (found == rows.end()) {
    throw std::logic_error("no row is called " + flags);
  }
  return *found;
}

}  // namespace

std::string TableCase::name() const {
  return operation + " " + mode() + (dtype.empty() ? "" : " " + dtype) + (half == "both" ? "" : " " + half) +
         (captured ? " captured" : "") + (executor.empty() ? "" : " by " + executor) + ", " +
         std::to_string(shape.tokens) + " tokens, hidden " + std::to_string(shape.hidden) + ", top " +
         std::to_string(shape.top_k);
}

bool TableCase::has_main_shape() const {
  return shape.hidden == kHidden && shape.top_k == kTopK && shape.tokens == (low_latency ? kLowLatencyTokens : kTokens);
}

bool TableCase::shares_group(const TableCase& other) const {
  const auto key = [](const TableCase& it) {
    // A double batch is measured with an idle client alone, and layers come last. A group that captures has streams of
    // the daemon that wait.
    return std::tuple(it.operation == "overlap", it.operation == "layer", it.executor, it.captured, it.low_latency,
                      it.shape.ranks, it.shape.experts, it.shape.hidden, it.shape.top_k, it.shape.tokens);
  };
  return key(*this) == key(other);
}

const std::vector<std::string>& table_operations() {
  static const std::vector<std::string> operations = {"dispatch", "combine", "layout", "empty",
                                                      "pair",     "layer",   "overlap"};
  return operations;
}

std::vector<TableCase> table_cases(const TableSelection& selection) {
  std::vector<TableCase> cases;
  const auto shape = [&](uint32_t hidden, uint32_t top_k, uint32_t tokens) {
    return BenchShape{selection.ranks, selection.experts, hidden, top_k, tokens};
  };
  add_group(selection, false, shape(kHidden, kTopK, kTokens), &cases);
  add_group(selection, true, shape(kHidden, kTopK, kLowLatencyTokens), &cases);
  for (const uint32_t tokens : {kLowLatencyTokens, 16u, 512u}) {
    add_captured(selection, shape(kHidden, kTopK, tokens), &cases);
  }
  if (selection.eager && wanted(selection.operations, std::string("empty"))) {
    // Of a group of one rank, whose shape does not matter.
    cases.push_back({"empty", "", false, {1, selection.experts, kHidden, kTopK, kLowLatencyTokens}});
  }
  add_wanted(selection, {{"overlap", "bf16", true, shape(kHidden, kTopK, kLowLatencyTokens)}}, &cases);
  add_copies(selection, shape(kHidden, kTopK, kLowLatencyTokens), &cases);
  for (const uint32_t tokens : {16u, 64u, 512u, 1024u}) {
    add_group(selection, true, shape(kHidden, kTopK, tokens), &cases);
  }
  for (const uint32_t tokens : {512u, 8192u}) {
    add_group(selection, false, shape(kHidden, kTopK, tokens), &cases);
  }
  using Form = std::pair<uint32_t, uint32_t>;  // hidden, top-k
  for (const auto& [hidden, top_k] : {Form{2048, kTopK}, Form{4096, kTopK}, Form{kHidden, 4}, Form{kHidden, 6}}) {
    if (!selection.quick) {
      add_group(selection, false, shape(hidden, top_k, kTokens), &cases);
      add_group(selection, true, shape(hidden, top_k, kLowLatencyTokens), &cases);
    }
  }
  add_layers(selection, shape(kHidden, kTopK, kTokens), shape(kHidden, kTopK, kLowLatencyTokens), &cases);
  return cases;
}

BenchRowSpec row_spec(const TableCase& it) {
  if (it.operation == "pair") {
    return ctl::low_latency_pair_row();
  }
  if (it.operation == "layout" || it.operation == "empty") {
    return find(ctl::common_rows(false), it.operation == "layout" ? "int64" : "-");
  }
  if (it.operation == "combine") {
    return find(it.low_latency ? ctl::low_latency_combine_rows() : ctl::combine_rows(it.shape), "bf16");
  }
  if (it.low_latency) {
    return find(ctl::low_latency_dispatch_rows(it.shape), it.dtype == "fp8" ? "fp8 float32 scales" : "bf16");
  }
  return it.dtype == "fp8" ? ctl::quantised_dispatch_row() : find(ctl::dispatch_rows(it.shape), "bf16 exact");
}

}  // namespace expertd::bench
