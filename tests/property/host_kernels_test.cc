// SPDX-License-Identifier: Apache-2.0
// Random cases of layout and of the high throughput operations on the host kernels, against the reference, bit for bit.
// A failing case prints its EXPERTD_SEED; with that variable set only that case runs. EXPERTD_CASES sets their number.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>

#include "proto/abi/expertd_reason.h"
#include "tests/support/random_case_host.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::OpShape;

constexpr uint32_t kLayoutCases = 300;
constexpr uint32_t kDispatchCases = 700;
constexpr uint32_t kErrorCases = 200;
constexpr uint32_t kThreadCases = 60;

bool active(const base::RankSet& ranks, uint32_t rank) {
  return ranks.contains(rank);
}

std::string fault(const char* what, uint64_t rank, uint64_t row) {
  return std::string(what) + " of rank " + std::to_string(rank) + ", row " + std::to_string(row);
}

bool is_poison(const void* data, size_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(data);
  return std::all_of(begin, begin + bytes, [](uint8_t byte) { return byte == 0xab; });
}

/// One dispatch that ran, and what it should have done. Rows from sources outside `senders` stay as they were.
struct DispatchCheck {
  const RandomCase& random_case;
  const GroupMemory& memory;
  const std::vector<DispatchResult>& expected;
  base::RankSet senders;

  std::string payload(uint32_t rank) const {
    const OpShape& shape = random_case.shape;
    const auto& rows = expected[rank].rows;
    const RankMemory& own = memory.ranks[rank];
    const size_t side_bytes = size_t{shape.side_elements} * shape.side_element_bytes;
    for (size_t row = 0; row < random_case.capacities[rank]; ++row) {
      const bool arrives =
          row < rows.size() && rows[row].source >= 0 && active(senders, static_cast<uint32_t>(rows[row].source));
      const auto same = [&](const PoisonedBuffer& out, const std::vector<uint8_t>& wanted, size_t bytes) {
        const uint8_t* data = out.as<uint8_t>() + row * bytes;
        return arrives ? std::memcmp(data, wanted.data() + row * bytes, bytes) == 0 : is_poison(data, bytes);
      };
      if (!same(own.x, expected[rank].x, shape.row_bytes)) {
        return fault("payload", rank, row);
      }
      if (side_bytes != 0 && !same(own.out_side, expected[rank].side, side_bytes)) {
        return fault("side", rank, row);
      }
      if (own.src_info.bytes() != 0) {
        const int32_t* info = own.src_info.as<int32_t>() + row;
        const bool written = arrives && shape.cached == 0;
        if (written ? *info != rows[row].token : !is_poison(info, 4)) {
          return fault("src_info", rank, row);
        }
      }
    }
    return {};
  }

  std::string top_k(uint32_t rank) const {
    const OpShape& shape = random_case.shape;
    const RankMemory& own = memory.ranks[rank];
    const DispatchResult& wanted = expected[rank];
    const size_t width = shape.expanded != 0 ? 1 : shape.top_k;
    const bool weighted = own.out_topk_weights.bytes() != 0;
    for (size_t at = 0; at < random_case.capacities[rank] * width; ++at) {
      const uint8_t* raw = own.out_topk_idx.as<uint8_t>() + at * shape.topk_idx_bytes;
      const float* weight = own.out_topk_weights.as<float>() + at;
      const bool arrives = at < wanted.topk_idx.size();
      if (shape.cached != 0 || (!arrives && shape.worst_tokens == 0)) {
        if (!is_poison(raw, shape.topk_idx_bytes) || (weighted && !is_poison(weight, 4))) {
          return fault("top-k that was not to be written", rank, at / width);
        }
        continue;
      }
      const int64_t wanted_idx = arrives ? wanted.topk_idx[at] : -1;
      const float wanted_weight = arrives && weighted ? wanted.topk_weights[at] : 0.0f;
      int32_t narrow = 0;
      int64_t wide = 0;
      std::memcpy(&narrow, raw, sizeof(narrow));
      if (shape.topk_idx_bytes == 8) {
        std::memcpy(&wide, raw, sizeof(wide));
      }
      if ((shape.topk_idx_bytes == 4 ? narrow : wide) != wanted_idx) {
        return fault("topk_idx", rank, at / width);
      }
      if (weighted && std::memcmp(weight, &wanted_weight, 4) != 0) {
        return fault("topk_weights", rank, at / width);
      }
    }
    return {};
  }

