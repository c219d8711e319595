// SPDX-License-Identifier: Apache-2.0
// Label gpu. Layouts of a session on a GPU are kernels of the client library: every result is that of the reference,
// the daemon hears of none, and one takes microseconds of the caller's stream.
#include "tests/device/process_fixture.h"

namespace expertd::device_test {
namespace {

class ProcessLayout : public ProcessTest {
 protected:
  ProcessLayout() : ProcessTest(1, seconds(90)) {}
};

TEST_F(ProcessLayout, EqualsTheReferenceWithoutTheDaemon) {
  constexpr int kCases = 150;
  ASSERT_TRUE(start_daemon());
  const auto client = make_client();
  expect_ok(*client, "attach " + daemon_->attach_socket() + " " + device(0) + " layout");
  const std::string answer = expect_ok(*client, "layout " + std::to_string(kCases), seconds(60));
  if (machine().host) {
    EXPECT_EQ(number_in(answer, "local"), 0) << "host devices have no kernels";
    return;
  }
  EXPECT_GE(number_in(answer, "local"), kCases) << "the daemon was asked";
  figure("layout of 4096 tokens, top 8 of 256, us on the stream",
         {{"of a hundred", {number_in(answer, "many_us")}}, {"alone", {number_in(answer, "alone_us")}}});
}

TEST_F(ProcessLayout, OfTheSecondGpu) {
  if (machine().uuids.size() < 2) {
    GTEST_SKIP() << "needs 2 GPUs, there are " << machine().uuids.size();
  }
  ASSERT_TRUE(start_daemon());
  const auto client = make_client();
  expect_ok(*client, "attach " + daemon_->attach_socket() + " " + device(1) + " layout");
  expect_ok(*client, "layout 20", seconds(60));
}

}  // namespace
}  // namespace expertd::device_test
