// SPDX-License-Identifier: Apache-2.0
// A group of ranks, one engine, one session and one fake device each, over one GroupShared: what the engine's tests
// drive by hand, with the time as an argument.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "daemon/engine/engine.h"
#include "tests/support/fake_ports.h"

namespace expertd::test {

inline constexpr uint64_t kDeadlineNs = 1'000;

inline engine::GroupSettings group_settings(uint32_t ranks, bool mask_on_loss,
                                            uint32_t exchange_pages = engine::kExchangePages) {
  engine::GroupSettings settings;
  settings.exchange_pages = exchange_pages;
  settings.shape.id = base::GroupId{7};
  settings.shape.ranks = ranks;
  settings.shape.experts = ranks * 4;
  settings.shape.hidden = 128;
  settings.shape.top_k = 4;
  settings.shape.max_tokens = 64;
  settings.mask_on_loss = mask_on_loss;
  settings.op_timeout_ns = kDeadlineNs;
  settings.first_op_timeout_ns = kDeadlineNs;
  for (uint32_t place = 0; place < std::min(ranks, base::kMaxLocalRanks); ++place) {
    settings.shape.devices[place] = base::DeviceIndex{place};
  }
  return settings;
}

/// A dispatch that its peers agree with.
inline engine::Request plain_request() {
  engine::Request request;
  request.shape.kind = kernels::OpKind::kDispatch;
  request.shape.tokens = 4;
  request.shape.top_k = 4;
  request.shape.row_bytes = 256;
  request.deadline_ns = kDeadlineNs;
  return request;
}

class FakeRank {
 public:
  FakeRank(engine::GroupShared* group, uint32_t rank, FakeWakePort* wake)
      : engine_(base::DeviceIndex{rank}, &port, wake, &observer),
        session_(base::SessionId{rank + 1}, &completions, nullptr),
        state_{group, rank, 1} {
    engine_.add_session(&session_);
  }

  /// Submits as this rank of the group and returns the sequence.
  uint64_t submit(const engine::Request& request = plain_request()) { return put(request, &state_); }
  uint64_t submit_local(const engine::Request& request = plain_request()) { return put(request, nullptr); }
  bool run(uint64_t now_ns) { return engine_.run_once(now_ns); }
  void close(uint64_t now_ns) { engine_.close_session(&session_, now_ns); }
  bool drained() { return engine_.forget_if_drained(&session_); }

  bool completed(uint64_t seq) const { return completions.count.count(seq) != 0; }
  /// Of a completed sequence.
  const expertd_completion& completion(uint64_t seq) const { return completions.by_seq.at(seq); }
  uint32_t reason(uint64_t seq) const { return completion(seq).reason; }
  engine::Engine& engine() { return engine_; }
  engine::EngineSession& session() { return session_; }
  const engine::RankState* state() const { return &state_; }

  FakeDevicePort port;
  FakeCompletionPort completions;
  FakeObserver observer;

 private:
  uint64_t put(const engine::Request& request, engine::RankState* rank) {
    const uint64_t seq = next_seq_++;
    const uint32_t slot = static_cast<uint32_t>((seq - 1) % EXPERTD_RING_SLOTS_MAX);
    engine::Request& stored = session_.request(slot);
    stored = request;
    stored.seq = seq;
    stored.slot = slot;
    stored.shape.rank = state_.rank;
    engine_.submit(&session_, slot, rank);
    return seq;
  }

  engine::Engine engine_;
  engine::EngineSession session_;
  engine::RankState state_;
  uint64_t next_seq_ = 1;
};

class FakeGroup {
 public:
  explicit FakeGroup(uint32_t ranks, bool mask_on_loss = false, uint32_t exchange_pages = engine::kExchangePages)
      : shared(group_settings(ranks, mask_on_loss, exchange_pages)) {
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      ranks_.push_back(std::make_unique<FakeRank>(&shared, rank, &wake));
    }
  }

  FakeRank& operator[](uint32_t rank) { return *ranks_[rank]; }
  uint32_t size() const { return static_cast<uint32_t>(ranks_.size()); }

  /// One operation of every rank; all have the same sequence when nothing else was submitted.
  uint64_t submit_all(const engine::Request& request = plain_request()) {
    uint64_t seq = 0;
    for (const std::unique_ptr<FakeRank>& rank : ranks_) {
      seq = rank->submit(request);
    }
    return seq;
  }
  /// Turns every engine until none moves; false when that does not end.
  bool settle(uint64_t now_ns) {
    for (uint32_t turn = 0; turn < 1000; ++turn) {
      bool moved = false;
      for (const std::unique_ptr<FakeRank>& rank : ranks_) {
        moved |= rank->run(now_ns);
      }
      if (!moved) {
        return true;
      }
    }
    return false;
  }
  void finish_all() {
    for (const std::unique_ptr<FakeRank>& rank : ranks_) {
      rank->port.finish_all();
    }
  }
  /// What the session service does when a lease ends.
  void end_session(uint32_t rank, uint64_t now_ns) {
    shared.set_lost(rank);
    ranks_[rank]->close(now_ns);
  }

  engine::GroupShared shared;
  FakeWakePort wake;

 private:
  std::vector<std::unique_ptr<FakeRank>> ranks_;
};

}  // namespace expertd::test
