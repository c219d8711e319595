// SPDX-License-Identifier: Apache-2.0
// HostDevice: a device without a GPU. Its memory is sealed memfds, its executor is the loop thread itself: poll() runs
// the steps of a part in slices (host_part.h). The parts of a session run one after the other in the order of their
// launch, as on the stream that a session has on a GPU: a handle's tables and the memory of the client pass from one to
// the next. DevicePort calls come from the device's loop thread, Device calls from control threads.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "daemon/device/device.h"
#include "daemon/device/host/host_group.h"
#include "daemon/device/pool.h"

namespace expertd::device {

class HostPart;

class HostDevice : public Device, public engine::DevicePort {
 public:
  HostDevice(base::DeviceIndex index, uint32_t ordinal, HostGroupDirectory* groups, engine::WakePort* wake,
             uint64_t pool_max_bytes);
  ~HostDevice() override;

  base::DeviceIndex index() const override { return index_; }
  DeviceInfo info() const override;
  engine::DevicePort& port() override { return *this; }
  base::Result<Window> create_window(uint64_t bytes) override;
  base::Result<uint64_t> window_size(uint64_t bytes) const override;
  base::Result<std::unique_ptr<HeldMemory>> import_fd(base::ScopedFd fd, uint64_t offset, uint64_t bytes,
                                                      uint64_t allocation_bytes) override;
  base::Result<std::unique_ptr<HeldMemory>> import_ipc(const void* handle, uint64_t offset, uint64_t bytes) override;
  base::Result<SessionGrant> open_session(base::SessionId session) override;
  void close_session(base::SessionId session) override;
  void* session_flag_page(base::SessionId session) override;
  base::Status create_group(const engine::GroupShape& shape, uint32_t handle_limit) override;
  base::Result<GroupMemory> plan_group(const engine::GroupShape& shape, uint32_t handle_limit) const override;
  void destroy_group(base::GroupId group, base::Rank rank) override;
  uint32_t handle_capacity(base::GroupId group, base::Rank rank) const override;

  bool launch(const engine::LaunchSpec& spec, const engine::SlotWords& words, engine::PartId* part) override;
  bool poll(engine::PartId part, engine::Outcome* outcome) override;
  bool works_in_poll() const override { return true; }
  bool works(engine::PartId part) const override;
  bool settle(engine::PartId /*part*/) override { return true; }
  void abort(engine::PartId part, uint32_t reason) override;
  uint32_t missing(engine::PartId part, base::RankSet* ranks) override;
  bool busy() const override { return runnable_ != 0; }
  void release_words(const engine::SlotWords& words, uint32_t reason) override;

 private:
  static constexpr uint32_t kMaxParts = 256;
  /// Who runs in a place of parts_; beside the parts, so that looking through all of them touches little memory.
  struct Place {
    uint64_t session = 0;
    engine::PartId part = 0;  // 0: free
  };

  HostPart* find(engine::PartId part);
  engine::PartId last_part(base::SessionId session) const;
  void end(HostPart& part);

  base::DeviceIndex index_;
  uint32_t ordinal_;
  HostGroupDirectory* groups_;
  engine::WakePort* wake_;
  Pool pool_;
  std::atomic<uint64_t> handle_table_bytes_{0};
  std::vector<HostPart> parts_;
  std::array<Place, kMaxParts> places_{};
  uint32_t used_ = 0;  // places; alone on its device a part is not looked for in all of them
  uint64_t next_serial_ = 1;
  uint32_t runnable_ = 0;  // parts that can advance without an event
};

}  // namespace expertd::device
