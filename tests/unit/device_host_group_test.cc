// SPDX-License-Identifier: Apache-2.0
// The tables of groups on host devices: how many handles they hold, and that all memory comes at the join and goes with
// the rank.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "daemon/device/host/host_device.h"
#include "tests/support/fake_ports.h"

namespace expertd::device {
namespace {

engine::GroupShape shape_of(uint32_t ranks, uint32_t max_tokens) {
  engine::GroupShape shape;
  shape.id = base::GroupId{5};
  shape.ranks = ranks;
  shape.experts = ranks * 4;
  shape.hidden = 128;
  shape.top_k = 32;
  shape.max_tokens = max_tokens;
  return shape;
}

TEST(HostGroup, TakesWhatItsPlanSays) {
  HostGroupDirectory groups;
  test::FakeWakePort wake;
  HostDevice device(base::DeviceIndex{0}, 0, &groups, &wake, 0);
  for (const uint32_t handles : {0U, 1U, 512U}) {
    for (const engine::GroupShape& shape : {shape_of(1, 1), shape_of(2, 64), shape_of(64, 65536)}) {
      SCOPED_TRACE(std::to_string(handles) + " handles, " + std::to_string(shape.ranks) + " ranks");
      const auto plan = device.plan_group(shape, handles);
      ASSERT_TRUE(plan.is_ok());
      EXPECT_EQ(device.info().pool_used_bytes, 0U) << "a plan takes nothing";
      ASSERT_TRUE(device.create_group(shape, handles).is_ok());
      EXPECT_EQ(plan.value().handle_count, device.handle_capacity(shape.id, base::Rank{0}));
      EXPECT_EQ(plan.value().handle_bytes, device.info().pool_used_bytes);
      EXPECT_LE(plan.value().handle_bytes, kMaxHandleTableBytes);
      EXPECT_EQ(plan.value().table_bytes, uint64_t{shape.ranks} * (shape.ranks * 5 + 4) * 4 * engine::kExchangePages);
      EXPECT_EQ(plan.value().pinned_bytes, 0U);
      device.destroy_group(shape.id, base::Rank{0});
    }
  }
}

TEST(HostGroup, WindowsHaveTheSizeThatIsToldBefore) {
  HostGroupDirectory groups;
  test::FakeWakePort wake;
  HostDevice device(base::DeviceIndex{0}, 0, &groups, &wake, 0);
  for (const uint64_t bytes : {1ULL, 4096ULL, 4097ULL}) {
    const auto size = device.window_size(bytes);
    ASSERT_TRUE(size.is_ok());
    const auto window = device.create_window(bytes);
    ASSERT_TRUE(window.is_ok());
    EXPECT_EQ(size.value(), window.value().bytes);
    EXPECT_EQ(size.value(), device.info().window_bytes);
  }
  EXPECT_EQ(device.window_size(0).status().reason(), EXPERTD_REASON_ARGUMENT_RANGE);
}

TEST(HostGroup, HoldsAsManyHandlesAsAskedForOrFit) {
  HostGroupDirectory groups;
  test::FakeWakePort wake;
  HostDevice device(base::DeviceIndex{0}, 0, &groups, &wake, 0);
  ASSERT_TRUE(device.create_group(shape_of(2, 64), 512).is_ok());
  EXPECT_EQ(device.handle_capacity(base::GroupId{5}, base::Rank{0}), 512U);
  device.destroy_group(base::GroupId{5}, base::Rank{0});
  ASSERT_TRUE(device.create_group(shape_of(64, 65536), 512).is_ok());
  const uint64_t bytes = 4 * (65536ULL * (64 + 64) + 64 * (64 + 256 + 4));
  EXPECT_EQ(device.handle_capacity(base::GroupId{5}, base::Rank{0}), kMaxHandleTableBytes / bytes);
  EXPECT_EQ(device.info().pool_used_bytes, kMaxHandleTableBytes / bytes * bytes);
  device.destroy_group(base::GroupId{5}, base::Rank{0});
  EXPECT_EQ(device.info().pool_used_bytes, 0U);
}

TEST(HostGroup, HandlesHaveTablesOfTheirOwnUpToTheCapacity) {
  HostGroupDirectory groups;
  const engine::GroupShape shape = shape_of(2, 16);
  ASSERT_TRUE(groups.add_rank(shape, 3).is_ok());
  HostGroupTables* tables = groups.find(shape.id);
  ASSERT_NE(tables, nullptr);
  const uint64_t ints = tables->handle_bytes() / 4;
  for (uint32_t handle = 0; handle < 3; ++handle) {
    const kernels::Routing routing = tables->routing(0, handle);
    ASSERT_NE(routing.token_rank, nullptr);
    std::fill_n(routing.token_rank, ints, static_cast<int32_t>(handle));  // the four tables lie one behind the other
  }
  for (uint32_t handle = 0; handle < 3; ++handle) {
    const int32_t* first = tables->routing(0, handle).token_rank;
    EXPECT_TRUE(std::all_of(first, first + ints, [&](int32_t value) { return value == static_cast<int32_t>(handle); }));
    EXPECT_EQ(tables->use(0, handle)->generation, 0U);
  }
  EXPECT_EQ(tables->routing(0, 3).token_rank, nullptr);
  EXPECT_EQ(tables->use(0, 3), nullptr);
  EXPECT_EQ(tables->use(1, 0), nullptr) << "rank 1 has not joined";
}

TEST(HostGroup, GoesWithItsLastRankAndARankThatComesBackFindsNoHandles) {
  HostGroupDirectory groups;
  engine::GroupShape shape = shape_of(2, 16);
  ASSERT_TRUE(groups.add_rank(shape, 4).is_ok());
  shape.rank = 1;
  ASSERT_TRUE(groups.add_rank(shape, 4).is_ok());
  groups.find(shape.id)->use(1, 0)->generation = 9;
  groups.remove_rank(shape.id, base::Rank{1});
  ASSERT_NE(groups.find(shape.id), nullptr);
  EXPECT_EQ(groups.find(shape.id)->handle_capacity(1), 0U);
  ASSERT_TRUE(groups.add_rank(shape, 4).is_ok());
  EXPECT_EQ(groups.find(shape.id)->use(1, 0)->generation, 0U);
  groups.remove_rank(shape.id, base::Rank{0});
  groups.remove_rank(shape.id, base::Rank{1});
  EXPECT_EQ(groups.find(shape.id), nullptr);
}

TEST(HostGroup, SaysWhenThereIsNoMemoryForItAndLeavesNothing) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizer's allocator ends the process instead";
#endif
  HostGroupDirectory groups;
  engine::GroupShape shape = shape_of(64, 65536);
  shape.top_k = 1U << 20;  // no group has so many; it asks for more than any machine has
  shape.max_tokens = UINT32_MAX;
  EXPECT_EQ(groups.add_rank(shape, 512).reason(), EXPERTD_REASON_POOL_EXHAUSTED);
  EXPECT_EQ(groups.find(shape.id), nullptr);
}

}  // namespace
}  // namespace expertd::device
