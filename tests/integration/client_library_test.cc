// SPDX-License-Identifier: Apache-2.0
// The client library as others see it, the metrics that move, and a drain.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>

#include "expertd/v1/control.grpc.pb.h"
#include "tests/integration/moe_case.h"
#include "tests/support/daemon_process.h"

namespace expertd::support {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

std::string loaded_library() {
  std::string path;
  ::dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* out) {
        const std::string name = library->dlpi_name;
        if (name.find("libexpertd_client") != std::string::npos) {
          *static_cast<std::string*>(out) = name;
        }
        return 0;
      },
      &path);
  return path;
}

std::string output_of(const std::string& command) {
  std::string text;
  std::FILE* pipe = ::popen(command.c_str(), "r");
  char buffer[4096];
  for (size_t got = std::fread(buffer, 1, sizeof(buffer), pipe); got > 0;
       got = std::fread(buffer, 1, sizeof(buffer), pipe)) {
    text.append(buffer, got);
  }
  ::pclose(pipe);
  return text;
}

TEST(ClientLibrary, ExportsItsOwnNamesOnly) {
  const std::string library = loaded_library();
  if (library.empty()) {
    GTEST_SKIP() << "the test is linked with the static library";
  }
  std::istringstream names(output_of("nm -D --defined-only --format=posix '" + library + "'"));
  int count = 0;
  for (std::string name; std::getline(names, name); ++count) {
    const bool version = name.find(" A ") != std::string::npos;  // the version node itself
    EXPECT_TRUE(version || name.compare(0, 8, "expertd_") == 0) << name;
  }
  EXPECT_GT(count, 40);
}

TEST(ClientLibrary, NeedsNeitherGrpcNorProtobuf) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "a sanitizer build links and holds more than what is installed";
#endif
  const std::string library = loaded_library();
  if (library.empty()) {
    GTEST_SKIP() << "the test is linked with the static library";
  }
  const std::string needed = output_of("readelf -d '" + library + "' | grep NEEDED");
  EXPECT_NE(needed.find("libc.so"), std::string::npos) << needed;
  for (const char* unwanted : {"grpc", "protobuf", "absl", "stdc++"}) {
    EXPECT_EQ(needed.find(unwanted), std::string::npos) << needed;
  }
}

std::string client_metrics() {
  std::string text(expertd_client_metrics_text(nullptr, 0) + 64, '\0');
  text.resize(std::min(expertd_client_metrics_text(text.data(), text.size()), text.size()));
  return text;
}

double value_of(const std::string& text, const std::string& series) {
  const size_t at = text.find("\n" + series + " ");
  return at == std::string::npos ? -1 : std::strtod(text.c_str() + at + series.size() + 2, nullptr);
}

/// One daemon, a pair of ranks, and the operator's side of gRPC.
class Served : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(daemon_.start());
    stub_ = v1::Control::NewStub(
        grpc::CreateChannel("unix:" + daemon_.control_socket(), grpc::InsecureChannelCredentials()));
  }
  struct Call {
    Call() { context.set_deadline(std::chrono::system_clock::now() + seconds(10)); }
    grpc::ClientContext context;
  };

  DaemonProcess daemon_{3, {"--engine-op-deadline=5s"}};
  std::unique_ptr<v1::Control::Stub> stub_;
};

TEST_F(Served, TheClientsMetricsCountItsOperations) {
  const std::string before = client_metrics();
  ASSERT_EQ(run_case(daemon_.attach_socket(), make_case(kernels::OpKind::kDispatch, {.ranks = 2}), Place::kStaged), "");
  const std::string after = client_metrics();
  const std::string dispatched = "expertd_client_ops_total{op=\"dispatch\",result=\"ok\"}";
  EXPECT_EQ(value_of(after, dispatched), value_of(before, dispatched) + 4) << "two ranks, plain and cached";
  const std::string counted = "expertd_client_op_duration_seconds_count{op=\"dispatch\"}";
  EXPECT_EQ(value_of(after, counted), value_of(before, counted) + 4);
  const std::string staged = "expertd_client_staged_copies_total";
  EXPECT_GT(value_of(after, staged), value_of(before, staged));
  char small[10];
  EXPECT_GT(expertd_client_metrics_text(small, sizeof(small)), sizeof(small)) << "says what it needs";
}

