// SPDX-License-Identifier: Apache-2.0
// Goal: what a server other than gRPC may do (HTTP errors, resets, GOAWAY, garbage, a close between
// two frames). Method: a scripted HTTP/2 server at the other end; one thread calls, the test's own
// thread moves both ends in turns.
#include <gtest/gtest.h>
#include <nghttp2/nghttp2.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "client/rpc/channel.h"
#include "client/rpc/grpc_wire.h"

namespace expertd::rpc {
namespace {

constexpr std::uint64_t kLongNs = 30'000'000'000;
constexpr auto kPatience = std::chrono::seconds(20);

using Fields = std::vector<std::pair<std::string, std::string>>;

class ScriptedServer {
 public:
  explicit ScriptedServer(int fd) : fd_(fd) {
    nghttp2_session_callbacks* callbacks = nullptr;
    EXPECT_EQ(nghttp2_session_callbacks_new(&callbacks), 0);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
    EXPECT_EQ(nghttp2_session_server_new(&session_, callbacks, this), 0);
    nghttp2_session_callbacks_del(callbacks);
    EXPECT_EQ(nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, nullptr, 0), 0);
  }
  ~ScriptedServer() {
    nghttp2_session_del(session_);
    close_socket();
  }
  ScriptedServer(const ScriptedServer&) = delete;
  ScriptedServer& operator=(const ScriptedServer&) = delete;

  int fd() const { return fd_; }
  nghttp2_session* session() { return session_; }
  void close_socket() {
    if (fd_ >= 0) {
      close(std::exchange(fd_, -1));
    }
  }

  void step() {
    if (fd_ < 0) {
      return;
    }
    std::array<std::uint8_t, 65536> bytes;
    for (ssize_t size = 0; (size = recv(fd_, bytes.data(), bytes.size(), 0)) > 0;) {
      EXPECT_EQ(nghttp2_session_mem_recv(session_, bytes.data(), static_cast<std::size_t>(size)), size);
    }
    const std::uint8_t* out = nullptr;
    for (ssize_t size = 0; (size = nghttp2_session_mem_send(session_, &out)) > 0;) {
      send_raw({reinterpret_cast<const char*>(out), static_cast<std::size_t>(size)});
    }
  }
  // The answers of these tests are far smaller than the buffer of the socket.
  void send_raw(std::string_view bytes) {
    EXPECT_EQ(send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
  }

  void headers(std::int32_t stream, const Fields& fields, bool end) {
    std::vector<nghttp2_nv> list;
    for (const auto& [name, value] : fields) {
      nghttp2_nv nv{};
      nv.name = const_cast<std::uint8_t*>(reinterpret_cast<const std::uint8_t*>(name.data()));
      nv.value = const_cast<std::uint8_t*>(reinterpret_cast<const std::uint8_t*>(value.data()));
      nv.namelen = name.size();
      nv.valuelen = value.size();
      list.push_back(nv);
    }
    const std::uint8_t flags = end ? NGHTTP2_FLAG_END_STREAM : NGHTTP2_FLAG_NONE;
    EXPECT_EQ(nghttp2_submit_headers(session_, flags, stream, nullptr, list.data(), list.size(), nullptr), 0);
  }
  void reset(std::int32_t stream, std::uint32_t error) {
    EXPECT_EQ(nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, stream, error), 0);
  }
  void goaway(std::int32_t last_stream) {
    EXPECT_EQ(nghttp2_submit_goaway(session_, NGHTTP2_FLAG_NONE, last_stream, NGHTTP2_NO_ERROR, nullptr, 0), 0);
  }

  // Streams whose request has ended, in order.
  std::vector<std::int32_t> requests;
  std::map<std::int32_t, std::map<std::string, std::string>> request_headers;
  int pings_answered = 0;

