// SPDX-License-Identifier: Apache-2.0
// The fakes behind ControlServer and the fixture of its tests: real gRPC over adopted descriptors and control.sock.
// Test threads use it; each test owns its own.
#pragma once

#include <grpcpp/create_channel.h>
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <future>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/control/control_server.h"
#include "expertd/v1/control.grpc.pb.h"
#include "expertd/v1/error.pb.h"
#include "expertd/v1/session.grpc.pb.h"
#include "google/protobuf/any.pb.h"
#include "google/protobuf/unknown_field_set.h"

namespace expertd::control {

inline constexpr uint64_t kSecond = 1'000'000'000;
inline constexpr uint32_t kUser = 1000;  // of every session
inline constexpr std::chrono::seconds kPatience(20);

/// Records calls; answers are fields of it. Joins wait for the test.
class FakeSessions final : public session::SessionApi {
 public:
  base::Status open_session(base::SessionId session, const std::string& client_id, const std::string&) override {
    const std::lock_guard lock(mutex);
    opened = {session.value, client_id};
    return base::Status::ok();
  }
  base::Result<session::BufferGrant> register_ipc(base::SessionId, const std::string& handle, uint64_t,
                                                  uint64_t) override {
    return session::BufferGrant{static_cast<uint32_t>(handle.size()), 0, 0};
  }
  base::Result<session::BufferGrant> register_fd(base::SessionId, uint64_t token, uint64_t, uint64_t,
                                                 uint64_t) override {
    return session::BufferGrant{static_cast<uint32_t>(token), 0, 0};
  }
  base::Status unregister(base::SessionId, uint32_t, uint64_t deadline_ns) override {
    std::unique_lock lock(mutex);
    ++unregistering;
    changed.notify_all();
    const auto left = std::chrono::nanoseconds(deadline_ns > base::now_ns() ? deadline_ns - base::now_ns() : 0);
    return changed.wait_for(lock, left, [this] { return released; }) ? base::Status::ok()
                                                                     : base::Status(EXPERTD_REASON_BUFFER_BUSY);
  }
  base::Result<session::BufferGrant> create_window(base::SessionId, uint64_t size) override {
    return session::BufferGrant{5, 77, size};
  }
  void join_group(base::SessionId, const session::JoinRequest& request, session::JoinCallback done) override {
    const std::lock_guard lock(mutex);
    joins.emplace_back(request, std::move(done));
    changed.notify_all();
  }
  base::Status leave_group(base::SessionId, base::GroupId, uint64_t) override {
    return base::Status(EXPERTD_REASON_NO_SUCH_GROUP);
  }
  base::Result<session::MaskReply> group_mask(base::SessionId, base::GroupId, const base::RankSet& exclude,
                                              const base::RankSet&) override {
    return session::MaskReply{2, base::RankSet(1), exclude};
  }
  base::Result<session::GroupPlan> plan_group(base::SessionId session, const session::GroupConfig& config) override {
    const uint64_t worst_rows = uint64_t{config.expert_parallel_size} * config.max_tokens;
    return session::GroupPlan{1, 2, 3, worst_rows, 4, 40 + session.value};
  }

  std::optional<std::pair<session::JoinRequest, session::JoinCallback>> take_join() {
    std::unique_lock lock(mutex);
    if (!changed.wait_for(lock, kPatience, [this] { return !joins.empty(); })) {
      return std::nullopt;
    }
    auto join = std::move(joins.back());
    joins.pop_back();
    return join;
  }
  bool wait_unregistering(int count) {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, kPatience, [this, count] { return unregistering >= count; });
  }
  void release() {
    const std::lock_guard lock(mutex);
    released = true;
    changed.notify_all();
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::pair<uint64_t, std::string> opened;
  std::vector<std::pair<session::JoinRequest, session::JoinCallback>> joins;
  int unregistering = 0;
  bool released = false;
};

class FakeOperator final : public session::OperatorApi {
 public:
  session::StatusSnapshot status() override {
    session::StatusSnapshot snapshot;
    snapshot.state = "ready";
    return snapshot;
  }
  std::vector<session::SessionSnapshot> sessions() override { return std::vector<session::SessionSnapshot>(3); }
  std::vector<session::OpCounterSnapshot> counters() override { return {}; }
  base::Result<session::PeersSnapshot> peers() override { return session::PeersSnapshot{}; }
  session::WaitsSnapshot waits(uint32_t) override { return {}; }
  uint32_t drain(uint64_t timeout_ns) override { return static_cast<uint32_t>(timeout_ns); }
  base::Result<std::string> set_log_level(const std::string& level) override {
    if (level != "debug") {
      return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE);
    }
    return std::string("info");
  }
};

