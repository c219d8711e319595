// SPDX-License-Identifier: Apache-2.0
// Starting and stopping the daemon: exit codes and what it says when it cannot start.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "tests/support/daemon_process.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {
namespace {

using std::chrono::seconds;

constexpr int kExitUsage = 64;
constexpr int kExitUnavailable = 69;
constexpr int kExitConfig = 78;

/// Starts a daemon that is expected to end by itself.
RunResult refused_start(const std::string& directory, std::vector<std::string> flags) {
  std::vector<std::string> all = {"--runtime-directory=" + directory, "--metrics-port=0", "--device-gpus=none",
                                  "--device-hosts=1"};
  all.insert(all.end(), flags.begin(), flags.end());
  return run_daemon(all, seconds(10));
}

bool says(const RunResult& result, const std::string& text) {
  return result.error.find(text) != std::string::npos || result.output.find(text) != std::string::npos;
}

/// A listening socket in a file, as another program would have it.
class ListeningFile {
 public:
  explicit ListeningFile(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::snprintf(address.sun_path, sizeof(address.sun_path), "%s", path.c_str());
    good_ = ::bind(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0 && ::listen(fd_, 4) == 0;
  }
  ~ListeningFile() { ::close(fd_); }
  bool good() const { return good_; }

 private:
  int fd_;
  bool good_ = false;
};

TEST(DaemonStart, ReplacesTheSocketFilesOfADeadDaemon) {
  DaemonProcess daemon(1);
  ASSERT_TRUE(daemon.start());
  daemon.kill();
  ASSERT_TRUE(std::filesystem::exists(daemon.attach_socket()));
  ASSERT_TRUE(daemon.start());
  EXPECT_TRUE(ClientSession(daemon.attach_socket(), "host:0").ok());
}

TEST(DaemonStart, RemovesItsSocketsWhenItStops) {
  DaemonProcess daemon(1);
  ASSERT_TRUE(daemon.start());
  struct stat info {};
  ASSERT_EQ(::stat(daemon.attach_socket().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0660u);
  EXPECT_EQ(daemon.stop(), 0);
  EXPECT_FALSE(std::filesystem::exists(daemon.attach_socket()));
  EXPECT_FALSE(std::filesystem::exists(daemon.control_socket()));
}

TEST(DaemonStart, RefusesASocketThatIsInUse) {
  const TempDir directory;
  const ListeningFile other(directory.file("attach.sock"));
  ASSERT_TRUE(other.good());
  const RunResult result = refused_start(directory.path(), {});
  EXPECT_EQ(result.exit_code, kExitUnavailable) << result.error;
  EXPECT_TRUE(says(result, "attach.sock")) << result.error;
  EXPECT_TRUE(says(result, "ADDRESS_IN_USE")) << result.error;
}

TEST(DaemonStart, RefusesASecondDaemonInItsDirectory) {
  DaemonProcess daemon(1);
  ASSERT_TRUE(daemon.start());
  const RunResult result = refused_start(daemon.directory(), {});
  EXPECT_EQ(result.exit_code, kExitUnavailable) << result.error;
  EXPECT_TRUE(says(result, daemon.directory())) << result.error;
  EXPECT_TRUE(ClientSession(daemon.attach_socket(), "host:0").ok()) << "the first one must not notice";
}

TEST(DaemonStart, SaysThatItsDirectoryCannotBeWritten) {
  // Below a regular file even root cannot write.
  const TempDir directory;
  write_text(directory.file("plain"), "not a directory");
  const RunResult result = refused_start(directory.file("plain") + "/run", {});
  EXPECT_EQ(result.exit_code, kExitUnavailable) << result.error;
  EXPECT_TRUE(says(result, directory.file("plain") + "/run")) << result.error;
}

TEST(DaemonStart, NamesTheMetricsPortThatIsInUse) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ASSERT_EQ(::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(::listen(fd, 1), 0);
  ASSERT_EQ(::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  const std::string port = std::to_string(ntohs(address.sin_port));
  const TempDir directory;
  const RunResult result = refused_start(directory.path(), {"--metrics-port=" + port});
  EXPECT_EQ(result.exit_code, kExitUnavailable) << result.error;
  EXPECT_TRUE(says(result, port)) << result.error;
  EXPECT_TRUE(says(result, "ADDRESS_IN_USE")) << result.error;
  ::close(fd);
}

TEST(DaemonStart, SaysThatThereIsNoGpuWhereOneWasAskedFor) {
  const TempDir directory;
  const RunResult result = refused_start(directory.path(), {"--device-gpus=63"});
  EXPECT_EQ(result.exit_code, kExitUnavailable) << result.error;
  EXPECT_TRUE(says(result, "device.gpus")) << result.error;
}

TEST(DaemonStart, FallsBackToHostDevicesOnlyWhenNoGpuWasNamed) {
  DaemonProcess daemon(1, {"--device-gpus=auto", "--device-hosts=1"});
  ASSERT_TRUE(daemon.start());
  EXPECT_TRUE(ClientSession(daemon.attach_socket(), "host:0").ok());
}

TEST(DaemonConfig, NamesAnUnknownKeyItsPlaceAndTheNearestOne) {
  const TempDir directory;
  write_text(directory.file("expertd.toml"), "[engine]\nop_deadlin = \"1s\"\n");
  const RunResult result = refused_start(directory.path(), {"--config=" + directory.file("expertd.toml")});
  EXPECT_EQ(result.exit_code, kExitConfig) << result.error;
  EXPECT_TRUE(says(result, "expertd.toml:2:")) << result.error;
  EXPECT_TRUE(says(result, "engine.op_deadline")) << result.error;
}

TEST(DaemonConfig, NamesTheAllowedRangeOfABadValue) {
  const TempDir directory;
  write_text(directory.file("expertd.toml"), "[control]\nmax_sessions = 100000\n");
  const RunResult result = refused_start(directory.path(), {"--config=" + directory.file("expertd.toml")});
  EXPECT_EQ(result.exit_code, kExitConfig) << result.error;
  EXPECT_TRUE(says(result, "max_sessions")) << result.error;
  EXPECT_TRUE(says(result, "1024")) << result.error;
}

TEST(DaemonConfig, CheckConfigEndsWithoutServing) {
  const TempDir directory;
  write_text(directory.file("good.toml"), "[engine]\nop_deadline = \"1s\"\n");
  write_text(directory.file("bad.toml"), "[engine]\nop_deadline = 1s\n");
  const RunResult good = run_daemon({"--config=" + directory.file("good.toml"), "--check-config"}, seconds(10));
  EXPECT_EQ(good.exit_code, 0) << good.error;
  const RunResult bad = run_daemon({"--config=" + directory.file("bad.toml"), "--check-config"}, seconds(10));
  EXPECT_EQ(bad.exit_code, kExitConfig);
  EXPECT_TRUE(says(bad, "bad.toml:2:")) << bad.error;
}

TEST(DaemonConfig, AMissingFileThatWasAskedForIsAnError) {
  const RunResult result = run_daemon({"--config=/nowhere/expertd.toml", "--check-config"}, seconds(10));
  EXPECT_EQ(result.exit_code, kExitConfig) << result.error;
  EXPECT_TRUE(says(result, "/nowhere/expertd.toml")) << result.error;
}

TEST(DaemonConfig, AnUnknownFlagIsAUsageError) {
  const RunResult result = run_daemon({"--no-such-flag=1"}, seconds(10));
  EXPECT_EQ(result.exit_code, kExitUsage) << result.error;
}

TEST(DaemonConfig, VersionAndHelpGoToStandardOutput) {
  const RunResult version = run_daemon({"--version"}, seconds(10));
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_EQ(std::count(version.output.begin(), version.output.end(), '\n'), 1) << version.output;
  const RunResult help = run_daemon({"--help"}, seconds(10));
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_NE(help.output.find("--runtime-directory"), std::string::npos);
}

TEST(DaemonConfig, ReloadChangesTheLogLevelAndNamesWhatNeedsARestart) {
  const TempDir directory;
  const std::string file = directory.file("expertd.toml");
  write_text(file, "[log]\nlevel = \"info\"\n");
  DaemonProcess daemon(1, {"--config=" + file});
  ASSERT_TRUE(daemon.start());
  write_text(file, "[log]\nlevel = \"debug\"\n[engine]\nring_slots = 16\n");
  ASSERT_EQ(::kill(daemon.pid(), SIGHUP), 0);
  EXPECT_TRUE(wait_until([&] { return daemon.log().find("configuration reloaded") != std::string::npos; }, seconds(5)));
  EXPECT_TRUE(wait_until([&] { return daemon.log().find("engine.ring_slots") != std::string::npos; }, seconds(5)));
  EXPECT_EQ(daemon.metric("expertd_config_last_load_success"), 1);
  write_text(file, "[log]\nlevel = \"loud\"\n");
  ASSERT_EQ(::kill(daemon.pid(), SIGHUP), 0);
  EXPECT_TRUE(daemon.metric_becomes("expertd_config_last_load_success", 0));
  write_text(file, "[log]\nlevel = \"info\"\n");
  ASSERT_EQ(::kill(daemon.pid(), SIGHUP), 0);
  EXPECT_TRUE(daemon.metric_becomes("expertd_config_last_load_success", 1));
}

}  // namespace
}  // namespace expertd::support
