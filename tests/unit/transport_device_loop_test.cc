// SPDX-License-Identifier: Apache-2.0
// The thread of a device: tasks that are given up, sessions that close, and what it does not touch.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <future>
#include <memory>

#include "daemon/transport/device_loop.h"
#include "tests/support/fake_admission.h"
#include "tests/support/fake_ports.h"

namespace expertd::test {
namespace {

constexpr uint32_t kSlots = 8;
constexpr std::chrono::seconds kPatience(20);

class QuietLoopObserver final : public transport::LoopObserver {
 public:
  void beat(base::DeviceIndex /*device*/, uint64_t /*now_ns*/, uint64_t /*lag_ns*/) override {}
  void ring_fill(base::DeviceIndex /*device*/, uint32_t used, uint32_t capacity) override {
    most_used = std::max(most_used, used);
    last_capacity = capacity;
  }
  uint32_t most_used = 0;
  uint32_t last_capacity = 0;
};

/// Ports and tables are the loop's thread's: the test touches them by tasks, or before the start.
class DeviceLoopTest : public testing::Test {
 protected:
  ~DeviceLoopTest() override {
    if (loop_ != nullptr) {
      loop_->stop();
    }
  }

  void start(uint64_t task_timeout_ns = 20'000'000'000) {
    transport::LoopOptions options;
    options.task_timeout_ns = task_timeout_ns;
    loop_ = std::move(transport::DeviceLoop::create(base::DeviceIndex{0}, options)).value();
    ring_ = std::move(session::RingMemory::create(base::SessionId{5}, 11, kSlots)).value();
    port_.ends_on_abort = false;
    ASSERT_TRUE(loop_->start(&port_, &wake_, &observer_, &loop_observer_, [](base::SessionId) {}).is_ok());
  }

  /// Runs `task` on the loop however late it is: closing a session that nobody knows is never refused or given up.
  void post(std::function<void()> task) {
    ASSERT_TRUE(loop_->close_session(base::SessionId{999}, std::move(task)).is_ok());
  }
  /// Holds the loop in a task until release().
  void block() {
    std::promise<void> started;
    post([this, &started] {
      started.set_value();
      gate_.get_future().wait();
    });
    started.get_future().wait();
  }
  /// Tasks run in order: at the end what was waiting has run.
  void release() {
    gate_.set_value();
    std::promise<void> seen;
    post([&seen] { seen.set_value(); });
    ASSERT_EQ(seen.get_future().wait_for(kPatience), std::future_status::ready);
  }

  base::Status add() { return loop_->add_session(&world_.tables, ring_.get(), nullptr); }
  void submit(uint64_t seq, expertd_slot slot) {
    slot.seq = seq;
    slot.timeout_ns = 100'000'000'000;  // the group's own is for tests that give the time
    ring_->slots()[(seq - 1) % kSlots] = slot;
    __atomic_store_n(&ring_->header()->submit_tail, seq, __ATOMIC_SEQ_CST);
    loop_->wake();
  }
  void await_parts(size_t count) {
    size_t launched = 0;
    while (launched < count) {
      ASSERT_TRUE(loop_->run([&] { launched = port_.parts().size(); }).is_ok());
    }
  }
  template <typename Question>
  bool ask(Question question) {
    bool answer = false;
    EXPECT_TRUE(loop_->run([&] { answer = question(); }).is_ok());
    return answer;
  }

