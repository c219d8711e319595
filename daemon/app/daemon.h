// SPDX-License-Identifier: Apache-2.0
// Daemon: the parts of the process in the order they start and stop. Built, run and destroyed by main; the only place
// beside main that names concrete types. Start: lock, devices, loops, sessions, metrics, sockets, READY. Never listens
// before it can serve.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "daemon/app/device_loss.h"
#include "daemon/app/nodes.h"
#include "daemon/app/observers.h"
#include "daemon/app/operator_view.h"
#include "daemon/config/config.h"
#include "daemon/control/control_server.h"
#include "daemon/device/device.h"
#include "daemon/device/host/host_device.h"
#include "daemon/supervise/lock_file.h"
#include "daemon/supervise/notify.h"
#include "daemon/supervise/signals.h"
#include "daemon/supervise/watchdog.h"
#include "daemon/transport/attach_listener.h"
#include "daemon/transport/device_loop.h"

namespace expertd::app {

/// Makes a host device; tests make ones that fail.
using MakeHostDevice = std::function<std::unique_ptr<device::Device>(base::DeviceIndex index, uint32_t ordinal,
                                                                     device::HostGroupDirectory* groups,
                                                                     engine::WakePort* wake, uint64_t pool_max_bytes)>;
std::unique_ptr<device::Device> make_host_device(base::DeviceIndex index, uint32_t ordinal,
                                                 device::HostGroupDirectory* groups, engine::WakePort* wake,
                                                 uint64_t pool_max_bytes);

class Daemon final : public engine::WakePort {
 public:
  Daemon(const config::LoadedConfig& loaded, config::LoadRequest request, supervise::SystemdNotifier* notifier,
         MakeHostDevice make_host);
  ~Daemon() override;

  base::Status start();
  /// Serves until a signal or a drain call; then drains. A lost device ends the process instead, from another thread,
  /// with kExitTryAgain: nothing mends a context inside the process, and the supervisor starts a new one.
  void run(supervise::Signals& signals);
  void wake(base::DeviceIndex device) override;

 private:
  base::Status create_devices();
  base::Status start_loops();
  base::Status start_nodes();
  base::Status start_services();
  base::Status start_sockets();
  base::Status start_loss_watch();
  void reload();
  void tell_of_loss(base::DeviceIndex device);
  [[noreturn]] void end_after_loss(base::DeviceIndex device, double since_seen_ms);
  supervise::Watchdog::Tick look_at_threads();
  void end_sessions(uint64_t deadline_ns);
  void drain(supervise::Signals& signals, uint64_t timeout_ns);

  config::LoadedConfig loaded_;
  config::LoadRequest request_;
  supervise::SystemdNotifier* notifier_;
  MakeHostDevice make_host_;
  std::unique_ptr<supervise::LockFile> lock_;
  std::shared_ptr<metrics::Blocks> blocks_ = std::make_shared<metrics::Blocks>();
  supervise::Watchdog watchdog_;
  std::unique_ptr<DeviceLoss> loss_;  // known to the devices and their loops; its own threads end before all others
  device::HostGroupDirectory host_groups_;
  std::vector<std::unique_ptr<device::Device>> devices_;
  std::vector<std::unique_ptr<DeviceObserver>> observers_;
  std::vector<std::unique_ptr<transport::DeviceLoop>> loops_;
  std::unique_ptr<Nodes> nodes_;  // null: fabric.enabled = false. Outlives the sessions, whose groups it carries
  std::unique_ptr<SessionLog> session_log_;
  std::unique_ptr<session::SessionService> sessions_;
  std::unique_ptr<OperatorView> view_;
  std::unique_ptr<metrics::MetricsServer> metrics_;
  std::unique_ptr<control::ControlServer> control_;
  std::unique_ptr<transport::AttachListener> listener_;
  std::string cuda_build_;
  std::string cuda_driver_;
  std::atomic<uint64_t> drain_requested_ns_{0};  // 0: none; otherwise the timeout asked for plus one
};

}  // namespace expertd::app
