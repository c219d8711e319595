// SPDX-License-Identifier: Apache-2.0
// The attach socket when the daemon cannot take more from its clients.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "daemon/transport/attach_listener.h"
#include "tests/support/raw_client.h"
#include "tests/support/temp_dir.h"

namespace expertd::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

/// Refuses every client but those of "host:7", and says what the test wants about descriptors that wait to be closed.
class FakeAttachApi final : public session::AttachApi {
 public:
  base::Result<session::AttachGrant> attach(const session::AttachRequest& request) override {
    if (request.device != "host:7") {
      return base::Status(EXPERTD_REASON_NO_SUCH_DEVICE);
    }
    session::AttachGrant grant;
    grant.session = base::SessionId{7};
    grant.ring_fd = STDIN_FILENO;
    grant.wake_fd = STDIN_FILENO;
    return grant;
  }
  void session_ended(base::SessionId /*session*/, const std::string& /*cause*/) override { ++ended; }
  base::Result<uint64_t> put_fd(base::SessionId /*session*/, base::ScopedFd /*fd*/) override { return uint64_t{1}; }
  base::Result<session::TakenFd> take_fd(base::SessionId /*session*/, uint64_t /*token*/) override {
    return base::Status(EXPERTD_REASON_NO_SUCH_TOKEN);
  }
  void discard_fd(base::ScopedFd /*fd*/) override { ++discarded; }
  bool discards_full() const override { return full; }

  std::atomic<bool> full{false};
  std::atomic<uint32_t> discarded{0};
  std::atomic<uint32_t> ended{0};
};

class AttachListenerTest : public testing::Test {
 protected:
  AttachListenerTest() {
    transport::ListenerOptions options;
    options.path = directory_.file("attach.sock");
    listener_ =
        std::move(transport::AttachListener::create(
                      options, &sessions_, [](base::ScopedFd, base::SessionId, uint32_t) { return base::Status::ok(); },
                      [](base::SessionId) {}))
            .value();
  }
  bool connect_and_greet(support::RawClient* client, const char* device = "host:0") {
    const expertd_attach_hello hello = support::make_hello(device);
    return client->connect(directory_.file("attach.sock")) && client->send(&hello, sizeof(hello));
  }

  support::TempDir directory_;
  FakeAttachApi sessions_;
  std::unique_ptr<transport::AttachListener> listener_;
};

TEST_F(AttachListenerTest, TakesNothingWhileTooManyDescriptorsWaitToBeClosed) {
  sessions_.full = true;
  ASSERT_TRUE(listener_->start().is_ok());
  support::RawClient client;
  ASSERT_TRUE(connect_and_greet(&client));
  EXPECT_FALSE(client.welcome(milliseconds(100)).has_value());
  sessions_.full = false;
  const auto answer = client.welcome(seconds(20));
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->reason, static_cast<uint32_t>(EXPERTD_REASON_NO_SUCH_DEVICE));
  EXPECT_EQ(sessions_.discarded, 0U);
}

TEST_F(AttachListenerTest, DiscardsEveryDescriptorThatItDoesNotKeep) {
  ASSERT_TRUE(listener_->start().is_ok());
  support::RawClient client;
  ASSERT_TRUE(client.connect(directory_.file("attach.sock")));
  const expertd_attach_hello hello = support::make_hello("host:0");
  ASSERT_TRUE(client.send_many(&hello, sizeof(hello), std::vector<int>(253, STDIN_FILENO)));
  const auto answer = client.welcome(seconds(20));
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->reason, static_cast<uint32_t>(EXPERTD_REASON_BAD_MESSAGE));
  EXPECT_TRUE(client.closed_by_peer(seconds(20)));
  EXPECT_EQ(sessions_.discarded, 253U);
}

TEST_F(AttachListenerTest, HangsUpWithoutEndingASessionAndTakesNobodyMore) {
  ASSERT_TRUE(listener_->start().is_ok());
  support::RawClient client;
  ASSERT_TRUE(connect_and_greet(&client, "host:7"));
  const auto welcome = client.welcome(seconds(20));
  ASSERT_TRUE(welcome.has_value());
  EXPECT_EQ(welcome->reason, 0U);
  listener_->hang_up();
  EXPECT_TRUE(client.closed_by_peer(seconds(20)));
  support::RawClient late;
  EXPECT_FALSE(late.connect(directory_.file("attach.sock")));
  listener_->stop();
  EXPECT_EQ(sessions_.ended, 0U) << "the peers of the session would take it for lost";
}

}  // namespace
}  // namespace expertd::test
