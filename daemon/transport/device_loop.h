// SPDX-License-Identifier: Apache-2.0
// DeviceLoop: the one thread of a device. It polls the rings of the device's sessions, drives the engine, and runs
// tasks of the control threads between operations. Spins for spin_ns after the last work, then sleeps on an eventfd
// that only the daemon has and on an epoll set of its rings' eventfds, which clients share and which it therefore never
// reads or writes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "daemon/base/fd.h"
#include "daemon/engine/engine.h"
#include "daemon/session/loop_port.h"
#include "daemon/transport/ring_server.h"

namespace expertd::transport {

/// Hook for the watchdog and lag metrics; loop thread, must not block.
class LoopObserver {
 public:
  virtual ~LoopObserver() = default;
  virtual void beat(base::DeviceIndex device, uint64_t now_ns, uint64_t lag_ns) = 0;
  /// Slots in use on the device's fullest ring, and the slots of a ring.
  virtual void ring_fill(base::DeviceIndex device, uint32_t used, uint32_t capacity) = 0;
};

struct LoopOptions {
  engine::Policy schedule = engine::Policy::kLatency;
  uint64_t spin_ns = 50'000;
  uint64_t default_timeout_ns = 100'000'000'000ULL;
  uint64_t task_timeout_ns = 5'000'000'000ULL;  // a control thread waits this long before it reports the loop as stuck
};

class DeviceLoop final : public session::LoopPort {
 public:
  /// Called from the loop thread when a client broke the ring protocol; the session is then closed from outside.
  using FaultCallback = std::function<void(base::SessionId session)>;

  static base::Result<std::unique_ptr<DeviceLoop>> create(base::DeviceIndex device, const LoopOptions& options);
  ~DeviceLoop() override;

  base::Status start(engine::DevicePort* port, engine::WakePort* wake, engine::OpObserver* op_observer,
                     LoopObserver* loop_observer, FaultCallback fault);
  void stop();

  base::Status add_session(session::SessionTables* tables, session::RingMemory* ring, void* flag_page) override;
  base::Status close_session(base::SessionId session, std::function<void()> drained) override;
  base::Status run(std::function<void()> task) override;
  bool uses(base::SessionId session, const engine::Mapping* mapping) override;
  bool uses_group(base::SessionId session, const engine::RankState* rank) override;
  void wake() override;
  /// Sets session flags (draining) in every ring, also in those to come; loop thread, inside run().
  void raise_session_flags(uint32_t flags) override;
  uint32_t outstanding() const { return outstanding_.load(std::memory_order_relaxed); }

 private:
  struct Closing {
    std::unique_ptr<RingServer> server;
    std::function<void()> drained;
  };

  DeviceLoop(base::DeviceIndex device, const LoopOptions& options, base::ScopedFd event, base::ScopedFd rings)
      : device_(device), options_(options), event_(std::move(event)), rings_(std::move(rings)) {}
  void thread_main();
  bool run_tasks();
  bool poll_rings(uint64_t now_ns);
  bool finish_closing();
  void catch_up(base::SessionId session);
  template <typename Thing>
  bool in_flight(base::SessionId session, const Thing* thing);
  void sleep_until_work(uint64_t now_ns, uint64_t idle_ns);
  void wait_for_event(uint64_t timeout_ns);
  base::Status watch(const session::RingMemory& ring);
  void unwatch(const session::RingMemory& ring);
  void set_sleeping(bool sleeping);
  bool anything_to_do();
  enum class Room { kBounded, kAlways };
  base::Status post(std::function<void()> task, Room room);
  void end_tasks();

  base::DeviceIndex device_;
  LoopOptions options_;
  base::ScopedFd event_;  // written by wake() alone
  base::ScopedFd rings_;  // epoll, edge-triggered: a write to any ring's eventfd, whatever its counter is
  engine::DevicePort* port_ = nullptr;
  std::unique_ptr<engine::Engine> engine_;
  LoopObserver* observer_ = nullptr;
  FaultCallback fault_;
  std::vector<std::unique_ptr<RingServer>> servers_;
  std::vector<Closing> closing_;
  std::vector<base::SessionId> fault_reported_;
  uint32_t raised_flags_ = 0;
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> stop_{false};
  std::atomic<uint32_t> outstanding_{0};
  std::atomic<uint32_t> tasks_waiting_{0};
  std::mutex tasks_mutex_;
  std::deque<std::function<void()>> tasks_;
  bool tasks_ended_ = false;  // under tasks_mutex_: the thread is through with them
  std::thread thread_;
};

}  // namespace expertd::transport
