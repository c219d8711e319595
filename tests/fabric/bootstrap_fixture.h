// SPDX-License-Identifier: Apache-2.0
// Nodes of one process that find each other over loopback TCP, real gRPC on both sides. Test threads use it; each test
// owns its own nodes.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/fabric/bootstrap/peer_server.h"
#include "daemon/fabric/bootstrap/rendezvous_client.h"

namespace expertd::fabric {

inline constexpr uint64_t kSecond = 1'000'000'000;
inline constexpr std::chrono::seconds kPatience(20);

struct JoinEnd {
  session::ErrorDetail error;
  std::shared_ptr<const group::Placed> placed;
};

inline session::GroupConfig config_of(uint32_t ranks) {
  session::GroupConfig config;
  config.expert_parallel_size = ranks;
  config.num_experts = ranks * 4;
  config.hidden = 512;
  config.top_k = 4;
  config.max_tokens = 64;
  config.mode = session::GroupMode::kAuto;
  config.on_rank_loss = session::OnRankLoss::kFail;
  return config;
}

/// Waits with a deadline; a wait that has none is a failed test.
template <typename T>
T take(std::future<T> future) {
  if (future.wait_for(kPatience) != std::future_status::ready) {
    ADD_FAILURE() << "no answer within the patience of the test";
    return T{};
  }
  return future.get();
}

/// A daemon as far as other daemons see it.
class TestNode {
 public:
  struct Settings {
    std::string name = {};
    uint64_t id = 0;
    std::vector<std::string> rendezvous = {};  // empty: this node
    std::string listen = "127.0.0.1:0";
    std::string advertise = {};  // "host:port"
    std::string key = {};
    group::RendezvousOptions options = {};
    uint64_t first_bytes_ns = 5 * kSecond;
    uint32_t connections_max = 256;
    bool hosts_by_list = true;                     // false: only the test tells the server whether it hosts
    std::function<group::Elected()> elected = {};  // in place of `rendezvous`
    uint64_t backoff_min_ns = 10'000'000;
    uint64_t backoff_max_ns = 200'000'000;
  };

  explicit TestNode(Settings settings) : settings_(std::move(settings)) {
    identity_ = {settings_.id, settings_.name, settings_.advertise, {{0, "lane0-of-" + settings_.name}, {1, "lane1"}}};
    start_server(settings_.listen);
    start_client();
  }
  ~TestNode() { client_.reset(); }
  TestNode(const TestNode&) = delete;
  TestNode& operator=(const TestNode&) = delete;

  /// At which the server listens.
  std::string address() const {
    return settings_.listen.substr(0, settings_.listen.rfind(':') + 1) + std::to_string(server_->port());
  }
  PeerServer& server() { return *server_; }
  RendezvousClient& client() { return *client_; }
  const group::NodeIdentity& identity() const { return identity_; }

  std::future<JoinEnd> join(const std::string& group, uint32_t rank, const session::GroupConfig& config,
                            uint64_t timeout_ns = 15 * kSecond, uint64_t attempt = 0) {
    auto promise = std::make_shared<std::promise<JoinEnd>>();
    group::RankJoin join{group,     rank, config, {}, attempt != 0 ? attempt : ++attempts_ + (identity_.id << 20),
                         timeout_ns};
    client_->join_rank(
        join, [promise](const session::ErrorDetail& error, const std::shared_ptr<const group::Placed>& placed) {
          promise->set_value({error, placed});
        });
    return promise->get_future();
  }

  std::future<session::ErrorDetail> report(uint64_t key, const base::Status& status = base::Status::ok(),
                                           int32_t rank = -1) {
    auto promise = std::make_shared<std::promise<session::ErrorDetail>>();
    client_->report_formed({key, status, rank},
                           [promise](const session::ErrorDetail& error) { promise->set_value(error); });
    return promise->get_future();
  }

  /// Ends the server; the client goes on.
  void stop_server() {
    port_ = server_->port();
    current_.store(nullptr);
    stopped_ = std::move(server_);
    stopped_->shutdown(0);
  }
  /// A new one on the same port, which knows nothing of before.
  void restart_server() {
    start_server("127.0.0.1:" + std::to_string(port_));
    server_->set_hosting(true);
  }

 private:
  void start_server(const std::string& listen) {
    PeerServerOptions options;
    options.listen = listen;
    options.cluster_key = settings_.key;
    options.identity = identity_;
    options.rendezvous = settings_.options;
    options.first_bytes_ns = settings_.first_bytes_ns;
    options.connections_max = settings_.connections_max;
    base::Result<std::unique_ptr<PeerServer>> server = PeerServer::create(options);
    ASSERT_TRUE(server.is_ok()) << server.status().message();
    server_ = std::move(server).value();
    current_.store(server_.get());
  }
  void start_client() {
    RendezvousClientOptions options;
    options.identity = identity_;
    options.rendezvous = settings_.rendezvous.empty() ? std::vector<std::string>{address()} : settings_.rendezvous;
    options.elected = settings_.elected;
    options.cluster_key = settings_.key;
    options.own_port = server_->port();
    options.own_listen = settings_.listen;
    options.presence_ns = kSecond / 5;
    options.backoff_min_ns = settings_.backoff_min_ns;
    options.backoff_max_ns = settings_.backoff_max_ns;
    base::Result<std::unique_ptr<RendezvousClient>> client = RendezvousClient::create(options, [this](bool hosting) {
      if (PeerServer* const server = current_.load(); server != nullptr && settings_.hosts_by_list) {
        server->set_hosting(hosting);
      }
    });
    ASSERT_TRUE(client.is_ok()) << client.status().message();
    client_ = std::move(client).value();
  }

  const Settings settings_;
  group::NodeIdentity identity_;
  std::unique_ptr<PeerServer> server_;
  std::unique_ptr<PeerServer> stopped_;  // kept: the client's thread may be looking at it
  std::atomic<PeerServer*> current_{nullptr};
  std::unique_ptr<RendezvousClient> client_;
  std::atomic<uint64_t> attempts_{0};
  uint16_t port_ = 0;
};

}  // namespace expertd::fabric
