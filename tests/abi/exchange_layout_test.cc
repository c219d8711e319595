// SPDX-License-Identifier: Apache-2.0
// The exchange window: regions lie apart and inside, what travels fits its region, shapes outside the limits have none.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "proto/abi/exchange_ht_v1.h"
#include "proto/abi/exchange_v1.h"

namespace {

struct Region {
  uint64_t begin;
  uint64_t bytes;
};

void expect_apart(std::vector<Region> regions, uint64_t total) {
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < regions.size(); ++i) {
    EXPECT_EQ(regions[i].begin % 16, 0U);
    const uint64_t next = i + 1 < regions.size() ? regions[i + 1].begin : total;
    EXPECT_LE(regions[i].begin + regions[i].bytes, next) << "region " << i;
  }
}

std::vector<expertd_exchange_shape> shapes() {
  return {
      {1, 1, 128, 1, 1}, {2, 8, 1024, 128, 2}, {2, 256, 7168, 128, 8}, {16, 2048, 16384, 4096, 32}, {3, 9, 384, 7, 5}};
}

TEST(ExchangeLayout, KeepsRegionsApart) {
  for (const expertd_exchange_shape& shape : shapes()) {
    const expertd_exchange_layout at = expertd_exchange_layout_of(&shape);
    const uint64_t lanes = uint64_t{shape.max_tokens} * shape.top_k;
    const uint64_t header = sizeof(expertd_exchange_header);
    const uint64_t sums = 2ull * shape.ranks * shape.max_tokens * shape.hidden;
    const uint64_t report = sizeof(expertd_exchange_report);
    expect_apart({{0, header + 4ull * shape.num_experts},
                  {at.lanes, lanes * sizeof(expertd_exchange_lane)},
                  {at.rows, shape.max_tokens * at.row_stride}},
                 at.block_bytes);
    expect_apart({{0, header}, {at.masks, 4ull * shape.max_tokens}, {at.weights, 4 * lanes}}, at.weights_bytes);
    expect_apart({{0, report}, {at.out_block, at.block_bytes}, {at.in_blocks, shape.ranks * at.block_bytes}},
                 at.buffer_bytes);
    expect_apart({{0, report},
                  {at.out_weights, at.weights_bytes},
                  {at.in_weights, shape.ranks * at.weights_bytes},
                  {at.out_sums, sums},
                  {at.in_sums, sums}},
                 at.buffer_bytes);
    expect_apart({{0, sizeof(expertd_exchange_handle)},
                  {at.handle_slots, 4 * shape.ranks * lanes},
                  {at.handle_lanes, 4 * lanes}},
                 at.handle_bytes);
    EXPECT_EQ(at.handles, EXPERTD_EXCHANGE_BUFFERS * at.buffer_bytes);
    EXPECT_EQ(at.total_bytes, at.handles + EXPERTD_EXCHANGE_HANDLES * at.handle_bytes);
  }
}

TEST(ExchangeLayout, WhatTravelsFitsItsRegion) {
  for (const expertd_exchange_shape& shape : shapes()) {
    const expertd_exchange_layout at = expertd_exchange_layout_of(&shape);
    EXPECT_LE(expertd_exchange_block_copy(&at, shape.max_tokens, at.row_stride), at.block_bytes);
    EXPECT_LE(expertd_exchange_weights_copy(&at, shape.max_tokens, shape.top_k), at.weights_bytes);
    EXPECT_LE(expertd_exchange_row_stride(shape.hidden, shape.hidden / 32), at.row_stride);
    EXPECT_LE(expertd_exchange_row_stride(2ull * shape.hidden, 0), at.row_stride);
    EXPECT_EQ(at.row_stride % 128, 0U);
  }
}

TEST(ExchangeLayout, RefusesShapesOutsideTheLimits) {
  const expertd_exchange_shape good{2, 8, 1024, 128, 2};
  ASSERT_NE(expertd_exchange_layout_of(&good).total_bytes, 0U);
  for (const expertd_exchange_shape& bad :
       {expertd_exchange_shape{0, 8, 1024, 128, 2}, expertd_exchange_shape{17, 34, 1024, 128, 2},
        expertd_exchange_shape{2, 9, 1024, 128, 2}, expertd_exchange_shape{2, 1024, 1024, 128, 2},
        expertd_exchange_shape{2, 8, 1000, 128, 2}, expertd_exchange_shape{2, 8, 16512, 128, 2},
        expertd_exchange_shape{2, 8, 1024, 0, 2}, expertd_exchange_shape{2, 8, 1024, 4097, 2},
        expertd_exchange_shape{2, 8, 1024, 128, 0}, expertd_exchange_shape{2, 8, 1024, 128, 33}}) {
    EXPECT_EQ(expertd_exchange_layout_of(&bad).total_bytes, 0U);
  }
}

std::vector<expertd_exchange_ht_shape> ht_shapes() {
  return {{1, 1, 128, 1, 1},
          {2, 8, 1024, 128, 2},
          {2, 256, 7168, 4096, 8},
          {16, 2048, 16384, 65536, 32},
          {3, 9, 384, 7, 5}};
}

