// SPDX-License-Identifier: Apache-2.0
// Closing what clients sent: never on the caller's thread, and memory never behind a close that is stuck.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <thread>

#include "daemon/base/clock.h"
#include "daemon/base/limits.h"
#include "daemon/session/descriptor_closer.h"
#include "tests/support/stuck_socket.h"

namespace expertd::test {
namespace {

base::ScopedFd memory_file() {
  return base::ScopedFd(::memfd_create("closer-test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
}

/// The read end sees the end of file when the last writer is closed.
struct Pipe {
  Pipe() {
    int ends[2] = {-1, -1};
    EXPECT_EQ(::pipe2(ends, O_CLOEXEC | O_NONBLOCK), 0);
    reader.reset(ends[0]);
    writer.reset(ends[1]);
  }
  bool ended() const {
    char byte = 0;
    return ::read(reader.get(), &byte, 1) == 0;
  }
  base::ScopedFd reader;
  base::ScopedFd writer;
};

template <typename Condition>
bool becomes_true(Condition condition) {
  const uint64_t deadline_ns = base::now_ns() + 20'000'000'000;
  while (!condition() && base::now_ns() < deadline_ns) {
    std::this_thread::yield();
  }
  return condition();
}

TEST(DescriptorCloser, ClosesWhatItIsGiven) {
  session::DescriptorCloser closer;
  ASSERT_TRUE(closer.start().is_ok());
  Pipe pipe;
  closer.close(std::move(pipe.writer));
  closer.close(base::ScopedFd());
  EXPECT_TRUE(becomes_true([&] { return pipe.ended(); }));
  EXPECT_FALSE(closer.full());
}

TEST(DescriptorCloser, AStuckCloseHoldsNeitherTheCallerNorMemory) {
  support::StuckSocket stuck;
  ASSERT_TRUE(stuck.ready());
  Pipe behind;
  {
    session::DescriptorCloser closer;
    ASSERT_TRUE(closer.start().is_ok());
    closer.close(base::ScopedFd(stuck.take()));
    closer.close(std::move(behind.writer));
    base::ScopedFd memory = memory_file();
    const int number = memory.get();
    closer.close(std::move(memory));
    EXPECT_TRUE(becomes_true([&] { return ::fcntl(number, F_GETFD) < 0; }));
    EXPECT_FALSE(behind.ended()) << "the socket's close is stuck, or the test proves nothing";
    for (uint32_t i = 2; i < base::kMaxClosingFds; ++i) {
      EXPECT_FALSE(closer.full());
      closer.close(std::move(Pipe().writer));
    }
    EXPECT_TRUE(closer.full());
  }
}

TEST(DescriptorCloser, KnowsMemoryFromOtherFiles) {
  EXPECT_TRUE(session::DescriptorCloser::is_memory_file(memory_file().get()));
  EXPECT_FALSE(session::DescriptorCloser::is_memory_file(Pipe().writer.get()));
  EXPECT_FALSE(session::DescriptorCloser::is_memory_file(-1));
}

}  // namespace
}  // namespace expertd::test
