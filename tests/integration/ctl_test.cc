// SPDX-License-Identifier: Apache-2.0
// expertctl as a program beside a real daemon, and beside none.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>

#include "tests/support/daemon_process.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {
namespace {

using nlohmann::json;
using std::chrono::seconds;

constexpr int kExitUsage = 64;
constexpr int kExitUnavailable = 69;

RunResult ctl(const std::vector<std::string>& arguments) {
  return run_program("expertctl", arguments, seconds(60));
}

json parsed(const RunResult& result) {
  return json::parse(result.output, nullptr, false);
}

class Ctl : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }
  DaemonProcess daemon_{2};
};

TEST_F(Ctl, BenchRunsBothModesAndVerifiesThem) {
  const RunResult result = ctl({"bench", "--socket", daemon_.attach_socket(), "--quick", "--json"});
  EXPECT_EQ(result.exit_code, 0) << result.error;
  const json document = parsed(result);
  ASSERT_TRUE(document.is_object()) << result.output;
  EXPECT_GT(document["verified"], 0);
  std::set<std::string> modes;
  for (const json& row : document["rows"]) {
    modes.insert(row["mode"]);
    EXPECT_GE(row["p99_us"], row["p50_us"]) << row;
    EXPECT_EQ(row["executor"], "host") << row;
    EXPECT_EQ(row["sms"], 0) << row;
    EXPECT_GE(row["logical_gb_per_s"], row["link_gb_per_s"]) << row;
  }
  EXPECT_EQ(modes, (std::set<std::string>{"inference", "normal"}));
}

TEST_F(Ctl, BenchPlansWithoutTakingAnything) {
  const RunResult result = ctl({"--json", "bench", "--socket", daemon_.attach_socket(), "--quick", "--plan"});
  EXPECT_EQ(result.exit_code, 0) << result.error;
  const json plans = parsed(result);
  ASSERT_EQ(plans.size(), 2U) << result.output;
  EXPECT_EQ(plans[0]["window_bytes"], 0) << "normal mode has no window";
  EXPECT_GT(plans[1]["window_bytes"], 0);
  for (const json& plan : plans) {
    EXPECT_GT(plan["table_bytes"], 0);
    EXPECT_GT(plan["handles"], 0);
    EXPECT_GE(plan["handle_bytes"], plan["handles"]);
    EXPECT_EQ(plan["pinned_bytes"], 0) << "host devices reach each other";
  }
  EXPECT_EQ(daemon_.metric("expertd_pool_bytes{gpu=\"host\","), 0);
}

TEST_F(Ctl, StatusShowsTheMemoryOfAttachedSessions) {
  const ClientSession session(daemon_.attach_socket(), "host:1");
  expertd_buffer_t* window = nullptr;
  void* own = nullptr;
  ASSERT_TRUE(outcome_of(expertd_window_create(session.get(), 1 << 20, &window)).ok());
  ASSERT_TRUE(outcome_of(expertd_alloc(session.get(), 1 << 21, &own)).ok());
  const json status = parsed(ctl({"status", "--socket", daemon_.control_socket(), "--json"}));
  ASSERT_TRUE(status.is_object());
  EXPECT_EQ(status["devices"][1]["window_bytes"], 1 << 20);
  EXPECT_GE(status["devices"][1]["registered_bytes"], 1 << 21);
  EXPECT_EQ(status["devices"][0]["window_bytes"], 0);
}

TEST(CtlAlone, EveryVerbSaysThatNoDaemonAnswers) {
  const TempDir directory;
  const std::string socket = directory.file("none.sock");
  for (const char* verb : {"status", "health", "sessions", "top", "drain", "bench"}) {
    const RunResult text = ctl({verb, "--socket", socket});
    EXPECT_EQ(text.exit_code, kExitUnavailable) << verb << text.error;
    EXPECT_NE(text.error.find(socket), std::string::npos) << verb << text.error;
    const RunResult machine = ctl({verb, "--socket", socket, "--json"});
    EXPECT_EQ(machine.exit_code, kExitUnavailable) << verb;
    EXPECT_EQ(parsed(machine).value("exit_code", 0), kExitUnavailable) << verb << machine.output;
  }
  EXPECT_EQ(ctl({"bench", "--devices", ","}).exit_code, kExitUsage);
}

}  // namespace
}  // namespace expertd::support
