// SPDX-License-Identifier: Apache-2.0
// One rank's part of one row of the benchmark: inputs, call and expectations of an operation. Made and used on the
// rank's thread; everything that issues operations is called by all ranks together.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "client/ctl/bench_check.h"
#include "client/ctl/bench_input.h"
#include "client/ctl/bench_options.h"
#include "client/ctl/bench_rank.h"
#include "client/ctl/bench_routing.h"

namespace expertd::ctl {

/// What an operation moved for one rank: payload and side or scales. `remote` rows cross a link.
struct BenchBytes {
  uint64_t logical = 0;
  uint64_t remote = 0;
};

/// What did a rank's operations, as their results say.
struct BenchExecution {
  uint32_t executor = EXPERTD_EXECUTOR_NONE;  // of the last one
  uint32_t sms = 0;                           // the most of any

  void add(uint32_t by, uint32_t on_sms) {
    executor = by;
    sms = on_sms > sms ? on_sms : sms;
  }
};
/// "host", "sm", "copy_engine"; "none" for those that are not known.
const char* executor_name(uint32_t executor);

class BenchOperation {
 public:
  virtual ~BenchOperation() = default;

  /// Inputs and routing of an iteration; may issue operations of its own.
  virtual void prepare(uint32_t iteration) = 0;
  /// Before an iteration whose outputs are verified.
  virtual void poison() = 0;
  virtual void issue(expertd_event_t* event) = 0;
  /// After every iteration, untimed.
  virtual void finish() {}
  /// Throws Failure when an output is wrong. `result` is that of the iteration.
  virtual void verify(const expertd_op_result_t& result) = 0;
  virtual BenchBytes bytes() const = 0;
  /// What the last issue left for a combine; generation 0: nothing.
  virtual expertd_handle_t handle() const { return {}; }
};

/// What the maker of an operation is given. `name` is for messages.
struct BenchCase {
  const BenchOptions& options;
  BenchShape shape;
  BenchRank* rank;
  std::string name;
  /// Of what makes an operation a half: EXPERTD_ASYNC. Low latency alone takes them.
  uint32_t extra_flags = 0;
  /// Issued into a CUDA graph: events stand for every replay and cannot be waited for, and there are no results.
  bool captured = false;

  BenchInput input(uint32_t iteration) const { return BenchInput(options.seed, iteration, options.expert_groups); }
  /// The iterations with inputs of their own: the first, whose inputs all but the last use, and the last.
  std::vector<uint32_t> verified_iterations() const { return {0, options.iterations - 1}; }
};

/// A row of the benchmark.
struct BenchRowSpec {
  std::string operation;
  std::string flags;  // dtype and flags
  bool low_latency = false;
  bool has_outputs = true;
  std::function<std::unique_ptr<BenchOperation>(const BenchCase&)> make;
};

/// Rows that run in a group of either mode, without and with outputs.
std::vector<BenchRowSpec> common_rows(bool low_latency);
std::vector<BenchRowSpec> dispatch_rows(const BenchShape& shape);
std::vector<BenchRowSpec> combine_rows(const BenchShape& shape);
std::vector<BenchRowSpec> low_latency_dispatch_rows(const BenchShape& shape);
std::vector<BenchRowSpec> low_latency_combine_rows();
/// Rows of their own, which no mode runs by itself: rows quantised before, with float32 scales per 128 channels in a
/// tensor of their own; an FP8 low latency dispatch and its combine as one.
BenchRowSpec quantised_dispatch_row();
BenchRowSpec low_latency_pair_row();

/// The bit of a flag that is on.
inline uint32_t flag(expertd_op_flag bit, bool on) {
  return on ? static_cast<uint32_t>(bit) : 0u;
}
/// Expert starts of expanded rows; small shapes take a small one.
uint32_t expanded_alignment(const BenchShape& shape);
/// Writes this rank's token rows and routing of an iteration.
void write_tokens(const BenchCase& it, const BenchInput& input, BenchTensor* x);
/// `bytes` 4 or 8 per id.
void write_routing(const BenchCase& it, const BenchRouting& routing, BenchTensor* topk_idx);
/// Element `bytes` wide integers, -1 included.
void put_integer(uint8_t* place, int64_t value, uint32_t bytes);

}  // namespace expertd::ctl
