// SPDX-License-Identifier: Apache-2.0
// Label gpu. Captured low latency operations through the ports of up to four GPUs, rung as a replayed graph rings them:
// in any order, with ranks that are late, with the engine away for longer than the arms last, with closes of memory
// that want the streams empty, with doorbells that hold anything, and with ranks whose graphs went apart. Outputs are
// compared byte for byte with the host kernels. Skips where there is no GPU.
#include <algorithm>
#include <cstdio>
#include <numeric>

#include "tests/device/case_requests.h"
#include "tests/device/gpu_fixture.h"

namespace expertd::device_test {
namespace {

class CudaCaptures : public GpuTest {
 protected:
  static constexpr uint32_t kLanes = 2;

  struct Entry {
    std::vector<uint64_t> entry;  // by rank
    std::vector<uint32_t> words;
    uint32_t lane = 0;
  };

  void TearDown() override {
    if (group_ != nullptr && created_) {
      end_captures();
      group_->destroy_group();
    }
  }

  /// A group of a random case for all GPUs, with its pairs captured: in lanes by turns.
  void capture(uint64_t seed) {
    RandomCase first = support::make_random_case(seed, OpKind::kLlDispatch);
    const base::RankSet all = base::RankSet::first(group_->size());
    while (first.shape.ranks != group_->size() || first.shape.active_ranks != all || is_wrong(first)) {
      first = support::make_random_case(++seed, OpKind::kLlDispatch);
    }
    repro_ = support::repro_line(first);
    const base::Status made = group_->create_group(first.shape, kLanes);
    ASSERT_TRUE(made.is_ok()) << made.message();
    created_ = true;
    make_pairs(group_.get(), first, &pairs_);
    for (uint32_t i = 0; i < pairs_.ops.size(); ++i) {
      auto& requests = pairs_.ops[i]->requests;
      for (Request& request : requests) {
        request.captured = true;
        request.capture_lane = i % kLanes;
        request.slot = i;
        request.admit_ns = base::now_ns();
        request.deadline_ns = request.admit_ns + deadline_ns_;
      }
      auto parts = group_->launch(&requests, all.low());
      ASSERT_TRUE(group_->drain(&parts));
      Entry entry;
      entry.lane = i % kLanes;
      for (const LaunchedPart& part : parts) {
        ASSERT_EQ(part.outcome.report.reason, 0U);
        ASSERT_NE(part.outcome.capture_entry, 0U);
        entry.entry.push_back(part.outcome.capture_entry);
        entry.words.push_back(part.outcome.capture_words);
      }
      entries_.push_back(entry);
    }
  }

  /// A case whose operations end with a Reason has no outputs to compare; rows of bytes may not fit the staging, and
  /// such operations are not captured.
  static bool is_wrong(const RandomCase& it) {
    if (it.shape.payload == kernels::Payload::kBytes) {
      return true;
    }
    for (const RankInput& input : it.inputs) {
      for (const int64_t id : input.topk_idx) {
        if (id < -1 || id >= static_cast<int64_t>(it.shape.experts)) {
          return true;
        }
      }
    }
    return false;
  }

