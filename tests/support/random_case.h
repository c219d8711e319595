// SPDX-License-Identifier: Apache-2.0
// Random operations of a whole group from one 64-bit seed: shapes, skewed routings, masks, flags and payloads. The same
// seed gives the same case on every platform (no std distributions). Pure, any thread, tests only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/kernels/op_params.h"
#include "tests/support/reference_moe.h"

namespace expertd::support {

/// SplitMix64: small, portable and good enough to shuffle tests.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  /// Uniform in [0, bound); bound > 0.
  uint32_t below(uint32_t bound);
  uint32_t between(uint32_t low, uint32_t high) { return low + below(high - low + 1); }
  bool chance(uint32_t percent) { return below(100) < percent; }
  /// Uniform in [0, 1).
  double unit();

 private:
  uint64_t state_;
};

struct RandomCase {
  uint64_t seed = 0;
  kernels::OpShape shape;            // of the layout or the dispatch; rank, tokens and capacity_rows differ per rank
  std::vector<RankInput> inputs;     // [R]
  std::vector<uint32_t> capacities;  // [R], enough for the rows unless an error case takes some away
  bool combine_weights = false;      // the HT combine brings weights back
  bool order_last_lane = false;      // of the HT combine
  bool optional_outputs = false;     // src_info, prefixes, counts and statistics are asked for
  uint32_t side_layout = 0;          // side strides: 0 row-major, 1 column-major, 2 both padded
  uint32_t token_bound = 0;          // given with every operation; 0: not given
  base::RankSet later_active;        // active ranks of the operations that follow with the handle
};

/// A case of kLayout, kDispatch (HT) or kLlDispatch. Sizes are bounded so that a thousand cases run in seconds. Of so
/// many ranks; 0: as drawn, at most 64.
RandomCase make_random_case(uint64_t seed, kernels::OpKind kind, uint32_t ranks = 0);

/// New payload and side rows with the same routing, for a cached dispatch.
void refill_payload(uint64_t seed, RandomCase* random_case);

/// Rows as experts would return them, one per (token, lane) of each source: finite bf16 values of mixed size.
std::vector<uint16_t> random_rows(Random* random, size_t elements);

/// "EXPERTD_SEED=... (kind, R, E, ...)": what to put before the test command to run one case again.
std::string repro_line(const RandomCase& random_case);

/// Seeds that a property test runs: the one of EXPERTD_SEED, or EXPERTD_CASES (default `cases`) from a fixed start
/// that EXPERTD_TEST_SEED moves.
std::vector<uint64_t> seeds_to_run(uint32_t cases);

}  // namespace expertd::support
