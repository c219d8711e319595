// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/daemon.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/config/command_line.h"
#include "daemon/device/cuda/cuda_devices.h"

namespace expertd::app {

namespace {

constexpr uint64_t kTickNs = 250'000'000;
constexpr uint64_t kReclaimNs = 2'000'000'000;
constexpr uint64_t kControlShutdownNs = 1'000'000'000;

uint64_t ping_interval_ns() {
  return supervise::watchdog_ping_interval_ns(std::getenv("WATCHDOG_USEC"), std::getenv("WATCHDOG_PID"), ::getpid());
}

device::cuda::CudaOptions cuda_options(const config::DeviceConfig& config) {
  device::cuda::CudaOptions options;
  options.pool_max_bytes = config.pool_max_bytes;
  options.peer_access = config.peer_access;
  options.kernels = config.kernels == config::Kernels::kGeneric ? "generic" : "auto";
  options.link_sms = config.link_sms;
  options.gpus = config.gpus.names;
  return options;
}

engine::Policy policy_of(config::Schedule schedule) {
  switch (schedule) {
    case config::Schedule::kFair:
      return engine::Policy::kFair;
    case config::Schedule::kFifo:
      return engine::Policy::kFifo;
    case config::Schedule::kLatency:
      break;
  }
  return engine::Policy::kLatency;
}

}  // namespace

std::unique_ptr<device::Device> make_host_device(base::DeviceIndex index, uint32_t ordinal,
                                                 device::HostGroupDirectory* groups, engine::WakePort* wake,
                                                 uint64_t pool_max_bytes) {
  return std::make_unique<device::HostDevice>(index, ordinal, groups, wake, pool_max_bytes);
}

Daemon::Daemon(const config::LoadedConfig& loaded, config::LoadRequest request, supervise::SystemdNotifier* notifier,
               MakeHostDevice make_host)
    : loaded_(loaded),
      request_(std::move(request)),
      notifier_(notifier),
      make_host_(std::move(make_host)),
      watchdog_(*notifier, {ping_interval_ns()}) {}

Daemon::~Daemon() {
  if (loss_ != nullptr) {
    loss_->stop();
  }
  end_sessions(base::now_ns());
}

// Sessions that end tell the rendezvous, and what it still answers goes to them.
void Daemon::end_sessions(uint64_t deadline_ns) {
  if (sessions_ != nullptr) {
    sessions_->stop(deadline_ns);
  }
  if (nodes_ != nullptr) {
    nodes_->detach();
  }
}

void Daemon::wake(base::DeviceIndex device) {
  loops_[device.value]->wake();
}

base::Status Daemon::create_devices() {
  const config::DeviceConfig& config = loaded_.config.device;
  const device::cuda::CudaVersions versions = device::cuda::cuda_versions();
  cuda_build_ = versions.toolkit;
  cuda_driver_ = versions.driver;
  if (config.gpus.kind != config::GpuSelection::Kind::kNone) {
    base::Result<std::vector<std::unique_ptr<device::Device>>> gpus =
        device::cuda::create_cuda_devices(cuda_options(config));
    if (gpus.is_ok()) {
      devices_ = std::move(gpus).value();
    } else if (config.gpus.kind == config::GpuSelection::Kind::kList ||
               gpus.status().reason() != EXPERTD_REASON_NO_GPU) {
      return gpus.status().with_context("device.gpus");
    } else {
      base::log_info("no GPU is served", {{"why", gpus.status().message()}});
    }
  }
  const int32_t hosts = config.hosts >= 0 ? config.hosts : devices_.empty() ? 2 : 0;
  for (int32_t i = 0; i < hosts; ++i) {
    const base::DeviceIndex index{static_cast<uint32_t>(devices_.size())};
    devices_.push_back(make_host_(index, static_cast<uint32_t>(i), &host_groups_, this, config.pool_max_bytes));
  }
  if (devices_.empty()) {
    return base::Status(EXPERTD_REASON_NO_GPU, "neither a GPU nor a host device is to be served: set device.hosts");
  }
  if (devices_.size() > base::kMaxDevices) {
    return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE,
                        std::to_string(devices_.size()) + " devices, at most " + std::to_string(base::kMaxDevices));
  }
  base::Result<std::unique_ptr<DeviceLoss>> loss = DeviceLoss::create();
  if (!loss.is_ok()) {
    return loss.status();
  }
  loss_ = std::move(loss).value();
  for (const std::unique_ptr<device::Device>& device : devices_) {
    device->watch_context(loss_.get());
  }
  return base::Status::ok();
}

