// SPDX-License-Identifier: Apache-2.0
// The session service over real loops and fake devices: joins that are taken back, and what happens just when a session
// ends.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/session/service.h"
#include "daemon/transport/device_loop.h"
#include "tests/support/fake_device.h"

namespace expertd::test {
namespace {

constexpr std::chrono::seconds kPatience(20);

class SilentObserver final : public session::SessionObserver, public transport::LoopObserver {
 public:
  void opened(const session::SessionSnapshot& /*session*/) override {}
  void ended(base::SessionId /*session*/, const std::string& /*cause*/) override {}
  void reclaimed(base::SessionId /*session*/, uint64_t /*duration_ns*/) override { ++reclaims; }
  void beat(base::DeviceIndex /*device*/, uint64_t /*now_ns*/, uint64_t /*lag_ns*/) override {}
  void ring_fill(base::DeviceIndex /*device*/, uint32_t /*used*/, uint32_t /*capacity*/) override {}
  std::atomic<int> reclaims{0};
};

/// What a join was answered, once it was.
class Answer {
 public:
  session::JoinCallback callback() {
    return [this](const session::ErrorDetail& error, const session::JoinGrant& grant) {
      grant_ = grant;
      promise_.set_value(error.status);
    };
  }
  base::Reason reason() {
    EXPECT_EQ(future_.wait_for(kPatience), std::future_status::ready);
    return future_.get().reason();
  }
  bool waits() const { return future_.wait_for(std::chrono::seconds(0)) != std::future_status::ready; }
  const session::JoinGrant& grant() const { return grant_; }