inline std::optional<v1::ErrorInfo> error_info(const grpc::Status& status) {
  // Read by an independent parser: the fields of google.rpc.Status as unknown fields.
  google::protobuf::UnknownFieldSet fields;
  if (!fields.ParseFromString(status.error_details()) || fields.field_count() != 3) {
    return std::nullopt;
  }
  EXPECT_EQ(fields.field(0).varint(), static_cast<uint64_t>(status.error_code()));
  EXPECT_EQ(fields.field(1).length_delimited(), status.error_message());
  google::protobuf::Any any;
  v1::ErrorInfo info;
  if (!any.ParseFromString(fields.field(2).length_delimited()) || !any.UnpackTo(&info)) {
    return std::nullopt;
  }
  return info;
}

class ControlServerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/expertd-control-XXXXXX";
    directory_ = mkdtemp(pattern);
    options_.socket = directory_ + "/control.sock";
    options_.version = "9.8.7";
    start();
  }
  void TearDown() override {
    sessions_.release();
    server_.reset();
    std::filesystem::remove_all(directory_);
  }
  void start() {
    server_.reset();
    auto server = ControlServer::create(options_, sessions_, operator_);
    ASSERT_TRUE(server.is_ok()) << server.status().message();
    server_ = std::move(server).value();
  }

  std::shared_ptr<grpc::Channel> attach(uint64_t session, uint32_t uid = kUser) {
    int fds[2] = {-1, -1};
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
    EXPECT_TRUE(server_->adopt_session_connection(base::ScopedFd(fds[0]), {session}, uid).is_ok());
    return grpc::CreateInsecureChannelFromFd("expertd", fds[1]);
  }
  std::shared_ptr<grpc::Channel> connect_operator() {
    return grpc::CreateChannel("unix:" + options_.socket, grpc::InsecureChannelCredentials());
  }
  static void set_deadline(grpc::ClientContext* context, std::chrono::milliseconds left = kPatience) {
    context->set_deadline(std::chrono::system_clock::now() + left);
  }

  grpc::Status open(const std::shared_ptr<grpc::Channel>& channel, v1::OpenSessionResponse* response,
                    const std::string& name = "client") {
    grpc::ClientContext context;
    set_deadline(&context);
    v1::OpenSessionRequest request;
    request.set_client_id(name);
    return v1::Session::NewStub(channel)->OpenSession(&context, request, response);
  }
  grpc::Status status(const std::shared_ptr<grpc::Channel>& channel, v1::GetStatusResponse* response) {
    grpc::ClientContext context;
    set_deadline(&context);
    return v1::Control::NewStub(channel)->GetStatus(&context, {}, response);
  }
  /// grpc.health.v1.Health/Check by hand: HealthCheckRequest { service = 1 }, HealthCheckResponse { status = 1 }.
  static std::pair<grpc::Status, std::string> health(const std::shared_ptr<grpc::Channel>& channel,
                                                     const std::string& service) {
    std::string bytes = service.empty() ? "" : std::string("\x0a") + static_cast<char>(service.size()) + service;
    return raw_call(channel, "/grpc.health.v1.Health/Check", bytes);
  }
  static std::pair<grpc::Status, std::string> raw_call(const std::shared_ptr<grpc::Channel>& channel,
                                                       const std::string& method, const std::string& bytes) {
    grpc::GenericStub stub(channel);
    grpc::ClientContext context;
    set_deadline(&context);
    const grpc::Slice slice(bytes);
    const grpc::ByteBuffer request(&slice, 1);
    grpc::ByteBuffer response;
    std::promise<grpc::Status> done;
    stub.UnaryCall(&context, method, {}, &request, &response,
                   [&done](const grpc::Status& result) { done.set_value(result); });
    grpc::Status result = done.get_future().get();
    grpc::Slice reply;
    std::string text;
    if (result.ok() && response.DumpToSingleSlice(&reply).ok()) {
      text.assign(reinterpret_cast<const char*>(reply.begin()), reply.size());
    }
    return {result, text};
  }
  static v1::JoinGroupRequest join_request() {
    v1::JoinGroupRequest request;
    request.set_name("group");
    request.mutable_config()->set_mode(v1::GROUP_MODE_AUTO);
    return request;
  }

  std::string directory_;
  ControlOptions options_;
  FakeSessions sessions_;
  FakeOperator operator_;
  std::unique_ptr<ControlServer> server_;
};

}  // namespace expertd::control