  std::string counts(uint32_t rank) const {
    const DispatchResult& wanted = expected[rank];
    const RankMemory& own = memory.ranks[rank];
    const kernels::OpReport& report = memory.reports[rank];
    const auto equal = [](const PoisonedBuffer& out, const std::vector<int32_t>& values) {
      return out.bytes() == 0 || std::memcmp(out.as<int32_t>(), values.data(), out.bytes()) == 0;
    };
    if (!equal(own.expert_counts, wanted.expert_counts) || !equal(own.rank_prefix, wanted.rank_prefix)) {
      return fault("counts or prefix", rank, 0);
    }
    if (report.reason != 0 || report.recv_rows != wanted.rows.size() ||
        report.expert_count_entries != wanted.report_counts.size() ||
        !std::equal(wanted.report_counts.begin(), wanted.report_counts.end(), report.expert_counts)) {
      return fault("report", rank, report.recv_rows);
    }
    uint64_t local = 0;
    uint64_t remote = 0;
    const OpShape& shape = random_case.shape;
    for (uint32_t to = 0; to < shape.ranks; ++to) {
      for (const RowOrigin& row : active(senders, to) ? expected[to].rows : std::vector<RowOrigin>{}) {
        if (row.source == static_cast<int32_t>(rank)) {
          (to == rank ? local : remote) += shape.row_bytes + shape.side_elements * shape.side_element_bytes;
        }
      }
    }
    return report.local_bytes == local && report.remote_bytes == remote ? "" : fault("bytes", rank, 0);
  }

  std::string run() const {
    for (uint32_t rank = 0; rank < random_case.shape.ranks; ++rank) {
      if (!active(senders, rank)) {
        if (!outputs_untouched(memory.ranks[rank])) {
          return fault("outputs of a masked rank", rank, 0);
        }
        continue;
      }
      for (const std::string& found : {payload(rank), top_k(rank), counts(rank)}) {
        if (!found.empty()) {
          return found;
        }
      }
    }
    return guards_intact(memory) ? "" : "memory around an output was written";
  }
};

/// A dispatch with its expectations; later operations use the handles that it leaves.
struct DispatchRun {
  RandomCase random_case;
  std::vector<HandleTables> handles;
  std::vector<DispatchResult> expected;
};

std::string run_dispatch(Drive how, DispatchRun* run) {
  run->handles = make_handles(run->random_case);
  run->expected = reference_dispatch(run->random_case.shape, run->random_case.inputs);
  GroupMemory memory = make_dispatch(run->random_case, &run->handles);
  drive(how, &memory);
  const base::RankSet senders = run->random_case.shape.active_ranks;
  std::string found = DispatchCheck{run->random_case, memory, run->expected, senders}.run();
  for (uint32_t rank = 0; found.empty() && rank < run->random_case.shape.ranks; ++rank) {
    if (active(senders, rank) && run->handles[rank].counts != memory.matrix) {
      return fault("handle's copy of the matrix", rank, 0);
    }
  }
  return found;
}

std::string run_cached(Drive how, DispatchRun* run) {
  RandomCase again = run->random_case;
  refill_payload(again.seed, &again);
  const auto expected = reference_dispatch(again.shape, again.inputs);
  again.shape.cached = 1;
  again.shape.active_ranks = again.later_active;
  const auto handles = run->handles;
  GroupMemory memory = make_dispatch(again, &run->handles);
  const auto matrix = memory.matrix;
  drive(how, &memory);
  for (uint32_t rank = 0; rank < again.shape.ranks; ++rank) {
    if (handles[rank].token_rank != run->handles[rank].token_rank ||
        handles[rank].token_expert != run->handles[rank].token_expert ||
        handles[rank].counts != run->handles[rank].counts || matrix != memory.matrix) {
      return fault("tables changed by a cached dispatch", rank, 0);
    }
  }
  return DispatchCheck{again, memory, expected, again.later_active}.run();
}

std::string compare_combine(const RandomCase& random_case, const GroupMemory& memory,
                            const std::vector<CombineResult>& expected) {
  for (uint32_t rank = 0; rank < random_case.shape.ranks; ++rank) {
    const RankMemory& own = memory.ranks[rank];
    const kernels::OpReport& report = memory.reports[rank];
    if (!active(random_case.shape.active_ranks, rank)) {
      if (!outputs_untouched(own)) {
        return fault("outputs of a masked rank", rank, 0);
      }
      continue;
    }
    const CombineResult& wanted = expected[rank];
    const uint32_t hidden = random_case.shape.hidden;
    for (size_t at = 0; at < wanted.x.size(); ++at) {
      if (own.x.as<uint16_t>()[at] != wanted.x[at]) {
        return fault("combined channel", rank, at / hidden);
      }
    }
    if (random_case.combine_weights && own.out_topk_weights.bytes() != 0 &&
        std::memcmp(own.out_topk_weights.as<float>(), wanted.weights.data(), own.out_topk_weights.bytes()) != 0) {
      return fault("combined weights", rank, 0);
    }
    if (report.reason != 0 || report.local_bytes != wanted.local_bytes || report.remote_bytes != wanted.remote_bytes) {
      return fault("combine report", rank, report.local_bytes);
    }
  }
  return guards_intact(memory) ? "" : "memory around an output was written";
}