TEST_F(Served, TheDaemonsMetricsCountOperationsBytesAndRefusals) {
  const std::string ops = "expertd_ops_total{op=\"dispatch\",gpu=\"host\",result=\"ok\"}";
  EXPECT_NE(daemon_.scrape().find(ops + " 0"), std::string::npos) << "every series exists from the start";
  ASSERT_EQ(run_case(daemon_.attach_socket(), make_case(kernels::OpKind::kDispatch, {.ranks = 2}), Place::kRegistered),
            "");
  EXPECT_TRUE(daemon_.metric_becomes(ops, 4));
  EXPECT_TRUE(daemon_.metric_becomes("expertd_ops_total{op=\"combine\",gpu=\"host\",result=\"ok\"}", 4));
  EXPECT_GT(daemon_.metric("expertd_op_tokens_total{op=\"dispatch\""), 0);
  EXPECT_GT(daemon_.metric("expertd_op_bytes_total{op=\"dispatch\",gpu=\"host\",path=\"remote\"}"), 0);
  RankGroup group(daemon_.attach_socket(), "refused", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
  args.dtype = EXPERTD_BF16;
  args.idx_type = EXPERTD_I64;
  args.tokens = 1000;
  expertd_handle_t handle{};
  expertd_event_t event{};
  ASSERT_TRUE(outcome_of(expertd_dispatch(group.rank(0).group, &args, nullptr, &handle, &event)).ok());
  EXPECT_EQ(finish(event).outcome.status.reason, EXPERTD_REASON_TOKENS_EXCEED_MAX);
  EXPECT_TRUE(daemon_.metric_becomes("expertd_op_rejected_total{gpu=\"host\",reason=\"TOKENS_EXCEED_MAX\"}", 1));
}

TEST_F(Served, MetricsNameTheBuildTheStateAndTheDeadlines) {
  EXPECT_EQ(daemon_.metric("expertd_build_info"), 1);
  EXPECT_EQ(daemon_.metric("expertd_state{state=\"ready\"}"), 1);
  RankGroup group(daemon_.attach_socket(), "late", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_EQ(barrier(group.rank(0).group, 50'000'000).outcome.status.reason, EXPERTD_REASON_TIMEOUT);
  EXPECT_TRUE(daemon_.metric_becomes("expertd_op_deadline_exceeded_total{op=\"barrier\",missing=\"submission\"}", 1));
}

TEST_F(Served, AnUnknownPathOfTheMetricsServerIsNotFound) {
  EXPECT_EQ(http_get(daemon_.metrics_port(), "/nothing").find("expertd_"), std::string::npos);
}

TEST_F(Served, TheLogLevelCanBeChanged) {
  Call call;
  v1::SetLogLevelRequest request;
  request.set_level("debug");
  v1::SetLogLevelResponse response;
  ASSERT_TRUE(stub_->SetLogLevel(&call.context, request, &response).ok());
  EXPECT_EQ(response.previous(), "info");
  Call bad_call;
  request.set_level("loud");
  const grpc::Status bad = stub_->SetLogLevel(&bad_call.context, request, &response);
  EXPECT_EQ(bad.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_NE(bad.error_message().find("loud"), std::string::npos) << bad.error_message();
}

TEST_F(Served, ADrainAfterWorkIsQuickAndEndsWithZero) {
  ASSERT_EQ(run_case(daemon_.attach_socket(), make_case(kernels::OpKind::kDispatch, {.ranks = 2}), Place::kRegistered),
            "");
  const ClientSession session(daemon_.attach_socket(), "host:0");
  RankGroup group(daemon_.attach_socket(), "idle", 1);
  ASSERT_TRUE(group.ok()) << group.failure();
  EXPECT_TRUE(barrier(group.rank(0).group).outcome.ok());
  const uint64_t begin = monotonic_ns();
  EXPECT_EQ(daemon_.stop(seconds(40)), 0);
  std::printf("drain with idle sessions: %.1f ms\n", elapsed_ms(begin));
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(1000));
  EXPECT_EQ(expertd_session_state(session.get()).reason, EXPERTD_REASON_UNAVAILABLE);
}

TEST_F(Served, ADrainFinishesWhatWasAdmittedAndTakesNothingNew) {
  RankGroup group(daemon_.attach_socket(), "drained", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_event_t early{};
  ASSERT_TRUE(outcome_of(expertd_barrier(group.rank(0).group, nullptr, 0, 0, &early)).ok());
  Call call;
  v1::DrainResponse response;
  ASSERT_TRUE(stub_->Drain(&call.context, v1::DrainRequest(), &response).ok());
  EXPECT_EQ(response.sessions(), 2u);
  ASSERT_TRUE(
      wait_until([&] { return expertd_session_state(group.rank(0).session.get()).reason == EXPERTD_REASON_DRAINING; },
                 seconds(5)));
  const ClientSession late(daemon_.attach_socket(), "host:2");
  EXPECT_EQ(late.attached().status.reason, EXPERTD_REASON_DRAINING) << describe(late.attached());
  EXPECT_TRUE(barrier(group.rank(1).group).outcome.ok()) << "it completes an operation that was admitted";
  const OpEnd end = finish(early);
  EXPECT_TRUE(end.outcome.ok()) << describe(end.outcome);
  EXPECT_EQ(daemon_.wait_exit(seconds(10)), 0);
  EXPECT_NE(daemon_.log().find("operations_cut_short=0"), std::string::npos);
}

TEST_F(Served, ADrainCutsOffWhatDoesNotEndAndSaysSo) {
  RankGroup group(daemon_.attach_socket(), "endless", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_event_t event{};
  ASSERT_TRUE(outcome_of(expertd_barrier(group.rank(0).group, nullptr, 0, 0, &event)).ok());
  Call call;
  v1::DrainRequest request;
  request.set_timeout_ns(200'000'000);
  v1::DrainResponse response;
  const uint64_t begin = monotonic_ns();
  ASSERT_TRUE(stub_->Drain(&call.context, request, &response).ok());
  // Which session the drain ends first is open: the other one's rank is then lost to this one before its own end.
  const int32_t reason = finish(event).outcome.status.reason;
  EXPECT_TRUE(reason == EXPERTD_REASON_UNAVAILABLE || reason == EXPERTD_REASON_PEER_LOST) << reason;
  EXPECT_EQ(daemon_.wait_exit(seconds(10)), 0);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(1500));
  EXPECT_NE(daemon_.log().find("operations_cut_short=1"), std::string::npos);
}

TEST_F(Served, ASecondSignalEndsADrainAtOnce) {
  RankGroup group(daemon_.attach_socket(), "endless", 2);
  ASSERT_TRUE(group.ok()) << group.failure();
  expertd_event_t event{};
  ASSERT_TRUE(outcome_of(expertd_barrier(group.rank(0).group, nullptr, 0, 0, &event)).ok());
  daemon_.terminate();
  ASSERT_TRUE(wait_until([&] { return daemon_.metric("expertd_drain_in_progress") == 1; }, seconds(5)));
  EXPECT_EQ(daemon_.wait_exit(milliseconds(50)), -1) << "it waits for the operation";
  const uint64_t begin = monotonic_ns();
  EXPECT_EQ(daemon_.stop(), 0);
  EXPECT_LT(elapsed_ms(begin), worst_bound_ms(1500));
}

}  // namespace
}  // namespace expertd::support
