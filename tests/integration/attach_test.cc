// SPDX-License-Identifier: Apache-2.0
// Attaching to a real daemon: what a client learns, and what is refused at the door.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>

#include "tests/support/daemon_process.h"
#include "tests/support/random_case.h"
#include "tests/support/rank_threads.h"
#include "tests/support/raw_client.h"

namespace expertd::support {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

/// One daemon with two host devices for all tests of this file.
class Attach : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(daemon_.start()); }

  double sessions() const { return daemon_.metric("expertd_sessions"); }
  bool sessions_become(double wanted) {
    return wait_until([&] { return sessions() == wanted; }, seconds(5));
  }
  std::optional<expertd_attach_welcome> answer_to(const void* bytes, size_t size) {
    RawClient client;
    EXPECT_TRUE(client.connect(daemon_.attach_socket()));
    EXPECT_TRUE(client.send(bytes, size));
    return client.welcome(seconds(5));
  }

  DaemonProcess daemon_;
};

TEST_F(Attach, TellsTheClientWhatItGot) {
  const ClientSession session(daemon_.attach_socket(), "host:1");
  ASSERT_TRUE(session.ok()) << describe(session.attached());
  const expertd_session_info_t info = session.info();
  EXPECT_GT(info.session_id, 0u);
  EXPECT_EQ(info.device_type, EXPERTD_HOST);
  EXPECT_STREQ(info.device, "host:1");
  EXPECT_EQ(info.mps_active, 0);
  EXPECT_EQ(info.ring_slots, 64u);
  EXPECT_EQ(info.handles_max, 512u);
  EXPECT_GT(info.generation, 0u);
  EXPECT_EQ(expertd_session_state(session.get()).reason, EXPERTD_REASON_NONE);
}

TEST_F(Attach, DetachingEndsTheSessionInTheDaemon) {
  ClientSession session(daemon_.attach_socket(), "host:0");
  ASSERT_TRUE(session.ok());
  EXPECT_TRUE(sessions_become(1));
  EXPECT_TRUE(session.detach().ok());
  EXPECT_TRUE(sessions_become(0));
  EXPECT_EQ(daemon_.metric("expertd_sessions_opened_total"), 1);
}

TEST_F(Attach, ServesSeveralSessionsOnOneDevice) {
  const ClientSession first(daemon_.attach_socket(), "host:0");
  const ClientSession second(daemon_.attach_socket(), "host:0");
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_NE(first.info().session_id, second.info().session_id);
  EXPECT_EQ(first.info().generation, second.info().generation);
}

TEST_F(Attach, RefusesADeviceItDoesNotServeAndNamesThoseItServes) {
  const ClientSession session(daemon_.attach_socket(), "host:7");
  EXPECT_EQ(session.attached().status.reason, EXPERTD_REASON_NO_SUCH_DEVICE);
  EXPECT_EQ(session.attached().status.code, EXPERTD_CODE_NOT_FOUND);
  EXPECT_NE(session.attached().message.find("host:7"), std::string::npos) << session.attached().message;
  EXPECT_NE(session.attached().message.find("host:0, host:1"), std::string::npos) << session.attached().message;
}

TEST_F(Attach, RefusesAMigInstance) {
  const expertd_attach_hello hello = make_hello("MIG-5f2b0d8e-0000-0000-0000-000000000000");
  const auto answer = answer_to(&hello, sizeof(hello));
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->type, static_cast<uint32_t>(EXPERTD_ATTACH_REFUSED));
  EXPECT_EQ(answer->reason, static_cast<uint32_t>(EXPERTD_REASON_MIG_UNSUPPORTED));
  const ClientSession session(daemon_.attach_socket(), hello.device);
  EXPECT_FALSE(session.ok());
  EXPECT_EQ(session.attached().status.reason, EXPERTD_REASON_MIG_UNSUPPORTED) << describe(session.attached());
}