base::Status Daemon::start_loops() {
  const config::EngineConfig& config = loaded_.config.engine;
  transport::LoopOptions options;
  options.spin_ns = uint64_t{config.spin_us} * 1000;
  options.default_timeout_ns = config.op_deadline_ns;
  options.schedule = policy_of(config.schedule);
  for (const std::unique_ptr<device::Device>& device : devices_) {
    base::Result<std::unique_ptr<transport::DeviceLoop>> loop = transport::DeviceLoop::create(device->index(), options);
    if (!loop.is_ok()) {
      return loop.status();
    }
    loops_.push_back(std::move(loop).value());
    const device::DeviceInfo info = device->info();
    const std::string name = "loop-" + info.uuid;
    base::Result<supervise::Beat*> beat = watchdog_.add(name, base::now_ns());
    if (!beat.is_ok()) {
      return beat.status();
    }
    metrics::Blocks::Device& block = blocks_->add_device(metrics::gpu_label(!info.is_cuda, device->index().value));
    metrics::ThreadCounters& thread = blocks_->add_thread(
        info.is_cuda ? "engine-" + std::to_string(device->index().value) : std::string("engine-host"));
    observers_.push_back(std::make_unique<DeviceObserver>(&block, &thread, beat.value()));
  }
  for (size_t i = 0; i < loops_.size(); ++i) {
    DeviceObserver* const observer = observers_[i].get();
    EXPERTD_RETURN_IF_ERROR(
        loops_[i]->start(&devices_[i]->port(), this, observer, observer, [this, observer](base::SessionId session) {
          observer->ring_broken();
          base::log_warn("client broke the ring protocol",
                         {{"session", session}, {"reason", EXPERTD_REASON_RING_OVERFLOW}});
          listener_->close_session(session);
        }));
  }
  return base::Status::ok();
}

base::Status Daemon::start_nodes() {
  const config::FabricConfig& config = loaded_.config.fabric;
  if (!config.enabled) {
    return base::Status::ok();
  }
  Nodes::Beats beats{};
  for (uint32_t lane = 0; lane < fabric::kLanes; ++lane) {
    base::Result<supervise::Beat*> beat =
        watchdog_.add(std::string("fabric-") + fabric::kLaneNames[lane], base::now_ns());
    if (!beat.is_ok()) {
      return beat.status();
    }
    beats[lane] = beat.value();
  }
  const auto gpu = std::find_if(devices_.begin(), devices_.end(),
                                [](const std::unique_ptr<device::Device>& device) { return device->info().is_cuda; });
  base::Result<std::unique_ptr<Nodes>> nodes =
      Nodes::create(config, this, beats, gpu == devices_.end() ? nullptr : gpu->get());
  if (!nodes.is_ok()) {
    return nodes.status();
  }
  nodes_ = std::move(nodes).value();
  return base::Status::ok();
}

base::Status Daemon::start_services() {
  const config::Config& config = loaded_.config;
  session::ServiceOptions options;
  options.generation = base::now_ns();
  options.max_sessions = config.control.max_sessions;
  options.max_sessions_per_uid = config.control.max_sessions_per_uid;
  options.max_buffers = config.session.max_buffers;
  options.max_groups = config.session.max_groups;
  options.max_window_bytes = config.session.max_window_bytes;
  options.max_registered_bytes = config.session.max_registered_bytes;
  options.ring_slots = config.engine.ring_slots;
  options.handles_per_session = config.engine.handles_per_session;
  options.op_timeout_ns = config.engine.op_deadline_ns;
  options.first_op_timeout_ns = config.engine.first_op_deadline_ns;
  std::vector<session::DeviceEntry> entries;
  for (size_t i = 0; i < devices_.size(); ++i) {
    entries.push_back({devices_[i].get(), loops_[i].get()});
  }
  session_log_ = std::make_unique<SessionLog>(&blocks_->process());
  sessions_ = std::make_unique<session::SessionService>(options, std::move(entries), session_log_.get());
  if (nodes_ != nullptr) {
    EXPERTD_RETURN_IF_ERROR(nodes_->attach(sessions_.get()));
  }
  EXPERTD_RETURN_IF_ERROR(sessions_->start());
  ViewFacts facts;
  facts.version = EXPERTD_VERSION;
  facts.generation = options.generation;
  facts.sessions_max = options.max_sessions;
  facts.ring_slots = options.ring_slots;
  facts.pool_max_bytes = config.device.pool_max_bytes;
  facts.schedule = engine::policy_name(policy_of(config.engine.schedule));
  facts.cuda_build = cuda_build_;
  facts.cuda_driver = cuda_driver_;
  view_ = std::make_unique<OperatorView>(
      facts, sessions_.get(), blocks_,
      [this](uint64_t timeout_ns) { drain_requested_ns_.store(timeout_ns + 1, std::memory_order_release); },
      [this] { return nodes_ == nullptr ? NodeFacts{} : nodes_->facts(); },
      nodes_ == nullptr ? nullptr : nodes_->mesh());
  if (config.metrics.enabled) {
    metrics::CollectorOptions collector;
    collector.address = config.metrics.address;
    collector.port = config.metrics.port;
    collector.build = {EXPERTD_VERSION, EXPERTD_COMMIT, cuda_build_, "",
                       std::to_string(EXPERTD_ABI_MAJOR) + "." + std::to_string(EXPERTD_ABI_MINOR)};
    base::Result<std::unique_ptr<metrics::MetricsServer>> server =
        metrics::MetricsServer::create(collector, blocks_, *view_);
    if (!server.is_ok()) {
      return server.status();
    }
    metrics_ = std::move(server).value();
    view_->set_metrics_address(metrics_->address());
  }
  return base::Status::ok();
}