std::string run_combine(Drive how, DispatchRun* run) {
  RandomCase combine = run->random_case;
  Random random(combine.seed + 1);
  combine.shape.kind = OpKind::kCombine;
  combine.shape.active_ranks = combine.later_active;
  combine.shape.order_last_lane = combine.order_last_lane ? 1 : 0;
  const size_t width = combine.shape.expanded != 0 ? 1 : combine.shape.top_k;
  std::vector<CombineInput> rows(combine.shape.ranks);
  std::vector<uint32_t> in_rows = combine.capacities;
  for (uint32_t rank = 0; rank < combine.shape.ranks; ++rank) {
    if (random.chance(5)) {
      in_rows[rank] /= 2;  // a client that gives fewer rows than it received: they are never read past
    }
    rows[rank].x = random_rows(&random, size_t{in_rows[rank]} * combine.shape.hidden);
    for (size_t i = 0; combine.combine_weights && i < in_rows[rank] * width; ++i) {
      rows[rank].weights.push_back(static_cast<float>(random.unit()));
    }
  }
  GroupMemory memory = make_combine(combine, &run->handles, rows, in_rows);
  drive(how, &memory);
  return compare_combine(combine, memory,
                         reference_combine(combine.shape, combine.inputs, run->expected, rows, in_rows));
}

void run_high_throughput(uint64_t seed, Drive how) {
  DispatchRun run{make_random_case(seed, OpKind::kDispatch), {}, {}};
  ASSERT_EQ(run_dispatch(how, &run), "") << repro_line(run.random_case);
  ASSERT_EQ(run_combine(how, &run), "") << repro_line(run.random_case);
  ASSERT_EQ(run_cached(how, &run), "") << repro_line(run.random_case);
  ASSERT_EQ(run_combine(how, &run), "") << "after cached: " << repro_line(run.random_case);
}

TEST(HostKernels, DispatchAndCombineEqualTheReference) {
  uint32_t number = 0;
  for (const uint64_t seed : seeds_to_run(kDispatchCases)) {
    ASSERT_NO_FATAL_FAILURE(run_high_throughput(seed, number++ % 2 == 0 ? Drive::kWhole : Drive::kChunked));
  }
}

TEST(RandomCases, AreOthersWithAnotherTestSeed) {
  if (std::getenv("EXPERTD_SEED") != nullptr || std::getenv("EXPERTD_TEST_SEED") != nullptr) {
    GTEST_SKIP() << "the seeds are given";
  }
  const std::vector<uint64_t> fixed = seeds_to_run(50);
  EXPECT_EQ(fixed, seeds_to_run(50));
  ::setenv("EXPERTD_TEST_SEED", "17", 1);
  const std::vector<uint64_t> others = seeds_to_run(50);
  ::unsetenv("EXPERTD_TEST_SEED");
  EXPECT_NE(fixed, others);
  EXPECT_EQ(fixed.size(), others.size());
}

TEST(HostKernels, RanksMayRunOnThreadsOfTheirOwn) {
  for (const uint64_t seed : seeds_to_run(kThreadCases)) {
    ASSERT_NO_FATAL_FAILURE(run_high_throughput(seed, Drive::kThreads));
  }
}

TEST(HostKernels, LayoutEqualsTheReference) {
  for (const uint64_t seed : seeds_to_run(kLayoutCases)) {
    const RandomCase random_case = make_random_case(seed, OpKind::kLayout);
    GroupMemory memory = make_layout(random_case);
    if (seed % 2 == 0) {
      kernels::host::layout(memory.params[0], &memory.reports[0]);
    } else {
      layout_in_chunks(memory.params[0], &memory.reports[0]);
    }
    const LayoutResult expected = reference_layout(memory.params[0].shape, random_case.inputs[0].topk_idx);
    const auto equal = [](const PoisonedBuffer& out, const auto& wanted) {
      return out.bytes() == 0 || std::memcmp(out.as<uint8_t>(), wanted.data(), out.bytes()) == 0;
    };
    const RankMemory& own = memory.ranks[0];
    EXPECT_EQ(memory.reports[0].reason, 0u) << repro_line(random_case);
    EXPECT_TRUE(equal(own.rank_prefix, expected.tokens_per_rank)) << repro_line(random_case);
    EXPECT_TRUE(equal(own.expert_counts, expected.tokens_per_expert)) << repro_line(random_case);
    EXPECT_TRUE(equal(own.layout_range, expected.tokens_per_node)) << repro_line(random_case);
    EXPECT_TRUE(equal(own.token_rank_mask, expected.token_rank_mask)) << repro_line(random_case);
    ASSERT_TRUE(guards_intact(memory)) << repro_line(random_case);
  }
}