TEST(ExchangeHtLayout, KeepsRegionsApart) {
  for (const expertd_exchange_ht_shape& shape : ht_shapes()) {
    const expertd_exchange_ht_layout at = expertd_exchange_ht_layout_of(&shape);
    const uint64_t lanes = uint64_t{shape.max_tokens} * shape.top_k;
    const uint64_t others = shape.ranks - 1;
    EXPECT_GE(at.rows_bytes, shape.max_tokens * 2ull * shape.hidden);
    EXPECT_GE(at.beside_bytes, shape.max_tokens * (at.side_bytes_max + 8ull * shape.top_k + 4));
    EXPECT_GE(at.weights_bytes, lanes * 4);
    expect_apart({{0, sizeof(expertd_exchange_ht_counts) + 4ull * EXPERTD_HT_SLICES * shape.num_experts},
                  {at.plan, sizeof(expertd_exchange_ht_plan)},
                  {at.rows, others * at.rows_bytes},
                  {at.beside, others * at.beside_bytes},
                  {at.beside_in, others * at.beside_bytes},
                  {at.weights, others * at.weights_bytes}},
                 at.buffer_bytes);
    expect_apart({{0, sizeof(expertd_exchange_ht_handle)},
                  {at.handle_numbers, 4ull * shape.max_tokens * shape.ranks},
                  {at.handle_owners, lanes}},
                 at.handle_bytes);
    EXPECT_EQ(at.handles, EXPERTD_HT_BUFFERS * at.buffer_bytes);
    EXPECT_GE(at.handle_count, 1U);
    EXPECT_EQ(at.total_bytes, at.handles + at.handle_count * at.handle_bytes);
    EXPECT_TRUE(expertd_exchange_ht_fits(&at, 2ull * shape.hidden, 0));
    EXPECT_FALSE(expertd_exchange_ht_fits(&at, 2ull * shape.hidden + 16, 0));
    EXPECT_FALSE(expertd_exchange_ht_fits(&at, 16, at.side_bytes_max + 1));
  }
}

TEST(ExchangeHtLayout, ARecordHasRoomForWhatTravelsBesideARow) {
  EXPECT_EQ(expertd_exchange_ht_record_bytes(0, 8, 1), 0U);
  for (const uint64_t side : {0U, 1U, 7U, 16U, 224U}) {
    for (const uint32_t top_k : {1U, 8U, 32U}) {
      const uint64_t whole = expertd_exchange_ht_record_bytes(side, top_k, 0);
      const uint64_t cached = expertd_exchange_ht_record_bytes(side, top_k, 1);
      EXPECT_EQ(whole % 16 + cached % 16, 0U);
      EXPECT_GE(whole, (side + 3) / 4 * 4 + 8 * top_k + 4);
      EXPECT_LT(whole, side + 3 + 8 * top_k + 4 + 16);
      EXPECT_GE(cached, side);
      EXPECT_LT(cached, side + 16);
    }
  }
}

TEST(ExchangeHtLayout, RefusesShapesOutsideTheLimits) {
  for (const expertd_exchange_ht_shape& bad :
       {expertd_exchange_ht_shape{17, 34, 1024, 128, 2}, expertd_exchange_ht_shape{2, 9, 1024, 128, 2},
        expertd_exchange_ht_shape{2, 8, 1000, 128, 2}, expertd_exchange_ht_shape{2, 8, 1024, 65537, 2},
        expertd_exchange_ht_shape{2, 8, 1024, 128, 33}}) {
    const expertd_exchange_ht_layout at = expertd_exchange_ht_layout_of(&bad);
    EXPECT_EQ(at.total_bytes, 0U);
    EXPECT_FALSE(expertd_exchange_ht_fits(&at, 16, 0));
  }
}

TEST(ExchangeHtLayout, SlicesAreAllTokensInOrder) {
  for (const uint32_t tokens : {0U, 1U, 7U, 8U, 9U, 1000U, 65536U}) {
    EXPECT_EQ(expertd_exchange_ht_slice(tokens, 0), 0U);
    EXPECT_EQ(expertd_exchange_ht_slice(tokens, EXPERTD_HT_SLICES), tokens);
    for (uint32_t slice = 0; slice < EXPERTD_HT_SLICES; ++slice) {
      const uint32_t begin = expertd_exchange_ht_slice(tokens, slice);
      const uint32_t end = expertd_exchange_ht_slice(tokens, slice + 1);
      EXPECT_LE(begin, end);
      // How the kernels find the slice of a token.
      for (const uint32_t token : {begin, end - 1}) {
        EXPECT_TRUE(begin == end || (uint64_t{token} * 8 + 7) / tokens == slice) << token << " of " << tokens;
      }
    }
  }
}

TEST(ExchangeHtWords, LieBehindThoseOfTheRing) {
  constexpr uint32_t kChunkEnds[] = EXPERTD_HT_CHUNK_ENDS;
  static_assert(kChunkEnds[0] >= kChunkEnds[1] - kChunkEnds[0] &&
                kChunkEnds[1] - kChunkEnds[0] >= kChunkEnds[2] - kChunkEnds[1]);
  static_assert(std::size(kChunkEnds) == EXPERTD_HT_CHUNKS && EXPERTD_HT_CHUNKS < EXPERTD_HT_ALL &&
                EXPERTD_HT_BESIDE < EXPERTD_HT_ALL);
  static_assert(EXPERTD_HT_STEP_OFFSET(0) == EXPERTD_FLAG_PAGE_BYTES);
  static_assert(EXPERTD_HT_STEP_PROGRESS + 8 * EXPERTD_EXCHANGE_RANKS_MAX == EXPERTD_HT_STEP_PLAN);
  static_assert(EXPERTD_HT_STEP_VOIDED + 8 == EXPERTD_HT_STEP_ENDED);
  static_assert(EXPERTD_HT_STEP_PACKED + 8 * EXPERTD_HT_PIECES <= EXPERTD_HT_STEP_ROWS);
  static_assert(EXPERTD_HT_STEP_ROWS + 8 * EXPERTD_EXCHANGE_RANKS_MAX <= EXPERTD_HT_STEP_STRIDE);
  // Every progress of an operation is beyond all of those before, and short of the abort.
  static_assert(EXPERTD_HT_PROGRESS(5, EXPERTD_HT_ALL) < EXPERTD_HT_PROGRESS(6, 1));
  SUCCEED();
}

}  // namespace