base::Status Daemon::start_sockets() {
  const config::ControlConfig& config = loaded_.config.control;
  control::ControlOptions control;
  control.socket = config.socket;
  control.socket_mode = config.socket_mode;
  control.socket_group = config.socket_group;
  control.allowed_uids = config.allowed_uids;
  control.enable_reflection = config.enable_reflection;
  control.call_deadline_max_ns = config.call_deadline_max_ns;
  control.version = EXPERTD_VERSION;
  base::Result<std::unique_ptr<control::ControlServer>> server =
      control::ControlServer::create(control, *sessions_, *view_);
  if (!server.is_ok()) {
    return server.status();
  }
  control_ = std::move(server).value();
  transport::ListenerOptions attach;
  attach.path = config.attach_socket;
  attach.mode = config.socket_mode;
  attach.group = config.socket_group;
  attach.allowed_uids = config.allowed_uids;
  base::Result<std::unique_ptr<transport::AttachListener>> listener = transport::AttachListener::create(
      attach, sessions_.get(),
      [this](base::ScopedFd fd, base::SessionId session, uint32_t uid) {
        return control_->adopt_session_connection(std::move(fd), session, uid);
      },
      [this](base::SessionId session) { control_->session_ended(session); });
  if (!listener.is_ok()) {
    return listener.status();
  }
  listener_ = std::move(listener).value();
  EXPERTD_RETURN_IF_ERROR(control_->start_listening());
  return listener_->start();
}

base::Status Daemon::start() {
  base::Result<supervise::LockFile> lock = supervise::LockFile::acquire(loaded_.config.runtime_directory);
  if (!lock.is_ok()) {
    return lock.status();
  }
  lock_ = std::make_unique<supervise::LockFile>(std::move(lock).value());
  EXPERTD_RETURN_IF_ERROR(create_devices());
  EXPERTD_RETURN_IF_ERROR(start_loops());
  EXPERTD_RETURN_IF_ERROR(start_nodes());
  EXPERTD_RETURN_IF_ERROR(start_services());
  EXPERTD_RETURN_IF_ERROR(start_sockets());
  EXPERTD_RETURN_IF_ERROR(start_loss_watch());
  view_->set_state(State::kReady);
  control_->set_serving(control::Serving::kReady);
  std::string names;
  for (const std::unique_ptr<device::Device>& device : devices_) {
    control_->set_device_healthy(device->index(), device->info().healthy);
    names += (names.empty() ? "" : " ") + device->info().uuid;
  }
  base::log_info("ready", {{"devices", names},
                           {"attach_socket", loaded_.config.control.attach_socket},
                           {"control_socket", loaded_.config.control.socket},
                           {"nodes", nodes_ != nullptr ? nodes_->address() : std::string("off")},
                           {"metrics", metrics_ != nullptr ? metrics_->address() : std::string("off")}});
  if (const base::Status told = notifier_->ready("serving " + names); !told.is_ok()) {
    base::log_warn("service manager not told", {{"why", told.message()}});
  }
  return base::Status::ok();
}

