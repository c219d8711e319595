// SPDX-License-Identifier: Apache-2.0
// Goal: the channel speaks with the real gRPC server. Method: a generic callback service over one
// end of a socketpair, the channel and a pump thread at the other end; waits are on conditions with
// a deadline.
#include <grpc/grpc.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/server_posix.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "client/rpc/channel.h"

namespace expertd::rpc {
namespace {

using std::chrono::steady_clock;

constexpr std::uint64_t kLongNs = 30'000'000'000;
constexpr auto kPatience = std::chrono::seconds(20);
constexpr const char* kDetailText = "Rang 3 antwortet nicht: 100 % \xE2\x9C\x97\n";
const std::string kDetailBytes("\x08\x09\x00\xff", 4);

std::string text_of(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  std::string text;
  if (buffer.Dump(&slices).ok()) {
    for (const grpc::Slice& slice : slices) {
      text.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
    }
  }
  return text;
}

grpc::ByteBuffer buffer_of(const std::string& text) {
  const grpc::Slice slice(text);
  return grpc::ByteBuffer(&slice, 1);
}

// Counts what happens in the server, so that tests can wait for it.
class Counter {
 public:
  void add() {
    const std::lock_guard lock(mutex_);
    ++count_;
    changed_.notify_all();
  }
  bool wait_for(int count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, [&] { return count_ >= count; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_ = 0;
};

struct Observed {
  Counter hanging;
  Counter cancelled;
};

class CallReactor final : public grpc::ServerGenericBidiReactor {
 public:
  CallReactor(grpc::GenericCallbackServerContext* context, Observed* observed)
      : context_(context), observed_(observed) {
    if (context_->method() == "/t.T/Refuse") {
      finish(grpc::Status(grpc::StatusCode::PERMISSION_DENIED, "not even read"));
    } else {
      StartRead(&request_);
    }
  }

  void OnReadDone(bool ok) override {
    const std::string& method = context_->method();
    if (!ok) {
      finish(grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no request"));
    } else if (method == "/t.T/Echo") {
      reply(text_of(request_));
    } else if (method == "/t.T/Grow") {
      reply(std::string(std::stoul(text_of(request_)), 'g'));
    } else if (method == "/t.T/Host") {
      const auto agent = context_->client_metadata().find("user-agent");
      reply(context_->host() + "|" + std::string(agent->second.begin(), agent->second.end()));
    } else if (method == "/t.T/Left") {
      const auto left = context_->deadline() - std::chrono::system_clock::now();
      reply(std::to_string(std::chrono::duration_cast<std::chrono::seconds>(left).count()));
    } else if (method == "/t.T/Fail") {
      finish(grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, kDetailText, kDetailBytes));
    } else if (method == "/t.T/Long") {
      finish(grpc::Status(grpc::StatusCode::INTERNAL, std::string(std::stoul(text_of(request_)), 'l')));
    } else {
      observed_->hanging.add();
    }
  }

  void OnCancel() override {
    observed_->cancelled.add();
    finish(grpc::Status::CANCELLED);
  }

  void OnDone() override { delete this; }

 private:
  void finish(const grpc::Status& status) {
    if (!finished_.exchange(true)) {
      Finish(status);
    }
  }
  void reply(const std::string& text) {
    response_ = buffer_of(text);
    if (!finished_.exchange(true)) {
      StartWriteAndFinish(&response_, grpc::WriteOptions(), grpc::Status::OK);
    }
  }

  grpc::GenericCallbackServerContext* context_;
  Observed* observed_;
  std::atomic<bool> finished_ = false;
  grpc::ByteBuffer request_;
  grpc::ByteBuffer response_;
};

class TestService final : public grpc::CallbackGenericService {
 public:
  explicit TestService(Observed* observed) : observed_(observed) {}
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext* context) override {
    return new CallReactor(context, observed_);
  }

 private:
  Observed* observed_;
};

// A service with one method and no generic fallback, so that gRPC itself answers for unknown
// methods.
class OneMethodService final : public grpc::Service {
 public:
  OneMethodService() {
    using Handler = grpc::internal::CallbackUnaryHandler<grpc::ByteBuffer, grpc::ByteBuffer>;
    AddMethod(new grpc::internal::RpcServiceMethod("/t.T/Known", grpc::internal::RpcMethod::NORMAL_RPC, nullptr));
    MarkMethodCallback(0, new Handler([](grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response) {
                         *response = *request;
                         grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
                         reactor->Finish(grpc::Status::OK);
                         return reactor;
                       }));
  }
};

// The client library's thread, reduced to what concerns the channel.
class PumpThread {
 public:
  explicit PumpThread(Channel* channel)
      : channel_(channel), stop_fd_(eventfd(0, EFD_CLOEXEC)), thread_([this] { run(); }) {}
  ~PumpThread() {
    stop();
    close(stop_fd_);
  }

