// SPDX-License-Identifier: Apache-2.0
// What a client that may attach can do to the daemon and to its neighbours with the descriptors it shares with them.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>

#include "tests/support/daemon_process.h"
#include "tests/support/raw_client.h"

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

  DaemonProcess daemon_{1};
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

}  // namespace
}  // namespace expertd::support
