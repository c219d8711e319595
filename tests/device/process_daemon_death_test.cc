// SPDX-License-Identifier: Apache-2.0
// Label gpu. The daemon is killed while a client's stream waits for a completion: the stream is let go, calls say so,
// and after a restart the same sessions work again.
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

constexpr double kAfterEndOfFileMs = 200;  // the promise of the client library
constexpr double kAfterKillMs = 10'000;    // a kernel takes a process with GPUs apart in this time
constexpr double kBackMs = 5'000;          // from the restart on
constexpr int kCycles = 3;

/// A connection to the daemon that says nothing, to see when the kernel closes them.
class EndOfFile {
 public:
  explicit EndOfFile(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::snprintf(address.sun_path, sizeof(address.sun_path), "%s", path.c_str());
    connected_ = ::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  }
  ~EndOfFile() { ::close(fd_); }
  EndOfFile(const EndOfFile&) = delete;
  EndOfFile& operator=(const EndOfFile&) = delete;
  bool connected() const { return connected_; }
  /// The time of the end of file, 0 when it does not come.
  uint64_t wait(milliseconds limit) {
    support::note_wait("the end of file of the killed daemon");
    pollfd entry{fd_, POLLIN, 0};
    return ::poll(&entry, 1, static_cast<int>(limit.count())) > 0 ? support::monotonic_ns() : 0;
  }

 private:
  int fd_;
  bool connected_ = false;
};

double ms_between(uint64_t begin_ns, uint64_t end_ns) {
  return (static_cast<double>(end_ns) - static_cast<double>(begin_ns)) * 1e-6;
}

class ProcessDaemonDeath : public ProcessTest {
 protected:
  ProcessDaemonDeath() : ProcessTest(2, seconds(100)) {}
  std::vector<FaultClient*> both() { return {clients_[0].get(), clients_[1].get()}; }
  bool ready(const std::string& group) {
    return all_ok(both(), "join " + group + " # 2 normal") && all_ok(both(), "rounds 5 4");
  }
  void kill_beside_a_parked_stream();
  bool restart(const std::string& group);

  std::unique_ptr<FaultClient> clients_[2];
  std::vector<double> end_of_file_ms_, from_kill_ms_, from_end_of_file_ms_, restart_ms_;
};

void ProcessDaemonDeath::kill_beside_a_parked_stream() {
  // Rank 1 submits nothing, so that the stream of rank 0 stays in its wait.
  ASSERT_TRUE(is_ok(expect_ok(*clients_[0], "submit")));
  EXPECT_EQ(number_in(expect_ok(*clients_[0], "query"), "done"), 0);
  ASSERT_EQ(clients_[0]->ask("block"), "ok blocking");
  EndOfFile end_of_file(daemon_->attach_socket());
  ASSERT_TRUE(end_of_file.connected());
  const uint64_t kill_ns = support::monotonic_ns();
  ::kill(daemon_->pid(), SIGKILL);
  const uint64_t eof_ns = end_of_file.wait(seconds(15));
  ASSERT_NE(eof_ns, 0u) << "no end of file";
  const std::string released = clients_[0]->answer(seconds(15)).value_or("no answer");
  ASSERT_TRUE(is_ok(released)) << "the stream was not let go: " << released;
  std::printf("the blocked thread: %s\n", released.c_str());
  const auto at_ns = static_cast<uint64_t>(number_in(released, "at"));
  end_of_file_ms_.push_back(ms_between(kill_ns, eof_ns));
  from_kill_ms_.push_back(ms_between(kill_ns, at_ns));
  from_end_of_file_ms_.push_back(ms_between(eof_ns, at_ns));
  EXPECT_LT(from_kill_ms_.back(), kAfterKillMs);
  // Negative when the client's own connection was closed before this one.
  EXPECT_LT(from_end_of_file_ms_.back(), support::bound_ms(kAfterEndOfFileMs));
  for (const char* call : {"wait 5000", "barrier 1000", "state"}) {
    const std::string answer = clients_[0]->ask(call, seconds(10));
    EXPECT_EQ(answer.rfind("failed UNAVAILABLE", 0), 0u) << call << ": " << answer;
  }
  const std::string idle = clients_[1]->ask("barrier 1000", seconds(10));
  EXPECT_EQ(idle.rfind("failed UNAVAILABLE", 0), 0u) << idle;
  daemon_->kill();  // waits for its end
}

bool ProcessDaemonDeath::restart(const std::string& group) {
  const uint64_t begin = support::monotonic_ns();
  const bool good = daemon_->start() && all_ok(both(), "reattach 20000") && ready(group);
  restart_ms_.push_back(support::elapsed_ms(begin));
  EXPECT_LT(restart_ms_.back(), support::bound_ms(kBackMs));
  return good;
}

TEST_F(ProcessDaemonDeath, LetsAParkedStreamGoAndSessionsComeBack) {
  ASSERT_TRUE(start_daemon());
  for (uint32_t i = 0; i < 2; ++i) {
    clients_[i] = make_client();
    // One with registered memory, one with a window: both are made anew.
    ASSERT_TRUE(attach(*clients_[i], i, "lasting-" + std::to_string(i), i == 0 ? "malloc" : "window"));
  }
  ASSERT_TRUE(ready("life-0"));
  for (int cycle = 1; cycle <= kCycles && !HasFatalFailure(); ++cycle) {
    kill_beside_a_parked_stream();
    const bool back = !HasFatalFailure() && restart("life-" + std::to_string(cycle));
    EXPECT_TRUE(back) << "cycle " << cycle;
    if (!back) {
      break;
    }
  }
  figure("daemon killed, ms p50/max", {{"kill to end of file", end_of_file_ms_},
                                       {"kill to the parked stream let go", from_kill_ms_},
                                       {"end of file to that", from_end_of_file_ms_},
                                       {"restart to verified rounds", restart_ms_}});
}

}  // namespace
}  // namespace expertd::device_test