  void stop() {
    if (thread_.joinable()) {
      const std::uint64_t one = 1;
      EXPECT_EQ(write(stop_fd_, &one, sizeof(one)), static_cast<ssize_t>(sizeof(one)));
      thread_.join();
    }
  }
  Counter& ended() { return ended_; }

 private:
  void run() {
    for (;;) {
      const short events = static_cast<short>(channel_->wants_write() ? POLLIN | POLLOUT : POLLIN);
      std::array<pollfd, 3> fds = {
          {{channel_->fd(), events, 0}, {channel_->wake_fd(), POLLIN, 0}, {stop_fd_, POLLIN, 0}}};
      if (poll(fds.data(), fds.size(), -1) < 0) {
        continue;
      }
      if (fds[2].revents != 0) {
        return;
      }
      if (!channel_->pump()) {
        ended_.add();
        return;
      }
    }
  }

  Channel* channel_;
  int stop_fd_;
  Counter ended_;
  std::thread thread_;
};

class ClientRpc : public ::testing::Test {
 protected:
  // A reference that is never given back: the last grpc_shutdown() can wait ten seconds for gRPC's
  // backup poller.
  static void SetUpTestSuite() { grpc_init(); }

  void SetUp() override {
    std::array<int, 2> fds{};
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds.data()), 0);
    server_fd_ = fds[1];
    std::string error;
    channel_ = Channel::create(fds[0], "expertd", &error);
    ASSERT_NE(channel_, nullptr) << error;
    pump_ = std::make_unique<PumpThread>(channel_.get());
  }

  void TearDown() override {
    pump_.reset();
    channel_.reset();
    stop_server();
    if (server_fd_ >= 0) {
      close(server_fd_);
    }
  }

  void serve() {
    grpc::ServerBuilder builder;
    builder.RegisterCallbackGenericService(&service_);
    serve(&builder);
  }
  void serve(grpc::ServerBuilder* builder) {
    server_ = builder->BuildAndStart();
    ASSERT_NE(server_, nullptr);
    grpc::AddInsecureChannelFromFd(server_.get(), std::exchange(server_fd_, -1));
  }
  void stop_server() {
    if (server_ != nullptr) {
      server_->Shutdown(std::chrono::system_clock::now());
      server_.reset();
    }
  }
  CallResult call(const std::string& method, const std::string& request, std::uint64_t timeout_ns = kLongNs) {
    return channel_->call("/t.T/" + method, request, timeout_ns);
  }
  void expect_echo(std::size_t size) {
    const std::string request(size, 'e');
    const CallResult result = call("Echo", request);
    EXPECT_EQ(result.grpc_status, 0) << result.message;
    EXPECT_TRUE(result.response == request) << result.response.size() << " of " << size;
  }

  Observed observed_;
  TestService service_{&observed_};
  std::unique_ptr<grpc::Server> server_;
  int server_fd_ = -1;
  std::unique_ptr<Channel> channel_;
  std::unique_ptr<PumpThread> pump_;
};

TEST_F(ClientRpc, EchoesMessagesOfEverySize) {
  serve();
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{64}, std::size_t{16379}, std::size_t{1} << 20, kMaxMessageBytes}) {
    expect_echo(size);
  }
}

