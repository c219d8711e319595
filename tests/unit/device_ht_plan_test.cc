// SPDX-License-Identifier: Apache-2.0
// What the loops decide about high throughput by copy engines: counts that a client makes up are refused, every row has
// one place, no copy leaves the outputs, and all ranks say the same of an operation that does not go.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "client/src/local_kernels/exchange_ht_params.h"
#include "daemon/device/cuda/ht_plan.h"
#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {
namespace {

using kernels::OpReport;
using kernels::OpShape;

OpShape shape_of(uint32_t rank, uint32_t tokens) {
  OpShape shape;
  shape.kind = kernels::OpKind::kDispatch;
  shape.ranks = 3;
  shape.rank = rank;
  shape.local_experts = 2;
  shape.experts = 6;
  shape.tokens = tokens;
  shape.top_k = 2;
  shape.hidden = 128;
  shape.row_bytes = 256;
  shape.out_row_bytes = 256;
  shape.max_tokens = 100;
  return shape;
}

/// A client's counts, as its kernel writes them.
struct Said {
  expertd_exchange_ht_counts counts{};
  std::vector<int32_t> experts = std::vector<int32_t>(EXPERTD_HT_SLICES * 6);

  explicit Said(uint32_t tokens) {
    for (uint32_t slice = 0; slice < EXPERTD_HT_SLICES; ++slice) {
      const uint32_t begin = expertd_exchange_ht_slice(tokens, slice);
      for (uint32_t t = begin; t < expertd_exchange_ht_slice(tokens, slice + 1); ++t) {
        for (const uint32_t expert : {t % 6, (t * 5 + 3) % 6}) {
          ++experts[slice * 6 + expert];
        }
        for (uint32_t j = 0; j < 3; ++j) {
          counts.rows[slice][j] += t % 6 / 2 == j || (t * 5 + 3) % 6 / 2 == j ? 1 : 0;
        }
      }
    }
  }
  HtRow row(const OpShape& shape) const {
    HtRow taken;
    ht_take_counts(counts, experts.data(), shape, &taken);
    return taken;
  }
};

TEST(HtPlan, TakesWhatIdsCanHave) {
  for (const uint32_t tokens : {0u, 1u, 7u, 8u, 9u, 100u}) {
    const HtRow row = Said(tokens).row(shape_of(0, tokens));
    EXPECT_EQ(row.reason, EXPERTD_REASON_NONE);
    uint32_t lanes = 0;
    for (uint32_t e = 0; e < 6; ++e) {
      lanes += row.experts[e];
    }
    EXPECT_EQ(lanes, 2 * tokens);
    for (uint32_t slice = 1; slice < EXPERTD_HT_SLICES; ++slice) {
      EXPECT_GE(row.rows[slice][1], row.rows[slice - 1][1]);
    }
  }
}

TEST(HtPlan, RefusesCountsThatCannotBeTrue) {
  using Change = void (*)(Said*);
  const Change changes[] = {
      [](Said* said) { said->counts.rows[0][0] = -1; },
      [](Said* said) { said->counts.rows[7][2] = 14; },  // of 13 tokens
      [](Said* said) { said->counts.rows[3][1] = INT32_MAX; },
      [](Said* said) { said->counts.rows[3][1] = INT32_MIN; },
      [](Said* said) { said->experts[0] = -1; },
      [](Said* said) { said->experts[5] += 1000; },
      [](Said* said) { said->experts[7 * 6 + 5] = INT32_MAX; },
      [](Said* said) { said->counts.errors[2].reason = EXPERTD_REASON_INTERNAL; },
      [](Said* said) {
        said->counts.errors[0].reason = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
        said->counts.rows[5][0] = -7;
      },
  };
  for (const Change change : changes) {
    Said said(100);
    change(&said);
    const HtRow row = said.row(shape_of(1, 100));
    EXPECT_EQ(row.reason, EXPERTD_REASON_BAD_STATE) << &change - changes;
    EXPECT_EQ(row.argument, EXPERTD_ARGUMENT_EXCHANGE_BUFFER);
    EXPECT_EQ(row.rows[EXPERTD_HT_SLICES - 1][0], 0u);
    EXPECT_TRUE(std::all_of(row.experts.begin(), row.experts.end(), [](uint32_t count) { return count == 0; }));
  }
}

TEST(HtPlan, TheFirstBadIdIsTold) {
  Said said(100);
  said.counts.errors[5] = {EXPERTD_REASON_EXPERT_OUT_OF_RANGE, 0, 77};
  said.counts.errors[3] = {EXPERTD_REASON_EXPERT_OUT_OF_RANGE, 0, -5};
  const HtRow row = said.row(shape_of(0, 100));
  EXPECT_EQ(row.reason, EXPERTD_REASON_EXPERT_OUT_OF_RANGE);
  EXPECT_EQ(row.value, -5);
}

/// Three ranks of different numbers of tokens.
class HtRanks : public testing::Test {
 protected:
  static constexpr uint32_t kTokens[3] = {100, 0, 37};
  HtRanks() {
    for (uint32_t r = 0; r < 3; ++r) {
      rows_[r] = Said(kTokens[r]).row(shape_of(r, kTokens[r]));
      all_[r] = &rows_[r];
    }
  }
  HtTable table(uint32_t rank, uint64_t active = 7) const {
    HtRows given = all_;
    for (uint32_t r = 0; r < 3; ++r) {
      given[r] = (active >> r & 1) != 0 ? given[r] : nullptr;
    }
    return ht_table(given, shape_of(rank, kTokens[rank]), active);
  }
  std::array<HtRow, 3> rows_;
  HtRows all_{};
};

TEST_F(HtRanks, EveryRowHasOnePlace) {
  for (uint32_t j = 0; j < 3; ++j) {
    const uint64_t total = table(j).total(j);
    std::vector<int> seen(total);
    for (uint32_t s = 0; s < 3; ++s) {
      const HtTable own = table(s);
      uint64_t before = 0;
      for (const auto& [first, end] : {std::pair(0u, EXPERTD_HT_FIRST_SLICES), {EXPERTD_HT_FIRST_SLICES, kHtSlices}}) {
        const HtSpan span = ht_span(own.sent, j, first, end, own.rows[s][j]);
        EXPECT_EQ(span.begin, before);
        before += span.count;
        for (uint64_t row = 0; row < span.count; ++row) {
          ++seen[own.base(s, j) + span.begin + row];
        }
      }
      EXPECT_EQ(before, own.rows[s][j]);
    }
    EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; })) << j;
  }
}

