// SPDX-License-Identifier: Apache-2.0
// The processes of tests and their watchdog: tests that cannot hang depend on them.
#include "tests/support/child_process.h"

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include "tests/support/case_watchdog.h"

namespace expertd::support {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

pid_t shell(const std::string& script, std::vector<std::string> environment = {}, bool own_pid_namespace = false) {
  ChildOptions options;
  options.arguments = {"/bin/sh", "-c", script};
  options.environment = std::move(environment);
  options.own_pid_namespace = own_pid_namespace;
  return start_child(options);
}

TEST(ChildProcess, EndsWithItsStatusAndTheEnvironmentItWasGiven) {
  int status = 0;
  ASSERT_TRUE(reap_child(shell("exit $ANSWER", {"ANSWER=42"}), &status, seconds(10)));
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 42);
}

TEST(ChildProcess, IsNotWaitedForBeyondTheLimit) {
  const pid_t child = shell("exec sleep 100");
  int status = 0;
  EXPECT_FALSE(reap_child(child, &status, milliseconds(20)));
  ::kill(child, SIGKILL);
  EXPECT_TRUE(reap_child(child, &status, seconds(10)));
  EXPECT_TRUE(WIFSIGNALED(status));
}

TEST(ChildProcess, IsProcessOneOfANamespaceOfItsOwn) {
  const std::string problem = pid_namespace_problem();
  if (!problem.empty()) {
    GTEST_SKIP() << problem;
  }
  int status = 0;
  // Its /proc has to be that of the namespace too.
  ASSERT_TRUE(
      reap_child(shell("[ $$ = 1 ] && [ -d /proc/self ] && [ -e /proc/1/exe ]", {}, true), &status, seconds(10)));
  EXPECT_EQ(status, 0);
}

TEST(CaseWatchdog, DoesNothingInTime) {
  const CaseWatchdog watchdog("quick", seconds(60));
}

void wait_for_a_sleeper() {
  const CaseWatchdog watchdog("slow", milliseconds(50));
  const pid_t child = shell("exec sleep 100");
  note_wait("a process that sleeps");
  int status = 0;
  ASSERT_TRUE(reap_child(child, &status, seconds(10)));
  ASSERT_TRUE(WIFSIGNALED(status));
  ASSERT_EQ(shell("exit 0"), -1) << "a case that goes on must not start more";
}

TEST(CaseWatchdog, KillsTheChildrenAndSaysWhatWasWaitedFor) {
  EXPECT_NONFATAL_FAILURE_ON_ALL_THREADS(wait_for_a_sleeper(),
                                         "slow was not done after 50 ms; it waited for a process that sleeps");
  allow_children();
}

}  // namespace
}  // namespace expertd::support
