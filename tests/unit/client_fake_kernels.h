// SPDX-License-Identifier: Apache-2.0
// A stand-in for the kernels of the library: launches are written down, and the test says when and how each ends. Any
// thread.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "client/src/local_kernels/local_kernels.h"

namespace expertd::test {

class FakeKernels final : public client::LocalKernels {
 public:
  struct Launch {
    client::LayoutParams params;
    uint32_t slot = 0;
    expertd_stream_t stream = nullptr;
  };

  client::LocalRecord* record(uint32_t slot) override { return &records_[slot]; }
  const void* word(uint32_t slot) const override { return &words_[slot]; }
  client::Status launch_layout(const client::LayoutParams& params, uint32_t slot, expertd_stream_t stream) override {
    if (fails_) {
      return {EXPERTD_REASON_CUDA, "cuLaunchKernel: out of something"};
    }
    {
      const std::lock_guard lock(mutex_);
      launches_.push_back({params, slot, stream});
    }
    if (!holds_) {
      end(params, slot);
    }
    return {};
  }
  bool reaches(const client::Extent& bytes, client::Extent* known) override {
    return reaches_ == nullptr || known->contains(bytes) || reaches_(bytes, known);
  }
  client::Status health() override {
    return lost_ ? client::Status{EXPERTD_REASON_CUDA, "the context is lost"} : client::Status();
  }

  bool exchanges() const override { return exchanges_; }
  client::Status launch_exchange(client::ExchangeKernel, const client::ExchangeParams&, expertd_stream_t) override {
    return {};
  }

  client::Status launch_ht(client::HtKernel, const client::HtParams&, expertd_stream_t) override { return {}; }

  void have_exchanges() { exchanges_ = true; }
  void hold(bool holds) { holds_ = holds; }
  void fail_launches(bool fails) { fails_ = fails; }
  void lose() { lost_ = true; }
  void refuse(int64_t value) { bad_ = value; }
  void set_reach(std::function<bool(const client::Extent&, client::Extent*)> reaches) { reaches_ = std::move(reaches); }
  std::vector<Launch> launches() {
    const std::lock_guard lock(mutex_);
    return launches_;
  }
  void end(size_t launch) {
    const Launch it = launches().at(launch);
    end(it.params, it.slot);
  }

 private:
  void end(const client::LayoutParams& params, uint32_t slot) {
    client::LocalRecord& record = records_[slot];
    if (bad_ != 0) {
      record.value = bad_;
      record.failed = 1;
    }
    std::atomic_ref<uint64_t>(record.seq).store(params.seq, std::memory_order_release);
  }

  std::array<client::LocalRecord, client::kLocalSlots> records_{};
  std::array<uint64_t, client::kLocalSlots> words_{};
  std::mutex mutex_;
  std::vector<Launch> launches_;
  std::function<bool(const client::Extent&, client::Extent*)> reaches_;
  bool exchanges_ = false;
  std::atomic<bool> holds_{false};
  std::atomic<bool> fails_{false};
  std::atomic<bool> lost_{false};
  int64_t bad_ = 0;
};

}  // namespace expertd::test