TEST_F(Attach, RefusesAnotherProtocolVersionNamingBoth) {
  expertd_attach_hello hello = make_hello("host:0");
  hello.abi_major = 7;
  hello.abi_minor = 9;
  const auto answer = answer_to(&hello, sizeof(hello));
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->type, static_cast<uint32_t>(EXPERTD_ATTACH_REFUSED));
  EXPECT_EQ(answer->reason, static_cast<uint32_t>(EXPERTD_REASON_PROTOCOL_VERSION));
  EXPECT_EQ(answer->abi_major, EXPERTD_ABI_MAJOR);
  EXPECT_NE(std::string(answer->message).find("7.9"), std::string::npos) << answer->message;
  const std::string ours = std::to_string(EXPERTD_ABI_MAJOR) + "." + std::to_string(EXPERTD_ABI_MINOR);
  EXPECT_NE(std::string(answer->message).find(ours), std::string::npos) << answer->message;
}

TEST_F(Attach, RefusesRandomBytesInPlaceOfAHello) {
  Random random(11);
  for (int round = 0; round < 200; ++round) {
    std::vector<uint8_t> bytes(round % 2 == 0 ? sizeof(expertd_attach_hello) : 1 + random.below(1500));
    for (uint8_t& byte : bytes) {
      byte = static_cast<uint8_t>(random.next());
    }
    const auto answer = answer_to(bytes.data(), bytes.size());
    ASSERT_TRUE(answer.has_value()) << "round " << round;
    ASSERT_EQ(answer->type, static_cast<uint32_t>(EXPERTD_ATTACH_REFUSED));
    ASSERT_EQ(answer->reason, static_cast<uint32_t>(EXPERTD_REASON_BAD_MESSAGE));
  }
  EXPECT_TRUE(ClientSession(daemon_.attach_socket(), "host:0").ok());
}

TEST_F(Attach, HelloMutationsNeverStopTheDaemon) {
  Random random(12);
  for (int round = 0; round < 200; ++round) {
    expertd_attach_hello hello = make_hello("host:0");
    auto* bytes = reinterpret_cast<uint8_t*>(&hello);
    for (uint32_t i = random.between(1, 4); i > 0; --i) {
      bytes[random.below(sizeof(hello))] = static_cast<uint8_t>(random.next());
    }
    RawClient client;
    ASSERT_TRUE(client.connect(daemon_.attach_socket()));
    ASSERT_TRUE(client.send(&hello, sizeof(hello)));
    ASSERT_TRUE(client.welcome(seconds(5)).has_value()) << "round " << round;
  }
  EXPECT_TRUE(sessions_become(0));
}

TEST_F(Attach, ClosesAConnectionThatSaysNothing) {
  RawClient silent;
  ASSERT_TRUE(silent.connect(daemon_.attach_socket()));
  EXPECT_FALSE(silent.closed_by_peer(milliseconds(100)));
  // Others attach meanwhile.
  EXPECT_TRUE(ClientSession(daemon_.attach_socket(), "host:0").ok());
  EXPECT_TRUE(silent.closed_by_peer(seconds(9)));
}

TEST_F(Attach, AWrongMessageAfterTheHelloEndsOnlyThatSession) {
  const ClientSession other(daemon_.attach_socket(), "host:0");
  RawClient client;
  ASSERT_TRUE(client.attach(daemon_.attach_socket(), "host:0"));
  ASSERT_TRUE(sessions_become(2));
  const char text[] = "this is no message of the protocol";
  ASSERT_TRUE(client.send(text, sizeof(text)));
  EXPECT_TRUE(client.closed_by_peer(seconds(5)));
  EXPECT_TRUE(sessions_become(1));
  EXPECT_NE(client.header()->session_flags & EXPERTD_SESSION_CLOSED, 0u);
  EXPECT_EQ(expertd_session_state(other.get()).reason, EXPERTD_REASON_NONE);
}

TEST_F(Attach, ASecondHelloEndsTheSession) {
  RawClient client;
  ASSERT_TRUE(client.attach(daemon_.attach_socket(), "host:0"));
  const expertd_attach_hello hello = make_hello("host:0");
  ASSERT_TRUE(client.send(&hello, sizeof(hello)));
  EXPECT_TRUE(client.closed_by_peer(seconds(5)));
  EXPECT_TRUE(sessions_become(0));
}

