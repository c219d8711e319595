// SPDX-License-Identifier: Apache-2.0
// The outlets of loops and sessions towards metrics, log and watchdog: they look, never act. One DeviceObserver per
// device, called by its loop thread except where it says otherwise; the SessionLog by control threads.
#pragma once

#include <memory>
#include <string>

#include "daemon/metrics/blocks.h"
#include "daemon/session/service.h"
#include "daemon/supervise/watchdog.h"
#include "daemon/transport/device_loop.h"

namespace expertd::app {

class DeviceObserver final : public engine::OpObserver, public transport::LoopObserver {
 public:
  DeviceObserver(metrics::Blocks::Device* device, metrics::ThreadCounters* thread, supervise::Beat* beat)
      : ops_(&device->ops), waits_(&device->waits), thread_(thread), beat_(beat) {}
  void completed(base::DeviceIndex device, const engine::Request& request, const expertd_completion& completion,
                 const engine::HeldUp& held_up) override;
  void overtook(base::DeviceIndex /*device*/) override { ops_->overtook(); }
  void beat(base::DeviceIndex device, uint64_t now_ns, uint64_t lag_ns) override;
  void ring_fill(base::DeviceIndex device, uint32_t used, uint32_t capacity) override;
  /// A client broke the ring protocol; loop thread.
  void ring_broken();
  /// After a tick of the watchdog, on its thread.
  void count_missed_beats();

 private:
  metrics::OpCounters* ops_;
  metrics::WaitLog* waits_;
  metrics::ThreadCounters* thread_;
  supervise::Beat* beat_;
  uint64_t missed_counted_ = 0;
};

class SessionLog final : public session::SessionObserver {
 public:
  explicit SessionLog(metrics::ProcessCounters* counters) : counters_(counters) {}
  void opened(const session::SessionSnapshot& session) override;
  void ended(base::SessionId session, const std::string& cause) override;
  void reclaimed(base::SessionId session, uint64_t duration_ns) override;

 private:
  metrics::ProcessCounters* counters_;
};

}  // namespace expertd::app
