// SPDX-License-Identifier: Apache-2.0
// What the daemon does with its own process: signals, the lock file, the environment. Children stand in for the daemon
// where the effect could not be undone.
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <string>

#include "daemon/supervise/environment.h"
#include "daemon/supervise/lock_file.h"
#include "daemon/supervise/signals.h"

namespace expertd::supervise {
namespace {

/// Long enough for any machine; a signal that is pending is seen at once.
constexpr uint64_t kPatienceNs = 10'000'000'000;

/// The exit code of `body` in a child; -1 when it died otherwise.
template <typename Body>
int in_child(const Body& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::_exit(body());
  }
  int status = 0;
  return ::waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

class SignalsTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(pthread_sigmask(SIG_SETMASK, nullptr, &mask_), 0);
    ASSERT_TRUE(block_signals().is_ok());
    base::Result<Signals> signals = Signals::create();
    ASSERT_TRUE(signals.is_ok());
    signals_.emplace(std::move(signals).value());
  }
  void TearDown() override {
    while (signals_->wait(0).value() != SignalEvent::kNone) {
    }
    ::signal(SIGPIPE, SIG_DFL);
    pthread_sigmask(SIG_SETMASK, &mask_, nullptr);
  }
  SignalEvent next() {
    const base::Result<SignalEvent> event = signals_->wait(kPatienceNs);
    EXPECT_TRUE(event.is_ok());
    return event.is_ok() ? event.value() : SignalEvent::kNone;
  }

  sigset_t mask_{};
  std::optional<Signals> signals_;
};

TEST_F(SignalsTest, ReturnsNoneWhenTheTimeoutPasses) {
  EXPECT_EQ(signals_->wait(0).value(), SignalEvent::kNone);
}

TEST_F(SignalsTest, TakesSigtermAsDrainAndTheSecondAsStop) {
  ::raise(SIGTERM);
  EXPECT_EQ(next(), SignalEvent::kDrain);
  ::raise(SIGTERM);
  EXPECT_EQ(next(), SignalEvent::kStopNow);
}

TEST_F(SignalsTest, TakesSigintLikeSigterm) {
  ::raise(SIGINT);
  EXPECT_EQ(next(), SignalEvent::kDrain);
  ::raise(SIGTERM);
  EXPECT_EQ(next(), SignalEvent::kStopNow);
}

TEST_F(SignalsTest, TakesSighupAsReloadAlsoBetweenTheTwo) {
  ::raise(SIGTERM);
  EXPECT_EQ(next(), SignalEvent::kDrain);
  ::raise(SIGHUP);
  EXPECT_EQ(next(), SignalEvent::kReload);
  ::raise(SIGINT);
  EXPECT_EQ(next(), SignalEvent::kStopNow);
}

TEST_F(SignalsTest, IgnoresABrokenPipe) {
  ::raise(SIGPIPE);
  EXPECT_EQ(signals_->wait(0).value(), SignalEvent::kNone);
}

class LockFileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = testing::TempDir() + "lock_XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    root_ = name;
    directory_ = root_ + "/run";
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  std::string root_;
  std::string directory_;
};