 private:
  static int on_header(nghttp2_session*, const nghttp2_frame* frame, const std::uint8_t* name, std::size_t name_size,
                       const std::uint8_t* value, std::size_t value_size, std::uint8_t, void* self) {
    static_cast<ScriptedServer*>(self)->request_headers[frame->hd.stream_id].emplace(
        std::string(reinterpret_cast<const char*>(name), name_size),
        std::string(reinterpret_cast<const char*>(value), value_size));
    return 0;
  }
  static int on_frame(nghttp2_session*, const nghttp2_frame* frame, void* self) {
    auto* server = static_cast<ScriptedServer*>(self);
    const bool body = frame->hd.type == NGHTTP2_DATA || frame->hd.type == NGHTTP2_HEADERS;
    if (body && (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) != 0) {
      server->requests.push_back(frame->hd.stream_id);
    }
    if (frame->hd.type == NGHTTP2_PING && (frame->hd.flags & NGHTTP2_FLAG_ACK) != 0) {
      ++server->pings_answered;
    }
    return 0;
  }

  int fd_;
  nghttp2_session* session_ = nullptr;
};

class ClientRpcPeer : public ::testing::Test {
 protected:
  void SetUp() override {
    std::array<int, 2> fds{};
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds.data()), 0);
    std::string error;
    channel_ = Channel::create(fds[0], "expertd", &error);
    ASSERT_NE(channel_, nullptr) << error;
    server_ = std::make_unique<ScriptedServer>(fds[1]);
  }
  void TearDown() override { channel_.reset(); }

  std::future<CallResult> call(std::string request = "x") {
    return std::async(std::launch::async,
                      [this, request = std::move(request)] { return channel_->call("/t.T/Call", request, kLongNs); });
  }
  // Moves both ends until the condition holds; false after the patience.
  bool run_until(const std::function<bool()>& done) {
    const auto give_up = std::chrono::steady_clock::now() + kPatience;
    while (!done()) {
      if (std::chrono::steady_clock::now() > give_up) {
        return false;
      }
      const short events = static_cast<short>(channel_->wants_write() ? POLLIN | POLLOUT : POLLIN);
      std::array<pollfd, 3> fds = {{{over_ ? -1 : channel_->fd(), events, 0},
                                    {over_ ? -1 : channel_->wake_fd(), POLLIN, 0},
                                    {server_->fd(), POLLIN, 0}}};
      EXPECT_GE(poll(fds.data(), fds.size(), 1), 0);
      server_->step();
      over_ = over_ || !channel_->pump();
    }
    return true;
  }
  CallResult finish(std::future<CallResult>* future) {
    const auto ready = [&] { return future->wait_for(std::chrono::seconds(0)) == std::future_status::ready; };
    EXPECT_TRUE(run_until(ready));
    return future->get();
  }
  // Starts a call and stops when the server has its whole request.
  std::int32_t arrive() {
    const std::size_t seen = server_->requests.size();
    EXPECT_TRUE(run_until([&] { return server_->requests.size() > seen; }));
    return server_->requests.empty() ? 0 : server_->requests.back();
  }

  std::unique_ptr<Channel> channel_;
  std::unique_ptr<ScriptedServer> server_;
  bool over_ = false;
};

const Fields kHead = {{":status", "200"}, {"content-type", "application/grpc"}};

TEST_F(ClientRpcPeer, SendsTheHeadersOfGrpc) {
  auto future = call();
  const std::int32_t stream = arrive();
  const auto headers = server_->request_headers[stream];
  EXPECT_EQ(headers.at(":method"), "POST");
  EXPECT_EQ(headers.at(":scheme"), "http");
  EXPECT_EQ(headers.at(":path"), "/t.T/Call");
  EXPECT_EQ(headers.at(":authority"), "expertd");
  EXPECT_EQ(headers.at("te"), "trailers");
  EXPECT_EQ(headers.at("content-type"), "application/grpc");
  EXPECT_EQ(headers.at("grpc-timeout").back(), 'u');
  server_->headers(stream,
                   {{":status", "200"},
                    {"content-type", "application/grpc"},
                    {"grpc-status", "5"},
                    {"grpc-message", "nobody%20here"}},
                   true);
  const CallResult result = finish(&future);
  EXPECT_EQ(result.grpc_status, 5);
  EXPECT_EQ(result.message, "nobody here");
}

