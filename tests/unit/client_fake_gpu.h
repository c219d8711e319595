// SPDX-License-Identifier: Apache-2.0
// A stand-in for the GPU on the client's side: allocations are numbers that nobody follows, with the identity that a
// freed and re-used address does not keep, and the words on streams are written down instead of enqueued. The daemon
// gets a memfd for each exported allocation, so that the stand-in daemon can execute operations. Any thread.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "client/src/device_side.h"
#include "proto/abi/ring_v1.h"
#include "tests/unit/client_fake_socket.h"

namespace expertd::test {

struct Rung {
  expertd_stream_t stream = nullptr;
  uint64_t seq = 0;
};

struct WordWait {
  const void* word = nullptr;
  uint64_t value = 0;
  expertd_stream_t stream = nullptr;
};

class FakeGpu {
 public:
  FakeGpu() { current_ = this; }
  ~FakeGpu() { current_ = nullptr; }
  FakeGpu(const FakeGpu&) = delete;
  FakeGpu& operator=(const FakeGpu&) = delete;
  static FakeGpu* current() { return current_; }

  /// Every stream is being captured; what went into the graph: words and entry, or 0 for the wait.
  bool capturing = false;
  std::vector<std::pair<uint32_t, uint64_t>> captured;

  char* allocate(uint64_t bytes) {
    const uintptr_t address = next_address_;
    next_address_ += bytes + kGap;
    return allocate_at(reinterpret_cast<char*>(address), bytes);
  }
  char* allocate_at(char* address, uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    allocations_[reinterpret_cast<uintptr_t>(address)] = {bytes, ++identity_};
    return address;
  }
  void release(const char* address) {
    const std::lock_guard lock(mutex_);
    allocations_.erase(reinterpret_cast<uintptr_t>(address));
  }
  // The allocation around an address, or null values.
  struct Allocation {
    uint64_t bytes = 0;
    uint64_t identity = 0;
    uintptr_t base = 0;
  };
  Allocation find(const void* data) {
    const std::lock_guard lock(mutex_);
    const auto address = reinterpret_cast<uintptr_t>(data);
    auto it = allocations_.upper_bound(address);
    if (it == allocations_.begin() || address - (--it)->first >= it->second.first) {
      return {};
    }
    return {it->second.first, it->second.second, it->first};
  }

  // What happened, in order: "begin" and "released".
  void note(std::string what) {
    const std::lock_guard lock(mutex_);
    log_.push_back(std::move(what));
    changed_.notify_all();
  }
  std::vector<std::string> log() {
    const std::lock_guard lock(mutex_);
    return log_;
  }
  bool wait_for_entries(size_t count, std::chrono::milliseconds limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [&] { return log_.size() >= count; });
  }
  void on_release(std::function<void()> action) { on_release_ = std::move(action); }
  void released() {
    if (on_release_) {
      on_release_();
    }
    note("released");
  }

  void ring(expertd_stream_t stream, uint64_t seq) {
    const std::lock_guard lock(mutex_);
    rung_.push_back({stream, seq});
  }
  std::vector<Rung> rung() {
    const std::lock_guard lock(mutex_);
    return rung_;
  }
  void synchronize(expertd_stream_t stream) {
    const std::lock_guard lock(mutex_);
    synchronized_.push_back(stream);
  }
  std::vector<expertd_stream_t> synchronized() {
    const std::lock_guard lock(mutex_);
    return synchronized_;
  }
  void note_wait(const WordWait& wait) {
    const std::lock_guard lock(mutex_);
    waits_.push_back(wait);
  }
  std::vector<WordWait> waits() {
    const std::lock_guard lock(mutex_);
    return waits_;
  }
  /// Before the session attaches; null: the daemon does local work.
  void set_kernels(client::LocalKernels* kernels) { kernels_ = kernels; }
  client::LocalKernels* kernels() { return kernels_; }
  void count_export() {
    const std::lock_guard lock(mutex_);
    ++exports_;
  }
  uint64_t exports() {
    const std::lock_guard lock(mutex_);
    return exports_;
  }

 private:
  static constexpr uintptr_t kGap = uintptr_t{1} << 20;

