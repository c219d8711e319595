// SPDX-License-Identifier: Apache-2.0
// Every field of the shared structs: ring_v1.md against the C++ compiler against the C compiler.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "tests/abi/layout_facts.h"

namespace expertd::test {
namespace {

using FieldKey = std::pair<std::string, std::string>;
using Place = std::pair<uint64_t, uint64_t>;  // offset, bytes
using FieldMap = std::map<FieldKey, Place>;

constexpr const char* kWhole = "(whole)";
constexpr expertd_test_field kCppFields[] = {EXPERTD_TEST_STRUCTS(EXPERTD_TEST_STRUCT_ROW)
                                                 EXPERTD_TEST_FIELDS(EXPERTD_TEST_FIELD_ROW){nullptr, nullptr, 0, 0}};

FieldMap map_of(const expertd_test_field* fields) {
  FieldMap map;
  for (; fields->structure != nullptr; ++fields) {
    map[{fields->structure, fields->field == nullptr ? kWhole : fields->field}] = {fields->offset, fields->bytes};
  }
  return map;
}

struct Row {
  FieldKey key;
  Place place;
  std::string writer;
  std::string meaning;
};

std::vector<Row> rows_of_the_specification() {
  std::ifstream file(EXPERTD_SOURCE_DIR "/proto/abi/ring_v1.md");
  EXPECT_TRUE(file.is_open());
  std::vector<Row> rows;
  for (std::string line; std::getline(file, line);) {
    std::vector<std::string> cells;
    std::istringstream stream(line);
    for (std::string cell; std::getline(stream, cell, '|');) {
      cell.erase(0, cell.find_first_not_of(' '));
      cell.erase(cell.find_last_not_of(' ') + 1);
      cells.push_back(cell);
    }
    if (cells.size() == 7 && cells[1].rfind("expertd_", 0) == 0) {
      rows.push_back({{cells[1], cells[2]}, {std::stoull(cells[3]), std::stoull(cells[4])}, cells[5], cells[6]});
    }
  }
  return rows;
}

TEST(RingLayout, IsTheSameInC11AndInCpp20) {
  EXPECT_EQ(map_of(kCppFields), map_of(expertd_test_c_fields()));
}

TEST(RingLayout, IsWhatTheSpecificationSays) {
  FieldMap specified;
  for (const Row& row : rows_of_the_specification()) {
    EXPECT_TRUE(specified.emplace(row.key, row.place).second) << row.key.first << "." << row.key.second << " twice";
  }
  EXPECT_EQ(specified, map_of(kCppFields));
}

TEST(RingLayout, IsSpecifiedByteForByteWithoutGapOrOverlap) {
  std::map<std::string, uint64_t> cursor;
  std::map<std::string, uint64_t> whole;
  for (const Row& row : rows_of_the_specification()) {
    if (row.key.second == kWhole) {
      whole[row.key.first] = row.place.second;
      continue;
    }
    EXPECT_EQ(row.place.first, cursor[row.key.first]) << row.key.first << "." << row.key.second;
    cursor[row.key.first] = row.place.first + row.place.second;
  }
  EXPECT_EQ(cursor, whole);
}

TEST(RingLayout, NamesAWriterAndAMeaningForEveryField) {
  const std::set<std::string> writers = {"client", "daemon", "both", "nobody"};
  for (const Row& row : rows_of_the_specification()) {
    EXPECT_FALSE(row.meaning.empty()) << row.key.second;
    const bool window = row.key.first.rfind("expertd_ll_window", 0) == 0;
    if (row.key.second != kWhole && !window) {
      EXPECT_EQ(writers.count(row.writer), 1U) << row.key.first << "." << row.key.second << ": " << row.writer;
      EXPECT_EQ(row.writer == "nobody", row.key.second.rfind("reserved", 0) == 0) << row.key.second;
    }
  }
}

TEST(RingLayout, GivesEachSideLinesOfItsOwn) {
  std::map<uint64_t, std::set<std::string>> writers;  // by 128-byte line of the header
  for (const Row& row : rows_of_the_specification()) {
    const bool shared = row.key.first == "expertd_ring_header" && row.place.first >= 128 && row.place.second <= 8;
    if (shared && row.writer != "both") {
      writers[row.place.first / 128].insert(row.writer);
    }
  }
  for (const auto& [line, sides] : writers) {
    EXPECT_EQ(sides.size(), 1U) << "line " << line;
  }
}

TEST(RingLayout, AlignsEveryIntegerNaturally) {
  for (const Row& row : rows_of_the_specification()) {
    const uint64_t bytes = row.place.second;
    if (bytes == 2 || bytes == 4 || bytes == 8) {
      EXPECT_EQ(row.place.first % bytes, 0U) << row.key.first << "." << row.key.second;
    }
  }
}

TEST(RingLayout, PutsTheWordsOfAllSlotsOnTheFlagPageApart) {
  std::set<uint64_t> offsets;
  for (uint64_t slot = 0; slot < EXPERTD_RING_SLOTS_MAX; ++slot) {
    for (const uint64_t offset : {EXPERTD_DOORBELL_OFFSET(slot), EXPERTD_COMPLETION_WORD_OFFSET(slot)}) {
      EXPECT_EQ(offset % EXPERTD_FLAG_STRIDE, 0U);
      EXPECT_LE(offset + 16, EXPERTD_FLAG_PAGE_BYTES);
      EXPECT_TRUE(offsets.insert(offset).second);
    }
    EXPECT_EQ(EXPERTD_RESULT_WORD_OFFSET(slot), EXPERTD_COMPLETION_WORD_OFFSET(slot) + 8);
  }
}

TEST(RingLayout, PutsTheStepWordsBehindThem) {
  const uint64_t words = EXPERTD_RESULT_WORD_OFFSET(EXPERTD_RING_SLOTS_MAX - 1) + 8;
  std::set<uint64_t> offsets;
  for (uint64_t slot = 0; slot < EXPERTD_RING_SLOTS_MAX; ++slot) {
    std::vector<uint64_t> all = {EXPERTD_STEP_ACTIVE_OFFSET(slot), EXPERTD_STEP_RUNG_OFFSET(slot),
                                 EXPERTD_STEP_ENDED_OFFSET(slot)};
    for (uint64_t rank = 0; rank < EXPERTD_STEP_RANKS; ++rank) {
      all.push_back(EXPERTD_STEP_ARRIVED_OFFSET(slot, 0, rank));
      all.push_back(EXPERTD_STEP_ARRIVED_OFFSET(slot, 1, rank));
    }
    for (const uint64_t offset : all) {
      EXPECT_GE(offset, words);
      EXPECT_LE(offset + 8, EXPERTD_FLAG_PAGE_BYTES);
      EXPECT_TRUE(offsets.insert(offset).second) << offset;
    }
    // The two sides write to lines of their own.
    EXPECT_NE(EXPERTD_STEP_RUNG_OFFSET(slot) / 128, EXPERTD_STEP_ACTIVE_OFFSET(slot) / 128);
  }
}

TEST(RingLayout, PutsTheWordsOfCaptureLanesBehindThose) {
  const uint64_t words = EXPERTD_STEP_OFFSET(EXPERTD_RING_SLOTS_MAX);
  std::set<uint64_t> offsets;
  for (uint64_t lane = 0; lane < EXPERTD_CAPTURE_LANES_MAX; ++lane) {
    for (const uint64_t offset : {EXPERTD_CAPTURE_DOORBELL_OFFSET(lane), EXPERTD_CAPTURE_COMPLETION_OFFSET(lane)}) {
      EXPECT_GE(offset, words);
      EXPECT_EQ(offset % EXPERTD_FLAG_STRIDE, 0U) << "the two sides write to lines of their own";
      EXPECT_LE(offset + 16, EXPERTD_FLAG_PAGE_BYTES);
      EXPECT_TRUE(offsets.insert(offset).second) << offset;
    }
    EXPECT_EQ(EXPERTD_CAPTURE_RESULT_OFFSET(lane), EXPERTD_CAPTURE_COMPLETION_OFFSET(lane) + 8);
  }
  EXPECT_GT(EXPERTD_CAPTURE_CANCEL, uint64_t{EXPERTD_CAPTURE_RUNG_MAX});
  EXPECT_LT(EXPERTD_CAPTURE_CANCEL, EXPERTD_ABORT_WORD);
}

struct Region {
  uint64_t offset;
  uint64_t bytes;
};

std::vector<Region> regions_of(const expertd_ll_window_shape& shape, uint32_t payloads, uint32_t set) {
  const expertd_ll_window_layout layout = expertd_ll_window_place_payloads(&shape, payloads, set);
  const uint64_t local = shape.num_experts / shape.ranks;
  const uint64_t rows = local * shape.ranks * shape.max_tokens;
  const uint64_t row = payloads == EXPERTD_PAYLOAD_FP8 ? shape.hidden : 2 * shape.hidden;
  const uint64_t scales = payloads == EXPERTD_PAYLOAD_BF16 ? 0 : shape.hidden / 128 * 4;
  return {{layout.recv_x, rows * row},
          {layout.recv_scales, rows * scales},
          {layout.combine_x, rows * 2 * shape.hidden},
          {layout.src_info, rows * 4},
          {layout.layout_range, local * shape.ranks * 8},
          {layout.expert_counts, local * 4}};
}

class LlWindow : public testing::TestWithParam<expertd_ll_window_shape> {};

TEST_P(LlWindow, KeepsItsRegionsApartAlignedAndInside) {
  const expertd_ll_window_shape shape = GetParam();
  for (uint32_t payloads = 0; payloads <= EXPERTD_PAYLOADS_ALL; ++payloads) {
    SCOPED_TRACE(payloads);
    const uint64_t total = expertd_ll_window_place_payloads(&shape, payloads, 0).total_bytes;
    std::vector<Region> regions = regions_of(shape, payloads, 0);
    const std::vector<Region> second = regions_of(shape, payloads, 1);
    regions.insert(regions.end(), second.begin(), second.end());
    // A region without bytes shares its place with the one behind it.
    std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) {
      return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
    });
    uint64_t end = 0;
    for (const Region& region : regions) {
      EXPECT_EQ(region.offset % EXPERTD_LL_WINDOW_ALIGNMENT, 0U);
      EXPECT_GE(region.offset, end);
      end = region.offset + region.bytes;
    }
    EXPECT_LE(end, total);
    EXPECT_LE(total, expertd_ll_window_place_all(&shape, 0).total_bytes);
    EXPECT_LT(total, 1ULL << 43);
  }
}

