// SPDX-License-Identifier: Apache-2.0
// Who may call what on ControlServer, and what comes back.
#include <sys/syscall.h>
#include <sys/un.h>

#include <cstring>

#include "tests/unit/control_server_fixture.h"

namespace expertd::control {
namespace {

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
  EXPECT_EQ(planned.handles(), 4U);
  EXPECT_EQ(planned.pinned_bytes(), 41U) << "the session that asks";
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

/// A connection to control.sock as another user: the raw call changes the user of one thread only.
int connect_as(uint32_t uid, const std::string& path) {
  int fd = -1;
  std::thread([&] {
    if (syscall(SYS_setresuid, -1, uid, -1) != 0) {
      return;
    }
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
      close(fd);
      fd = -1;
    }
  }).join();
  return fd;
}

TEST_F(ControlServerTest, OtherUsersLookButDoNotAct) {
  if (geteuid() != 0) {
    GTEST_SKIP() << "needs root, to connect as somebody else";
  }
  constexpr uint32_t kSomebody = 65534;
  options_.socket_mode = 0666;
  options_.allowed_uids = {kSomebody};
  start();
  std::filesystem::permissions(directory_, std::filesystem::perms(0755));
  ASSERT_TRUE(server_->start_listening().is_ok());
  const int fd = connect_as(kSomebody, options_.socket);
  ASSERT_GE(fd, 0);
  const auto channel = grpc::CreateInsecureChannelFromFd("expertd", fd);
  v1::GetStatusResponse state;
  EXPECT_TRUE(status(channel, &state).ok());
  const auto stub = v1::Control::NewStub(channel);
  grpc::ClientContext drain_context;
  set_deadline(&drain_context);
  v1::DrainResponse drained;
  EXPECT_EQ(error_info(stub->Drain(&drain_context, {}, &drained))->reason_name(), "PERMISSION");
  grpc::ClientContext level_context;
  set_deadline(&level_context);
  v1::SetLogLevelResponse previous;
  EXPECT_EQ(error_info(stub->SetLogLevel(&level_context, {}, &previous))->reason_name(), "PERMISSION");
  // Users who are not on the list get no connection, whatever the mode says.
  const base::ScopedFd refused(connect_as(kSomebody - 1, options_.socket));
  ASSERT_TRUE(refused.valid());
  char byte = 0;
  EXPECT_EQ(recv(refused.get(), &byte, 1, 0), 0);
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

}  // namespace
}  // namespace expertd::control