TEST_F(ClientRpc, SendsAuthorityUserAgentAndTimeout) {
  serve();
  EXPECT_EQ(call("Host", "").response.rfind("expertd|expertd-client/", 0), 0u);
  const int seconds_left = std::stoi(call("Left", "").response);
  EXPECT_GE(seconds_left, 10);
  EXPECT_LE(seconds_left, 30);
}

TEST_F(ClientRpc, ReturnsStatusMessageAndDetails) {
  serve();
  const CallResult result = call("Fail", "x");
  EXPECT_EQ(result.grpc_status, 9);
  EXPECT_EQ(result.message, kDetailText);
  EXPECT_EQ(result.details, kDetailBytes);
  EXPECT_EQ(result.response, "");
  expect_echo(64);
}

TEST_F(ClientRpc, UnknownMethodIsUnimplemented) {
  OneMethodService service;
  grpc::ServerBuilder builder;
  builder.RegisterService(&service);
  serve(&builder);
  EXPECT_EQ(call("Unknown", "x").grpc_status, 12);
  EXPECT_EQ(call("Known", "abc").response, "abc");
  stop_server();
}

TEST_F(ClientRpc, DeadlineEndsTheCallOnBothSides) {
  serve();
  const auto start = steady_clock::now();
  EXPECT_EQ(call("Hang", "x", 50'000'000).grpc_status, 4);
  EXPECT_GE(steady_clock::now() - start, std::chrono::milliseconds(50));
  EXPECT_TRUE(observed_.cancelled.wait_for(1));
  expect_echo(64);
}

TEST_F(ClientRpc, ZeroTimeoutEndsAtOnce) {
  serve();
  EXPECT_EQ(call("Hang", "x", 0).grpc_status, 4);
  expect_echo(64);
}

TEST_F(ClientRpc, ServerShutdownEndsTheCallUnavailable) {
  serve();
  CallResult result;
  std::thread caller([&] { result = call("Hang", "x"); });
  ASSERT_TRUE(observed_.hanging.wait_for(1));
  stop_server();
  caller.join();
  EXPECT_EQ(result.grpc_status, 14) << result.message;
  EXPECT_TRUE(pump_->ended().wait_for(1));
  EXPECT_EQ(call("Echo", "x").grpc_status, 14);
}