TEST_F(HtRanks, ChunksOfACombineAreTheRowsOfTheDispatch) {
  for (uint32_t owner = 0; owner < 3; ++owner) {
    const HtTable own = table(owner);
    for (uint32_t s = 0; s < 3; ++s) {
      for (const uint64_t limit : {uint64_t{0}, uint64_t{5}, uint64_t{own.rows[s][owner]}}) {
        uint64_t rows = 0;
        for (uint32_t c = 0; c < EXPERTD_HT_CHUNKS; ++c) {
          const HtSpan span = ht_span(own.received, s, c == 0 ? 0 : kHtChunkEnds[c - 1], kHtChunkEnds[c], limit);
          EXPECT_TRUE(span.count == 0 || span.begin == rows);
          rows += span.count;
        }
        EXPECT_EQ(rows, std::min<uint64_t>(limit, own.rows[s][owner]));
      }
    }
  }
  EXPECT_EQ(kHtChunkEnds.back(), kHtSlices);
}

TEST_F(HtRanks, InactiveRanksHaveNoRows) {
  const HtTable own = table(0, 0b101);
  EXPECT_EQ(own.rows[0][1], 0u);
  EXPECT_EQ(own.sent[kHtSlices - 1][1], 0u);
  EXPECT_EQ(own.total(0), own.rows[0][0] + own.rows[2][0]);
}

TEST_F(HtRanks, AllRanksDecideAlike) {
  std::array<uint64_t, kHtRanks> room{};
  for (uint32_t j = 0; j < 3; ++j) {
    room[j] = table(j).total(j);
  }
  for (uint32_t r = 0; r < 3; ++r) {
    OpReport report;
    const HtTable own = table(r);
    EXPECT_TRUE(ht_decide(all_, &own, room, shape_of(r, kTokens[r]), &report));
    --room[2];
    EXPECT_FALSE(ht_decide(all_, &own, room, shape_of(r, kTokens[r]), &report));
    EXPECT_EQ(report.reason, EXPERTD_REASON_CAPACITY_EXCEEDED);
    EXPECT_EQ(report.rank, 2);
    EXPECT_EQ(report.value, report.maximum + 1);
    ++room[2];
    rows_[1].reason = EXPERTD_REASON_EXPERT_OUT_OF_RANGE;
    rows_[1].value = 9;
    EXPECT_FALSE(ht_decide(all_, &own, room, shape_of(r, kTokens[r]), &report));
    EXPECT_EQ(report.reason, r == 1 ? EXPERTD_REASON_EXPERT_OUT_OF_RANGE : EXPERTD_REASON_PEER_REJECTED);
    EXPECT_EQ(report.rank, r == 1 ? -1 : 1);
    EXPECT_EQ(report.maximum, r == 1 ? 5 : 0);
    rows_[1].reason = EXPERTD_REASON_NONE;
  }
}

