// SPDX-License-Identifier: Apache-2.0
// What a client that may attach can do to the daemon and to its neighbours with the descriptors it shares with them.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "tests/integration/raw_rpc.h"
#include "tests/support/daemon_process.h"
#include "tests/support/raw_client.h"
#include "tests/support/stuck_socket.h"

namespace expertd::support {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class HostileClient : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(daemon_.start());
    ASSERT_TRUE(hostile_.attach(daemon_.attach_socket(), "host:0"));
    ASSERT_TRUE(neighbour_.attach(daemon_.attach_socket(), "host:0"));
  }

  /// A layout of no tokens: an operation of the session alone, without memory.
  static expertd_slot layout() {
    expertd_slot slot{};
    slot.op = EXPERTD_OP_LAYOUT;
    slot.top_k = 2;
    slot.topk_idx_bytes = 8;
    slot.num_experts = 4;
    slot.num_ranks = 2;
    return slot;
  }
  void expect_service() {
    // First, because the neighbour's writes would wake a loop that is stuck on them.
    RawClient newcomer;
    EXPECT_TRUE(newcomer.attach(daemon_.attach_socket(), "host:0"));
    for (int round = 0; round < 3; ++round) {
      const auto end = neighbour_.wait(neighbour_.submit(layout()));
      ASSERT_TRUE(end.has_value());
      EXPECT_EQ(end->reason, static_cast<uint32_t>(EXPERTD_REASON_NONE));
    }
  }

  /// Sends a packet with a descriptor whose last close waits for hours, and lets the daemon be the last that has it.
  void send_stuck(RawClient* client, const void* bytes, size_t size, int fd) {
    daemon_.pause();
    EXPECT_TRUE(client->send(bytes, size, fd));
    ::close(fd);
    daemon_.resume();
  }
  static expertd_attach_fd put_message() { return {EXPERTD_ATTACH_MAGIC, EXPERTD_ATTACH_PUT_FD, 0, 0, 0}; }

  DaemonProcess daemon_{1};
  StuckSocket stuck_;
  RawClient hostile_;
  RawClient neighbour_;
};

TEST_F(HostileClient, CannotBlockTheLoopThroughItsEventfd) {
  // O_NONBLOCK belongs to the eventfd, not to one descriptor of it: a read of the daemon's would wait for ever.
  ASSERT_EQ(::fcntl(hostile_.wake_fd(), F_SETFL, 0), 0);
  EXPECT_FALSE(hostile_.closed_by_peer(milliseconds(700))) << "longer than the loop sleeps";
  expect_service();
  // A full counter: a write of the daemon's would wait for ever.
  const uint64_t full = UINT64_MAX - 1;
  ASSERT_EQ(::write(hostile_.wake_fd(), &full, sizeof(full)), static_cast<ssize_t>(sizeof(full)));
  EXPECT_FALSE(hostile_.closed_by_peer(milliseconds(700)));
  expect_service();
}

TEST_F(HostileClient, CannotTakeTheWakeUpsOfItsNeighbours) {
  for (int round = 0; round < 200; ++round) {
    ASSERT_TRUE(wait_until(
        [&] { return __atomic_load_n(&neighbour_.header()->daemon_sleeping, __ATOMIC_SEQ_CST) == 1; }, seconds(5)));
    const uint64_t seq = neighbour_.submit(layout());
    uint64_t taken = 0;
    (void)!::read(hostile_.wake_fd(), &taken, sizeof(taken));
    ASSERT_EQ(taken, 0U) << "the neighbour's wake-up is not this client's to see";
    ASSERT_TRUE(neighbour_.wait(seq).has_value());
  }
}

TEST_F(HostileClient, CannotHoldTheReclaimWithADescriptorThatDoesNotClose) {
  ASSERT_TRUE(stuck_.ready());
  const expertd_attach_fd message = put_message();
  send_stuck(&hostile_, &message, sizeof(message), stuck_.take());
  std::vector<int> fds;
  ASSERT_TRUE(hostile_.receive(&fds, seconds(5)).has_value());
  hostile_.close();
  EXPECT_TRUE(daemon_.metric_becomes("expertd_sessions", 1));
  EXPECT_TRUE(daemon_.metric_becomes("expertd_lease_reap_duration_seconds_count", 1)) << "it is reclaimed all the same";
  expect_service();
}