  void tend() {
    for (uint32_t r = 0; r < group_->size(); ++r) {
      group_->port(r).tend(base::now_ns());
      const Request* request = nullptr;
      engine::Outcome outcome;
      while (group_->port(r).next_replay(&request, &outcome)) {
        ++replays_;
        last_reason_ = outcome.report.reason;
      }
    }
  }
  void ring(uint32_t op, uint32_t rank) {
    group_->write_word(rank, EXPERTD_CAPTURE_DOORBELL_OFFSET(entries_[op].words[rank]), entries_[op].entry[rank]);
  }
  /// Of all ranks, as close together as the host can.
  void ring_all(uint32_t op) {
    for (uint32_t r = 0; r < group_->size(); ++r) {
      group_->write_word_async(r, EXPERTD_CAPTURE_DOORBELL_OFFSET(entries_[op].words[r]), entries_[op].entry[r]);
    }
    for (uint32_t r = 0; r < group_->size(); ++r) {
      group_->wait_for_words(r);
    }
  }
  /// Replays without the engine until an operation does not end, which it does then with it; returns how many did.
  uint32_t replay_alone(support::Random* random) {
    for (uint32_t done = 0; done < 200; ++done) {
      const uint32_t op = 2 * static_cast<uint32_t>(random->below(kPairs));
      ring_all(op);
      bool late = false;
      for (uint32_t r = 0; r < group_->size(); ++r) {
        uint64_t reason = take(op, r, late, late ? kDrainNs : 50'000'000);
        if (reason == ~uint64_t{0} && !late) {
          late = true;
          reason = take(op, r);
        }
        EXPECT_EQ(reason, 0U) << repro_;
      }
      if (late) {
        return done;
      }
    }
    return 200;
  }
  /// Waits for the completion as the graph does, and takes it. The Reason, or ~0 when it did not come.
  uint64_t take(uint32_t op, uint32_t rank, bool tends = true, uint64_t limit_ns = kDrainNs) {
    const uint32_t words = entries_[op].words[rank];
    const uint64_t until = base::now_ns() + limit_ns;
    while (group_->read_word(rank, EXPERTD_CAPTURE_COMPLETION_OFFSET(words)) == 0) {
      if (tends) {
        tend();
      }
      if (base::now_ns() > until) {
        return ~uint64_t{0};
      }
    }
    const uint64_t reason = group_->read_word(rank, EXPERTD_CAPTURE_RESULT_OFFSET(words));
    group_->write_word(rank, EXPERTD_CAPTURE_COMPLETION_OFFSET(words), 0);
    return reason;
  }
  void replay(uint32_t op, bool tends = true) {
    for (uint32_t r = 0; r < group_->size(); ++r) {
      ring(op, r);
    }
    for (uint32_t r = 0; r < group_->size(); ++r) {
      ASSERT_EQ(take(op, r, tends), 0U) << "operation " << op << " of rank " << r << "\n" << repro_;
    }
  }
  void upload() {
    for (uint32_t r = 0; r < group_->size(); ++r) {
      group_->arena(r).upload(group_->device_index(r));
    }
  }
  void compare() {
    for (uint32_t r = 0; r < group_->size(); ++r) {
      group_->arena(r).download(group_->device_index(r));
      for (size_t i = 0; i < pairs_.ops.size(); ++i) {
        SCOPED_TRACE(repro_ + "\nrank " + std::to_string(r) + ", operation " + std::to_string(i));
        expect_equal_outputs(pairs_.ops[i]->host.ranks[r], pairs_.ops[i]->gpu.ranks[r]);
      }
    }
  }
  /// Every pair once, in random order, into poisoned outputs.
  template <typename Run>
  void round(support::Random* random, const Run& run) {
    std::vector<uint32_t> order(kPairs);
    std::iota(order.begin(), order.end(), 0U);
    for (uint32_t i = kPairs - 1; i > 0; --i) {
      std::swap(order[i], order[random->below(i + 1)]);
    }
    upload();
    for (const uint32_t pair : order) {
      run(2 * pair);
      run(2 * pair + 1);
    }
    compare();
  }
  void wait_until_armed() {
    for (int i = 0; i < 200; ++i) {
      tend();
    }
  }
  void end_captures() {
    const uint64_t until = base::now_ns() + kDrainNs;
    bool ended = false;
    while (!ended && base::now_ns() < until) {
      ended = true;
      for (uint32_t r = 0; r < group_->size(); ++r) {
        ended = group_->port(r).end_captures({r + 1}, group_->group()) && ended;
      }
      tend();
    }
    EXPECT_TRUE(ended) << "the lanes did not end";
  }

