// SPDX-License-Identifier: Apache-2.0
// Label gpu. A group whose second rank belongs to another user than the daemon and the first rank: attaching, memory
// and verified operations, as in a node that several users share.
//
// EXPERTD_TEST_MPS_USERS=all: the MPS that the runner started serves all users. Another MPS serves one, and a process
// of a second user would hang in its first CUDA call.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

constexpr uint32_t kNobody = 65534;

class ProcessUser : public ProcessTest {
 protected:
  ProcessUser() : ProcessTest(2, seconds(90)) {}
};

bool serves_all_users() {
  const char* const said = std::getenv("EXPERTD_TEST_MPS_USERS");
  return said != nullptr && std::string(said) == "all";
}

TEST_F(ProcessUser, OfAnotherUidAttachesJoinsAndHasVerifiedOperations) {
  if (::geteuid() != 0) {
    GTEST_SKIP() << "only root can start a process of another user";
  }
  if (machine().mps_promised && !serves_all_users()) {
    GTEST_SKIP() << "the MPS server serves one user";
  }
  ASSERT_TRUE(start_daemon({"--control-socket-mode=0666"}));
  // Only root may look into a directory of the tests.
  std::filesystem::permissions(daemon_->directory(), std::filesystem::perms::others_exec,
                               std::filesystem::perm_options::add);
  const auto own = make_client();
  const auto other = make_client();
  const std::string became = expect_ok(*other, "become " + std::to_string(kNobody));
  ASSERT_EQ(number_in(became, "uid"), kNobody);
  const uint64_t begin = support::monotonic_ns();
  ASSERT_TRUE(attach(*own, 0, "root"));
  ASSERT_TRUE(attach(*other, 1, "nobody", "window"));
  bool good = true;
  for (const char* mode : {"normal", "ll"}) {
    good = good && all_ok({own.get(), other.get()}, std::string("join users-") + mode + " # 2 " + mode) &&
           all_ok({own.get(), other.get()}, "rounds 20 4") && all_ok({own.get(), other.get()}, "leave");
  }
  ASSERT_TRUE(good);
  std::printf("figure second user, %s: window memory, 160 verified rounds after %.0f ms\n",
              machine().mps ? "MPS" : "no MPS", support::elapsed_ms(begin));
  // Memory of its own, as an IPC handle and as a descriptor.
  for (const char* kind : {"malloc", "vmm"}) {
    if (machine().host) {
      break;
    }
    const bool placed = all_ok({own.get(), other.get()}, std::string("memory ") + kind) &&
                        all_ok({own.get(), other.get()}, std::string("join users-") + kind + " # 2 normal") &&
                        all_ok({own.get(), other.get()}, "rounds 10 4") && all_ok({own.get(), other.get()}, "leave");
    std::printf("figure second user, %s memory: %s\n", kind, placed ? "40 verified rounds" : "FAILED");
  }
}

}  // namespace
}  // namespace expertd::device_test
