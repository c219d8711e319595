// SPDX-License-Identifier: Apache-2.0
// HostDevice: a device without a GPU. Its memory is sealed memfds, its executor is the loop thread itself: poll() runs
// the steps of a part in slices, so that an abort or another session never waits for a whole operation. The ranks of a
// group meet through the ExchangeFlags of the operation; nothing blocks and nothing spins. DevicePort calls come from
// the device's loop thread, Device calls from control threads.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "daemon/device/device.h"
#include "daemon/device/pool.h"

namespace expertd::device {

/// Tables of one group that its host ranks share: count matrices, and the handles of each rank.
class HostGroupTables;

/// Finds the tables of a group; shared by the host devices of a process. Control threads write, loops read.
class HostGroupDirectory {
 public:
  static constexpr uint32_t kMaxGroups = 1024;
  HostGroupDirectory();
  ~HostGroupDirectory();
  base::Status add_rank(const engine::GroupShape& shape, uint32_t handle_limit);
  void remove_rank(base::GroupId group, base::Rank rank);
  /// Lock-free; null when the group is not known.
  HostGroupTables* find(base::GroupId group) const;

 private:
  std::mutex mutex_;
  std::array<std::atomic<HostGroupTables*>, kMaxGroups> tables_{};
};

class HostDevice final : public Device, public engine::DevicePort {
 public:
  HostDevice(base::DeviceIndex index, uint32_t ordinal, HostGroupDirectory* groups, engine::WakePort* wake,
             uint64_t pool_max_bytes);
  ~HostDevice() override;

  base::DeviceIndex index() const override { return index_; }
  DeviceInfo info() const override;
  engine::DevicePort& port() override { return *this; }
  base::Result<Window> create_window(uint64_t bytes) override;
  base::Result<std::unique_ptr<HeldMemory>> import_fd(base::ScopedFd fd, uint64_t offset, uint64_t bytes,
                                                      uint64_t allocation_bytes) override;
  base::Result<std::unique_ptr<HeldMemory>> import_ipc(const void* handle, uint64_t offset, uint64_t bytes) override;
  base::Result<SessionGrant> open_session(base::SessionId session) override;
  void close_session(base::SessionId session) override;
  void* session_flag_page(base::SessionId session) override;
  base::Status create_group(const engine::GroupShape& shape, uint32_t handle_limit) override;
  void destroy_group(base::GroupId group, base::Rank rank) override;
  uint32_t handle_capacity(base::GroupId group, base::Rank rank) const override;

  bool launch(const engine::LaunchSpec& spec, const engine::SlotWords& words, engine::PartId* part) override;
  bool poll(engine::PartId part, engine::Outcome* outcome) override;
  bool settle(engine::PartId /*part*/) override { return true; }
  void abort(engine::PartId part, uint32_t reason) override;
  uint32_t missing(engine::PartId part, uint64_t* ranks) override;
  bool busy() const override { return runnable_ != 0; }
  void release_words(const engine::SlotWords& words, uint32_t reason) override;

 private:
  static constexpr uint32_t kMaxParts = 256;
  enum class Step : uint32_t { kFree, kStart, kAwaitRouted, kMove, kAwaitMoved };
  struct Part;

  Part* find(engine::PartId part);
  bool prepare(const engine::LaunchSpec& spec, Part& part);
  bool advance(Part& part);
  void start(Part& part);
  void move_slice(Part& part);
  void set_flag(Part& part, std::atomic<uint64_t>& flag);
  void set_step(Part& part, Step step);

  base::DeviceIndex index_;
  uint32_t ordinal_;
  HostGroupDirectory* groups_;
  engine::WakePort* wake_;
  Pool pool_;
  std::vector<Part> parts_;
  uint64_t next_serial_ = 1;
  uint32_t runnable_ = 0;  // parts that can advance without an event
};

}  // namespace expertd::device