/// An id that is no expert, as far out as the width allows.
int64_t bad_id(Random* random, const OpShape& shape) {
  const int64_t wide[] = {shape.experts, -2, INT64_MIN, INT64_MAX, int64_t{1} << 32, -(int64_t{1} << 32) - 1};
  const int64_t narrow[] = {shape.experts, -2, INT32_MIN, INT32_MAX};
  return shape.topk_idx_bytes == 4 ? narrow[random->below(4)] : wide[random->below(6)];
}

TEST(HostKernels, LayoutReportsTheFirstBadId) {
  for (const uint64_t seed : seeds_to_run(kErrorCases)) {
    RandomCase random_case = make_random_case(seed, OpKind::kLayout);
    Random random(seed);
    auto& ids = random_case.inputs[0].topk_idx;
    if (ids.empty()) {
      continue;
    }
    const int64_t bad = bad_id(&random, random_case.shape);
    ids[random.below(static_cast<uint32_t>(ids.size()))] = bad;
    GroupMemory memory = make_layout(random_case);
    if (seed % 2 == 0) {
      kernels::host::layout(memory.params[0], &memory.reports[0]);
    } else {
      layout_in_chunks(memory.params[0], &memory.reports[0]);
    }
    EXPECT_EQ(memory.reports[0].reason, static_cast<uint32_t>(EXPERTD_REASON_EXPERT_OUT_OF_RANGE));
    EXPECT_EQ(memory.reports[0].value, bad) << repro_line(random_case);
    ASSERT_TRUE(outputs_untouched(memory.ranks[0])) << repro_line(random_case);
  }
}

/// Breaks a case: ids out of range on some ranks, or too little room on some.
void break_case(RandomCase* random_case) {
  Random random(random_case->seed + 2);
  OpShape& shape = random_case->shape;
  const bool ids = random.chance(60);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    auto& topk = random_case->inputs[rank].topk_idx;
    if (ids && random.chance(50)) {
      for (uint32_t i = random.between(1, 3); !topk.empty() && i > 0; --i) {
        topk[random.below(static_cast<uint32_t>(topk.size()))] = bad_id(&random, shape);
      }
    }
    if (!ids && random.chance(60) && random_case->capacities[rank] > 0) {
      random_case->capacities[rank] = random.below(random_case->capacities[rank]);
    }
  }
  if (!ids && shape.slots_per_expert > 0) {
    shape.slots_per_expert = random.below(shape.slots_per_expert);
  }
}

std::string compare_ends(const RandomCase& random_case, const GroupMemory& memory,
                         const std::vector<ExpectedEnd>& ends) {
  for (uint32_t rank = 0; rank < random_case.shape.ranks; ++rank) {
    if (!active(random_case.shape.active_ranks, rank)) {
      continue;
    }
    const kernels::OpReport& got = memory.reports[rank];
    const ExpectedEnd& end = ends[rank];
    if (got.reason != end.reason || got.argument != end.argument || got.value != end.value ||
        got.minimum != end.minimum || got.maximum != end.maximum || got.rank != end.rank) {
      return fault("end", rank, got.reason);
    }
    if (end.reason != 0 && (!outputs_untouched(memory.ranks[rank]) || got.local_bytes + got.remote_bytes != 0)) {
      return fault("outputs of a refused operation", rank, got.reason);
    }
  }
  return guards_intact(memory) ? "" : "memory around an output was written";
}

void run_errors(OpKind kind) {
  uint32_t refused = 0;
  uint32_t number = 0;
  for (const uint64_t seed : seeds_to_run(kErrorCases)) {
    RandomCase random_case = make_random_case(seed, kind);
    break_case(&random_case);
    auto handles = make_handles(random_case);
    GroupMemory memory = make_dispatch(random_case, &handles);
    drive(number++ % 2 == 0 ? Drive::kWhole : Drive::kChunked, &memory);
    const auto ends = reference_end(random_case.shape, random_case.inputs, random_case.capacities);
    ASSERT_EQ(compare_ends(random_case, memory, ends), "") << repro_line(random_case);
    refused += std::any_of(ends.begin(), ends.end(), [](const ExpectedEnd& end) { return end.reason != 0; }) ? 1 : 0;
  }
  if (number > 1) {
    EXPECT_GT(refused, number / 4);
  }
}

TEST(HostKernels, HighThroughputErrorsEndAlikeAndMoveNothing) {
  run_errors(OpKind::kDispatch);
}

TEST(HostKernels, LowLatencyErrorsEndAlikeAndMoveNothing) {
  run_errors(OpKind::kLlDispatch);
}

}  // namespace
}  // namespace expertd::support
