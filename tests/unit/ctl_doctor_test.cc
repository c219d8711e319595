// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/doctor.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace expertd::ctl {
namespace {

TEST(CtlDoctor, OneLinePerCheckAndASum) {
  const Checks checks = {{"kernel", Level::kOk, "Linux 6.1", "", ""},
                         {"rdma", Level::kWarn, "no port", "load it", "one node"},
                         {"daemon", Level::kFail, "does not answer", "start it", ""}};
  EXPECT_EQ(doctor_text(checks),
            "ok    kernel            Linux 6.1\n"
            "warn  rdma              no port; do: load it; without: one node\n"
            "fail  daemon            does not answer; do: start it\n"
            "1 ok, 1 warn, 1 fail\n");
  const nlohmann::json json = doctor_json(checks);
  EXPECT_EQ(json["ok"], false);
  EXPECT_EQ(json["checks"][1]["level"], "warn");
  EXPECT_EQ(json["checks"][1]["without"], "one node");
  EXPECT_TRUE(any_failed(checks));
  EXPECT_FALSE(any_failed({checks[0], checks[1]}));
}

TEST(CtlDoctor, KernelVersions) {
  EXPECT_EQ(kernel_version("6.1.0-18-amd64"), (std::pair(6, 1)));
  EXPECT_EQ(kernel_version("5.15"), (std::pair(5, 15)));
  EXPECT_EQ(kernel_version("odd"), (std::pair(0, 0)));
}

TEST(CtlDoctor, TransportsOfUcxInfo) {
  const std::string text =
      "# Memory domain: tcp\n#      Transport: tcp\n#         Device: eth0\n"
      "#      Transport: posix\n#\n#      Transport: tcp\n# Transport:\n#      Transport: rc_mlx5\n";
  EXPECT_EQ(ucx_transports(text), (std::vector<std::string>{"tcp", "posix", "rc_mlx5"}));
  EXPECT_TRUE(ucx_transports("").empty());
}

TEST(CtlDoctor, GpuUuids) {
  const unsigned char bytes[16] = {0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0, 1, 2, 3, 4, 5, 6, 0xff};
  EXPECT_EQ(gpu_uuid_text(bytes), "GPU-01234567-89ab-cdef-0001-0203040506ff");
}

// Whatever the machine is: every check says something, failures say what to do, names are one word.
TEST(CtlDoctor, ChecksOfThisMachineAreComplete) {
  Checks all = check_system();
  for (const Checks& more :
       {check_daemon("/nonexistent/expertd/control.sock", 1'000'000'000), check_gpus(), check_fabric()}) {
    all.insert(all.end(), more.begin(), more.end());
  }
  for (const Check& check : all) {
    EXPECT_FALSE(check.finding.empty()) << check.name;
    EXPECT_EQ(check.name.find_first_not_of("abcdefghijklmnopqrstuvwxyz_"), std::string::npos) << check.name;
    EXPECT_EQ(check.finding.find('\n'), std::string::npos) << check.name;
    EXPECT_TRUE(check.level != Level::kFail || !check.remedy.empty()) << check.name;
  }
  EXPECT_TRUE(any_failed(all));  // the daemon is not there
}

}  // namespace
}  // namespace expertd::ctl
