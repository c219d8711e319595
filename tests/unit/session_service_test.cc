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

/// Ranks of a group wake each other's loops.
class LoopWaker final : public engine::WakePort {
 public:
  explicit LoopWaker(const std::vector<std::unique_ptr<transport::DeviceLoop>>* loops) : loops_(loops) {}
  void wake(base::DeviceIndex device) override { (*loops_)[device.value]->wake(); }

 private:
  const std::vector<std::unique_ptr<transport::DeviceLoop>>* loops_;
};

/// The client's end of a ring, for barriers.
class ClientRing {
 public:
  explicit ClientRing(const session::AttachGrant& grant)
      : bytes_(grant.ring_bytes),
        base_(static_cast<char*>(::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, grant.ring_fd, 0))) {}
  ~ClientRing() { ::munmap(base_, bytes_); }
  ClientRing(const ClientRing&) = delete;
  ClientRing& operator=(const ClientRing&) = delete;

  void submit_barriers(base::GroupId group, uint64_t count) {
    auto* const slots = reinterpret_cast<expertd_slot*>(base_ + EXPERTD_RING_HEADER_BYTES);
    for (uint64_t seq = 1; seq <= count; ++seq) {
      expertd_slot slot{};
      slot.seq = seq;
      slot.op = EXPERTD_OP_BARRIER;
      slot.group = group.value;
      slots[seq - 1] = slot;
    }
    __atomic_store_n(&header()->submit_tail, count, __ATOMIC_SEQ_CST);
  }
  uint64_t taken() const { return __atomic_load_n(&header()->submit_head, __ATOMIC_ACQUIRE); }

 private:
  expertd_ring_header* header() const { return reinterpret_cast<expertd_ring_header*>(base_); }
  uint64_t bytes_;
  char* base_;
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
      EXPECT_TRUE(loops_[i]
                      ->start(&devices_[i]->port(), &wake_, &op_observers_[i], &observer_, [](base::SessionId) {})
                      .is_ok());
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

  session::AttachGrant attach_with_ring(uint32_t device) {
    session::AttachRequest request;
    request.device = "host:" + std::to_string(device);
    base::Result<session::AttachGrant> grant = service_->attach(request);
    EXPECT_TRUE(grant.is_ok()) << grant.status().message();
    return std::move(grant).value();
  }
  base::SessionId attach(uint32_t device) { return attach_with_ring(device).session; }
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

  size_t launched(uint32_t device) {
    size_t parts = 0;
    EXPECT_TRUE(loops_[device]->run([&] { parts = devices_[device]->fake_port.parts().size(); }).is_ok());
    return parts;
  }
  void finish_parts(uint32_t device) {
    EXPECT_TRUE(loops_[device]->run([&] { devices_[device]->fake_port.finish_all(); }).is_ok());
    loops_[device]->wake();
  }
  /// Two GPUs that reach what these masks say form a group.
  void make_gpus(uint64_t reached_by_first, uint64_t reached_by_second) {
    devices_[0]->told.is_cuda = devices_[1]->told.is_cuda = true;
    devices_[0]->told.peer_access_mask = reached_by_first;
    devices_[1]->told.peer_access_mask = reached_by_second;
  }
  /// Both ranks submit two barriers at once; how many the first launches before any has ended.
  size_t launched_of_two() {
    const session::AttachGrant grants[2] = {attach_with_ring(0), attach_with_ring(1)};
    ClientRing rings[2] = {ClientRing(grants[0]), ClientRing(grants[1])};
    std::vector<Answer> answers(2);
    for (uint32_t rank = 0; rank < 2; ++rank) {
      service_->join_group(grants[rank].session, request("moe", rank, 2), answers[rank].callback());
    }
    for (uint32_t rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(answers[rank].reason(), EXPERTD_REASON_NONE);
      rings[rank].submit_barriers(answers[rank].grant().group, 2);
      loops_[rank]->wake();
    }
    EXPECT_TRUE(becomes_true([&] { return rings[0].taken() == 2 && rings[1].taken() == 2; }));
    EXPECT_TRUE(becomes_true([&] { return launched(0) >= 1 && launched(1) >= 1; }));
    size_t at_once = 0;
    for (int turn = 0; turn < 20; ++turn) {  // each is at least one turn of both loops with all submissions there
      at_once = std::max(launched(0), launched(1));
    }
    finish_parts(0);
    EXPECT_EQ(launched(0), at_once) << "the other rank's part still runs";
    finish_parts(1);
    EXPECT_TRUE(becomes_true([&] { return launched(0) == 2 && launched(1) == 2; }));
    return at_once;
  }

  LoopWaker wake_{&loops_};
  FakeObserver op_observers_[2];
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
  const auto mask = service_->group_mask(second, joined.grant().group, {}, {});
  ASSERT_TRUE(mask.is_ok());
  EXPECT_EQ(mask.value().lost, base::RankSet(1)) << "its peers see at once that nobody is there";
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

TEST_F(SessionServiceTest, GpusThatReachEachOtherHaveSeveralOperationsAtATime) {
  make_gpus(3, 3);
  EXPECT_EQ(launched_of_two(), 2U);
}

TEST_F(SessionServiceTest, GpusWithoutMutualAccessHaveOneOperationAtATime) {
  make_gpus(3, 2);
  EXPECT_EQ(launched_of_two(), 1U);
}

TEST_F(SessionServiceTest, HostDevicesHaveSeveralOperationsAtATimeWhateverTheyReach) {
  EXPECT_EQ(launched_of_two(), 2U);
}

TEST_F(SessionServiceTest, APlanIsWhatTheDeviceOfTheSessionSays) {
  const base::SessionId session = attach(1);
  devices_[1]->told_memory = {.table_bytes = 100, .handle_bytes = 20, .pinned_bytes = 3};
  session::JoinRequest join = request("moe", 0, 2);
  base::Result<session::GroupPlan> plan = service_->plan_group(session, join.config);
  ASSERT_TRUE(plan.is_ok()) << plan.status().message();
  EXPECT_EQ(plan.value().table_bytes, 102U);
  EXPECT_EQ(plan.value().handle_bytes, 20U);
  EXPECT_EQ(plan.value().handles, session::ServiceOptions{}.handles_per_session - 1);
  EXPECT_EQ(plan.value().pinned_bytes, 3U);
  EXPECT_EQ(plan.value().worst_rows, uint64_t{2} * join.config.max_tokens);
  EXPECT_GT(plan.value().window_bytes, 0U);
  EXPECT_EQ(devices_[1]->groups, 0);
  join.config.hidden = 100;
  EXPECT_EQ(service_->plan_group(session, join.config).status().reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(service_->plan_group(base::SessionId{99}, join.config).status().reason(), EXPERTD_REASON_NO_SUCH_SESSION);
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