TEST_F(ClientRpc, EightThreadsCallAtOnce) {
  serve();
  std::vector<std::thread> threads;
  std::atomic<int> good = 0;
  for (std::size_t thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&, thread] {
      for (std::size_t i = 0; i < 50; ++i) {
        const std::string request(thread * 7001 + i, static_cast<char>('a' + thread));
        const CallResult result = call("Echo", request);
        good += result.grpc_status == 0 && result.response == request ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(good, 400);
}

TEST_F(ClientRpc, RefusesTheSixtyFifthPendingCall) {
  serve();
  std::vector<std::thread> threads;
  std::atomic<int> unavailable = 0;
  for (std::size_t i = 0; i < kMaxPendingCalls; ++i) {
    threads.emplace_back([&] { unavailable += call("Hang", "x").grpc_status == 14 ? 1 : 0; });
  }
  EXPECT_TRUE(observed_.hanging.wait_for(static_cast<int>(kMaxPendingCalls)));
  EXPECT_EQ(call("Echo", "x").grpc_status, 8);
  channel_->fail_all("the lease ended");
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(unavailable, static_cast<int>(kMaxPendingCalls));
  const CallResult late = call("Echo", "x");
  EXPECT_EQ(late.grpc_status, 14);
  EXPECT_EQ(late.message, "the lease ended");
}

TEST_F(ClientRpc, RefusesMessagesOverTheLimitAndLivesOn) {
  serve();
  EXPECT_EQ(call("Echo", std::string(kMaxMessageBytes + 1, 'x')).grpc_status, 8);
  const CallResult grown = call("Grow", std::to_string(kMaxMessageBytes + 1));
  EXPECT_EQ(grown.grpc_status, 8);
  EXPECT_NE(grown.message.find("over the limit"), std::string::npos) << grown.message;
  EXPECT_EQ(call("Grow", std::to_string(kMaxMessageBytes)).response.size(), kMaxMessageBytes);
}

TEST_F(ClientRpc, ReturnsALongStatusMessage) {
  serve();
  const CallResult result = call("Long", "50000");
  EXPECT_EQ(result.grpc_status, 13);
  EXPECT_EQ(result.message.size(), 50'000u);
  expect_echo(64);
}

TEST_F(ClientRpc, StatusMessageOverTheHeaderLimitEndsTheConnectionNotTheProcess) {
  serve();
  EXPECT_EQ(call("Long", "200000").grpc_status, 14);
  EXPECT_TRUE(pump_->ended().wait_for(1));
}

TEST_F(ClientRpc, AnswerBeforeTheWholeRequestEndsTheCall) {
  serve();
  const CallResult result = call("Refuse", std::string(kMaxMessageBytes, 'x'));
  EXPECT_EQ(result.grpc_status, 7) << result.message;
  EXPECT_EQ(result.message, "not even read");
  expect_echo(64);
}

TEST_F(ClientRpc, AbandonedCallsOfAStalledServerLeaveNothingBehind) {
  // Nobody serves the other end, so that the socket fills up and most streams cannot even be
  // opened.
  const std::string request(std::size_t{1} << 20, 'x');
  std::vector<std::thread> threads;
  std::atomic<int> late = 0;
  for (std::size_t i = 0; i < kMaxPendingCalls; ++i) {
    threads.emplace_back([&] { late += call("Echo", request, 100'000'000).grpc_status == 4; });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(late, static_cast<int>(kMaxPendingCalls));
  serve();
  const auto give_up = steady_clock::now() + kPatience;
  CallResult result = call("Echo", "back");
  // The places of the abandoned calls come back as soon as the server reads again.
  while (result.grpc_status == 8 && steady_clock::now() < give_up) {
    std::this_thread::yield();
    result = call("Echo", "back");
  }
  EXPECT_EQ(result.response, "back") << result.message;
  for (int i = 0; i < 3; ++i) {
    expect_echo(1 << 20);
  }
}

TEST_F(ClientRpc, ClosedPeerEndsPendingAndLaterCalls) {
  CallResult result;
  std::thread caller([&] { result = call("Echo", "x"); });
  close(std::exchange(server_fd_, -1));
  caller.join();
  EXPECT_EQ(result.grpc_status, 14);
  EXPECT_TRUE(pump_->ended().wait_for(1));
  const auto start = steady_clock::now();
  EXPECT_EQ(call("Echo", "x").grpc_status, 14);
  EXPECT_LT(steady_clock::now() - start, std::chrono::seconds(5));
}

TEST_F(ClientRpc, CallsWithoutAPumpEndByDeadlineOrFailAll) {
  pump_->stop();
  for (std::size_t i = 0; i < 2 * kMaxPendingCalls; ++i) {
    EXPECT_EQ(call("Echo", "x", 1'000).grpc_status, 4);
  }
  channel_->fail_all("the thread ended");
  EXPECT_EQ(call("Echo", "x").grpc_status, 14);
  EXPECT_FALSE(channel_->pump());
}

TEST_F(ClientRpc, DestructionReleasesTheCallersInside) {
  serve();
  CallResult result;
  std::thread caller([&] { result = call("Hang", "x"); });
  ASSERT_TRUE(observed_.hanging.wait_for(1));
  pump_.reset();
  channel_.reset();
  caller.join();
  EXPECT_EQ(result.grpc_status, 14);
  EXPECT_EQ(result.message, "the channel was closed");
}

TEST(ClientRpcCreate, RefusesABadDescriptor) {
  std::string error;
  EXPECT_EQ(Channel::create(-1, "expertd", &error), nullptr);
  EXPECT_NE(error.find("descriptor"), std::string::npos) << error;
}

}  // namespace
}  // namespace expertd::rpc
