// SPDX-License-Identifier: Apache-2.0
// Real gRPC calls against ControlServer, over adopted descriptors and control.sock, with fakes behind it.
#include "daemon/control/control_server.h"

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
#include <utility>

#include "daemon/base/clock.h"
#include "expertd/v1/control.grpc.pb.h"
#include "expertd/v1/error.pb.h"
#include "expertd/v1/session.grpc.pb.h"
#include "google/protobuf/any.pb.h"
#include "google/protobuf/unknown_field_set.h"

namespace expertd::control {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;
constexpr std::chrono::seconds kPatience(20);

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
  base::Result<session::MaskReply> group_mask(base::SessionId, base::GroupId, uint64_t exclude, uint64_t) override {
    return session::MaskReply{2, 1, exclude};
  }
  base::Result<session::GroupPlan> plan_group(const session::GroupConfig& config) override {
    return session::GroupPlan{1, 2, 3, uint64_t{config.expert_parallel_size} * config.max_tokens};
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
  uint32_t drain(uint64_t timeout_ns) override { return static_cast<uint32_t>(timeout_ns); }
  base::Result<std::string> set_log_level(const std::string& level) override {
    if (level != "debug") {
      return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE);
    }
    return std::string("info");
  }
};

std::optional<v1::ErrorInfo> error_info(const grpc::Status& status) {
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

  std::shared_ptr<grpc::Channel> attach(uint64_t session) {
    int fds[2] = {-1, -1};
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds), 0);
    EXPECT_TRUE(server_->adopt_session_connection(base::ScopedFd(fds[0]), {session}).is_ok());
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

TEST_F(ControlServerTest, EveryConnectionIsItsSession) {
  const auto first = attach(11);
  const auto second = attach(22);
  v1::OpenSessionResponse response;
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(open(first, &response, "one").ok());
    EXPECT_EQ(response.session_id(), 11U);
    EXPECT_EQ(sessions_.opened, (std::pair<uint64_t, std::string>{11, "one"}));
    ASSERT_TRUE(open(second, &response, "two").ok());
    EXPECT_EQ(response.session_id(), 22U);
  }
  EXPECT_EQ(response.daemon_version(), "9.8.7");
}

