// SPDX-License-Identifier: Apache-2.0
// Random cases of the low latency operations on the host kernels: dispatch against the reference in any permitted order
// and also in the order this implementation promises, combine within the relative error of the definition.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "daemon/kernels/numerics.h"
#include "tests/support/random_case_host.h"

namespace expertd::support {
namespace {

using kernels::OpKind;
using kernels::OpShape;
using kernels::Payload;
using kernels::ScaleForm;

constexpr uint32_t kCases = 700;
constexpr uint32_t kThreadCases = 40;

bool active(const base::RankSet& ranks, uint32_t rank) {
  return ranks.contains(rank);
}

std::string fault(const char* what, uint64_t rank, uint64_t expert) {
  return std::string(what) + " of rank " + std::to_string(rank) + ", local expert " + std::to_string(expert);
}

/// What lies behind the rows of an expert was not to be written.
bool unused_slots_poisoned(const OpShape& shape, const RankMemory& own, uint64_t expert, uint64_t count) {
  const uint64_t slots = shape.slots_per_expert;
  const uint64_t first = expert * slots + count;
  const uint64_t last = (expert + 1) * slots;
  bool clean = own.x.poisoned(first * shape.out_row_bytes, last * shape.out_row_bytes) &&
               own.src_info.poisoned(first * 4, last * 4);
  if (shape.payload != Payload::kFp8) {
    const uint64_t bytes = uint64_t{shape.side_elements} * shape.side_element_bytes;
    return clean && own.out_side.poisoned(first * bytes, last * bytes);
  }
  const uint64_t columns = shape.hidden / 128 / (shape.scale == ScaleForm::kUe8m0 ? 4 : 1);
  for (uint64_t column = 0; column < columns; ++column) {
    const uint64_t at = (expert * columns + column) * slots;
    clean = clean && own.out_side.poisoned((at + count) * 4, (at + slots) * 4);
  }
  return clean;
}

std::string check_rank(const RandomCase& random_case, uint32_t rank, const GroupMemory& memory,
                       const std::vector<LlDispatchResult>& expected) {
  const OpShape& shape = random_case.shape;
  const RankMemory& own = memory.ranks[rank];
  const LlDispatchView view{own.x.as<uint8_t>(), own.out_side.bytes() == 0 ? nullptr : own.out_side.as<uint8_t>(),
                            own.expert_counts.as<int32_t>(), own.src_info.as<int32_t>(),
                            own.layout_range.as<int64_t>()};
  std::string found = compare_ll_dispatch(shape, rank, random_case.inputs, expected, view);
  if (!found.empty()) {
    return found;
  }
  const kernels::OpReport& report = memory.reports[rank];
  uint64_t total = 0;
  for (uint32_t expert = 0; expert < shape.local_experts; ++expert) {
    const auto& rows = expected[rank].expert_rows[expert];
    total += rows.size();
    for (size_t row = 0; row < rows.size(); ++row) {
      if (view.src_info[expert * uint64_t{shape.slots_per_expert} + row] != rows[row].token) {
        return fault("order of rows", rank, expert);
      }
    }
    if (!unused_slots_poisoned(shape, own, expert, rows.size())) {
      return fault("slots behind the rows", rank, expert);
    }
    if (own.stats.bytes() != 0 && own.stats.as<int32_t>()[expert] != 1000 + static_cast<int32_t>(rows.size())) {
      return fault("statistics", rank, expert);
    }
    if (report.expert_counts[expert] != rows.size()) {
      return fault("report", rank, expert);
    }
  }
  return report.reason == 0 && report.recv_rows == total && report.local_bytes == expected[rank].local_bytes &&
                 report.remote_bytes == expected[rank].remote_bytes
             ? ""
             : fault("report", rank, 0);
}

/// The row that an expert makes of a token: any function will do that differs for different (expert, source, token).
std::vector<uint16_t> expert_row(const RandomCase& random_case, uint64_t expert, uint64_t source, uint64_t token) {
  Random random(random_case.seed ^ (expert << 40) ^ (source << 20) ^ token);
  return random_rows(&random, random_case.shape.hidden);
}

/// Runs the experts over what was dispatched; rows that no token owns hold NaN, which would show in any sum.
std::vector<CombineInput> run_experts(const RandomCase& random_case, const GroupMemory& memory) {
  const OpShape& shape = random_case.shape;
  std::vector<CombineInput> results(shape.ranks);
  for (uint32_t rank = 0; rank < shape.ranks; ++rank) {
    const uint64_t slots = shape.slots_per_expert;
    auto& x = results[rank].x;
    x.assign(shape.local_experts * slots * shape.hidden, 0x7fff);
    const RankMemory& own = memory.ranks[rank];
    for (uint64_t at = 0; active(shape.active_ranks, rank) && at < uint64_t{shape.local_experts} * shape.ranks; ++at) {
      const uint64_t expert = at / shape.ranks;
      const auto range = static_cast<uint64_t>(own.layout_range.as<int64_t>()[at]);
      for (uint64_t row = range >> 32; row < (range >> 32) + (range & 0xffffffffu); ++row) {
        const auto token = static_cast<uint64_t>(own.src_info.as<int32_t>()[expert * slots + row]);
        const auto made =
            expert_row(random_case, uint64_t{rank} * shape.local_experts + expert, at % shape.ranks, token);
        std::copy(made.begin(), made.end(),
                  x.begin() + static_cast<std::ptrdiff_t>((expert * slots + row) * shape.hidden));
      }
    }
  }
  return results;
}

std::vector<std::vector<uint16_t>> lane_rows(const RandomCase& random_case) {
  const OpShape& shape = random_case.shape;
  std::vector<std::vector<uint16_t>> lanes(shape.ranks);
  for (uint32_t source = 0; source < shape.ranks; ++source) {
    const RankInput& input = random_case.inputs[source];
    for (size_t at = 0; at < input.topk_idx.size(); ++at) {
      const int64_t id = input.topk_idx[at];
      const auto row = id < 0 ? std::vector<uint16_t>(shape.hidden)
                              : expert_row(random_case, static_cast<uint64_t>(id), source, at / shape.top_k);
      lanes[source].insert(lanes[source].end(), row.begin(), row.end());
    }
  }
  return lanes;
}

std::string run_combine(Drive how, const RandomCase& dispatch, const GroupMemory& memory,
                        std::vector<HandleTables>* handles) {
  RandomCase combine = dispatch;
  Random random(dispatch.seed + 3);
  combine.shape.kind = OpKind::kLlCombine;
  combine.shape.active_ranks = dispatch.later_active;
  if (random.chance(25)) {
    for (RankInput& input : combine.inputs) {
      for (int64_t& id : input.topk_idx) {
        id = random.chance(20) ? -1 : id;  // a caller may drop lanes of its dispatch
      }
    }
  }
  const auto rows = run_experts(dispatch, memory);
  GroupMemory pulled = make_combine(combine, handles, rows, combine.capacities);
  drive(how, &pulled);
  const auto lanes = lane_rows(combine);
  const auto expected = reference_ll_combine(combine.shape, combine.inputs, lanes, LlSum::kOfRanks);
  const auto plain = reference_ll_combine(combine.shape, combine.inputs, lanes, LlSum::kOfLanes);
  for (uint32_t rank = 0; rank < combine.shape.ranks; ++rank) {
    const RankMemory& own = pulled.ranks[rank];
    if (!active(combine.shape.active_ranks, rank)) {
      if (!own.x.untouched()) {
        return fault("output of a masked rank", rank, 0);
      }
      continue;
    }
    const uint16_t* out = own.x.as<uint16_t>();
    const std::string found = compare_ll_combine(expected[rank], plain[rank], {out, out + expected[rank].size()});
    if (!found.empty()) {
      return "rank " + std::to_string(rank) + ": " + found;
    }
  }
  return guards_intact(pulled) ? "" : "memory around an output was written";
}

void run_low_latency(uint64_t seed, Drive how) {
  const RandomCase random_case = make_random_case(seed, OpKind::kLlDispatch);
  auto handles = make_handles(random_case);
  GroupMemory memory = make_dispatch(random_case, &handles);
  drive(how, &memory);
  const auto expected = reference_ll_dispatch(random_case.shape, random_case.inputs);
  for (uint32_t rank = 0; rank < random_case.shape.ranks; ++rank) {
    if (active(random_case.shape.active_ranks, rank)) {
      ASSERT_EQ(check_rank(random_case, rank, memory, expected), "") << repro_line(random_case);
    } else {
      ASSERT_TRUE(outputs_untouched(memory.ranks[rank])) << repro_line(random_case);
    }
  }
  ASSERT_TRUE(guards_intact(memory)) << repro_line(random_case);
  ASSERT_EQ(run_combine(how, random_case, memory, &handles), "") << repro_line(random_case);
}

TEST(HostKernelsLowLatency, DispatchAndCombineEqualTheReference) {
  uint32_t number = 0;
  for (const uint64_t seed : seeds_to_run(kCases)) {
    ASSERT_NO_FATAL_FAILURE(run_low_latency(seed, number++ % 2 == 0 ? Drive::kWhole : Drive::kChunked));
  }
}

TEST(HostKernelsLowLatency, RanksMayRunOnThreadsOfTheirOwn) {
  for (const uint64_t seed : seeds_to_run(kThreadCases)) {
    ASSERT_NO_FATAL_FAILURE(run_low_latency(seed, Drive::kThreads));
  }
}

/// One rank, identity experts on the dequantised rows: what FP8 costs the result of a whole round.
TEST(HostKernelsLowLatency, Fp8RoundTripStaysInsideItsBound) {
  for (const ScaleForm form : {ScaleForm::kFloat32, ScaleForm::kRounded, ScaleForm::kUe8m0}) {
    constexpr uint32_t kHidden = 2048;
    Random random(7);
    std::vector<float> original;
    std::vector<uint16_t> returned;
    for (uint32_t token = 0; token < 64; ++token) {
      std::vector<uint16_t> row(kHidden);
      for (uint16_t& value : row) {
        double normal = -6;
        for (int i = 0; i < 12; ++i) {
          normal += random.unit();  // the sum of twelve uniforms is close to a normal distribution
        }
        value = kernels::float_to_bf16(static_cast<float>(normal));
        original.push_back(kernels::bf16_to_float(value));
      }
      const QuantisedRow quantised = reference_quantise(row.data(), kHidden, form);
      for (uint32_t i = 0; i < kHidden; ++i) {
        const float back = kernels::e4m3_to_float(quantised.payload[i]) * quantised.scales[i / 128];
        returned.push_back(kernels::float_to_bf16(back));
      }
    }
    EXPECT_LT(relative_error(original, returned), 9e-4);
  }
}

}  // namespace
}  // namespace expertd::support
