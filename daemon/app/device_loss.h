// SPDX-License-Identifier: Apache-2.0
// DeviceLoss: ends the process when a device lost its context. Whoever sees the loss (a loop, a probe) only notes it;
// one thread that calls no driver and waits for no other thread tells the clients and ends the process, whoever is
// stuck meanwhile. A thread per device besides its loop asks for the context now and then, because a loop that is idle
// does not, nor one that is stuck. Nothing ends because a thread is late: a loop may be held up and come back.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "daemon/base/fd.h"
#include "daemon/base/status.h"
#include "daemon/device/device.h"

namespace expertd::app {

class DeviceLoss final : public device::LossObserver {
 public:
  /// What is done about a loss, on the thread of its own. `tell`: the clients; `end`: the process, with the
  /// milliseconds since the loss was seen. Neither may wait for anything that a driver can hold up.
  struct Act {
    std::function<void(base::DeviceIndex device)> tell;
    std::function<void(base::DeviceIndex device, double since_seen_ms)> end;
  };

  static base::Result<std::unique_ptr<DeviceLoss>> create();
  ~DeviceLoss() override { stop(); }

  void context_lost(base::DeviceIndex device) override;
  /// A loss that was noted before is acted upon at once. The devices outlive this.
  base::Status start(Act act, const std::vector<device::Device*>& devices);
  /// Waits for the probes, so no device may be stuck.
  void stop();

 private:
  explicit DeviceLoss(base::ScopedFd seen) : seen_(std::move(seen)) {}
  void wait_for_loss(const Act& act);
  void probe(device::Device& device);

  base::ScopedFd seen_;  // eventfd: written for the first loss, and at the end
  std::atomic<bool> taken_{false};
  std::atomic<uint64_t> lost_{0};  // index of the device plus one; written after lost_ns_
  uint64_t lost_ns_ = 0;
  std::mutex mutex_;
  std::condition_variable ended_signal_;
  bool ended_ = false;
  std::thread thread_;
  std::vector<std::thread> probes_;
};

}  // namespace expertd::app