void Daemon::reload() {
  base::Result<config::LoadedConfig> fresh = config::load(request_);
  view_->set_config_loaded(fresh.is_ok());
  if (!fresh.is_ok()) {
    base::log_error("configuration not reloaded", {{"why", fresh.status().message()}});
    return;
  }
  const config::Difference difference = config::compare(loaded_.report, fresh.value().report);
  base::set_log_level(fresh.value().config.log.level);
  loaded_.config.log.level = fresh.value().config.log.level;
  for (const std::string& key : difference.restart_required) {
    base::log_warn("restart required", {{"key", key}});
  }
  base::log_info("configuration reloaded", {{"changed", difference.reloadable.size()}});
}

supervise::Watchdog::Tick Daemon::look_at_threads() {
  supervise::Watchdog::Tick tick = watchdog_.tick(base::now_ns());
  for (const std::unique_ptr<DeviceObserver>& observer : observers_) {
    observer->count_missed_beats();
  }
  return tick;
}

base::Status Daemon::start_loss_watch() {
  std::vector<device::Device*> devices;
  for (const std::unique_ptr<device::Device>& device : devices_) {
    devices.push_back(device.get());
  }
  return loss_->start({[this](base::DeviceIndex device) { tell_of_loss(device); },
                       [this](base::DeviceIndex device, double ms) { end_after_loss(device, ms); }},
                      devices);
}

// In this order: a client whose lease ends reads why in its ring. Nothing here waits for a loop, and none is needed:
// the rings are memory that the clients have too, so they read the word also after the end of the process.
void Daemon::tell_of_loss(base::DeviceIndex device) {
  sessions_->say_last_word(EXPERTD_REASON_GPU_LOST);
  listener_->hang_up();
  metrics::add_shared(blocks_->devices()[device.value]->context_lost, 1);
}

void Daemon::end_after_loss(base::DeviceIndex device, double since_seen_ms) {
  constexpr uint64_t kLogNs = 200'000'000;
  base::log_error("GPU context lost; the process ends for a restart", {{"device", devices_[device.value]->info().uuid},
                                                                       {"exit_code", config::kExitTryAgain},
                                                                       {"since_seen_ms", since_seen_ms}});
  base::log_close(kLogNs);
  std::_Exit(config::kExitTryAgain);
}

void Daemon::run(supervise::Signals& signals) {
  while (true) {
    base::Result<supervise::SignalEvent> event = signals.wait(kTickNs);
    const supervise::SignalEvent what = event.is_ok() ? event.value() : supervise::SignalEvent::kNone;
    const supervise::Watchdog::Tick tick = look_at_threads();
    for (const std::string& late : tick.late) {
      base::log_error("thread makes no progress", {{"thread", late}});
    }
    base::log_report_suppressed();
    const uint64_t asked = drain_requested_ns_.exchange(0, std::memory_order_acq_rel);
    if (what == supervise::SignalEvent::kReload) {
      reload();
    } else if (what == supervise::SignalEvent::kStopNow) {
      return;
    } else if (what == supervise::SignalEvent::kDrain || asked != 0) {
      drain(signals, asked > 1 ? asked - 1 : loaded_.config.control.drain_timeout_ns);
      return;
    }
  }
}

// Operations already admitted end; nothing new is taken. A second signal cuts it short.
void Daemon::drain(supervise::Signals& signals, uint64_t timeout_ns) {
  view_->set_state(State::kDraining);
  control_->set_serving(control::Serving::kNotReady);
  (void)notifier_->stopping("draining").is_ok();
  const uint32_t told = sessions_->begin_drain();
  base::log_info("draining", {{"sessions", told}, {"timeout_ms", timeout_ns / 1'000'000}});
  const uint64_t deadline_ns = base::now_ns() + timeout_ns;
  while (sessions_->outstanding_operations() != 0 && base::now_ns() < deadline_ns) {
    constexpr uint64_t kLookNs = 5'000'000;
    base::Result<supervise::SignalEvent> event = signals.wait(kLookNs);
    (void)look_at_threads();
    if (event.is_ok() && event.value() == supervise::SignalEvent::kStopNow) {
      break;
    }
  }
  const uint32_t left = sessions_->outstanding_operations();
  listener_->stop();
  end_sessions(base::now_ns() + kReclaimNs);
  (void)control_->shutdown(base::now_ns() + kControlShutdownNs);
  for (const std::unique_ptr<transport::DeviceLoop>& loop : loops_) {
    loop->stop();
  }
  if (metrics_ != nullptr) {
    metrics_->detach();
  }
  base::log_info("drained", {{"operations_cut_short", left}});
}

}  // namespace expertd::app
