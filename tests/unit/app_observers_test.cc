// SPDX-License-Identifier: Apache-2.0
// What the daemon counts and shows: events of loops into counters, devices into gauges.
#include "daemon/app/observers.h"

#include <gtest/gtest.h>

#include <cmath>

#include "daemon/app/operator_view.h"

namespace expertd::app {
namespace {

constexpr base::DeviceIndex kDevice{0};

class SilentNotifier final : public supervise::Notifier {
 public:
  base::Status send(std::string_view) override { return base::Status::ok(); }
};

class DeviceObserverTest : public ::testing::Test {
 protected:
  static engine::Request request(kernels::OpKind kind, uint32_t rejected_reason) {
    engine::Request request;
    request.shape.kind = kind;
    request.rejected_reason = rejected_reason;
    return request;
  }
  static expertd_completion completion(uint32_t reason) {
    expertd_completion completion{};
    completion.reason = reason;
    return completion;
  }

  void complete(const engine::Request& request, const expertd_completion& completion,
                const engine::HeldUp& held_up = {}) {
    observer_.completed(kDevice, request, completion, held_up);
  }

  metrics::Blocks::Device block_;
  metrics::OpCounters& ops_ = block_.ops;
  metrics::ThreadCounters thread_;
  SilentNotifier notifier_;
  supervise::Watchdog watchdog_{notifier_, {}};
  supervise::Beat* beat_ = watchdog_.add("loop", 0).value();
  DeviceObserver observer_{&block_, &thread_, beat_};
};

TEST_F(DeviceObserverTest, ARefusalIsNoOperationThatFailed) {
  complete(request(kernels::OpKind::kDispatch, EXPERTD_REASON_UNALIGNED), completion(EXPERTD_REASON_UNALIGNED));
  EXPECT_EQ(ops_.rejected(metrics::reason_index(EXPERTD_REASON_UNALIGNED)), 1U);
  EXPECT_EQ(ops_.totals(EXPERTD_OP_DISPATCH).failed, 0U);
  complete(request(kernels::OpKind::kDispatch, 0), completion(EXPERTD_REASON_PEER_LOST));
  EXPECT_EQ(ops_.totals(EXPERTD_OP_DISPATCH).failed, 1U);
  complete(request(kernels::OpKind::kDispatch, 0), completion(0));
  EXPECT_EQ(ops_.totals(EXPERTD_OP_DISPATCH).ok, 1U);
}

TEST_F(DeviceObserverTest, TheExecutorAndItsMultiprocessorsAreCounted) {
  expertd_completion done = completion(0);
  done.executor = EXPERTD_COMPLETION_EXECUTOR_SM;
  done.sms = 24;
  done.start_ns = 100;
  done.end_ns = 150;
  complete(request(kernels::OpKind::kCombine, 0), done);
  const metrics::OpBlock& block = ops_.block(EXPERTD_OP_COMBINE);
  EXPECT_EQ(metrics::read(block.executed[EXPERTD_COMPLETION_EXECUTOR_SM]), 1U);
  EXPECT_EQ(metrics::read(block.sm_ns), 24U * 50U);
}

TEST_F(DeviceObserverTest, RowsThatCrossNodesAreAPathOfTheirOwn) {
  expertd_completion done = completion(0);
  done.local_bytes = 10;
  done.remote_bytes = 100;
  complete(request(kernels::OpKind::kDispatch, 0), done, {.group = {}, .fabric_bytes = 60});
  const metrics::OpBlock& block = ops_.block(EXPERTD_OP_DISPATCH);
  EXPECT_EQ(metrics::read(block.local_bytes), 10U);
  EXPECT_EQ(metrics::read(block.remote_bytes), 40U);
  EXPECT_EQ(metrics::read(block.fabric_bytes), 60U);
}

TEST_F(DeviceObserverTest, WhoWasWaitedForIsKeptOfWhatSucceeded) {
  expertd_completion done = completion(0);
  done.group_op = 7;
  const engine::HeldUp held{.group = {3}, .rank = 1, .last_rank = 2, .waited_ns = 500, .counts = true};
  complete(request(kernels::OpKind::kCombine, 0), done, held);
  complete(request(kernels::OpKind::kCombine, 0), done);  // nothing is known
  complete(request(kernels::OpKind::kCombine, 0), completion(EXPERTD_REASON_PEER_LOST), held);
  const std::vector<metrics::WaitRecord> waits = block_.waits.last(10);
  ASSERT_EQ(waits.size(), 1U);
  EXPECT_EQ(waits[0].group, 3U);
  EXPECT_EQ(waits[0].number, 7U);
  EXPECT_EQ(waits[0].op, static_cast<uint32_t>(EXPERTD_OP_COMBINE));
  EXPECT_EQ(waits[0].rank, 1U);
  EXPECT_EQ(waits[0].last_rank, 2U);
  EXPECT_EQ(waits[0].waited_ns, 500U);
  EXPECT_TRUE(waits[0].counts);
}

TEST_F(DeviceObserverTest, OnlyWhatCannotBeUnderstoodIsAnInvalidDescriptor) {
  complete(request(kernels::OpKind::kBarrier, EXPERTD_REASON_UNALIGNED), completion(0));
  complete(request(kernels::OpKind::kBarrier, EXPERTD_REASON_DESCRIPTOR_MALFORMED), completion(0));
  EXPECT_EQ(ops_.invalid(metrics::reason_index(EXPERTD_REASON_UNALIGNED)), 0U);
  EXPECT_EQ(ops_.invalid(metrics::reason_index(EXPERTD_REASON_DESCRIPTOR_MALFORMED)), 1U);
  observer_.ring_broken();
  EXPECT_EQ(ops_.invalid(metrics::reason_index(EXPERTD_REASON_RING_OVERFLOW)), 1U);
  EXPECT_EQ(ops_.rejected(metrics::reason_index(EXPERTD_REASON_RING_OVERFLOW)), 1U);
}

TEST_F(DeviceObserverTest, AFullRingIsCounted) {
  observer_.ring_fill(kDevice, 63, 64);
  EXPECT_EQ(ops_.ring_full_count(), 0U);
  observer_.ring_fill(kDevice, 64, 64);
  EXPECT_EQ(ops_.ring_full_count(), 1U);
  EXPECT_EQ(ops_.take_ring_used_max(), 64U);
}

TEST_F(DeviceObserverTest, MissedBeatsAreCountedOnce) {
  watchdog_.tick(3 * supervise::Watchdog::kLateNs);
  observer_.count_missed_beats();
  observer_.count_missed_beats();
  EXPECT_EQ(thread_.missed_beats(), 3U);
  observer_.beat(kDevice, 3 * supervise::Watchdog::kLateNs, 7);
  watchdog_.tick(3 * supervise::Watchdog::kLateNs);
  observer_.count_missed_beats();
  EXPECT_EQ(thread_.missed_beats(), 3U);
  EXPECT_EQ(thread_.take_lag_max_ns(), 7U);
}

/// A device that only tells of itself.
class ToldDevice final : public device::Device {
 public:
  base::DeviceIndex index() const override { return kDevice; }
  device::DeviceInfo info() const override { return told; }
  engine::DevicePort& port() override { std::abort(); }
  base::Result<device::Window> create_window(uint64_t) override { return nothing(); }
  base::Result<uint64_t> window_size(uint64_t) const override { return nothing(); }
  base::Result<std::unique_ptr<device::HeldMemory>> import_fd(base::ScopedFd, uint64_t, uint64_t, uint64_t) override {
    return nothing();
  }
  base::Result<std::unique_ptr<device::HeldMemory>> import_ipc(const void*, uint64_t, uint64_t) override {
    return nothing();
  }
  base::Result<device::SessionGrant> open_session(base::SessionId) override { return nothing(); }
  void close_session(base::SessionId) override {}
  void* session_flag_page(base::SessionId) override { return nullptr; }
  base::Status create_group(const engine::GroupShape&, uint32_t) override { return nothing(); }
  base::Result<device::GroupMemory> plan_group(const engine::GroupShape&, uint32_t) const override { return nothing(); }
  void destroy_group(base::GroupId, base::Rank) override {}
  uint32_t handle_capacity(base::GroupId, base::Rank) const override { return 0; }