TEST_F(LockFileTest, MakesTheDirectoryForTheClientGroup) {
  ASSERT_TRUE(LockFile::acquire(directory_).is_ok());
  struct stat info {};
  ASSERT_EQ(::stat(directory_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07027U, 0U);  // nothing for others, no write for the group
}

TEST_F(LockFileTest, RefusesASecondHolderAndNamesTheFirst) {
  const base::Result<LockFile> first = LockFile::acquire(directory_);
  ASSERT_TRUE(first.is_ok());
  const base::Result<LockFile> second = LockFile::acquire(directory_);
  EXPECT_EQ(second.status().reason(), EXPERTD_REASON_ADDRESS_IN_USE);
  EXPECT_NE(second.status().message().find("pid " + std::to_string(::getpid())), std::string::npos)
      << second.status().message();
}

TEST_F(LockFileTest, RefusesASecondProcess) {
  const base::Result<LockFile> first = LockFile::acquire(directory_);
  ASSERT_TRUE(first.is_ok());
  EXPECT_EQ(in_child([this] { return LockFile::acquire(directory_).is_ok() ? 0 : 1; }), 1);
}

TEST_F(LockFileTest, IsFreeAgainWhenItsHolderIsGone) {
  EXPECT_EQ(in_child([this] { return LockFile::acquire(directory_).is_ok() ? 0 : 1; }), 0);
  EXPECT_TRUE(LockFile::acquire(directory_).is_ok());
}

TEST_F(LockFileTest, SaysWhatToDoAboutADirectoryItCannotMake) {
  const base::Result<LockFile> lock = LockFile::acquire(root_ + "/missing/run");
  EXPECT_EQ(lock.status().reason(), EXPERTD_REASON_RUNTIME_DIRECTORY);
  EXPECT_NE(lock.status().message().find("RuntimeDirectory=expertd"), std::string::npos);
}

TEST_F(LockFileTest, RefusesAFileInPlaceOfTheDirectory) {
  std::ofstream(directory_) << "x";
  EXPECT_EQ(LockFile::acquire(directory_).status().reason(), EXPERTD_REASON_RUNTIME_DIRECTORY);
}

TEST_F(LockFileTest, DoesNotFollowALinkInPlaceOfTheFile) {
  std::filesystem::create_directory(directory_);
  std::filesystem::create_symlink(root_ + "/elsewhere", directory_ + "/expertd.lock");
  EXPECT_EQ(LockFile::acquire(directory_).status().reason(), EXPERTD_REASON_RUNTIME_DIRECTORY);
  EXPECT_FALSE(std::filesystem::exists(root_ + "/elsewhere"));
}

class EnvironmentPlanTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const EnvironmentVariable& variable : required_environment()) {
      variables_[variable.name] = variable.value;
    }
  }
  EnvironmentPlan plan() const {
    return plan_environment([this](const std::string& name) {
      const auto found = variables_.find(name);
      return found == variables_.end() ? std::nullopt : std::optional<std::string>(found->second);
    });
  }

  std::map<std::string, std::string> variables_;
};

TEST_F(EnvironmentPlanTest, LeavesACompleteEnvironmentAlone) {
  EXPECT_FALSE(plan().reexecute);
  EXPECT_TRUE(plan().missing.empty());
  EXPECT_TRUE(plan().different.empty());
}

TEST_F(EnvironmentPlanTest, AsksForAnotherRunWhenOneIsMissing) {
  variables_.erase("CUDA_MODULE_LOADING");
  ASSERT_EQ(plan().missing.size(), 1U);
  EXPECT_EQ(plan().missing[0].name, "CUDA_MODULE_LOADING");
  EXPECT_EQ(plan().missing[0].value, "EAGER");
  EXPECT_TRUE(plan().reexecute);
}

TEST_F(EnvironmentPlanTest, NeverRunsItselfTwice) {
  variables_.erase("CUDA_MODULE_LOADING");
  variables_["EXPERTD_REEXECUTED"] = "1";
  EXPECT_FALSE(plan().reexecute);
  EXPECT_EQ(plan().missing.size(), 1U);
}

TEST_F(EnvironmentPlanTest, KeepsWhatTheOperatorSetAndTellsIt) {
  variables_["UCX_HANDLE_ERRORS"] = "bt";
  EXPECT_FALSE(plan().reexecute);
  ASSERT_EQ(plan().different.size(), 1U);
  EXPECT_EQ(plan().different[0].name, "UCX_HANDLE_ERRORS");
  EXPECT_EQ(plan().different[0].value, "bt");
}

TEST_F(EnvironmentPlanTest, TakesAnEmptyVariableAsSet) {
  EXPECT_EQ(variables_["UCX_ERROR_SIGNALS"], "");
  EXPECT_FALSE(plan().reexecute);
}

TEST(Reexecute, RunsTheExecutableWithTheVariablesAndTheGuard) {
  const EnvironmentPlan plan = {
      .missing = {{"CUDA_MODULE_LOADING", "EAGER"}, {"UCX_ERROR_SIGNALS", ""}}, .different = {}, .reexecute = true};
  std::string name = "sh";
  std::string flag = "-c";
  std::string script =
      "test \"$CUDA_MODULE_LOADING\" = EAGER && test \"${UCX_ERROR_SIGNALS-unset}\" = '' && "
      "test \"$EXPERTD_REEXECUTED\" = 1 && exit 7";
  std::array<char*, 4> argv{name.data(), flag.data(), script.data(), nullptr};
  EXPECT_EQ(in_child([&] { return reexecute(plan, argv.data(), "/bin/sh").is_ok() ? 1 : 2; }), 7);
}

TEST(Reexecute, ReportsAnExecutableThatCannotRun) {
  std::array<char*, 1> argv{nullptr};
  EXPECT_EQ(in_child([&] {
              const base::Status status = reexecute({}, argv.data(), "/nonexistent/expertd");
              return status.reason() == EXPERTD_REASON_SYSTEM ? 3 : 4;
            }),
            3);
}

}  // namespace
}  // namespace expertd::supervise
