// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/peer_server.h"

#include <grpcpp/resource_quota.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/server_posix.h>
#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <limits>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/base/limits.h"
#include "daemon/fabric/bootstrap/peer_listener.h"
#include "daemon/fabric/bootstrap/peer_services.h"

namespace expertd::fabric {

namespace {

constexpr size_t kQuotaBytes = 128UL << 20;
constexpr int kQuotaThreads = 16;
constexpr int kMetadataBytesMax = 8192;
constexpr int kStreamsMax = 2048;  // joins of all ranks of a node wait at once
constexpr int kPingIntervalMinMs = 500;
constexpr int kPingStrikesMax = 3;
constexpr uint64_t kNoDeadline = std::numeric_limits<uint64_t>::max();

std::chrono::steady_clock::time_point steady(uint64_t at_ns) {
  return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(at_ns));
}

std::chrono::system_clock::time_point wall_time(uint64_t deadline_ns) {
  const uint64_t now = base::now_ns();
  return std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::system_clock::duration>(
                                                std::chrono::nanoseconds(deadline_ns > now ? deadline_ns - now : 0));
}

void set_limits(const PeerServerOptions& options, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(base::kMaxControlMessageBytes));
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kStreamsMax);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMetadataBytesMax);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kPingIntervalMinMs);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, kPingStrikesMax);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, static_cast<int>(options.keepalive_ns / 1'000'000));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, static_cast<int>(options.keepalive_ns / 2'000'000));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  grpc::ResourceQuota quota("expertd-peers");
  quota.Resize(kQuotaBytes);
  quota.SetMaxThreads(kQuotaThreads);
  builder->SetResourceQuota(quota);
}

uint64_t random_key() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

}  // namespace

struct PeerServer::Parts {
  explicit Parts(const PeerServerOptions& given) : options(given), rendezvous(given.rendezvous, random_key) {}

  base::Status start();
  void run();
  void wake();
  void stop_clock();

  const PeerServerOptions options;
  group::Rendezvous rendezvous;
  PeerContext context;
  std::unique_ptr<grpc::Service> peer_service;
  std::unique_ptr<grpc::Service> rendezvous_service;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<PeerListener> listener;
  uint16_t port = 0;

  std::mutex mutex;
  std::condition_variable changed;  // with mutex: the rest
  bool looked_at = true;            // no deadline may have become earlier since
  bool stopping = false;
  std::thread clock;
};

base::Status PeerServer::Parts::start() {
  context.cluster_key = options.cluster_key;
  context.identity = options.identity;
  context.rendezvous = &rendezvous;
  context.probes = options.probes;
  context.deadline_changed = [this] { wake(); };
  peer_service = make_peer_service(&context);
  rendezvous_service = make_rendezvous_service(&context);
  try {
    grpc::ServerBuilder builder;
    set_limits(options, &builder);
    builder.RegisterService(peer_service.get());
    builder.RegisterService(rendezvous_service.get());
    server = builder.BuildAndStart();
    clock = std::thread([this] { run(); });
    pthread_setname_np(clock.native_handle(), "rendezvous");
  } catch (const std::exception& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the gRPC server for peers: ") + error.what());
  }
  if (server == nullptr) {
    return base::Status(EXPERTD_REASON_INTERNAL, "the gRPC server for peers did not start");
  }
  auto made = PeerListener::create(
      {options.listen, options.connections_max, options.first_bytes_ns},
      [raw = server.get()](base::ScopedFd fd) { grpc::AddInsecureChannelFromFd(raw, fd.release()); });
  if (!made.is_ok()) {
    return made.status();
  }
  listener = std::move(made).value();
  port = listener->port();
  return base::Status::ok();
}

void PeerServer::Parts::wake() {
  const std::lock_guard lock(mutex);
  looked_at = false;
  changed.notify_all();
}

void PeerServer::Parts::run() {
  std::unique_lock lock(mutex);
  while (!stopping) {
    looked_at = true;
    lock.unlock();
    rendezvous.expire(base::now_ns());
    const uint64_t next = rendezvous.next_deadline_ns();
    lock.lock();
    const auto ready = [this] { return stopping || !looked_at; };
    if (next == kNoDeadline) {
      changed.wait(lock, ready);
    } else {
      changed.wait_until(lock, steady(next), ready);
    }
  }
}

void PeerServer::Parts::stop_clock() {
  {
    const std::lock_guard lock(mutex);
    stopping = true;
    changed.notify_all();
  }
  if (clock.joinable()) {
    clock.join();
  }
}

base::Result<std::unique_ptr<PeerServer>> PeerServer::create(const PeerServerOptions& options) {
  std::unique_ptr<PeerServer> server(new PeerServer(std::make_unique<Parts>(options)));
  EXPERTD_RETURN_IF_ERROR(server->parts_->start());
  return server;
}

PeerServer::PeerServer(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

PeerServer::~PeerServer() {
  shutdown(0);
}

uint16_t PeerServer::port() const {
  return parts_->port;
}

void PeerServer::set_hosting(bool hosting) {
  if (parts_->context.hosting.exchange(hosting, std::memory_order_acq_rel) && !hosting) {
    parts_->rendezvous.close(
        base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE,
                     "node \"" + parts_->options.identity.name + "\" does not host the rendezvous any more"));
  }
}

void PeerServer::set_elected(uint64_t term, uint64_t until_ns) {
  PeerContext& context = parts_->context;
  if (context.term.load(std::memory_order_acquire) != term) {
    set_hosting(false);
    context.term.store(term, std::memory_order_release);
  }
  context.until_ns.store(until_ns, std::memory_order_release);
  set_hosting(true);
}

bool PeerServer::hosting() const {
  return parts_->context.hosts_at(base::now_ns());
}

std::vector<group::Rendezvous::NodeSnapshot> PeerServer::nodes() const {
  return parts_->rendezvous.nodes();
}

void PeerServer::shutdown(uint64_t deadline_ns) {
  parts_->listener.reset();
  set_hosting(false);
  if (parts_->server != nullptr) {
    parts_->server->Shutdown(wall_time(deadline_ns));
    parts_->server->Wait();
    parts_->server.reset();
  }
  parts_->stop_clock();
}

}  // namespace expertd::fabric