  device::DeviceInfo told;

 private:
  static base::Status nothing() { return base::Status(EXPERTD_REASON_UNSUPPORTED); }
};

class OperatorViewTest : public ::testing::Test {
 protected:
  OperatorViewTest() {
    facts_.ring_slots = 64;
    facts_.pool_max_bytes = 1000;
    device_.told.is_cuda = true;
    device_.told.pool_used_bytes = 300;
    device_.told.window_bytes = 200;
  }

  metrics::DeviceGauges device_gauges() { return view().gauges().devices.at(0); }
  OperatorView& view() {
    if (view_ == nullptr) {
      view_ = std::make_unique<OperatorView>(
          facts_, &sessions_, std::make_shared<metrics::Blocks>(), [](uint64_t) {}, [this] { return nodes_; }, nullptr);
    }
    return *view_;
  }

  ViewFacts facts_;
  NodeFacts nodes_;
  ToldDevice device_;
  metrics::ProcessCounters counters_;
  SessionLog log_{&counters_};
  session::SessionService sessions_{{}, {{&device_, nullptr}}, &log_};
  std::unique_ptr<OperatorView> view_;
};

TEST_F(OperatorViewTest, AContextThatIsNotKnownIsNoNumber) {
  EXPECT_TRUE(std::isnan(device_gauges().context_bytes));
  device_.told.context_bytes = 500;
  device_.told.context_source = "process";
  EXPECT_EQ(device_gauges().context_bytes, 500);
  device_.told = device::DeviceInfo{};
  EXPECT_EQ(device_gauges().context_bytes, 0) << "a host device has none";
}

TEST_F(OperatorViewTest, TablesAreUsedMemoryAndWindowsOfNobodyAreNot) {
  const metrics::DeviceGauges gauges = device_gauges();
  EXPECT_EQ(gauges.pool_used_bytes, 100U) << "no session is attached, so the windows are nobody's";
  EXPECT_EQ(gauges.pool_free_bytes, 700U);
  EXPECT_EQ(view().status().devices.at(0).table_bytes, 100U);
}

TEST_F(OperatorViewTest, NothingIsFreeBelowNoCap) {
  facts_.pool_max_bytes = 0;
  EXPECT_EQ(device_gauges().pool_free_bytes, 0U);
}

TEST_F(OperatorViewTest, TheCapacityIsThatOfOneRing) {
  EXPECT_EQ(device_gauges().ring_slots_capacity, 64U);
}

TEST_F(OperatorViewTest, AConfigurationThatCannotBeReadIsSeen) {
  EXPECT_TRUE(view().gauges().config_last_load_success);
  view().set_config_loaded(false);
  EXPECT_FALSE(view().gauges().config_last_load_success);
}

}  // namespace
}  // namespace expertd::app