  inline static FakeGpu* current_ = nullptr;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uintptr_t, std::pair<uint64_t, uint64_t>> allocations_;
  uintptr_t next_address_ = uintptr_t{1} << 50;  // no address of a process
  uint64_t identity_ = 0;
  uint64_t exports_ = 0;
  std::vector<std::string> log_;
  std::function<void()> on_release_;
  std::vector<Rung> rung_;
  std::vector<expertd_stream_t> synchronized_;
  std::vector<WordWait> waits_;
  client::LocalKernels* kernels_ = nullptr;
};

// The client's side of the stand-in GPU; windows are the host's.
class FakeGpuSide final : public client::DeviceSide {
  using Status = client::Status;

 public:
  explicit FakeGpuSide(FakeGpu* gpu) : gpu_(gpu) {}

  bool is_cuda() const override { return true; }
  const std::string& name() const override { return name_; }
  Status begin(const expertd_attach_welcome&, client::OwnedFd, uint32_t) override {
    gpu_->note("begin");
    return {};
  }
  void release_waiters() override { gpu_->released(); }
  Status map_window(client::OwnedFd fd, uint64_t bytes, const client::MappedWindow& at,
                    client::MappedWindow* mapped) override {
    return windows_->map_window(std::move(fd), bytes, at, mapped);
  }
  void unmap_window(const client::MappedWindow& mapped) override { windows_->unmap_window(mapped); }
  Status export_memory(const void* data, uint64_t bytes, bool, client::ExportedMemory* exported) override {
    const FakeGpu::Allocation found = gpu_->find(data);
    exported->offset = reinterpret_cast<uintptr_t>(data) - found.base;
    if (found.bytes == 0 || bytes > found.bytes - exported->offset) {
      return {EXPERTD_REASON_CUDA, "no such memory"};
    }
    gpu_->count_export();
    exported->fd = client::OwnedFd(make_memfd(found.bytes));
    exported->allocation_bytes = found.bytes;
    exported->buffer_id = found.identity;
    return {};
  }
  Status buffer_id(const void* data, uint64_t* id) override {
    *id = gpu_->find(data).identity;
    return *id == 0 ? Status{EXPERTD_REASON_CUDA, "no such memory"} : Status();
  }
  Status allocation_of(const void* data, void** base, uint64_t* bytes) override {
    const FakeGpu::Allocation found = gpu_->find(data);
    *base = reinterpret_cast<void*>(found.base);
    *bytes = found.bytes;
    return found.bytes == 0 ? Status{EXPERTD_REASON_CUDA, "no such memory"} : Status();
  }
  Status check_stream(expertd_stream_t, bool* capturing) override {
    *capturing = gpu_->capturing;
    return {};
  }
  Status ring_captured(uint32_t words, uint64_t entry, expertd_stream_t) override {
    gpu_->captured.push_back({words, entry});
    return {};
  }
  Status take_captured(uint32_t words, expertd_stream_t) override {
    gpu_->captured.push_back({words, 0});
    return {};
  }
  void exchange_capture_mode(int*) override {}
  Status ring_doorbell(uint32_t, uint64_t seq, expertd_stream_t stream) override {
    gpu_->ring(stream, seq);
    return {};
  }
  Status wait_completion(uint32_t, uint64_t, expertd_stream_t) override { return {}; }
  Status wait_word(const void* word, uint64_t value, expertd_stream_t stream) override {
    gpu_->note_wait({word, value, stream});
    return {};
  }
  Status stream_words(const client::StreamWord* words, uint32_t count, expertd_stream_t stream) override {
    for (uint32_t i = 0; i < count; ++i) {
      if (!words[i].writes) {
        gpu_->note_wait({words[i].word, words[i].value, stream});
      }
    }
    return {};
  }
  char* flag_page() override { return flag_page_.data(); }
  client::LocalKernels* local_kernels() override { return gpu_->kernels(); }
  Status copy(void*, const void*, uint64_t, expertd_stream_t) override { return {}; }
  Status synchronize(expertd_stream_t stream, uint64_t) override {
    gpu_->synchronize(stream);
    return {};
  }

 private:
  FakeGpu* const gpu_;
  std::vector<char> flag_page_ = std::vector<char>(EXPERTD_FLAG_PAGE_BYTES);
  const std::string name_ = "GPU-fake";
  std::unique_ptr<client::DeviceSide> windows_ = client::create_host_side("host:0");
};

}  // namespace expertd::test
