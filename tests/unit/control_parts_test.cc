// SPDX-License-Identifier: Apache-2.0
// The parts of the control server that need no gRPC: peer table, call pool, listener.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/control/call_pool.h"
#include "daemon/control/listener.h"
#include "daemon/control/peer_table.h"

namespace expertd::control {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;
constexpr std::chrono::seconds kPatience(20);

struct Pair {
  base::ScopedFd ours;
  base::ScopedFd theirs;
};

Pair make_pair_of_sockets() {
  int fds[2] = {-1, -1};
  EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  return {base::ScopedFd(fds[0]), base::ScopedFd(fds[1])};
}

std::string name_of(int fd) {
  return "fd:" + std::to_string(fd);
}

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    char pattern[] = "/tmp/expertd-control-XXXXXX";
    path_ = mkdtemp(pattern);
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

TEST(ControlPeerTable, NumbersRiseWrapAndAreNotTakenTwice) {
  PeerTable table(FdRange{900, 903});
  std::vector<base::ScopedFd> open;
  for (uint64_t i = 1; i <= 3; ++i) {
    auto fd = table.adopt(make_pair_of_sockets().ours, Peer{PeerKind::kSession, {i}, 0, 0});
    ASSERT_TRUE(fd.is_ok());
    EXPECT_EQ(fd.value().get(), 899 + static_cast<int>(i));
    open.push_back(std::move(fd).value());
  }
  // Every number is in use: refused, and the entries stay what they were.
  EXPECT_FALSE(table.adopt(make_pair_of_sockets().ours, Peer{PeerKind::kSession, {9}, 0, 0}).is_ok());
  EXPECT_EQ(table.find("fd:901")->session.value, 2U);
  // A closed number is used again only after the others, and then belongs to the newcomer.
  open[1].reset();
  auto again = table.adopt(make_pair_of_sockets().ours, Peer{PeerKind::kSession, {4}, 0, 0});
  ASSERT_TRUE(again.is_ok());
  EXPECT_EQ(again.value().get(), 901);
  EXPECT_EQ(table.find("fd:901")->session.value, 4U);
}

TEST(ControlPeerTable, OnlyExactNamesAreFound) {
  PeerTable table(FdRange{900, 910});
  const Pair pair = make_pair_of_sockets();
  auto fd = table.adopt(base::ScopedFd(dup(pair.ours.get())), Peer{PeerKind::kOperator, {}, 1000, 12});
  ASSERT_TRUE(fd.is_ok());
  EXPECT_EQ(table.find("fd:900")->uid, 1000U);
  for (const char* name : {"fd:", "fd:900x", "fd:-900", "unix:", "fd:901", "ipv4:900", "", "fd: 900"}) {
    EXPECT_FALSE(table.find(name).has_value()) << name;
  }
  EXPECT_NE(fcntl(fd.value().get(), F_GETFL) & O_NONBLOCK, 0);
  EXPECT_NE(fcntl(fd.value().get(), F_GETFD) & FD_CLOEXEC, 0);
}

/// Sends a byte with a descriptor; 0 or errno.
int send_descriptor(int socket) {
  char byte = 'x';
  iovec data{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* const rights = CMSG_FIRSTHDR(&message);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(int));
  const int sent = STDIN_FILENO;
  std::memcpy(CMSG_DATA(rights), &sent, sizeof(sent));
  return sendmsg(socket, &message, MSG_NOSIGNAL) == 1 ? 0 : errno;
}

TEST(ControlPeerTable, ConnectionsTakeNoDescriptors) {
  if (!refuse_descriptors(make_pair_of_sockets().ours.get())) {
    GTEST_SKIP() << "this kernel cannot refuse them";
  }
  PeerTable table(FdRange{900, 910});
  Pair pair = make_pair_of_sockets();
  auto fd = table.adopt(std::move(pair.ours), Peer{PeerKind::kSession, {1}, 0, 0});
  ASSERT_TRUE(fd.is_ok());
  EXPECT_EQ(send_descriptor(pair.theirs.get()), EPERM);
}

TEST(ControlPeerTable, EndOfSessionShutsItsConnectionsDownOnly) {
  PeerTable table(FdRange{900, 910});
  Pair first = make_pair_of_sockets();
  Pair second = make_pair_of_sockets();
  auto one = table.adopt(std::move(first.ours), Peer{PeerKind::kSession, {1}, 0, 0});
  auto two = table.adopt(std::move(second.ours), Peer{PeerKind::kSession, {2}, 0, 0});
  ASSERT_TRUE(one.is_ok() && two.is_ok());
  table.end_session({1});
  EXPECT_FALSE(table.find(name_of(one.value().get())).has_value());
  EXPECT_TRUE(table.find(name_of(two.value().get())).has_value());
  char byte = 0;
  EXPECT_EQ(recv(first.theirs.get(), &byte, 1, MSG_DONTWAIT), 0);
  EXPECT_EQ(recv(second.theirs.get(), &byte, 1, MSG_DONTWAIT), -1);
}

TEST(ControlPeerTable, ClosedConnectionsAreNotCounted) {
  PeerTable table(FdRange{900, 990});
  auto fd = table.adopt(make_pair_of_sockets().ours, Peer{PeerKind::kOperator, {}, 0, 0});
  ASSERT_TRUE(fd.is_ok());
  EXPECT_EQ(table.count_open(PeerKind::kOperator), 1U);
  EXPECT_EQ(table.count_open(PeerKind::kSession), 0U);
  // Another file under the same number is not the connection.
  ASSERT_EQ(dup2(STDIN_FILENO, fd.value().get()), fd.value().get());
  EXPECT_EQ(table.count_open(PeerKind::kOperator), 0U);
}

/// A pool whose first jobs wait for the test.
class ControlCallPool : public ::testing::Test {
 protected:
  ~ControlCallPool() override { release(); }
  void create(const CallPoolOptions& options) { pool_ = std::move(CallPool::create(options)).value(); }
  /// Returns when the job has begun and holds its thread until release().
  void hold_thread(const Turn& turn) {
    std::promise<void> started;
    ASSERT_TRUE(submit(turn, [&] {
                  started.set_value();
                  released_.wait();
                }).is_ok());
    ASSERT_EQ(started.get_future().wait_for(kPatience), std::future_status::ready);
  }
  base::Status submit(const Turn& turn, std::function<void()> job) {
    return pool_->submit(
        turn, [] { return false; }, std::move(job));
  }
  void release() {
    if (!std::exchange(is_released_, true)) {
      release_.set_value();
    }
    pool_.reset();  // runs what waits
  }