TEST_F(ControlServerTest, SessionCallsReachTheApi) {
  const auto stub = v1::Session::NewStub(attach(1));
  const auto call = [](auto&& body) {
    grpc::ClientContext context;
    set_deadline(&context);
    return body(&context);
  };
  v1::RegisterBufferRequest buffer;
  buffer.set_fd_token(9);
  v1::RegisterBufferResponse registered;
  EXPECT_TRUE(call([&](auto* c) { return stub->RegisterBuffer(c, buffer, &registered); }).ok());
  EXPECT_EQ(registered.buffer_id(), 9U);
  buffer.set_cuda_ipc_handle(std::string(64, 'h'));
  EXPECT_TRUE(call([&](auto* c) { return stub->RegisterBuffer(c, buffer, &registered); }).ok());
  EXPECT_EQ(registered.buffer_id(), 64U);
  v1::CreateWindowRequest window;
  window.set_size(4096);
  v1::CreateWindowResponse created;
  EXPECT_TRUE(call([&](auto* c) { return stub->CreateWindow(c, window, &created); }).ok());
  EXPECT_EQ(created.fd_token(), 77U);
  EXPECT_EQ(created.size(), 4096U);
  v1::GroupMaskRequest mask;
  mask.set_exclude(8);
  v1::GroupMaskResponse masked;
  EXPECT_TRUE(call([&](auto* c) { return stub->GroupMask(c, mask, &masked); }).ok());
  EXPECT_EQ(masked.excluded(), 8U);
  v1::PlanGroupRequest plan;
  *plan.mutable_config() = join_request().config();
  plan.mutable_config()->set_expert_parallel_size(4);
  plan.mutable_config()->set_max_tokens(8);
  v1::PlanGroupResponse planned;
  EXPECT_TRUE(call([&](auto* c) { return stub->PlanGroup(c, plan, &planned); }).ok());
  EXPECT_EQ(planned.worst_rows(), 32U);
  v1::LeaveGroupResponse left;
  const grpc::Status missing = call([&](auto* c) { return stub->LeaveGroup(c, {}, &left); });
  EXPECT_EQ(missing.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(error_info(missing)->reason_name(), "NO_SUCH_GROUP");
}

TEST_F(ControlServerTest, SessionCallsAreRefusedOnControlSocket) {
  ASSERT_TRUE(server_->start_listening().is_ok());
  const auto channel = connect_operator();
  v1::OpenSessionResponse opened;
  const grpc::Status refused = open(channel, &opened);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(error_info(refused)->reason(), static_cast<uint32_t>(EXPERTD_REASON_PERMISSION));
  v1::GetStatusResponse state;
  ASSERT_TRUE(status(channel, &state).ok());
  EXPECT_EQ(state.state(), "ready");
  EXPECT_EQ(state.pid(), static_cast<uint32_t>(getpid()));
  EXPECT_GT(state.resident_bytes(), 0U);
}

TEST_F(ControlServerTest, OperatorCallsAreRefusedOnSessionConnections) {
  v1::GetStatusResponse state;
  const grpc::Status refused = status(attach(1), &state);
  EXPECT_EQ(error_info(refused)->reason_name(), "PERMISSION");
}

TEST_F(ControlServerTest, OperatorVerbs) {
  ASSERT_TRUE(server_->start_listening().is_ok());
  const auto stub = v1::Control::NewStub(connect_operator());
  grpc::ClientContext drain_context;
  set_deadline(&drain_context);
  v1::DrainRequest drain;
  drain.set_timeout_ns(42);
  v1::DrainResponse drained;
  ASSERT_TRUE(stub->Drain(&drain_context, drain, &drained).ok());  // the tests run as the daemon's own user
  EXPECT_EQ(drained.sessions(), 42U);
  v1::SetLogLevelRequest level;
  v1::SetLogLevelResponse previous;
  level.set_level("loud");
  grpc::ClientContext bad_context;
  set_deadline(&bad_context);
  EXPECT_EQ(error_info(stub->SetLogLevel(&bad_context, level, &previous))->reason_name(), "CONFIG_BAD_VALUE");
  level.set_level("debug");
  grpc::ClientContext good_context;
  set_deadline(&good_context);
  ASSERT_TRUE(stub->SetLogLevel(&good_context, level, &previous).ok());
  EXPECT_EQ(previous.previous(), "info");
}

TEST_F(ControlServerTest, CallsWithoutDeadlineAreRefused) {
  const auto channel = attach(1);
  grpc::ClientContext context;
  v1::OpenSessionResponse opened;
  const grpc::Status refused = v1::Session::NewStub(channel)->OpenSession(&context, {}, &opened);
  EXPECT_EQ(error_info(refused)->reason_name(), "DEADLINE_MISSING");
  grpc::ClientContext join_context;
  v1::JoinGroupResponse joined;
  const grpc::Status join = v1::Session::NewStub(channel)->JoinGroup(&join_context, join_request(), &joined);
  EXPECT_EQ(error_info(join)->reason_name(), "DEADLINE_MISSING");
}

TEST_F(ControlServerTest, OversizedMessageIsRefused) {
  const auto channel = attach(1);
  v1::OpenSessionResponse opened;
  EXPECT_EQ(open(channel, &opened, std::string(65 * 1024, 'a')).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(open(channel, &opened).ok());  // the connection lives on
}

TEST_F(ControlServerTest, ErrorDetailsRoundTrip) {
  const auto channel = attach(1);
  std::promise<grpc::Status> result;
  std::thread caller([&] {
    grpc::ClientContext context;
    set_deadline(&context);
    v1::JoinGroupResponse joined;
    result.set_value(v1::Session::NewStub(channel)->JoinGroup(&context, join_request(), &joined));
  });
  auto join = sessions_.take_join();
  ASSERT_TRUE(join.has_value());
  session::ErrorDetail error;
  error.status = base::Status(EXPERTD_REASON_CONFIG_MISMATCH, "hidden differs" + std::string(5000, '!'));
  error.rank = 3;
  error.field = "hidden";
  error.value = "7168";
  error.other_value = std::string(5000, '4');
  join->second(error, {});
  caller.join();
  const grpc::Status status = result.get_future().get();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(status.error_message().size(), 1024U);
  const std::optional<v1::ErrorInfo> info = error_info(status);
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->reason(), 61U);
  EXPECT_FALSE(info->retryable());
  EXPECT_EQ(info->rank(), 3);
  EXPECT_EQ(info->field(), "hidden");
  EXPECT_EQ(info->value(), "7168");
  EXPECT_EQ(info->other_value().size(), 256U);
}

TEST_F(ControlServerTest, ManyJoinsWaitWithoutHoldingThreads) {
  constexpr size_t kJoins = 40;  // far more than threads
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  std::vector<std::future<grpc::Status>> results;
  std::vector<std::thread> callers;
  for (size_t i = 0; i < kJoins; ++i) {
    auto promise = std::make_shared<std::promise<grpc::Status>>();
    results.push_back(promise->get_future());
    channels.push_back(attach(100 + i));
    callers.emplace_back([promise, channel = channels.back()] {
      grpc::ClientContext context;
      set_deadline(&context);
      v1::JoinGroupResponse joined;
      const grpc::Status status = v1::Session::NewStub(channel)->JoinGroup(&context, join_request(), &joined);
      promise->set_value(status.ok() && joined.group_id() != 6 ? grpc::Status::CANCELLED : status);
    });
  }
  std::vector<session::JoinCallback> waiting;
  for (size_t i = 0; i < kJoins; ++i) {
    auto join = sessions_.take_join();
    ASSERT_TRUE(join.has_value());
    EXPECT_GT(join->first.timeout_ns, 0U);
    EXPECT_LT(join->first.timeout_ns, 20 * kSecond);
    waiting.push_back(std::move(join->second));
  }
  v1::OpenSessionResponse opened;
  EXPECT_TRUE(open(channels.front(), &opened).ok());
  session::JoinGrant grant;
  grant.group = {6};
  for (const session::JoinCallback& done : waiting) {
    done({}, grant);
  }
  for (size_t i = 0; i < kJoins; ++i) {
    callers[i].join();
    EXPECT_TRUE(results[i].get().ok());
  }
}

TEST_F(ControlServerTest, LateJoinAnswerAfterTheDeadlineIsDropped) {
  const auto channel = attach(1);
  grpc::ClientContext context;
  set_deadline(&context, std::chrono::milliseconds(100));
  v1::JoinGroupResponse joined;
  const grpc::Status status = v1::Session::NewStub(channel)->JoinGroup(&context, join_request(), &joined);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  auto join = sessions_.take_join();
  ASSERT_TRUE(join.has_value());
  join->second({}, {});
  server_.reset();
  join->second({}, {});  // even after the server: nothing happens
}

TEST_F(ControlServerTest, BlockedSessionsDoNotBlockOperatorsOrHealth) {
  ASSERT_TRUE(server_->start_listening().is_ok());
  std::vector<std::thread> callers;
  for (uint64_t i = 0; i < 6; ++i) {  // more than session_threads
    callers.emplace_back([channel = attach(i + 1)] {
      grpc::ClientContext context;
      set_deadline(&context);
      v1::UnregisterBufferResponse response;
      EXPECT_TRUE(v1::Session::NewStub(channel)->UnregisterBuffer(&context, {}, &response).ok());
    });
  }
  ASSERT_TRUE(sessions_.wait_unregistering(4));
  const auto channel = connect_operator();
  v1::GetStatusResponse state;
  EXPECT_TRUE(status(channel, &state).ok());
  EXPECT_TRUE(health(channel, "").first.ok());
  sessions_.release();
  for (std::thread& caller : callers) {
    caller.join();
  }
}

TEST_F(ControlServerTest, EndOfSessionEndsItsCalls) {
  const auto channel = attach(5);
  const auto other = attach(6);
  std::promise<grpc::Status> result;
  std::thread caller([&] {
    grpc::ClientContext context;
    set_deadline(&context);
    v1::JoinGroupResponse joined;
    result.set_value(v1::Session::NewStub(channel)->JoinGroup(&context, join_request(), &joined));
  });
  ASSERT_TRUE(sessions_.take_join().has_value());
  server_->session_ended({5});
  std::future<grpc::Status> ended = result.get_future();
  ASSERT_EQ(ended.wait_for(kPatience / 2), std::future_status::ready);
  EXPECT_EQ(ended.get().error_code(), grpc::StatusCode::UNAVAILABLE);
  caller.join();
  v1::OpenSessionResponse opened;
  EXPECT_TRUE(open(other, &opened).ok());
}

TEST_F(ControlServerTest, HealthFollowsTheState) {
  ASSERT_TRUE(server_->start_listening().is_ok());
  const auto channel = connect_operator();
  const std::string serving("\x08\x01", 2);
  const std::string not_serving("\x08\x02", 2);
  EXPECT_EQ(health(channel, "").second, serving);
  EXPECT_EQ(health(channel, "expertd.ready").second, not_serving);
  server_->set_serving(Serving::kReady);
  EXPECT_EQ(health(channel, "expertd.ready").second, serving);
  server_->set_serving(Serving::kNotReady);
  EXPECT_EQ(health(channel, "expertd.ready").second, not_serving);
  EXPECT_EQ(health(channel, "expertd.gpu.3").first.error_code(), grpc::StatusCode::NOT_FOUND);
  server_->set_device_healthy({3}, true);
  EXPECT_EQ(health(channel, "expertd.gpu.3").second, serving);
}

TEST_F(ControlServerTest, ReflectionOnlyWhenAskedFor) {
  const std::string method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
  const std::string list_services("\x3a\x00", 2);
  EXPECT_EQ(raw_call(attach(1), method, list_services).first.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  options_.enable_reflection = true;
  start();
  const auto [status, reply] = raw_call(attach(1), method, list_services);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_NE(reply.find("expertd.v1.Session"), std::string::npos);
}

TEST_F(ControlServerTest, StaleSocketIsReplacedAndLiveOneRefused) {
  std::ofstream(options_.socket + ".lock") << "";
  ASSERT_TRUE(server_->start_listening().is_ok());
  auto second = ControlServer::create(options_, sessions_, operator_);
  ASSERT_TRUE(second.is_ok());
  const base::Status refused = second.value()->start_listening();
  EXPECT_EQ(refused.reason(), EXPERTD_REASON_ADDRESS_IN_USE);
  v1::GetStatusResponse state;
  EXPECT_TRUE(status(connect_operator(), &state).ok());
}

TEST_F(ControlServerTest, ConnectionsBeyondTheLimitAreClosed) {
  options_.operator_connections_max = 1;
  start();
  ASSERT_TRUE(server_->start_listening().is_ok());
  v1::GetStatusResponse state;
  const auto first = connect_operator();
  ASSERT_TRUE(status(first, &state).ok());
  grpc::ChannelArguments own_connection;
  own_connection.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto second =
      grpc::CreateCustomChannel("unix:" + options_.socket, grpc::InsecureChannelCredentials(), own_connection);
  EXPECT_EQ(status(second, &state).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(status(first, &state).ok());
}

TEST_F(ControlServerTest, ShutdownWithOpenCallsEndsByTheDeadline) {
  const auto channel = attach(1);
  std::promise<grpc::Status> result;
  std::thread joiner([&] {
    grpc::ClientContext context;
    set_deadline(&context);
    v1::JoinGroupResponse joined;
    result.set_value(v1::Session::NewStub(channel)->JoinGroup(&context, join_request(), &joined));
  });
  auto join = sessions_.take_join();
  ASSERT_TRUE(join.has_value());
  const uint64_t start_ns = base::now_ns();
  EXPECT_TRUE(server_->shutdown(start_ns + kSecond / 5));
  EXPECT_LT(base::now_ns() - start_ns, 2 * kSecond);
  joiner.join();
  EXPECT_FALSE(result.get_future().get().ok());
  join->second({}, {});
  EXPECT_FALSE(server_->adopt_session_connection(base::ScopedFd(dup(STDIN_FILENO)), {1}).is_ok());
}

TEST_F(ControlServerTest, ShutdownReportsAnApiCallThatIsStillRunning) {
  const auto channel = attach(1);
  std::thread caller([&] {
    grpc::ClientContext context;
    set_deadline(&context);
    v1::UnregisterBufferResponse response;
    EXPECT_FALSE(v1::Session::NewStub(channel)->UnregisterBuffer(&context, {}, &response).ok());
  });
  ASSERT_TRUE(sessions_.wait_unregistering(1));
  const uint64_t start_ns = base::now_ns();
  EXPECT_FALSE(server_->shutdown(start_ns + kSecond / 10));
  EXPECT_LT(base::now_ns() - start_ns, 2 * kSecond);
  caller.join();
  sessions_.release();
}

}  // namespace
}  // namespace expertd::control
