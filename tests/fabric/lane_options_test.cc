// SPDX-License-Identifier: Apache-2.0
// What a lane may be told, and that everything else is refused by its name: UCX itself refuses nothing.
#include <gtest/gtest.h>

#include "daemon/fabric/lane_options.h"
#include "tests/fabric/fabric_pair.h"

namespace expertd::fabric_test {
namespace {

using fabric::LaneOptionList;

std::string value_of(const LaneOptionList& options, const std::string& variable) {
  const auto settings = fabric::lane_settings(fabric::LaneKind::kControl, options);
  EXPECT_TRUE(settings.is_ok()) << settings.status().message();
  if (settings.is_ok()) {
    for (const fabric::UcxSetting& setting : settings.value()) {
      if (setting.variable == variable) {
        return setting.value;
      }
    }
  }
  return "";
}

TEST(FabricLaneOptions, SayToUcxWhatTheyMean) {
  EXPECT_EQ(value_of({{"transports", "tcp,self"}}, "UCX_TLS"), "tcp,self");
  EXPECT_EQ(value_of({{"devices", "mlx5_0:1,eth0"}}, "UCX_NET_DEVICES"), "mlx5_0:1,eth0");
  EXPECT_EQ(value_of({{"transports", "rc"}, {"service_level", "3"}}, "UCX_IB_SL"), "3");
  EXPECT_EQ(value_of({{"traffic_class", "106"}}, "UCX_IB_TRAFFIC_CLASS"), "106");
  EXPECT_EQ(value_of({{"adaptive_routing", "try"}}, "UCX_IB_AR_ENABLE"), "try");
}

TEST(FabricLaneOptions, EveryLaneGetsWhatItsTransportsNeed) {
  EXPECT_EQ(value_of({{"transports", "tcp"}}, "UCX_TCP_TX_SEG_SIZE"), "64k");
  EXPECT_EQ(value_of({{"transports", "tcp"}}, "UCX_POSIX_ERROR_HANDLING"), "");
  EXPECT_EQ(value_of({{"transports", "posix"}}, "UCX_POSIX_ERROR_HANDLING"), "y");
  EXPECT_EQ(value_of({{"transports", "posix"}}, "UCX_TCP_TX_SEG_SIZE"), "");
  EXPECT_EQ(value_of({{"transports", "tcp"}, {"tcp_send_segment_bytes", "16384"}}, "UCX_TCP_TX_SEG_SIZE"), "16384");
}

TEST(FabricLaneOptions, RefuseWhatIsNotInTheTable) {
  const std::vector<std::pair<LaneOptionList, std::string>> cases = {
      {{{"trafic_class", "1"}}, "there is no such option"},
      {{{"", ""}}, "there is no such option"},
      {{{"transports", "tcpp"}}, "tcpp"},
      {{{"transports", "tcp,,self"}}, "list of names"},
      {{{"transports", ""}}, "list of names"},
      {{{"transports", "tcp self"}}, "list of names"},
      {{{"transports", "^tcp"}}, "list of names"},
      {{{"devices", "eth0;rm"}}, "list of names"},
      {{{"traffic_class", "256"}}, "from 0 to 255"},
      {{{"traffic_class", "-1"}}, "from 0 to 255"},
      {{{"traffic_class", "10x"}}, "from 0 to 255"},
      {{{"traffic_class", ""}}, "from 0 to 255"},
      {{{"service_level", "99999999999999999999999"}}, "from 0 to 15"},
      {{{"adaptive_routing", "maybe"}}, "one of"},
      {{{"adaptive_routing", ""}}, "one of"},
      {{{"adaptive_routing", "yes no"}}, "one of"},
      {{{"transports", "tcp"}, {"traffic_class", "3"}}, "means nothing"},
      {{{"transports", "rc"}, {"tcp_send_segment_bytes", "65536"}}, "means nothing"},
      {{{"traffic_class", "3"}, {"traffic_class", "3"}}, "given twice"},
  };
  for (const auto& [options, word] : cases) {
    const auto settings = fabric::lane_settings(fabric::LaneKind::kControl, options);
    ASSERT_FALSE(settings.is_ok()) << options.back().first << "=" << options.back().second;
    EXPECT_EQ(settings.status().reason(), EXPERTD_REASON_CONFIG_BAD_VALUE);
    EXPECT_NE(settings.status().message().find(word), std::string::npos) << settings.status().message();
    EXPECT_NE(settings.status().message().find("\"" + options.back().second + "\""), std::string::npos);
  }
}

TEST(FabricLaneOptions, ALaneWhoseDevicesAreNotThereSaysWhatWasAsked) {
  fabric::FabricOptions options = options_for("tcp", "nowhere");
  options.lanes[1] = {{"transports", "tcp"}, {"devices", "nosuchdevice0"}};
  Bell bell;
  const auto made = fabric::Fabric::create(options, &bell, &bell);
  ASSERT_FALSE(made.is_ok());
  EXPECT_EQ(made.status().reason(), EXPERTD_REASON_UNAVAILABLE) << made.status().message();
  EXPECT_NE(made.status().message().find("latency"), std::string::npos) << made.status().message();
}

}  // namespace
}  // namespace expertd::fabric_test
