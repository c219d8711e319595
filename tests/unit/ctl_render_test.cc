// SPDX-License-Identifier: Apache-2.0
// What `expertctl status` shows: of the memory of devices, where what is not known is never shown as zero, and of
// groups what their dispatches carry.
#include "client/ctl/render.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

namespace expertd::ctl {
namespace {

constexpr uint64_t kMiB = 1ULL << 20;

v1::GetStatusResponse status_of(const std::string& kind, const std::string& source) {
  v1::GetStatusResponse status;
  v1::DeviceStatus& device = *status.add_devices();
  device.set_kind(kind);
  device.set_context_source(source);
  device.set_context_bytes(source.empty() ? 0 : 500 * kMiB);
  device.set_table_bytes(kind == "host" ? 0 : 6 * kMiB);
  device.set_window_bytes(32 * kMiB);
  device.set_registered_bytes(64 * kMiB);
  device.set_quarantined_bytes(8 * kMiB);
  return status;
}

/// The cells of the one row of the table whose first line has `column`.
std::string row_below(const std::string& text, const std::string& column) {
  std::istringstream lines(text.substr(text.rfind('\n', text.find(column)) + 1));
  std::string row;
  std::getline(lines, row);
  std::getline(lines, row);
  std::istringstream words(row);
  std::string out;
  for (std::string word; words >> word;) {
    out += (out.empty() ? "" : " ") + word;
  }
  return out;
}

TEST(RenderMemory, ShowsWhatTheDaemonHoldsOfAGpu) {
  const v1::GetStatusResponse status = status_of("cuda", "process");
  EXPECT_EQ(row_below(status_text(status), "HELD"), "0 506.0 MiB 500.0 MiB 6.0 MiB 32.0 MiB 64.0 MiB 8.0 MiB");
  const nlohmann::json device = status_json(status)["devices"][0];
  EXPECT_EQ(device["held_bytes"], 506 * kMiB);
  EXPECT_EQ(device["context_bytes"], 500 * kMiB);
  EXPECT_EQ(device["context_source"], "process");
  EXPECT_EQ(device["table_bytes"], 6 * kMiB);
  EXPECT_EQ(device["window_bytes"], 32 * kMiB);
  EXPECT_EQ(device["registered_bytes"], 64 * kMiB);
  EXPECT_EQ(device["quarantined_bytes"], 8 * kMiB);
}

TEST(RenderMemory, MarksAContextThatOthersMayHavePartIn) {
  const v1::GetStatusResponse status = status_of("cuda", "device");
  EXPECT_NE(status_text(status).find("~500.0 MiB"), std::string::npos) << status_text(status);
  EXPECT_EQ(status_json(status)["devices"][0]["context_source"], "device");
}

TEST(RenderMemory, SaysThatAContextIsNotKnown) {
  const v1::GetStatusResponse status = status_of("cuda", "");
  EXPECT_EQ(row_below(status_text(status), "HELD"), "0 unknown unknown 6.0 MiB 32.0 MiB 64.0 MiB 8.0 MiB");
  const nlohmann::json device = status_json(status)["devices"][0];
  EXPECT_TRUE(device["held_bytes"].is_null() && device["context_bytes"].is_null());
  EXPECT_TRUE(device["context_source"].is_null());
}

TEST(RenderMemory, OfAHostDeviceHasNoContext) {
  const v1::GetStatusResponse status = status_of("host", "");
  EXPECT_EQ(row_below(status_text(status), "HELD"), "0 0 B - 0 B 32.0 MiB 64.0 MiB 8.0 MiB");
  EXPECT_EQ(status_json(status)["devices"][0]["held_bytes"], 0);
  EXPECT_TRUE(status_json(status)["devices"][0]["context_bytes"].is_null());
}

v1::GetStatusResponse status_of_group(uint32_t dispatch_dtypes) {
  v1::GetStatusResponse status;
  v1::GroupStatus& group = *status.add_groups();
  group.set_name("decode");
  group.set_mode("auto");
  group.set_max_tokens(128);
  group.set_dispatch_dtypes(dispatch_dtypes);
  return status;
}

TEST(RenderGroup, ShowsRanksOfEveryWord) {
  v1::GetStatusResponse status = status_of_group(5);
  v1::GroupStatus& group = *status.mutable_groups(0);
  group.set_joined(0);
  group.add_joined_more(0xff);
  group.set_lost(2);
  group.add_lost_more(0);
  group.add_lost_more(1);
  group.set_excluded(uint64_t{1} << 63);
  group.add_excluded_more(3);
  const std::string row = row_below(status_text(status), "EXCLUDED");
  EXPECT_NE(row.find("64-71 1,128 63-65"), std::string::npos) << row;
  const nlohmann::json shown = status_json(status)["groups"][0];
  EXPECT_EQ(shown["excluded"], nlohmann::json({63, 64, 65}));
  EXPECT_EQ(shown["lost"], nlohmann::json({1, 128}));
  EXPECT_EQ(shown["excluded_mask"], uint64_t{1} << 63);
  EXPECT_EQ(shown["joined"][7], 71);
}

TEST(RenderGroup, NamesTheDtypesThatItCarries) {
  EXPECT_EQ(row_below(status_text(status_of_group(5)), "DTYPES").substr(0, 33), "decode auto 0 0 0 0 128 bf16,fp8 ");
  EXPECT_EQ(status_json(status_of_group(5))["groups"][0]["dispatch_dtypes"], nlohmann::json({"bf16", "fp8"}));
  EXPECT_EQ(status_json(status_of_group(2))["groups"][0]["dispatch_dtypes"], nlohmann::json({"bytes"}));
}

TEST(RenderGroup, TellsWhatExecutesItsOperations) {
  v1::GetStatusResponse status = status_of_group(0);
  EXPECT_NE(row_below(status_text(status), "EXECUTOR").find(" any - "), std::string::npos) << "an older daemon";
  status.mutable_groups(0)->set_executor("ll sm, split copy_engine");
  EXPECT_NE(row_below(status_text(status), "EXECUTOR").find(" any ll sm, split copy_engine "), std::string::npos);
  EXPECT_EQ(status_json(status)["groups"][0]["executor"], "ll sm, split copy_engine");
}

TEST(RenderDevice, CountsStreamsOfSessionsAndThoseOfLanes) {
  v1::GetStatusResponse status;
  v1::DeviceStatus& device = *status.add_devices();
  device.set_armed_streams(3);
  device.set_armed_streams_max(24);
  EXPECT_NE(row_below(status_text(status), "STREAMS").find(" 3/24 - "), std::string::npos) << "an older daemon";
  device.set_lane_streams(4);
  device.set_parked_streams_max(28);
  EXPECT_NE(row_below(status_text(status), "PARKED").find(" 3/24 7/28 "), std::string::npos) << status_text(status);
  EXPECT_EQ(status_json(status)["devices"][0]["lane_streams"], 4);
}

TEST(RenderGroup, SaysThatItCarriesAny) {
  EXPECT_EQ(row_below(status_text(status_of_group(0)), "DTYPES").substr(0, 28), "decode auto 0 0 0 0 128 any ");
  EXPECT_EQ(status_json(status_of_group(0))["groups"][0]["dispatch_dtypes"], nlohmann::json({"any"}));
}

TEST(RenderGroup, TellsTheThresholdOfADynamicOneAndTheLanesForCaptures) {
  v1::GetStatusResponse status = status_of_group(0);
  status.mutable_groups(0)->set_capture_lanes(2);
  EXPECT_EQ(row_below(status_text(status), "DTYPES").substr(0, 23), "decode auto, capture 2 ");
  status.mutable_groups(0)->set_dynamic_ll_tokens(64);
  EXPECT_EQ(row_below(status_text(status), "DTYPES").substr(0, 39), "decode auto, dynamic ll<=64, capture 2 ");
  EXPECT_EQ(status_json(status)["groups"][0]["capture_lanes"], 2);
  EXPECT_EQ(status_json(status_of_group(0))["groups"][0]["capture_lanes"], 0);
}

}  // namespace
}  // namespace expertd::ctl
