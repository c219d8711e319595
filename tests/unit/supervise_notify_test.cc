// SPDX-License-Identifier: Apache-2.0
// Datagrams to the service manager, received on sockets of the test.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>

#include "daemon/base/fd.h"
#include "daemon/supervise/notify.h"

namespace expertd::supervise {
namespace {

/// A datagram socket bound to `name`, whose first byte is '\0' for an abstract one.
base::ScopedFd listen_at(const std::string& name) {
  base::ScopedFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, name.data(), name.size());
  const auto bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size());
  EXPECT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), bytes), 0);
  return fd;
}

std::string receive(const base::ScopedFd& fd) {
  std::array<char, 512> text{};
  const ssize_t bytes = ::recv(fd.get(), text.data(), text.size(), 0);
  return std::string(text.data(), bytes > 0 ? static_cast<size_t>(bytes) : 0);
}

TEST(SystemdNotifier, SaysNothingWithoutTheVariable) {
  for (const char* address : {static_cast<const char*>(nullptr), ""}) {
    base::Result<SystemdNotifier> notifier = SystemdNotifier::create(address);
    ASSERT_TRUE(notifier.is_ok());
    EXPECT_FALSE(notifier.value().connected());
    EXPECT_TRUE(notifier.value().ready("serving").is_ok());
  }
}

TEST(SystemdNotifier, SendsToAPath) {
  std::string directory = testing::TempDir() + "notify_XXXXXX";
  ASSERT_NE(::mkdtemp(directory.data()), nullptr);
  const std::string path = directory + "/notify";
  const base::ScopedFd manager = listen_at(path);
  base::Result<SystemdNotifier> notifier = SystemdNotifier::create(path.c_str());
  ASSERT_TRUE(notifier.is_ok());
  EXPECT_TRUE(notifier.value().ready("serving 8 GPUs").is_ok());
  EXPECT_EQ(receive(manager), "READY=1\nSTATUS=serving 8 GPUs");
  std::filesystem::remove_all(directory);
}

class AbstractNotifier : public testing::Test {
 protected:
  void SetUp() override {
    const std::string name = "expertd-test-" + std::to_string(::getpid());
    manager_ = listen_at(std::string(1, '\0') + name);
    base::Result<SystemdNotifier> notifier = SystemdNotifier::create(("@" + name).c_str());
    ASSERT_TRUE(notifier.is_ok());
    notifier_.emplace(std::move(notifier).value());
  }

  base::ScopedFd manager_;
  std::optional<SystemdNotifier> notifier_;
};

TEST_F(AbstractNotifier, SendsTheWatchdogPing) {
  EXPECT_TRUE(notifier_->watchdog().is_ok());
  EXPECT_EQ(receive(manager_), "WATCHDOG=1");
}

TEST_F(AbstractNotifier, SendsStoppingWithAStatus) {
  EXPECT_TRUE(notifier_->stopping("draining").is_ok());
  EXPECT_EQ(receive(manager_), "STOPPING=1\nSTATUS=draining");
}

TEST_F(AbstractNotifier, KeepsAStatusOnOneLine) {
  EXPECT_TRUE(notifier_->status("one\nREADY=1").is_ok());
  EXPECT_EQ(receive(manager_), "STATUS=one READY=1");
}

TEST_F(AbstractNotifier, ReportsAManagerThatWentAway) {
  manager_.reset();
  EXPECT_EQ(notifier_->watchdog().reason(), EXPERTD_REASON_SYSTEM);
}

TEST(SystemdNotifier, RefusesAddressesThatItCannotReach) {
  const std::string long_path = "/" + std::string(200, 'x');
  for (const char* address : {"relative", "@", "/", "vsock:2:1234", long_path.c_str()}) {
    EXPECT_EQ(SystemdNotifier::create(address).status().reason(), EXPERTD_REASON_UNSUPPORTED) << address;
  }
}

}  // namespace
}  // namespace expertd::supervise
