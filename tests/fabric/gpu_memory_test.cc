// SPDX-License-Identifier: Apache-2.0
// Groups whose entries lie apart from their heads, as in memory of a GPU; here the host's, since this UCX knows no
// other. What UCX is told of the memory is all that differs.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>

#include "tests/fabric/fabric_pair.h"

namespace expertd::fabric_test {
namespace {

using engine::FabricLane;
using engine::MessageHeader;
using engine::MessageKind;

class Apart final : public fabric::MemoryPort {
 public:
  base::Result<std::byte*> allocate(uint64_t bytes) override {
    begin_ = static_cast<std::byte*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
    end_ = begin_ + bytes;
    std::memset(begin_, 0, bytes);
    return begin_;
  }
  void free(std::byte* data, uint64_t /*bytes*/) override {
    std::free(data);
    begin_ = end_ = nullptr;
  }
  bool has(const std::byte* data) const { return data >= begin_ && data < end_; }

 private:
  std::byte* begin_ = nullptr;
  std::byte* end_ = nullptr;
};

/// Whether each of two nodes has such memory.
struct Case {
  const char* name;
  bool apart[2];
};

class FabricGpuMemory : public testing::TestWithParam<Case> {};

INSTANTIATE_TEST_SUITE_P(Of, FabricGpuMemory, testing::Values(Case{"both", {true, true}}, Case{"one", {true, false}}),
                         [](const auto& of) { return std::string(of.param.name); });

TEST_P(FabricGpuMemory, EntriesArriveApartFromTheirHeads) {
  Apart memory[2];  // the world is taken down before it
  World world({1, 1});
  world.create([&](uint32_t node) {
    fabric::FabricOptions options = options_for("tcp", "node" + std::to_string(node));
    options.gpu_memory = &memory[node];
    return options;
  });
  ASSERT_NO_FATAL_FAILURE(world.connect());
  ASSERT_NO_FATAL_FAILURE(world.wait_up());
  ASSERT_NO_FATAL_FAILURE(
      world.open([](fabric::GroupLink* link) { link->gpu_memory = GetParam().apart[link->placement.own_node]; }));
  const uint64_t most = world.node(0).port->message_bytes();
  uint32_t sequence = 0;
  for (const uint64_t bytes : {uint64_t{16}, uint64_t{17}, uint64_t{8192}, uint64_t{65536}, most}) {
    for (const MessageKind kind : {MessageKind::kCounts, MessageKind::kRows, MessageKind::kSums}) {
      for (const FabricLane lane : {FabricLane::kLatency, FabricLane::kThroughput}) {
        for (const uint32_t from : {0U, 1U}) {
          const uint32_t to = 1 - from;
          const MessageHeader header{.kind = kind,
                                     .lane = lane,
                                     .op = 7,
                                     .source_rank = from,
                                     .node = to,
                                     .targets = 1,
                                     .entries = 3,
                                     .sequence = sequence++};
          ASSERT_TRUE(send(world.node(from), from, header, bytes));
          engine::Arrival arrival;
          ASSERT_TRUE(receive(world.node(to), to, &arrival)) << bytes << " bytes";
          EXPECT_EQ(arrival.bytes, bytes);
          EXPECT_EQ(wrong_bytes(arrival), 0U) << bytes << " bytes";
          const bool apart = GetParam().apart[0] && GetParam().apart[1] && kind != MessageKind::kCounts;
          EXPECT_EQ(apart, arrival.entries != nullptr);
          EXPECT_TRUE(!apart || memory[to].has(arrival.entries));
          world.node(to).port->release(to, arrival);
        }
      }
    }
  }
  for (const uint32_t node : {0U, 1U}) {
    EXPECT_EQ(GetParam().apart[node], world.node(node).port->has_gpu_memory());
  }
}

TEST(FabricGpuMemoryOfNone, IsRefusedWhereThereIsNone) {
  World world({1, 1});
  world.create([](uint32_t node) { return options_for("tcp", "node" + std::to_string(node)); });
  ASSERT_NO_FATAL_FAILURE(world.connect());
  ASSERT_NO_FATAL_FAILURE(world.wait_up());
  fabric::GroupLink link = world.link(0);
  link.gpu_memory = true;
  const auto opened = world.node(0).fabric->open_group(link);
  ASSERT_FALSE(opened.is_ok());
  EXPECT_EQ(opened.status().reason(), EXPERTD_REASON_UNSUPPORTED);
}

}  // namespace
}  // namespace expertd::fabric_test