  Pairs pairs_;
  std::vector<Entry> entries_;
  std::string repro_;
  bool created_ = false;
  uint64_t deadline_ns_ = kDrainNs;
  uint64_t replays_ = 0;
  uint32_t last_reason_ = 0;
};

TEST_F(CudaCaptures, ReplayInAnyOrder) {
  for (uint64_t seed = 1; seed < 13 && !HasFailure(); ++seed) {
    pairs_ = {};
    entries_.clear();
    capture(seed * 100);
    if (HasFatalFailure()) {
      return;
    }
    support::Random random(seed);
    for (uint32_t i = 0; i < 12 && !HasFailure(); ++i) {
      round(&random, [&](uint32_t op) { replay(op); });
    }
    end_captures();
    group_->destroy_group();
    created_ = false;
  }
  EXPECT_GE(replays_, 12U * 12 * 2 * kPairs) << "of every rank";
}

TEST_F(CudaCaptures, LateRanks) {
  capture(7);
  support::Random random(7);
  for (uint32_t i = 0; i < 20 && !HasFailure(); ++i) {
    round(&random, [&](uint32_t op) {
      const auto first = static_cast<uint32_t>(random.below(group_->size()));
      ring(op, first);
      // Longer than a kernel waits, sometimes with the engine looking and sometimes not.
      const uint64_t until = base::now_ns() + 100'000 + random.below(1'000'000);
      const bool looks = random.chance(50);
      while (base::now_ns() < until) {
        if (looks) {
          tend();
        }
      }
      for (uint32_t r = 0; r < group_->size(); ++r) {
        if (r != first) {
          ring(op, r);
        }
      }
      for (uint32_t r = 0; r < group_->size(); ++r) {
        ASSERT_EQ(take(op, r), 0U) << repro_;
      }
    });
  }
}

TEST_F(CudaCaptures, ArmsRunOutAndOperationsAreLateNotWrong) {
  capture(11);
  support::Random random(11);
  wait_until_armed();
  // Without the engine there are 64 arms per lane; what comes behind them waits for it, and so does an operation whose
  // doorbells this thread was kept from ringing together, which is why there are several attempts.
  upload();
  uint32_t done = 0;
  for (int attempt = 0; attempt < 20 && done != 64 && !HasFailure(); ++attempt) {
    done = replay_alone(&random);
    ASSERT_LE(done, 64U) << "all of these were in one lane";
    wait_until_armed();
  }
  EXPECT_EQ(done, 64U);
  for (uint32_t i = 0; i < 5 && !HasFailure(); ++i) {
    round(&random, [&](uint32_t op) { replay(op); });
  }
}

TEST_F(CudaCaptures, DoorbellsMayHoldAnything) {
  capture(13);
  support::Random random(13);
  round(&random, [&](uint32_t op) { replay(op); });
  // None of these names an operation. On all ranks at once: one alone is like one whose graphs went apart.
  for (const uint64_t value :
       {uint64_t{100}, uint64_t{2048}, uint64_t{2049}, uint64_t{0xffff}, uint64_t{0x10000},
        uint64_t{EXPERTD_ABORT_WORD}, uint64_t{EXPERTD_CAPTURE_CANCEL} - 1, uint64_t{EXPERTD_CAPTURE_CANCEL} + 1}) {
    upload();
    for (uint32_t r = 0; r < group_->size(); ++r) {
      group_->write_word(r, EXPERTD_CAPTURE_DOORBELL_OFFSET(entries_[0].words[r]), value);
    }
    for (uint32_t r = 0; r < group_->size(); ++r) {
      EXPECT_EQ(take(0, r), static_cast<uint64_t>(EXPERTD_REASON_DESCRIPTOR_MALFORMED)) << value;
    }
  }
  round(&random, [&](uint32_t op) { replay(op); });
}

TEST_F(CudaCaptures, HostileIdsAndRowNumbersStayInside) {
  capture(17);
  upload();
  // The ids are read anew with each replay: a value out of range is a Reason, and nothing is written outside.
  const engine::TensorView& ids = pairs_.ops[0]->requests[0].tensors[EXPERTD_IN_TOPK_IDX];
  const engine::TensorView& other = pairs_.ops[0]->requests[1 % group_->size()].tensors[EXPERTD_IN_TOPK_IDX];
  ASSERT_TRUE(ids.mapping != nullptr && other.mapping != nullptr && pairs_.ops[0]->requests[0].shape.tokens != 0)
      << "the case has no tokens: choose another seed";
  const uint32_t device = group_->device_index(0);
  const uint64_t hostile[] = {0x7fffffffffffffffULL, 0x8000000000000000ULL, 0x00000000fffffffeULL};
  for (const uint64_t value : hostile) {
    ASSERT_EQ(cudaSuccess, cudaSetDevice(static_cast<int>(device)));
    ASSERT_EQ(cudaSuccess, cudaMemcpy(ids.on({device}), &value, sizeof(value), cudaMemcpyHostToDevice));
    for (uint32_t r = 0; r < group_->size(); ++r) {
      ring(0, r);
    }
    EXPECT_NE(take(0, 0), 0U);
    for (uint32_t r = 1; r < group_->size(); ++r) {
      EXPECT_NE(take(0, r), 0U) << "the others hear of it";
    }
  }
  support::Random random(17);
  round(&random, [&](uint32_t op) { replay(op); });
}

TEST_F(CudaCaptures, ClosesOfMemoryAreNotHeldUp) {
  capture(19);
  support::Random random(19);
  for (uint32_t i = 0; i < 10 && !HasFailure(); ++i) {
    wait_until_armed();
    for (uint32_t r = 0; r < group_->size(); ++r) {
      group_->gate(r).hold();
    }
    const uint64_t until = base::now_ns() + kDrainNs;
    const bool rings = random.chance(50);  // while the arms are taken back
    if (rings) {
      for (uint32_t r = 0; r < group_->size(); ++r) {
        ring(0, r);
      }
    }
    bool idle = false;
    while (!idle && base::now_ns() < until) {
      tend();
      idle = true;
      for (uint32_t r = 0; r < group_->size(); ++r) {
        idle = idle && group_->gate(r).idle();
      }
    }
    EXPECT_TRUE(idle) << "arms stayed in the way";
    for (uint32_t r = 0; r < group_->size(); ++r) {
      group_->gate(r).release();
    }
    for (uint32_t r = 0; rings && r < group_->size(); ++r) {
      ASSERT_EQ(take(0, r), 0U) << repro_;
    }
    round(&random, [&](uint32_t op) { replay(op); });
  }
}

TEST_F(CudaCaptures, RanksThatWentApartAreTold) {
  if (group_->size() < 2) {
    GTEST_SKIP() << "needs two GPUs";
  }
  capture(23);
  upload();
  ring(0, 0);
  for (uint32_t r = 1; r < group_->size(); ++r) {
    ring(2, r);
  }
  for (uint32_t r = 0; r < group_->size(); ++r) {
    EXPECT_EQ(take(0, r), static_cast<uint64_t>(EXPERTD_REASON_OP_MISMATCH));
  }
  // And so is every operation after it.
  for (uint32_t r = 0; r < group_->size(); ++r) {
    ring(2, r);
    EXPECT_EQ(take(2, r), static_cast<uint64_t>(EXPERTD_REASON_OP_MISMATCH));
  }
}

TEST_F(CudaCaptures, ARankThatDoesNotComeEndsTheOthersWithTimeout) {
  if (group_->size() < 2) {
    GTEST_SKIP() << "needs two GPUs";
  }
  deadline_ns_ = 50'000'000;
  capture(29);
  upload();
  const uint64_t begin = base::now_ns();
  ring(0, 0);
  EXPECT_EQ(take(0, 0), static_cast<uint64_t>(EXPERTD_REASON_TIMEOUT));
  EXPECT_LT(base::now_ns() - begin, 2'000'000'000U);
  ring(0, 1);
  EXPECT_EQ(take(0, 1), static_cast<uint64_t>(EXPERTD_REASON_TIMEOUT));
}

TEST_F(CudaCaptures, ARankThatLeavesReleasesTheOthers) {
  if (group_->size() < 2) {
    GTEST_SKIP() << "needs two GPUs";
  }
  capture(31);
  upload();
  ring(0, 0);
  for (int i = 0; i < 50; ++i) {
    tend();
  }
  const uint64_t until = base::now_ns() + kDrainNs;
  bool ended = false;
  while (!ended && base::now_ns() < until) {
    ended = group_->port(1).end_captures({2}, {});
    tend();
  }
  EXPECT_TRUE(ended);
  EXPECT_EQ(take(0, 0), static_cast<uint64_t>(EXPERTD_REASON_PEER_LOST));
  ring(0, 0);
  EXPECT_EQ(take(0, 0), static_cast<uint64_t>(EXPERTD_REASON_PEER_LOST)) << "at once, from now on";
}

}  // namespace
}  // namespace expertd::device_test
