// SPDX-License-Identifier: Apache-2.0
// expertctl mesh over three real daemons on loopback, one of which is then stopped.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/support/daemon_cluster.h"

namespace expertd::support {
namespace {

using nlohmann::json;
using std::chrono::seconds;

RunResult mesh(const DaemonProcess& asked, const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {"mesh", "--socket", asked.control_socket()};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return run_program("expertctl", arguments, seconds(60));
}

class NodesMesh : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(cluster_.start());
    // Who has not said hello yet is no part of it.
    ASSERT_TRUE(wait_until([this] { return measured({"--json"})["nodes"].size() == 3; }, seconds(20)));
  }
  json measured(const std::vector<std::string>& more) {
    return json::parse(mesh(cluster_.node(1), more).output, nullptr, false);
  }

  DaemonCluster cluster_{3, 1};
};

TEST_F(NodesMesh, EveryPairHasFiguresAndAStoppedNodeIsNamed) {
  const std::string svg = cluster_.node(0).directory() + "/mesh.svg";
  const RunResult shown = mesh(cluster_.node(0), {"--svg", svg});
  EXPECT_EQ(shown.exit_code, 0) << shown.output << shown.error;
  EXPECT_NE(shown.error.find("6/6"), std::string::npos) << "progress: " << shown.error;
  EXPECT_NE(shown.output.find("lane latency: one way"), std::string::npos) << shown.output;
  EXPECT_NE(shown.output.find("lane throughput: gigabytes"), std::string::npos) << shown.output;
  const std::string picture = read_text(svg);
  EXPECT_EQ(picture.rfind("<svg", 0), 0U);
  EXPECT_NE(picture.find("n1 -&gt; n3"), std::string::npos);

  // Node 1 only passes the wish on between nodes 0 and 2.
  const json all = measured({"--json"});
  ASSERT_EQ(all["pairs"].size(), 6U) << all;
  EXPECT_EQ(all["nodes"], (std::vector<std::string>{"n1", "n2", "n3"}));
  for (const json& pair : all["pairs"]) {
    ASSERT_EQ(pair["lanes"].size(), 2U) << pair;
    for (const json& lane : pair["lanes"]) {
      EXPECT_GT(lane["latency_p50_ns"], 0) << pair;
      EXPECT_GE(lane["latency_p99_ns"], lane["latency_p50_ns"]) << pair;
      EXPECT_GT(lane["bytes_per_second"], 0) << pair;
    }
  }

  cluster_.node(2).pause();
  const RunResult partly = mesh(cluster_.node(0), {"--json", "--pair-timeout", "500ms"});
  cluster_.node(2).resume();
  EXPECT_EQ(partly.exit_code, 1) << partly.output << partly.error;
  const json some = json::parse(partly.output, nullptr, false);
  ASSERT_EQ(some["pairs"].size(), 6U) << some;
  for (const json& pair : some["pairs"]) {
    const bool stopped = pair["source"] == "n3" || pair["destination"] == "n3";
    EXPECT_EQ(pair.contains("error"), stopped) << pair;
    if (stopped) {
      EXPECT_NE(pair["error"].get<std::string>().find("n3"), std::string::npos) << pair;
      EXPECT_NE(pair["reason"], "");
    }
  }
  EXPECT_EQ(some["suspect"], "n3") << some;
}

TEST(NodesOff, ThereIsNothingToMeasure) {
  DaemonProcess daemon(1);
  ASSERT_TRUE(daemon.start());
  const RunResult result = mesh(daemon, {});
  EXPECT_NE(result.exit_code, 0);
  EXPECT_NE(result.error.find("fabric.enabled"), std::string::npos) << result.error;
}

}  // namespace
}  // namespace expertd::support
