// SPDX-License-Identifier: Apache-2.0
// Memory of host devices: what a client's descriptor must be before the daemon maps it.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "daemon/device/host/host_device.h"
#include "daemon/device/host/host_memory.h"
#include "tests/support/fake_ports.h"

namespace expertd::device {
namespace {

constexpr base::DeviceIndex kHome{2};

base::ScopedFd memfd(uint64_t bytes, int seals) {
  base::ScopedFd fd(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(bytes)), 0);
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, seals), 0);
  return fd;
}

base::Reason reason_of(base::ScopedFd fd, uint64_t offset, uint64_t bytes) {
  return import_host_fd(std::move(fd), offset, bytes, kHome).status().reason();
}

TEST(HostMemory, RefusesMemoryThatItsOwnerCanShrink) {
  EXPECT_EQ(reason_of(memfd(4096, 0), 0, 4096), EXPERTD_REASON_UNSEALED_MEMORY);
  EXPECT_EQ(reason_of(memfd(4096, F_SEAL_GROW), 0, 4096), EXPERTD_REASON_UNSEALED_MEMORY);
}

TEST(HostMemory, RefusesDescriptorsThatAreNoMemoryFiles) {
  int pipe_fds[2] = {-1, -1};
  ASSERT_EQ(::pipe2(pipe_fds, O_CLOEXEC), 0);
  const base::ScopedFd write_end(pipe_fds[1]);
  EXPECT_EQ(reason_of(base::ScopedFd(pipe_fds[0]), 0, 16), EXPERTD_REASON_UNSEALED_MEMORY);
  EXPECT_EQ(reason_of(base::ScopedFd(::open("/dev/zero", O_RDWR | O_CLOEXEC)), 0, 16), EXPERTD_REASON_UNSEALED_MEMORY);
  EXPECT_EQ(reason_of(base::ScopedFd(), 0, 16), EXPERTD_REASON_UNSEALED_MEMORY);
}

TEST(HostMemory, RefusesARangeBeyondTheFile) {
  EXPECT_EQ(reason_of(memfd(4096, F_SEAL_SHRINK), 0, 4097), EXPERTD_REASON_OUT_OF_BOUNDS);
  EXPECT_EQ(reason_of(memfd(4096, F_SEAL_SHRINK), 4112, 16), EXPERTD_REASON_OUT_OF_BOUNDS);
  EXPECT_EQ(reason_of(memfd(4096, F_SEAL_SHRINK), 16, ~0ULL), EXPERTD_REASON_OUT_OF_BOUNDS);
  EXPECT_EQ(reason_of(memfd(4096, F_SEAL_SHRINK), ~0ULL - 15, 32), EXPERTD_REASON_OUT_OF_BOUNDS);
  EXPECT_EQ(reason_of(memfd(4096, F_SEAL_SHRINK), 0, 0), EXPERTD_REASON_OUT_OF_BOUNDS);
}

TEST(HostMemory, RefusesAnOffsetThatIsNotAMultipleOfSixteen) {
  EXPECT_EQ(reason_of(memfd(4096, F_SEAL_SHRINK), 8, 16), EXPERTD_REASON_UNALIGNED);
}

TEST(HostMemory, MapsExactlyTheRangeThatWasAskedFor) {
  base::ScopedFd fd = memfd(3 * 4096, F_SEAL_SHRINK);
  const char text[] = "expert";
  ASSERT_EQ(::pwrite(fd.get(), text, sizeof(text), 4096 + 32), static_cast<ssize_t>(sizeof(text)));
  void* base = nullptr;
  {
    const auto memory = import_host_fd(std::move(fd), 4096 + 32, 4096, kHome);
    ASSERT_TRUE(memory.is_ok());
    const engine::Mapping& mapping = memory.value()->mapping();
    EXPECT_EQ(mapping.bytes, 4096U);
    EXPECT_EQ(mapping.home, kHome);
    EXPECT_STREQ(static_cast<const char*>(mapping.base[0]), text);
    EXPECT_EQ(mapping.base[0], mapping.base[63]);
    base = static_cast<char*>(mapping.base[0]) - 32;  // the page it lies on
    EXPECT_EQ(::msync(base, 4096, MS_ASYNC), 0);
  }
  EXPECT_NE(::msync(base, 4096, MS_ASYNC), 0) << "it is still mapped";
}