  std::promise<void> release_;
  std::shared_future<void> released_ = release_.get_future().share();
  bool is_released_ = false;
  std::unique_ptr<CallPool> pool_;
};

TEST_F(ControlCallPool, JobsOfOneKeyRunInOrderAndLeaveThreadsToOthers) {
  create({.threads = 2});
  std::mutex mutex;
  std::vector<int> order;
  hold_thread({1, 1});
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(submit({1, 1}, [&, i] {
                  const std::lock_guard lock(mutex);
                  order.push_back(i);
                }).is_ok());
  }
  std::promise<void> other;
  ASSERT_TRUE(submit({2, 2}, [&] { other.set_value(); }).is_ok());
  EXPECT_EQ(other.get_future().wait_for(kPatience), std::future_status::ready);
  EXPECT_FALSE(pool_->wait_idle(base::now_ns()));
  release();
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 3}));
}

TEST_F(ControlCallPool, OneOwnerLeavesAThreadHoweverManyKeysItHas) {
  create({.threads = 3});
  hold_thread({1, 7});
  hold_thread({2, 7});
  std::atomic<bool> ran{false};
  ASSERT_TRUE(submit({3, 7}, [&] { ran = true; }).is_ok());
  std::promise<void> other;
  ASSERT_TRUE(submit({4, 8}, [&] { other.set_value(); }).is_ok());
  EXPECT_EQ(other.get_future().wait_for(kPatience), std::future_status::ready);
  EXPECT_FALSE(ran) << "it would have held the last thread";
  release();
  EXPECT_TRUE(ran);
}

TEST_F(ControlCallPool, WhereNothingWaitsOneOwnerMayUseEveryThread) {
  create({.threads = 2, .leave_a_thread = false});
  hold_thread({1, 7});
  hold_thread({2, 7});
}

TEST_F(ControlCallPool, FullQueueIsRefusedAndClosingRunsWhatWaits) {
  std::atomic<int> ran{0};
  create({.threads = 1, .queue_max = 2});
  hold_thread({1, 1});
  ASSERT_TRUE(submit({1, 1}, [&] { ++ran; }).is_ok());
  ASSERT_TRUE(submit({2, 2}, [&] { ++ran; }).is_ok());
  EXPECT_EQ(submit({3, 3}, [] {}).reason(), EXPERTD_REASON_UNAVAILABLE);
  release();
  EXPECT_EQ(ran, 2);
}