TEST_F(Attach, TokensThatNobodyGaveOutAreRefused) {
  RawClient client;
  ASSERT_TRUE(client.attach(daemon_.attach_socket(), "host:0"));
  expertd_attach_fd message{EXPERTD_ATTACH_MAGIC, EXPERTD_ATTACH_GET_FD, 0, 4711, 0};
  ASSERT_TRUE(client.send(&message, sizeof(message)));
  std::vector<int> fds;
  const auto bytes = client.receive(&fds, seconds(5));
  ASSERT_TRUE(bytes.has_value() && bytes->size() == sizeof(message));
  std::memcpy(&message, bytes->data(), sizeof(message));
  EXPECT_EQ(message.reason, static_cast<uint32_t>(EXPERTD_REASON_NO_SUCH_TOKEN));
  EXPECT_TRUE(fds.empty());
}

TEST_F(Attach, TheSessionLimitOfAUserIsNamed) {
  DaemonProcess small(1, {"--control-max-sessions-per-uid=2"});
  ASSERT_TRUE(small.start());
  ClientSession first(small.attach_socket(), "host:0");
  const ClientSession second(small.attach_socket(), "host:0");
  ASSERT_TRUE(first.ok() && second.ok());
  const ClientSession third(small.attach_socket(), "host:0");
  EXPECT_EQ(third.attached().status.reason, EXPERTD_REASON_SESSION_LIMIT);
  EXPECT_NE(third.attached().message.find("control.max_sessions_per_uid"), std::string::npos)
      << third.attached().message;
  EXPECT_TRUE(first.detach().ok());
  EXPECT_TRUE(wait_until([&] { return ClientSession(small.attach_socket(), "host:0").ok(); }, seconds(5)));
}

TEST_F(Attach, TheSessionLimitOfTheDaemonIsNamed) {
  DaemonProcess small(1, {"--control-max-sessions=1"});
  ASSERT_TRUE(small.start());
  const ClientSession first(small.attach_socket(), "host:0");
  const ClientSession second(small.attach_socket(), "host:0");
  EXPECT_EQ(second.attached().status.reason, EXPERTD_REASON_SESSION_LIMIT);
  EXPECT_EQ(second.attached().status.code, EXPERTD_CODE_RESOURCE_EXHAUSTED);
  EXPECT_NE(second.attached().message.find("control.max_sessions = 1"), std::string::npos);
}

TEST_F(Attach, UsersThatAreNotListedAreRefused) {
  DaemonProcess strict(1, {"--control-allowed-uids=[4294967]"});
  ASSERT_TRUE(strict.start());
  const ClientSession session(strict.attach_socket(), "host:0");
  EXPECT_EQ(session.attached().status.reason, EXPERTD_REASON_PERMISSION) << describe(session.attached());
  EXPECT_NE(session.attached().message.find("control.allowed_uids"), std::string::npos) << session.attached().message;
}

TEST(AttachWithoutADaemon, IsUnavailableAndSaysWhatToDo) {
  const TempDir directory;
  const ClientSession session(directory.file("attach.sock"), "host:0");
  EXPECT_EQ(session.attached().status.reason, EXPERTD_REASON_UNAVAILABLE);
  EXPECT_EQ(session.attached().status.code, EXPERTD_CODE_UNAVAILABLE);
  EXPECT_EQ(expertd_reason_is_retryable(session.attached().status.reason), 1);
  const std::string& message = session.attached().message;
  EXPECT_NE(message.find(directory.file("attach.sock")), std::string::npos) << message;
  EXPECT_NE(message.find("expertd"), std::string::npos) << message;
}

TEST(AttachWithoutADaemon, AlsoWithASocketThatNobodyListensOn) {
  DaemonProcess daemon(1);
  ASSERT_TRUE(daemon.start());
  daemon.kill();  // leaves its socket files behind
  const ClientSession session(daemon.attach_socket(), "host:0");
  EXPECT_EQ(session.attached().status.reason, EXPERTD_REASON_UNAVAILABLE) << describe(session.attached());
}

}  // namespace
}  // namespace expertd::support