  AdmissionWorld world_;
  std::unique_ptr<session::RingMemory> ring_;
  FakeDevicePort port_;
  FakeWakePort wake_;
  FakeObserver observer_;
  QuietLoopObserver loop_observer_;
  std::unique_ptr<transport::DeviceLoop> loop_;
  std::promise<void> gate_;
};

TEST_F(DeviceLoopTest, ATaskThatWasGivenUpNeverRuns) {
  start(1'000'000);
  block();
  bool ran = false;
  EXPECT_EQ(loop_->run([&ran] { ran = true; }).reason(), EXPERTD_REASON_INTERNAL);
  release();
  EXPECT_FALSE(ran);
}

TEST_F(DeviceLoopTest, ASessionThatCouldNotBeAddedIsNeverServed) {
  start(1'000'000);
  block();
  ASSERT_FALSE(add().is_ok());
  submit(1, AdmissionWorld::slot(EXPERTD_OP_LAYOUT));
  release();
  loop_->stop();
  EXPECT_EQ(ring_->header()->submit_head, 0U);
  EXPECT_TRUE(port_.parts().empty());
}

TEST_F(DeviceLoopTest, ClosingASessionIsTakenHoweverManyTasksWait) {
  start(0);
  block();
  uint32_t waiting = 0;
  while (loop_->run([] {}).message().find("too many") == std::string::npos && waiting <= base::kMaxLoopTasks) {
    ++waiting;
  }
  EXPECT_EQ(waiting, base::kMaxLoopTasks);
  std::atomic<bool> drained{false};
  EXPECT_TRUE(loop_->close_session(base::SessionId{5}, [&drained] { drained = true; }).is_ok());
  EXPECT_FALSE(drained);
  release();
  EXPECT_TRUE(drained);
}

TEST_F(DeviceLoopTest, AClosingSessionUsesItsMemoryUntilItHasDrained) {
  start();
  ASSERT_TRUE(add().is_ok());
  submit(1, AdmissionWorld::slot(EXPERTD_OP_LAYOUT));
  await_parts(1);
  const auto in_use = [&] { return loop_->uses(base::SessionId{5}, &world_.large); };
  EXPECT_TRUE(ask(in_use));
  std::promise<void> drained;
  ASSERT_TRUE(loop_->close_session(base::SessionId{5}, [&] { drained.set_value(); }).is_ok());
  EXPECT_TRUE(ask(in_use)) << "its part still runs";
  EXPECT_FALSE(ask([&] { return loop_->uses(base::SessionId{5}, &world_.exact); }));
  EXPECT_FALSE(ask([&] { return loop_->uses(base::SessionId{6}, &world_.large); }));
  ASSERT_TRUE(loop_->run([&] { port_.finish(1); }).is_ok());
  ASSERT_EQ(drained.get_future().wait_for(kPatience), std::future_status::ready);
  EXPECT_FALSE(ask(in_use));
}

TEST_F(DeviceLoopTest, WhatIsStillInTheRingIsInFlight) {
  start();
  ASSERT_TRUE(add().is_ok());
  EXPECT_TRUE(ask([&] {
    submit(1, AdmissionWorld::slot(EXPERTD_OP_LAYOUT));  // the loop has not looked at the ring since
    return loop_->uses(base::SessionId{5}, &world_.large);
  }));
  std::promise<void> drained;
  ASSERT_TRUE(loop_->close_session(base::SessionId{5}, [&] { drained.set_value(); }).is_ok());
  ASSERT_TRUE(loop_->run([&] { port_.finish_all(); }).is_ok());
  ASSERT_EQ(drained.get_future().wait_for(kPatience), std::future_status::ready);
}

TEST_F(DeviceLoopTest, AClosingSessionUsesItsGroupsUntilItHasDrained) {
  start();
  (void)world_.admit(AdmissionWorld::slot(EXPERTD_OP_BARRIER));
  const engine::Request other = world_.request;
  world_.shared.post(1, 0, &other);
  ASSERT_TRUE(add().is_ok());
  submit(1, AdmissionWorld::slot(EXPERTD_OP_BARRIER));
  await_parts(1);
  const auto in_use = [&] { return loop_->uses_group(base::SessionId{5}, &world_.tables.groups[0].rank); };
  EXPECT_TRUE(ask(in_use));
  std::promise<void> drained;
  ASSERT_TRUE(loop_->close_session(base::SessionId{5}, [&] { drained.set_value(); }).is_ok());
  EXPECT_TRUE(ask(in_use)) << "its part still runs";
  ASSERT_TRUE(loop_->run([&] { port_.finish(1); }).is_ok());
  EXPECT_TRUE(ask(in_use)) << "the other rank's part still runs";
  world_.shared.part_finished(1);
  world_.shared.release(1, 0);
  loop_->wake();
  ASSERT_EQ(drained.get_future().wait_for(kPatience), std::future_status::ready);
  EXPECT_FALSE(ask(in_use));
}

TEST_F(DeviceLoopTest, TellsHowFullARingIs) {
  start();
  ASSERT_TRUE(add().is_ok());
  for (uint64_t seq = 1; seq <= kSlots; ++seq) {
    submit(seq, AdmissionWorld::slot(EXPERTD_OP_LAYOUT));
  }
  await_parts(kSlots);
  EXPECT_TRUE(ask([&] { return loop_observer_.most_used == kSlots && loop_observer_.last_capacity == kSlots; }));
  std::promise<void> drained;
  ASSERT_TRUE(loop_->close_session(base::SessionId{5}, [&] { drained.set_value(); }).is_ok());
  ASSERT_TRUE(loop_->run([&] { port_.finish_all(); }).is_ok());
  ASSERT_EQ(drained.get_future().wait_for(kPatience), std::future_status::ready);
}

TEST_F(DeviceLoopTest, TakesNothingAfterItsEnd) {
  start();
  loop_->stop();
  EXPECT_EQ(loop_->run([] {}).reason(), EXPERTD_REASON_UNAVAILABLE);
  EXPECT_EQ(loop_->close_session(base::SessionId{5}, [] {}).reason(), EXPERTD_REASON_UNAVAILABLE);
}

}  // namespace
}  // namespace expertd::test