TEST_F(HtRanks, PlanAndReportSayTheSame) {
  OpShape shape = shape_of(2, kTokens[2]);
  shape.expert_alignment = 16;
  const HtTable own = table(2);
  auto plan = std::make_unique<expertd_exchange_ht_plan>();
  ht_fill_plan(own, shape, plan.get());
  EXPECT_EQ(plan->recv_rows, own.total(2));
  EXPECT_EQ(plan->own_base, own.rows[0][2] + own.rows[1][2]);
  EXPECT_EQ(plan->rank_prefix[2 * 3 + 2], static_cast<int32_t>(own.total(2)));
  OpReport report;
  std::array<uint64_t, kHtRanks> room{};
  room.fill(1000);
  ht_report(own, room, shape, &report);
  EXPECT_EQ(report.recv_rows, plan->recv_rows);
  EXPECT_EQ(report.local_bytes, own.rows[2][2] * 256u);
  EXPECT_EQ(report.remote_bytes, (own.rows[2][0] + own.rows[2][1]) * 256u);
  for (uint32_t e = 0; e < 2; ++e) {
    EXPECT_EQ(report.expert_counts[e], (plan->expert_counts[e] + 15) / 16 * 16);
  }
}

/// A chunk's rows are those of the tokens that the client's kernel takes in that step.
TEST(HtPlan, TheClientTakesTheSameTokens) {
  for (const uint32_t tokens : {0u, 1u, 5u, 8u, 100u, 4096u}) {
    client::HtParams params;
    params.tokens = tokens;
    params.row_bytes = 512;
    uint32_t first = 0;
    for (uint32_t piece = 0; piece < EXPERTD_HT_PIECES; ++piece) {
      client::set_ht_step(client::HtKernel::kMove, piece, &params);
      EXPECT_EQ(params.first_token, first);
      first += params.step_tokens;
      EXPECT_EQ(first, expertd_exchange_ht_slice(tokens, piece == 0 ? EXPERTD_HT_FIRST_SLICES : kHtSlices));
      EXPECT_GE(client::ht_blocks(client::HtKernel::kMove, params), 1u);
    }
    client::set_ht_step(client::HtKernel::kMove, client::kHtPlace, &params);
    EXPECT_EQ(params.first_token, 0u);
    EXPECT_EQ(params.step_tokens, tokens);
    EXPECT_GE(client::ht_blocks(client::HtKernel::kMove, params), 2u);
    first = 0;
    for (uint32_t chunk = 0; chunk < EXPERTD_HT_CHUNKS; ++chunk) {
      client::set_ht_step(client::HtKernel::kReduce, chunk, &params);
      EXPECT_EQ(params.first_token, first);
      first += params.step_tokens;
      EXPECT_EQ(first, expertd_exchange_ht_slice(tokens, kHtChunkEnds[chunk]));
    }
    EXPECT_EQ(first, tokens);
  }
}

TEST(HtPlan, ARankWithoutTokensHasWarpsForTheRecordsOfOthers) {
  client::HtParams params;
  params.row_bytes = 512;
  params.capacity_rows = 4096;
  client::set_ht_step(client::HtKernel::kMove, client::kHtPlace, &params);
  EXPECT_EQ(client::ht_blocks(client::HtKernel::kMove, params), 2u);
  params.record_bytes = 64;
  EXPECT_EQ(client::ht_blocks(client::HtKernel::kMove, params),
            4096 / (client::kHtRecordsAtOnce * client::kHtWarps) + 1);
  params.capacity_rows = UINT32_MAX;
  EXPECT_EQ(client::ht_blocks(client::HtKernel::kMove, params), client::kHtBlocksMax + 1);
  params.step = 0;
  EXPECT_EQ(client::ht_blocks(client::HtKernel::kMove, params), 1u);
}

TEST(HtPlan, RowsInFrontOfALimit) {
  EXPECT_EQ(ht_rows_inside(0, 10, 10), 10u);
  EXPECT_EQ(ht_rows_inside(4, 10, 10), 6u);
  EXPECT_EQ(ht_rows_inside(10, 10, 10), 0u);
  EXPECT_EQ(ht_rows_inside(UINT64_MAX, 10, 10), 0u);
}

}  // namespace
}  // namespace expertd::device::cuda