TEST_F(HostileClient, CannotHoldTheListenerWithDescriptorsThatItDoesNotWant) {
  ASSERT_TRUE(stuck_.ready());
  // Beside a HELLO, which is refused; in front of the limit of users, so this is open to everybody who may connect.
  RawClient stranger;
  ASSERT_TRUE(stranger.connect(daemon_.attach_socket()));
  const expertd_attach_hello hello = make_hello("host:0");
  send_stuck(&stranger, &hello, sizeof(hello), stuck_.take());
  const auto answer = stranger.welcome(seconds(5));
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->reason, static_cast<uint32_t>(EXPERTD_REASON_BAD_MESSAGE));
  expect_service();
}

TEST_F(HostileClient, CannotHoldTheListenerWithPacketsThatItDoesNotRead) {
  for (const bool empty : {false, true}) {
    StuckSocket stuck;
    ASSERT_TRUE(stuck.ready());
    RawClient stranger;
    ASSERT_TRUE(stranger.connect(daemon_.attach_socket()));
    const std::string nonsense = "no message of the protocol";
    daemon_.pause();
    ASSERT_TRUE(stranger.send(nonsense.data(), nonsense.size()));
    const int fd = stuck.take();
    ASSERT_TRUE(stranger.send(nonsense.data(), empty ? 0 : nonsense.size(), fd));
    ::close(fd);
    daemon_.resume();
    expect_service();
  }
}

TEST_F(HostileClient, CannotHoldAControlThreadWithWhatItRegisters) {
  ASSERT_TRUE(stuck_.ready());
  RawRpc rpc(&hostile_);
  expertd_attach_fd message = put_message();
  send_stuck(&hostile_, &message, sizeof(message), stuck_.take());
  std::vector<int> fds;
  const auto reply = hostile_.receive(&fds, seconds(5));
  ASSERT_TRUE(reply.has_value() && reply->size() == sizeof(message));
  std::memcpy(&message, reply->data(), sizeof(message));
  v1::RegisterBufferRequest request;
  request.set_fd_token(message.token);
  request.set_size(4096);
  uint32_t buffer = 0;
  EXPECT_EQ(rpc.register_buffer(request, &buffer).info.reason_name(), "UNSEALED_MEMORY");
  EXPECT_NE(rpc.register_memfd(4096), 0U) << "the session's next call is served";
  expect_service();
}

TEST_F(HostileClient, LacksNothingButItsRequestWhenTheDaemonHasNoDescriptorLeft) {
  const rlimit usual = daemon_.limit_descriptors(8);  // all of those numbers are in use
  uint32_t reason = 0;
  EXPECT_EQ(hostile_.put_fd(STDIN_FILENO, &reason), 0U);
  EXPECT_EQ(reason, static_cast<uint32_t>(EXPERTD_REASON_SYSTEM));
  RawClient newcomer;
  ASSERT_TRUE(newcomer.connect(daemon_.attach_socket()));
  const expertd_attach_hello hello = make_hello("host:0");
  ASSERT_TRUE(newcomer.send(&hello, sizeof(hello)));
  EXPECT_TRUE(
      wait_until([&] { return daemon_.log().find("attach.sock cannot accept") != std::string::npos; }, seconds(5)));
  (void)daemon_.limit_descriptors(usual.rlim_cur);
  const auto answer = newcomer.welcome(seconds(5));
  ASSERT_TRUE(answer.has_value()) << "it waited until there were descriptors again";
  EXPECT_EQ(answer->type, static_cast<uint32_t>(EXPERTD_ATTACH_WELCOME));
  EXPECT_NE(hostile_.put_fd(STDIN_FILENO, &reason), 0U) << "the session is still there";
  expect_service();
}

TEST_F(HostileClient, ManyDescriptorsInOnePacketEndItsSessionAndAreClosed) {
  const size_t before = daemon_.open_descriptors();
  RawClient client;
  ASSERT_TRUE(client.attach(daemon_.attach_socket(), "host:0"));
  const expertd_attach_fd message = put_message();
  ASSERT_TRUE(client.send_many(&message, sizeof(message), std::vector<int>(200, STDIN_FILENO)));
  EXPECT_TRUE(client.closed_by_peer(seconds(5)));
  client.close();
  EXPECT_TRUE(wait_until([&] { return daemon_.open_descriptors() <= before; }, seconds(5)));
}

}  // namespace
}  // namespace expertd::support
