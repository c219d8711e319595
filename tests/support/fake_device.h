// SPDX-License-Identifier: Apache-2.0
// A device for tests of the session service: its memory counts how often it was given back, and hooks run in the middle
// of its calls, where a test can do what a client or another thread might do just then.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <functional>
#include <memory>
#include <utility>

#include "daemon/device/device.h"
#include "tests/support/fake_ports.h"

namespace expertd::test {

class FakeDevice final : public device::Device {
 public:
  explicit FakeDevice(uint32_t index) : index_{index} { told.uuid = "host:" + std::to_string(index); }

  base::DeviceIndex index() const override {
    run(on_index);
    return index_;
  }
  device::DeviceInfo info() const override { return told; }
  engine::DevicePort& port() override { return fake_port; }
  base::Result<device::Window> create_window(uint64_t bytes) override {
    run(on_create_window);
    device::Window window;
    window.memory = make_memory(bytes);
    window.fd.reset(::memfd_create("fake-window", MFD_CLOEXEC));
    window.bytes = bytes;
    return window;
  }
  base::Result<uint64_t> window_size(uint64_t bytes) const override { return bytes; }
  base::Result<std::unique_ptr<device::HeldMemory>> import_fd(base::ScopedFd /*fd*/, uint64_t /*offset*/,
                                                              uint64_t bytes, uint64_t /*allocation*/) override {
    return make_memory(bytes);
  }
  base::Result<std::unique_ptr<device::HeldMemory>> import_ipc(const void* /*handle*/, uint64_t /*offset*/,
                                                               uint64_t bytes) override {
    return make_memory(bytes);
  }
  base::Result<device::SessionGrant> open_session(base::SessionId /*session*/) override {
    return device::SessionGrant{};
  }
  void close_session(base::SessionId /*session*/) override { run(on_close_session); }
  void* session_flag_page(base::SessionId /*session*/) override { return nullptr; }
  base::Status create_group(const engine::GroupShape& /*shape*/, uint32_t /*handle_limit*/) override {
    ++groups;
    return base::Status::ok();
  }
  base::Result<device::GroupMemory> plan_group(const engine::GroupShape& shape, uint32_t handle_limit) const override {
    device::GroupMemory memory = told_memory;
    memory.table_bytes += shape.ranks;
    memory.handle_count = handle_limit - 1;
    return memory;
  }
  void destroy_group(base::GroupId /*group*/, base::Rank /*rank*/) override { --groups; }
  uint32_t handle_capacity(base::GroupId /*group*/, base::Rank /*rank*/) const override { return 8; }

  device::DeviceInfo told;          // the test changes it while nobody asks
  device::GroupMemory told_memory;  // likewise; plan_group() adds the ranks to the tables, and a handle is missing
  FakeDevicePort fake_port;         // of the loop's thread
  std::atomic<int> groups{0};
  std::atomic<int> memory_held{0};
  std::function<void()> on_index;
  std::function<void()> on_create_window;
  std::function<void()> on_close_session;

 private:
  class Memory final : public device::HeldMemory {
   public:
    Memory(uint64_t bytes, base::DeviceIndex home, std::atomic<int>* held) : held_(held) {
      mapping_.bytes = bytes;
      mapping_.home = home;
      ++*held_;
    }
    ~Memory() override { --*held_; }

   private:
    std::atomic<int>* held_;
  };

  /// Once, so that a hook may call what calls it.
  static void run(const std::function<void()>& hook) {
    if (hook) {
      auto& slot = const_cast<std::function<void()>&>(hook);
      const std::function<void()> once = std::exchange(slot, nullptr);
      once();
    }
  }
  std::unique_ptr<device::HeldMemory> make_memory(uint64_t bytes) {
    return std::make_unique<Memory>(bytes, index_, &memory_held);
  }

  base::DeviceIndex index_;
};

}  // namespace expertd::test
