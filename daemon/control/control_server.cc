// SPDX-License-Identifier: Apache-2.0
#include "daemon/control/control_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/impl/service_type.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/server_context.h>
#include <grpcpp/server_posix.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <mutex>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/base/limits.h"
#include "daemon/base/log.h"
#include "daemon/control/call_pool.h"
#include "daemon/control/listener.h"
#include "daemon/control/peer_table.h"
#include "daemon/control/services.h"

namespace expertd::control {

namespace {

constexpr size_t kQuotaBytes = 64UL << 20;
constexpr int kQuotaThreads = 32;
constexpr int kMetadataBytesMax = 8192;
constexpr int kPingIntervalMinMs = 10'000;
constexpr int kPingStrikesMax = 3;

const char* const kReadyService = "expertd.ready";

std::chrono::system_clock::time_point wall_time(uint64_t deadline_ns) {
  const uint64_t now = base::now_ns();
  const std::chrono::nanoseconds left(deadline_ns > now ? deadline_ns - now : 0);
  return std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::system_clock::duration>(left);
}

/// The reflection library adds its plugin to every builder of the process as soon as it is linked: take it out unless
/// it is wanted.
class ReflectionOption final : public grpc::ServerBuilderOption {
 public:
  explicit ReflectionOption(bool enable) : enable_(enable) {}
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    const std::string name = grpc::reflection::ProtoServerReflectionPlugin().name();
    std::erase_if(*plugins, [&name](const auto& plugin) { return plugin->name() == name; });
    if (enable_) {
      plugins->push_back(std::make_unique<grpc::reflection::ProtoServerReflectionPlugin>());
    }
  }

 private:
  const bool enable_;
};

void set_limits(grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(base::kMaxControlMessageBytes));
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, static_cast<int>(base::kMaxCallsPerConnection));
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMetadataBytesMax);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kPingIntervalMinMs);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, kPingStrikesMax);
  grpc::ResourceQuota quota("expertd-control");
  quota.Resize(kQuotaBytes);
  quota.SetMaxThreads(kQuotaThreads);
  builder->SetResourceQuota(quota);
}

}  // namespace

Admission admit_call(const ServiceContext& services, const grpc::CallbackServerContext& context, PeerKind kind) {
  Admission out;
  const std::chrono::system_clock::time_point deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) {
    out.error.status = base::Status(EXPERTD_REASON_DEADLINE_MISSING);
    return out;
  }
  const std::optional<Peer> peer = services.peers->find(context.peer());
  if (!peer.has_value()) {
    out.error.status = base::Status(EXPERTD_REASON_NO_SUCH_SESSION, "the session of this connection has ended");
    return out;
  }
  if (peer->kind != kind) {
    out.error.status = base::Status(EXPERTD_REASON_PERMISSION, kind == PeerKind::kSession
                                                                   ? "session calls need an attached connection"
                                                                   : "operator calls are served on control.sock");
    return out;
  }
  const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - std::chrono::system_clock::now());
  const uint64_t left_ns = left.count() > 0 ? static_cast<uint64_t>(left.count()) : 0;
  out.caller = Caller{*peer, base::now_ns() + std::min(left_ns, services.call_deadline_max_ns)};
  return out;
}

struct ControlServer::Parts {
  Parts(const ControlOptions& given, FdRange range) : options(given), peers(range) {}

  const ControlOptions options;
  PeerTable peers;
  std::unique_ptr<CallPool> session_calls;
  std::unique_ptr<CallPool> operator_calls;
  std::unique_ptr<grpc::Service> session_service;
  std::unique_ptr<grpc::Service> operator_service;
  std::unique_ptr<grpc::Server> server;

  base::Status adopt(base::ScopedFd fd, const Peer& peer);
  void accept_operator(base::ScopedFd fd, const Peer& peer);

  std::mutex mutex;                    // orders adding connections against shutting down
  bool closed = false;                 // under mutex
  std::unique_ptr<Listener> listener;  // main only
};

base::Status ControlServer::Parts::adopt(base::ScopedFd fd, const Peer& peer) {
  const std::lock_guard lock(mutex);
  if (closed) {
    return base::Status(EXPERTD_REASON_DRAINING);
  }
  base::Result<base::ScopedFd> own = peers.adopt(std::move(fd), peer);
  if (!own.is_ok()) {
    return own.status();
  }
  grpc::AddInsecureChannelFromFd(server.get(), own.value().release());
  return base::Status::ok();
}

