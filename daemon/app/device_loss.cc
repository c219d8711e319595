// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/device_loss.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <system_error>

#include "daemon/base/clock.h"

namespace expertd::app {

namespace {

// How long a loss may go unseen while no loop has work. Each probe is a call of about a microsecond.
constexpr std::chrono::milliseconds kProbeInterval(100);

}  // namespace

base::Result<std::unique_ptr<DeviceLoss>> DeviceLoss::create() {
  base::ScopedFd seen(::eventfd(0, EFD_CLOEXEC));
  if (!seen.valid()) {
    return base::errno_status("eventfd of the watch for lost devices");
  }
  return std::unique_ptr<DeviceLoss>(new DeviceLoss(std::move(seen)));
}

void DeviceLoss::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
  }
  ended_signal_.notify_all();
  const uint64_t one = 1;
  (void)!::write(seen_.get(), &one, sizeof(one));
  for (std::thread& probe : probes_) {
    probe.join();
  }
  probes_.clear();
  if (thread_.joinable()) {
    thread_.join();
  }
}

void DeviceLoss::context_lost(base::DeviceIndex device) {
  if (taken_.exchange(true, std::memory_order_acq_rel)) {
    return;
  }
  lost_ns_ = base::now_ns();
  lost_.store(uint64_t{device.value} + 1, std::memory_order_release);  // pairs with the acquire of wait_for_loss
  const uint64_t one = 1;
  (void)!::write(seen_.get(), &one, sizeof(one));
}

base::Status DeviceLoss::start(Act act, const std::vector<device::Device*>& devices) {
  try {
    thread_ = std::thread([this, act = std::move(act)] { wait_for_loss(act); });
    for (device::Device* device : devices) {
      if (device->can_lose_context()) {
        probes_.emplace_back([this, device] { probe(*device); });
      }
    }
  } catch (const std::system_error& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the watch for lost devices: ") + error.what());
  }
  return base::Status::ok();
}

void DeviceLoss::wait_for_loss(const Act& act) {
  (void)::pthread_setname_np(::pthread_self(), "expertd-loss");
  uint64_t count = 0;
  while (::read(seen_.get(), &count, sizeof(count)) < 0) {
  }
  const uint64_t lost = lost_.load(std::memory_order_acquire);
  if (lost == 0) {
    return;  // the end, without a loss
  }
  const base::DeviceIndex device{static_cast<uint32_t>(lost - 1)};
  act.tell(device);
  act.end(device, static_cast<double>(base::now_ns() - lost_ns_) * 1e-6);
}

void DeviceLoss::probe(device::Device& device) {
  const std::string name = "expertd-probe" + std::to_string(device.index().value);  // at most 15 characters
  (void)::pthread_setname_np(::pthread_self(), name.c_str());
  std::unique_lock<std::mutex> lock(mutex_);
  while (!ended_) {
    lock.unlock();
    device.probe_context();
    lock.lock();
    (void)ended_signal_.wait_for(lock, kProbeInterval, [this] { return ended_; });
  }
}

}  // namespace expertd::app