TEST_F(ControlCallPool, FewJobsOfOneKeyWaitAndEndedOnesMakeRoom) {
  create({.threads = 2, .per_key_max = 3});
  hold_thread({1, 1});
  std::atomic<bool> ended{false};
  std::atomic<int> ran{0};
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(pool_
                    ->submit(
                        {1, 1}, [&ended, i] { return i != 1 && ended; }, [&, i] { ran += i == 1 ? 1 : 100; })
                    .is_ok());
  }
  const base::Status refused = submit({1, 1}, [] {});
  EXPECT_EQ(refused.reason(), EXPERTD_REASON_CALL_LIMIT);
  EXPECT_EQ(refused.code(), base::Code::kResourceExhausted);
  EXPECT_TRUE(submit({2, 2}, [] {}).is_ok()) << "the other session's calls have their own room";
  ended = true;  // as when the client cancels its calls and makes new ones
  EXPECT_TRUE(submit({1, 1}, [] {}).is_ok());
  EXPECT_TRUE(submit({1, 1}, [] {}).is_ok());
  EXPECT_EQ(submit({1, 1}, [] {}).reason(), EXPERTD_REASON_CALL_LIMIT);
  release();
  EXPECT_EQ(ran, 1);
}

int connect_to(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    close(fd);
    return -1;
  }
  return fd;
}

void leave_stale_socket(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  const base::ScopedFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(fd.get(), 1), 0);
}

TEST(ControlListener, TellsWhoConnectedAndRemovesItsSocket) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("control.sock");
  std::promise<Peer> accepted;
  {
    auto listener = Listener::create({.path = path, .mode = 0600, .group = {}, .allowed_uids = {}},
                                     [&](base::ScopedFd, const Peer& peer) { accepted.set_value(peer); });
    ASSERT_TRUE(listener.is_ok()) << listener.status().message();
    struct stat info {};
    ASSERT_EQ(stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600U);
    const base::ScopedFd client(connect_to(path));
    ASSERT_TRUE(client.valid());
    std::future<Peer> peer = accepted.get_future();
    ASSERT_EQ(peer.wait_for(kPatience), std::future_status::ready);
    const Peer found = peer.get();
    EXPECT_EQ(found.kind, PeerKind::kOperator);
    EXPECT_EQ(found.uid, getuid());
    EXPECT_EQ(found.pid, static_cast<uint32_t>(getpid()));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(ControlListener, StaleSocketIsReplacedLiveOneIsNot) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("control.sock");
  leave_stale_socket(path);
  const auto ignore = [](base::ScopedFd, const Peer&) {};
  auto first = Listener::create({.path = path, .group = {}, .allowed_uids = {}}, ignore);
  ASSERT_TRUE(first.is_ok()) << first.status().message();
  const auto second = Listener::create({.path = path, .group = {}, .allowed_uids = {}}, ignore);
  EXPECT_EQ(second.status().reason(), EXPERTD_REASON_ADDRESS_IN_USE);
  EXPECT_NE(second.status().message().find(path), std::string::npos);
  // The refused one left the live socket alone.
  const base::ScopedFd client(connect_to(path));
  EXPECT_TRUE(client.valid());
}

TEST(ControlListener, RefusesOtherFilesLongPathsAndUnknownGroups) {
  const TemporaryDirectory directory;
  const auto ignore = [](base::ScopedFd, const Peer&) {};
  const std::string file = directory.file("plain");
  std::ofstream(file) << "x";
  EXPECT_EQ(Listener::create({.path = file, .group = {}, .allowed_uids = {}}, ignore).status().reason(),
            EXPERTD_REASON_ADDRESS_IN_USE);
  EXPECT_TRUE(std::filesystem::exists(file));
  EXPECT_EQ(
      Listener::create({.path = std::string(108, 'a'), .group = {}, .allowed_uids = {}}, ignore).status().reason(),
      EXPERTD_REASON_CONFIG_BAD_VALUE);
  EXPECT_EQ(Listener::create({.path = directory.file("s"), .group = "no-such-group", .allowed_uids = {}}, ignore)
                .status()
                .reason(),
            EXPERTD_REASON_CONFIG_BAD_VALUE);
  EXPECT_FALSE(std::filesystem::exists(directory.file("s")));
}

TEST(ControlListener, SocketOfASuccessorIsLeftAlone) {
  const TemporaryDirectory directory;
  const std::string path = directory.file("control.sock");
  const auto ignore = [](base::ScopedFd, const Peer&) {};
  auto first = Listener::create({.path = path, .group = {}, .allowed_uids = {}}, ignore);
  ASSERT_TRUE(first.is_ok());
  std::filesystem::rename(path, directory.file("moved"));
  auto second = Listener::create({.path = path, .group = {}, .allowed_uids = {}}, ignore);
  ASSERT_TRUE(second.is_ok());
  std::move(first).value().reset();
  EXPECT_TRUE(std::filesystem::exists(path));
}

}  // namespace
}  // namespace expertd::control