// A hole punched into a memfd of huge pages gives their reservation back, and the next access may find none.
TEST(HostMemory, RefusesHugePagesByName) {
  base::ScopedFd fd(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB));
  if (!fd.valid() || ::ftruncate(fd.get(), 1 << 30) != 0 || ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    GTEST_SKIP() << "no sealed memfds of huge pages here";
  }
  const auto memory = import_host_fd(std::move(fd), 0, 4096, kHome);
  EXPECT_EQ(memory.status().reason(), EXPERTD_REASON_UNSUPPORTED);
  EXPECT_NE(memory.status().message().find("hugetlbfs"), std::string::npos) << memory.status().message();
}

TEST(HostMemory, ReadsAHoleThatItsOwnerPunchedAsZeros) {
  base::ScopedFd fd = memfd(2 * 4096, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  const int owners = ::dup(fd.get());
  const auto memory = import_host_fd(std::move(fd), 0, 2 * 4096, kHome);
  ASSERT_TRUE(memory.is_ok());
  auto* bytes = static_cast<volatile char*>(memory.value()->mapping().base[0]);
  bytes[4096] = 7;
  ASSERT_EQ(::fallocate(owners, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 2 * 4096), 0);
  EXPECT_EQ(bytes[4096], 0);
  bytes[4096] = 8;
  EXPECT_EQ(bytes[4096], 8);
  ::close(owners);
}

TEST(HostWindow, IsZeroSharedSealedAndRoundedUp) {
  Pool pool(0);
  const auto window = create_host_window(5000, kHome, &pool);
  ASSERT_TRUE(window.is_ok());
  EXPECT_EQ(window.value().bytes, 8192U);
  const int fd = window.value().fd.get();
  EXPECT_EQ(::fcntl(fd, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  EXPECT_NE(::ftruncate(fd, 0), 0);
  auto* base = static_cast<char*>(window.value().memory->mapping().base[2]);
  EXPECT_EQ(base[8191], 0);
  std::memcpy(base, "seen", 5);
  char seen[5] = {};
  ASSERT_EQ(::pread(fd, seen, sizeof(seen), 0), 5);
  EXPECT_STREQ(seen, "seen");
}

TEST(HostWindow, RefusesSizesOutsideItsLimits) {
  Pool pool(0);
  EXPECT_EQ(create_host_window(0, kHome, &pool).status().reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(create_host_window((1ULL << 46) + 1, kHome, &pool).status().reason(), EXPERTD_REASON_ARGUMENT_RANGE);
  EXPECT_EQ(pool.used(), 0U);
}

TEST(HostWindow, IsCountedWhileItLivesAndRefusedBeyondTheCap) {
  Pool pool(3 * 4096);
  {
    const auto first = create_host_window(5000, kHome, &pool);
    ASSERT_TRUE(first.is_ok());
    EXPECT_EQ(pool.used(), 8192U);
    const auto second = create_host_window(4097, kHome, &pool);
    EXPECT_EQ(second.status().reason(), EXPERTD_REASON_POOL_EXHAUSTED);
    EXPECT_NE(second.status().message().find("device.pool_max_bytes"), std::string::npos) << second.status().message();
    EXPECT_EQ(pool.used(), 8192U) << "a refusal takes nothing";
    EXPECT_TRUE(create_host_window(4096, kHome, &pool).is_ok());
  }
  EXPECT_EQ(pool.used(), 0U);
}

}  // namespace
}  // namespace expertd::device
