// SPDX-License-Identifier: Apache-2.0
// expertctl mesh between two daemons whose throughput lane has two devices, each a link of this machine.
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/daemon_cluster.h"

namespace expertd::support {
namespace {

using nlohmann::json;
using std::chrono::seconds;

RunResult mesh(const DaemonProcess& asked) {
  return run_program("expertctl", {"mesh", "--socket", asked.control_socket(), "--json"}, seconds(60));
}

/// A link of this machine beside the loopback that is up; empty: there is none.
std::string second_device() {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/class/net", error)) {
    const std::string name = entry.path().filename();
    if (name != "lo" && read_text(entry.path() / "operstate") == "up\n") {
      return name;
    }
  }
  return {};
}

TEST(NodesMeshRails, EachDeviceOfALaneHasFiguresAndMetrics) {
  const std::string second = second_device();
  if (second.empty()) {
    GTEST_SKIP()
        << "no link beside the loopback is up. NOT RUN: a lane with two devices between daemons. FabricRailsOf "
           "has several rails over one device";
  }
  DaemonCluster cluster(2, 1, {"--fabric-throughput-devices=lo," + second});
  ASSERT_TRUE(cluster.start());
  json all;
  ASSERT_TRUE(wait_until(
      [&] {
        all = json::parse(mesh(cluster.node(0)).output, nullptr, false);
        return all["nodes"].size() == 2;
      },
      seconds(20)));
  ASSERT_EQ(all["pairs"].size(), 2U) << all;
  for (const json& pair : all["pairs"]) {
    ASSERT_EQ(pair["lanes"].size(), 3U) << pair;
    std::map<std::string, std::vector<std::string>> devices;
    for (const json& lane : pair["lanes"]) {
      devices[lane["lane"]].push_back(lane["device"]);
      EXPECT_GT(lane["latency_p50_ns"], 0) << pair;
      EXPECT_GT(lane["bytes_per_second"], 0) << pair;
    }
    EXPECT_EQ(devices["latency"], (std::vector<std::string>{""})) << pair;
    EXPECT_EQ(devices["throughput"], (std::vector<std::string>{"lo", second})) << pair;
  }
  const std::string page = cluster.node(1).scrape();
  for (const std::string& start : std::vector<std::string>{
           R"(expertd_fabric_mesh_latency_seconds{node="n1",lane="latency",device="",quantile="0.5"} )",
           R"(expertd_fabric_mesh_latency_seconds{node="n1",lane="throughput",device=")" + second +
               R"(",quantile="0.99"} )",
           R"(expertd_fabric_mesh_bytes_per_second{node="n1",lane="throughput",device="lo"} )",
       }) {
    EXPECT_NE(page.find(start), std::string::npos) << start;
  }
}

}  // namespace
}  // namespace expertd::support
