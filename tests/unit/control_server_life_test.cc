// SPDX-License-Identifier: Apache-2.0
// Beginning, waiting and end of calls, connections and the server.
#include "tests/unit/control_server_fixture.h"

namespace expertd::control {
namespace {

TEST_F(ControlServerTest, LateJoinAnswerAfterTheDeadlineIsDropped) {
  const auto channel = attach(1);
  grpc::ClientContext context;
  set_deadline(&context, std::chrono::milliseconds(100));
  v1::JoinGroupResponse joined;
  const grpc::Status status = v1::Session::NewStub(channel)->JoinGroup(&context, join_request(), &joined);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  auto join = sessions_.take_join();
  ASSERT_TRUE(join.has_value());
  ASSERT_NE(join->first.cancelled, nullptr);
  while (!*join->first.cancelled) {  // the service takes the rank back by it
    std::this_thread::yield();
  }
  join->second({}, {});
  server_.reset();
  join->second({}, {});  // even after the server: nothing happens
}

TEST_F(ControlServerTest, BlockedSessionsOfAUserDoNotBlockOtherUsersOperatorsOrHealth) {
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
  ASSERT_TRUE(sessions_.wait_unregistering(3));  // all threads but one
  v1::OpenSessionResponse opened;
  EXPECT_TRUE(open(attach(7, kUser + 1), &opened).ok());
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
  EXPECT_FALSE(server_->adopt_session_connection(base::ScopedFd(dup(STDIN_FILENO)), {1}, kUser).is_ok());
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