void ControlServer::Parts::accept_operator(base::ScopedFd fd, const Peer& peer) {
  if (peers.count_open(PeerKind::kOperator) >= options.operator_connections_max) {
    base::log_warn("control.sock: too many connections, one is closed", {{"uid", peer.uid}});
    return;
  }
  const base::Status adopted = adopt(std::move(fd), peer);
  if (!adopted.is_ok()) {
    base::log_warn("control.sock: a connection is closed", {{"error", adopted.message()}, {"uid", peer.uid}});
  }
}

base::Result<std::unique_ptr<ControlServer>> ControlServer::create(const ControlOptions& options,
                                                                   session::SessionApi& session_api,
                                                                   session::OperatorApi& operator_api) {
  const base::Result<FdRange> range = default_fd_range();
  if (!range.is_ok()) {
    return range.status();
  }
  auto parts = std::make_unique<Parts>(options, range.value());
  auto session_calls = CallPool::create({.threads = options.session_threads, .thread_name = "control-session"});
  // Operators' calls look and do not wait, so one of them may use every thread.
  auto operator_calls =
      CallPool::create({.threads = options.operator_threads, .leave_a_thread = false, .thread_name = "control-operat"});
  if (!session_calls.is_ok() || !operator_calls.is_ok()) {
    return session_calls.is_ok() ? operator_calls.status() : session_calls.status();
  }
  parts->session_calls = std::move(session_calls).value();
  parts->operator_calls = std::move(operator_calls).value();
  const ServiceContext services{.peers = &parts->peers,
                                .session_calls = parts->session_calls.get(),
                                .operator_calls = parts->operator_calls.get(),
                                .session_api = &session_api,
                                .operator_api = &operator_api,
                                .version = options.version,
                                .call_deadline_max_ns = options.call_deadline_max_ns,
                                .owner_uid = geteuid()};
  parts->session_service = make_session_service(services);
  parts->operator_service = make_operator_service(services);
  try {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    builder.SetOption(std::make_unique<ReflectionOption>(options.enable_reflection));
    set_limits(&builder);
    builder.RegisterService(parts->session_service.get());
    builder.RegisterService(parts->operator_service.get());
    parts->server = builder.BuildAndStart();
  } catch (const std::exception& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the gRPC server: ") + error.what());
  }
  if (parts->server == nullptr) {
    return base::Status(EXPERTD_REASON_INTERNAL, "the gRPC server did not start");
  }
  std::unique_ptr<ControlServer> control(new ControlServer(std::move(parts)));
  control->set_serving(Serving::kNotReady);
  return control;
}

ControlServer::ControlServer(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

ControlServer::~ControlServer() {
  shutdown(0);
  // Jobs use the services, so they end first.
  parts_->session_calls.reset();
  parts_->operator_calls.reset();
}

base::Status ControlServer::adopt_session_connection(base::ScopedFd fd, base::SessionId session, uint32_t uid) {
  return parts_->adopt(std::move(fd), Peer{PeerKind::kSession, session, uid, 0});
}

void ControlServer::session_ended(base::SessionId session) {
  parts_->peers.end_session(session);
}

base::Status ControlServer::start_listening() {
  const ControlOptions& options = parts_->options;
  base::Result<std::unique_ptr<Listener>> listener = Listener::create(
      {options.socket, options.socket_mode, options.socket_group, options.allowed_uids},
      [parts = parts_.get()](base::ScopedFd fd, const Peer& peer) { parts->accept_operator(std::move(fd), peer); });
  if (!listener.is_ok()) {
    return listener.status();
  }
  parts_->listener = std::move(listener).value();
  return base::Status::ok();
}

void ControlServer::set_serving(Serving serving) {
  parts_->server->GetHealthCheckService()->SetServingStatus(kReadyService, serving == Serving::kReady);
}

void ControlServer::set_device_healthy(base::DeviceIndex device, bool healthy) {
  parts_->server->GetHealthCheckService()->SetServingStatus("expertd.gpu." + std::to_string(device.value), healthy);
}

bool ControlServer::shutdown(uint64_t deadline_ns) {
  parts_->listener.reset();
  {
    const std::lock_guard lock(parts_->mutex);
    if (parts_->closed) {
      return true;
    }
    parts_->closed = true;
  }
  parts_->server->Shutdown(wall_time(deadline_ns));
  const bool sessions_idle = parts_->session_calls->wait_idle(deadline_ns);
  return parts_->operator_calls->wait_idle(deadline_ns) && sessions_idle;
}

}  // namespace expertd::control
