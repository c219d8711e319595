// SPDX-License-Identifier: Apache-2.0
// engine.schedule as clients see it: sessions that loop large dispatches, others that run low latency beside them, and
// what the daemon counts. No time is compared with a bound.
#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <string>
#include <thread>

#include "tests/support/daemon_process.h"
#include "tests/support/fault_client.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {
namespace {

constexpr uint32_t kRanks = 2;
constexpr uint32_t kTokens = 4096;
constexpr uint32_t kHidden = 1024;
constexpr uint32_t kTopK = 2;
constexpr uint32_t kLlTokens = 16;
constexpr const char* kOvertakes = "expertd_op_overtakes_total{gpu=\"host\"}";

RankGroup::Configure shaped(uint32_t max_tokens, expertd_group_mode_t mode) {
  return [=](expertd_group_options_t* options) {
    options->num_experts = kRanks * 2;
    options->hidden = kHidden;
    options->top_k = kTopK;
    options->max_tokens = max_tokens;
    options->mode = mode;
  };
}

void fill_routing(uint32_t tokens, int64_t* topk_idx) {
  for (uint32_t i = 0; i < tokens * kTopK; ++i) {
    topk_idx[i] = (i + i / 5) % (kRanks * 2);
  }
}

/// Dispatches 4096 tokens per rank, again and again, on threads and sessions of its own.
class PrefillLoop {
 public:
  explicit PrefillLoop(const std::string& socket)
      : group_(socket, "prefill", kRanks, shaped(kTokens, EXPERTD_MODE_NORMAL)) {}
  ~PrefillLoop() { end(); }
  bool ok() const { return group_.ok(); }
  void begin() {
    thread_ = std::thread([this] { group_.run([this](Rank& rank) { loop(rank); }); });
  }
  void end() {
    stop_ = true;
    if (thread_.joinable()) {
      thread_.join();
    }
  }
  uint32_t rounds() const { return rounds_; }

 private:
  struct NextRound {
    PrefillLoop* loop;
    void operator()() noexcept {
      loop->go_on_ = !loop->stop_;
      ++loop->rounds_;
    }
  };

  void loop(Rank& rank) {
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    int64_t* topk_idx = rank.session.alloc<int64_t>(size_t{kTokens} * kTopK);
    fill_routing(kTokens, topk_idx);
    args.x = rank.session.alloc<uint16_t>(size_t{kTokens} * kHidden);
    args.dtype = EXPERTD_BF16;
    args.topk_idx = topk_idx;
    args.idx_type = EXPERTD_I64;
    args.tokens = kTokens;
    args.capacity_rows = kRanks * kTokens;
    args.recv_x = rank.session.alloc<uint16_t>(size_t{kRanks} * kTokens * kHidden);
    while (go_on_) {
      expertd_handle_t handle{};
      expertd_event_t event{};
      const Outcome issued = outcome_of(expertd_dispatch(rank.group, &args, nullptr, &handle, &event));
      const Outcome ended = issued.ok() ? finish(event).outcome : issued;
      EXPECT_TRUE(ended.ok()) << describe(ended);
      EXPECT_TRUE(outcome_of(expertd_handle_free(rank.group, handle)).ok());
      together_.arrive_and_wait();
    }
  }

  RankGroup group_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> go_on_{true};
  std::atomic<uint32_t> rounds_{0};
  std::barrier<NextRound> together_{kRanks, NextRound{this}};
  std::thread thread_;
};

OpEnd decode(Rank& rank, const void* x, const int64_t* topk_idx) {
  expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.x = x;
  args.dtype = EXPERTD_BF16;
  args.topk_idx = topk_idx;
  args.idx_type = EXPERTD_I64;
  args.tokens = kLlTokens;
  expertd_handle_t handle{};
  expertd_event_t event{};
  OpEnd end;
  end.outcome = outcome_of(expertd_ll_dispatch(rank.group, &args, nullptr, &handle, &event));
  return end.outcome.ok() ? finish(event) : end;
}

class ScheduleOf : public ::testing::TestWithParam<const char*> {
 protected:
  ScheduleOf() : daemon_(kRanks, {std::string("--engine-schedule=") + GetParam()}) {}
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }
  DaemonProcess daemon_;
};

TEST_P(ScheduleOf, BothSessionsGetOn) {
  PrefillLoop prefill(daemon_.attach_socket());
  RankGroup decoders(daemon_.attach_socket(), "decode", kRanks, shaped(kLlTokens, EXPERTD_MODE_INFERENCE));
  ASSERT_TRUE(prefill.ok() && decoders.ok()) << decoders.failure();
  prefill.begin();
  decoders.run([&](Rank& rank) {
    const uint16_t* x = rank.session.alloc<uint16_t>(size_t{kLlTokens} * kHidden);
    int64_t* topk_idx = rank.session.alloc<int64_t>(size_t{kLlTokens} * kTopK);
    fill_routing(kLlTokens, topk_idx);
    for (int round = 0; round < 200; ++round) {
      const OpEnd end = decode(rank, x, topk_idx);
      ASSERT_TRUE(end.outcome.ok()) << describe(end.outcome);
    }
  });
  const uint32_t beside = prefill.rounds();
  while (prefill.rounds() < beside + 2) {
    std::this_thread::yield();
  }
  prefill.end();
  RecordProperty("overtakes", std::to_string(daemon_.metric(kOvertakes)));
  if (std::string(GetParam()) == "latency") {
    EXPECT_GT(daemon_.metric(kOvertakes), 0);
  }
  EXPECT_TRUE(daemon_.metric_becomes("expertd_ops_total{op=\"ll_dispatch\",gpu=\"host\",result=\"ok\"}", 400));
}

TEST_P(ScheduleOf, ClientsOfOtherProcessesGetOnBesideALargeOne) {
  FaultClient clients[kRanks];
  PrefillLoop prefill(daemon_.attach_socket());
  ASSERT_TRUE(prefill.ok());
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    ASSERT_TRUE(clients[rank].attach(daemon_.attach_socket(), rank));
    clients[rank].send("join others " + std::to_string(rank) + " " + std::to_string(kRanks));
  }
  for (FaultClient& client : clients) {
    ASSERT_TRUE(is_ok(client.answer().value_or("")));
  }
  prefill.begin();
  for (int round = 0; round < 20; ++round) {
    for (FaultClient& client : clients) {
      client.send("barrier");
    }
    for (FaultClient& client : clients) {
      const std::string said = client.answer().value_or("nothing");
      ASSERT_TRUE(is_ok(said)) << said;
    }
  }
  for (FaultClient& client : clients) {
    client.send("rounds 20");
  }
  for (FaultClient& client : clients) {
    const std::string said = client.answer().value_or("nothing");
    ASSERT_TRUE(is_ok(said)) << said;
  }
  prefill.end();
}

TEST_P(ScheduleOf, IsShownToOperators) {
  const RunResult status =
      run_program("expertctl", {"--socket=" + daemon_.control_socket(), "status"}, std::chrono::seconds(10));
  EXPECT_NE(status.output.find(std::string("schedule ") + GetParam()), std::string::npos)
      << status.output << status.error;
}

INSTANTIATE_TEST_SUITE_P(Each, ScheduleOf, ::testing::Values("latency", "fair", "fifo"),
                         [](const auto& row) { return std::string(row.param); });

}  // namespace
}  // namespace expertd::support
