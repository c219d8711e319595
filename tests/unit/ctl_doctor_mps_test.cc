// SPDX-License-Identifier: Apache-2.0
// Whom an MPS serves, found in a directory that looks like /proc.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "client/ctl/doctor_mps.h"
#include "tests/support/temp_dir.h"

namespace expertd::ctl {
namespace {

/// Words that end with a zero byte each.
std::string words(const std::vector<std::string>& all) {
  std::string text;
  for (const std::string& word : all) {
    text += word + '\0';
  }
  return text;
}

class DoctorMps : public testing::Test {
 protected:
  void add_process(const std::string& pid, const std::vector<std::string>& command,
                   const std::vector<std::string>& environment = {}) {
    std::filesystem::create_directory(proc_.file(pid));
    support::write_text(proc_.file(pid) + "/cmdline", words(command));
    support::write_text(proc_.file(pid) + "/environ", words(environment));
  }
  MpsView look() const { return look_for_mps(proc_.path(), "/run/nvidia-mps"); }

  const support::TempDir proc_;
};

TEST_F(DoctorMps, NamesTheOneUserOfAServerInOneSentence) {
  add_process("1", {"/sbin/init"});
  add_process("70", {"nvidia-cuda-mps-control", "-d"}, {"HOME=/", "CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps/"});
  add_process("71", {"/usr/bin/nvidia-cuda-mps-server"});
  const MpsView view = look();
  EXPECT_TRUE(view.control);
  EXPECT_FALSE(view.multi_user);
  ASSERT_TRUE(view.server_uid.has_value());
  EXPECT_EQ(*view.server_uid, ::getuid());
  const Check check = check_mps_users(view);
  EXPECT_EQ(check.level, Level::kWarn);
  EXPECT_EQ(check.finding, "the MPS server serves user " + std::to_string(::getuid()) +
                               " alone: processes of other users hang in their first CUDA call until its last client "
                               "has ended");
  EXPECT_NE(check.remedy.find("-multiuser-server"), std::string::npos);
}

TEST_F(DoctorMps, WithoutAServerYetServesOneUserAtATime) {
  add_process("70", {"/usr/bin/nvidia-cuda-mps-control", "-d"});
  EXPECT_NE(check_mps_users(look()).finding.find("one user at a time"), std::string::npos);
}

TEST_F(DoctorMps, StartedForManyUsersServesAll) {
  for (const char* flag : {"-multiuser-server", "--multiuser"}) {
    add_process("70", {"/usr/bin/nvidia-cuda-mps-control", "-d", flag});
    const Check check = check_mps_users(look());
    EXPECT_EQ(check.level, Level::kOk) << flag;
    EXPECT_EQ(check.finding, "the MPS server serves all users") << flag;
  }
}

TEST_F(DoctorMps, OfAnotherDirectoryIsNotThisOne) {
  add_process("70", {"nvidia-cuda-mps-control", "-d"}, {"CUDA_MPS_PIPE_DIRECTORY=/elsewhere"});
  add_process("80", {"nvidia-cuda-mps-control", "-d"}, {"HOME=/"});
  EXPECT_FALSE(look().control);
  EXPECT_NE(check_mps_users(look()).finding.find("not known"), std::string::npos);
  add_process("90", {"nvidia-cuda-mps-control", "-multiuser-server"}, {"CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps"});
  EXPECT_TRUE(look().multi_user);
}

TEST_F(DoctorMps, ThatCannotBeToldApartIsNotKnown) {
  add_process("70", {"nvidia-cuda-mps-control", "-d", "-multiuser-server"});
  add_process("71", {"nvidia-cuda-mps-control", "-d"});
  EXPECT_FALSE(look().control);
  EXPECT_FALSE(look_for_mps(proc_.file("none"), "/tmp/nvidia-mps").control);
}

}  // namespace
}  // namespace expertd::ctl