 private:
  std::promise<base::Status> promise_;
  std::shared_future<base::Status> future_ = promise_.get_future().share();
  session::JoinGrant grant_;
};

class SessionServiceTest : public testing::Test {
 protected:
  SessionServiceTest() {
    std::vector<session::DeviceEntry> entries;
    for (uint32_t i = 0; i < 2; ++i) {
      devices_.push_back(std::make_unique<FakeDevice>(i));
      loops_.push_back(std::move(transport::DeviceLoop::create(base::DeviceIndex{i}, {})).value());
      EXPECT_TRUE(
          loops_[i]->start(&devices_[i]->port(), &wake_, &op_observer_, &observer_, [](base::SessionId) {}).is_ok());
      entries.push_back({devices_[i].get(), loops_[i].get()});
    }
    session::ServiceOptions options;
    options.max_groups = 2;
    options.op_timeout_ns = options.first_op_timeout_ns = 100'000'000'000;
    service_ = std::make_unique<session::SessionService>(options, entries, &observer_);
    EXPECT_TRUE(service_->start().is_ok());
  }
  ~SessionServiceTest() override {
    service_->stop(base::now_ns() + 5'000'000'000);
    for (auto& loop : loops_) {
      loop->stop();
    }
  }

  base::SessionId attach(uint32_t device) {
    session::AttachRequest request;
    request.device = "host:" + std::to_string(device);
    base::Result<session::AttachGrant> grant = service_->attach(request);
    EXPECT_TRUE(grant.is_ok()) << grant.status().message();
    return grant.value().session;
  }
  static session::JoinRequest request(const std::string& name, uint32_t rank, uint32_t ranks) {
    session::JoinRequest join;
    join.name = name;
    join.rank = rank;
    join.config.expert_parallel_size = ranks;
    join.config.num_experts = ranks * 4;
    join.config.hidden = 512;
    join.config.top_k = 4;
    join.config.max_tokens = 16;
    join.config.mode = session::GroupMode::kAuto;
    join.config.on_rank_loss = session::OnRankLoss::kFail;
    return join;
  }
  uint32_t register_memory(base::SessionId session) {
    base::ScopedFd fd(::memfd_create("registered", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    base::Result<uint64_t> token = service_->put_fd(session, std::move(fd));
    base::Result<session::BufferGrant> grant = service_->register_fd(session, token.value(), 0, 4096, 0);
    EXPECT_TRUE(grant.is_ok()) << grant.status().message();
    return grant.value().buffer_id;
  }
  static uint64_t soon() { return base::now_ns() + 20'000'000'000; }
  template <typename Condition>
  static bool becomes_true(Condition condition) {
    const uint64_t deadline_ns = soon();
    while (!condition() && base::now_ns() < deadline_ns) {
      std::this_thread::yield();
    }
    return condition();
  }

  FakeWakePort wake_;
  FakeObserver op_observer_;
  SilentObserver observer_;
  std::vector<std::unique_ptr<FakeDevice>> devices_;
  std::vector<std::unique_ptr<transport::DeviceLoop>> loops_;
  std::unique_ptr<session::SessionService> service_;
};

TEST_F(SessionServiceTest, JoinsThatWaitCountAgainstTheLimitUntilTheyAreCancelled) {
  const base::SessionId session = attach(0);
  std::vector<Answer> answers(4);
  const auto flag = std::make_shared<std::atomic<bool>>(false);
  session::JoinRequest first = request("a", 0, 2);
  first.cancelled = flag;
  service_->join_group(session, first, answers[0].callback());
  service_->join_group(session, request("b", 0, 2), answers[1].callback());
  service_->join_group(session, request("c", 0, 2), answers[2].callback());
  EXPECT_EQ(answers[2].reason(), EXPERTD_REASON_GROUP_LIMIT);
  EXPECT_TRUE(answers[0].waits() && answers[1].waits());
  *flag = true;
  service_->join_group(session, request("c", 0, 1), answers[3].callback());
  EXPECT_EQ(answers[3].reason(), EXPERTD_REASON_NONE) << "the cancelled one's place is free at once";
  EXPECT_EQ(answers[0].reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_TRUE(service_->leave_group(session, answers[3].grant().group, soon()).is_ok());
  EXPECT_EQ(devices_[0]->groups, 0);
  service_->session_ended(session, "eof");
  EXPECT_EQ(answers[1].reason(), EXPERTD_REASON_CANCELLED);
}

TEST_F(SessionServiceTest, ACancelledJoinGivesItsRankBackByItself) {
  const base::SessionId first = attach(0);
  Answer cancelled;
  session::JoinRequest join = request("moe", 0, 2);
  const auto flag = std::make_shared<std::atomic<bool>>(false);
  join.cancelled = flag;
  service_->join_group(first, join, cancelled.callback());
  *flag = true;
  EXPECT_EQ(cancelled.reason(), EXPERTD_REASON_CANCELLED);
}

TEST_F(SessionServiceTest, ARankThatIsCancelledWhileItsGroupFormsLeavesIt) {
  const base::SessionId first = attach(0);
  const base::SessionId second = attach(1);
  Answer cancelled;
  Answer joined;
  session::JoinRequest join = request("moe", 0, 2);
  const auto flag = std::make_shared<std::atomic<bool>>(false);
  join.cancelled = flag;
  devices_[1]->on_create_window = [flag] { *flag = true; };
  service_->join_group(first, join, cancelled.callback());
  service_->join_group(second, request("moe", 1, 2), joined.callback());
  EXPECT_EQ(cancelled.reason(), EXPERTD_REASON_CANCELLED);
  EXPECT_EQ(joined.reason(), EXPERTD_REASON_NONE);
  const auto mask = service_->group_mask(second, joined.grant().group, 0, 0);
  ASSERT_TRUE(mask.is_ok());
  EXPECT_EQ(mask.value().lost, 1U) << "its peers see at once that nobody is there";
  EXPECT_EQ(devices_[0]->groups, 0);
  EXPECT_EQ(devices_[0]->memory_held, 0);
}

TEST_F(SessionServiceTest, AJoinOfASessionThatEndsMeanwhileLeavesNoGhost) {
  const base::SessionId session = attach(0);
  Answer ghost;
  devices_[0]->on_index = [&] { service_->session_ended(session, "eof"); };  // after the session was found
  service_->join_group(session, request("moe", 0, 2), ghost.callback());
  EXPECT_EQ(ghost.reason(), EXPERTD_REASON_CANCELLED);
  const base::SessionId other = attach(0);
  Answer joined;
  session::JoinRequest join = request("moe", 0, 2);
  join.timeout_ns = 1;
  service_->join_group(other, join, joined.callback());
  EXPECT_EQ(joined.reason(), EXPERTD_REASON_JOIN_TIMEOUT) << "the rank is free";
}

TEST_F(SessionServiceTest, AGroupThatIsNotHandedOutCannotBeLeft) {
  const base::SessionId session = attach(0);
  Answer joined;
  base::Status left;
  devices_[0]->on_create_window = [&] { left = service_->leave_group(session, base::GroupId{1}, soon()); };
  service_->join_group(session, request("moe", 0, 1), joined.callback());
  ASSERT_EQ(joined.reason(), EXPERTD_REASON_NONE);
  EXPECT_EQ(joined.grant().group.value, 1U) << "as the client guessed";
  EXPECT_EQ(left.reason(), EXPERTD_REASON_NO_SUCH_GROUP);
  EXPECT_TRUE(service_->leave_group(session, base::GroupId{1}, soon()).is_ok());
  EXPECT_EQ(devices_[0]->groups, 0);
}

TEST_F(SessionServiceTest, LeavingAGroupKeepsALaterBufferOfItsWindowsId) {
  const base::SessionId session = attach(0);
  Answer joined;
  service_->join_group(session, request("moe", 0, 1), joined.callback());
  ASSERT_EQ(joined.reason(), EXPERTD_REASON_NONE);
  const uint32_t window = joined.grant().window.buffer_id;
  ASSERT_TRUE(service_->unregister(session, window, soon()).is_ok());
  ASSERT_EQ(register_memory(session), window);
  EXPECT_TRUE(service_->leave_group(session, joined.grant().group, soon()).is_ok());
  EXPECT_EQ(devices_[0]->memory_held, 1);
  EXPECT_TRUE(service_->unregister(session, window, soon()).is_ok());
  EXPECT_EQ(devices_[0]->memory_held, 0);
}

TEST_F(SessionServiceTest, MemoryThatBeginsAtAnOddAddressIsRefusedWhateverTheDeviceWouldSay) {
  const base::SessionId session = attach(0);
  base::ScopedFd fd(::memfd_create("registered", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  base::Result<uint64_t> token = service_->put_fd(session, std::move(fd));
  ASSERT_TRUE(token.is_ok());
  EXPECT_EQ(service_->register_fd(session, token.value(), 8, 4096, 0).status().reason(), EXPERTD_REASON_UNALIGNED);
  EXPECT_EQ(service_->register_fd(session, token.value(), 0, 4096, 0).status().reason(), EXPERTD_REASON_NO_SUCH_TOKEN);
  EXPECT_EQ(devices_[0]->memory_held, 0);
}

TEST_F(SessionServiceTest, AReclaimThatBlocksInTheDeviceHoldsNoLockOfAScrape) {
  const base::SessionId session = attach(0);
  (void)register_memory(session);
  bool looked = false;
  devices_[0]->on_close_session = [&] {
    auto look =
        std::async(std::launch::async, [&] { return service_->devices().size() + service_->sessions().size(); });
    looked = look.wait_for(kPatience) == std::future_status::ready;
  };
  service_->session_ended(session, "eof");
  ASSERT_TRUE(becomes_true([&] { return observer_.reclaims == 1; }));
  EXPECT_TRUE(looked);
  EXPECT_EQ(devices_[0]->memory_held, 0);
}

}  // namespace
}  // namespace expertd::test