TEST_F(ClientRpcPeer, MapsAnHttpStatus) {
  auto future = call();
  server_->headers(arrive(), {{":status", "404"}, {"content-type", "text/html"}}, true);
  EXPECT_EQ(finish(&future).grpc_status, 12);
  EXPECT_FALSE(over_);
}

TEST_F(ClientRpcPeer, SkipsInterimResponses) {
  auto future = call();
  const std::int32_t stream = arrive();
  server_->headers(stream, {{":status", "103"}}, false);
  server_->headers(stream, kHead, false);
  server_->headers(stream, {{"grpc-status", "7"}}, true);
  EXPECT_EQ(finish(&future).grpc_status, 7);
}

TEST_F(ClientRpcPeer, ResetOfOneStreamLeavesTheOthers) {
  auto refused = call();
  const std::int32_t first = arrive();
  auto answered = call();
  const std::int32_t second = arrive();
  server_->reset(first, NGHTTP2_REFUSED_STREAM);
  EXPECT_EQ(finish(&refused).grpc_status, 14);
  server_->headers(second, kHead, false);
  server_->headers(second, {{"grpc-status", "3"}}, true);
  EXPECT_EQ(finish(&answered).grpc_status, 3);
}

TEST_F(ClientRpcPeer, AnswersPings) {
  EXPECT_EQ(nghttp2_submit_ping(server_->session(), NGHTTP2_FLAG_NONE, nullptr), 0);
  EXPECT_TRUE(run_until([&] { return server_->pings_answered == 1; }));
}

TEST_F(ClientRpcPeer, GoawayLetsEarlierCallsEndAndRefusesLaterOnes) {
  auto early = call();
  const std::int32_t first = arrive();
  auto late = call();
  arrive();
  server_->goaway(first);
  EXPECT_EQ(finish(&late).grpc_status, 14);
  EXPECT_FALSE(over_);
  const CallResult refused = channel_->call("/t.T/Call", "x", kLongNs);
  EXPECT_EQ(refused.grpc_status, 14);
  EXPECT_NE(refused.message.find("GOAWAY"), std::string::npos) << refused.message;
  server_->headers(first, kHead, false);
  server_->headers(first, {{"grpc-status", "6"}}, true);
  EXPECT_EQ(finish(&early).grpc_status, 6);
  EXPECT_TRUE(run_until([&] { return over_; }));
}

TEST_F(ClientRpcPeer, CallQueuedBeforeTheGoawayIsReadIsUnavailable) {
  ASSERT_TRUE(run_until(
      [&] { return nghttp2_session_get_remote_settings(server_->session(), NGHTTP2_SETTINGS_ENABLE_PUSH) == 0; }));
  server_->goaway(0);
  server_->step();
  auto future = call();
  EXPECT_EQ(finish(&future).grpc_status, 14);
  EXPECT_TRUE(run_until([&] { return over_; }));
}

TEST_F(ClientRpcPeer, GarbageEndsTheConnection) {
  auto future = call();
  arrive();
  server_->send_raw(std::string(100, '\xff'));
  EXPECT_EQ(finish(&future).grpc_status, 14);
  EXPECT_TRUE(run_until([&] { return over_; }));
}

TEST_F(ClientRpcPeer, LastWordsBeforeTheCloseStillCount) {
  auto answered = call();
  const std::int32_t stream = arrive();
  auto lost = call();
  arrive();
  server_->headers(stream, kHead, false);
  server_->headers(stream, {{"grpc-status", "9"}}, true);
  server_->step();
  server_->close_socket();
  EXPECT_EQ(finish(&answered).grpc_status, 9);
  EXPECT_EQ(finish(&lost).grpc_status, 14);
  EXPECT_TRUE(over_);
}

TEST_F(ClientRpcPeer, CloseAmidALargeRequestRaisesNoSignal) {
  auto future = call(std::string(kMaxMessageBytes, 'x'));
  EXPECT_TRUE(run_until([&] { return !server_->request_headers.empty(); }));
  server_->close_socket();
  EXPECT_EQ(finish(&future).grpc_status, 14);
}

}  // namespace
}  // namespace expertd::rpc