TEST(LlWindowPayloads, SpareWhatTheGroupDoesNotCarry) {
  const expertd_ll_window_shape shape{8, 256, 7168, 128};
  const uint64_t rows = 256 * 128;
  const uint64_t any = expertd_ll_window_place_all(&shape, 0).total_bytes;
  const auto spared = [&](uint32_t payloads) {
    return any - expertd_ll_window_place_payloads(&shape, payloads, 0).total_bytes;
  };
  EXPECT_EQ(spared(EXPERTD_PAYLOAD_FP8), 2 * rows * 7168) << "half of each row";
  EXPECT_EQ(spared(EXPERTD_PAYLOAD_BF16), 2 * rows * 7168 / 128 * 4) << "the scales";
  EXPECT_EQ(spared(EXPERTD_PAYLOAD_BYTES), 0U) << "the size of these rows is not known";
  EXPECT_EQ(spared(EXPERTD_PAYLOAD_BF16 | EXPERTD_PAYLOAD_FP8), 0U);
  EXPECT_EQ(spared(EXPERTD_PAYLOADS_ALL), 0U);
}

TEST_P(LlWindow, IsTheSameInC11AndInCpp20) {
  for (uint32_t i = 0; i < (EXPERTD_LL_WINDOW_SETS + 1) * (EXPERTD_PAYLOADS_ALL + 1); ++i) {
    const uint32_t set = i / (EXPERTD_PAYLOADS_ALL + 1);
    const uint32_t payloads = i % (EXPERTD_PAYLOADS_ALL + 1);
    const expertd_ll_window_shape shape = GetParam();
    const expertd_ll_window_layout ours = expertd_ll_window_place_payloads(&shape, payloads, set);
    const expertd_ll_window_layout theirs = expertd_test_c_window(shape, payloads, set);
    EXPECT_EQ(ours.recv_x, theirs.recv_x);
    EXPECT_EQ(ours.recv_scales, theirs.recv_scales);
    EXPECT_EQ(ours.combine_x, theirs.combine_x);
    EXPECT_EQ(ours.src_info, theirs.src_info);
    EXPECT_EQ(ours.layout_range, theirs.layout_range);
    EXPECT_EQ(ours.expert_counts, theirs.expert_counts);
    EXPECT_EQ(ours.set_bytes, theirs.set_bytes);
    EXPECT_EQ(ours.total_bytes, theirs.total_bytes);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, LlWindow,
                         testing::Values(expertd_ll_window_shape{1, 1, 128, 1}, expertd_ll_window_shape{2, 6, 384, 7},
                                         expertd_ll_window_shape{8, 256, 7168, 128},
                                         expertd_ll_window_shape{64, 2048, 16384, 4096},
                                         expertd_ll_window_shape{8, 2048, 128, 1}));

TEST(LlWindowLimits, GivesZerosOutsideTheShapesLimits) {
  const expertd_ll_window_shape bad[] = {{0, 8, 128, 1},   {513, 513, 128, 1}, {8, 4, 128, 1},   {8, 12, 128, 1},
                                         {1, 257, 128, 1}, {8, 2056, 128, 1},  {8, 8, 64, 1},    {8, 8, 16512, 1},
                                         {8, 8, 192, 1},   {8, 8, 128, 0},     {8, 8, 128, 4097}};
  for (const expertd_ll_window_shape& shape : bad) {
    const expertd_ll_window_layout layout = expertd_ll_window_place_all(&shape, 0);
    EXPECT_EQ(layout.total_bytes, 0U) << shape.ranks << " " << shape.num_experts << " " << shape.hidden;
    EXPECT_EQ(layout.recv_scales, 0U);
  }
  const expertd_ll_window_shape good{8, 8, 128, 1};
  EXPECT_EQ(expertd_ll_window_place_all(&good, 2).total_bytes, 0U) << "there are two sets";
}

}  // namespace
}  // namespace expertd::test
