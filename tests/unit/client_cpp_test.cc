// SPDX-License-Identifier: Apache-2.0
// Goal: the header-only C++ interface: owners, results and events. Method: the stand-in daemon, as in
// client_session_test.cc.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "expertd.hpp"
#include "tests/unit/client_fake_daemon.h"

namespace expertd::test {
namespace {

class ClientCpp : public ::testing::Test {
 protected:
  Result<Session> attach() {
    auto options = make<expertd_attach_options_t>();
    options.socket_path = daemon_.path().c_str();
    options.device = "host:0";
    options.timeout_ns = 20'000'000'000;
    return Session::attach(options);
  }
  static Result<Group> join(Session* session) {
    auto options = make<expertd_group_options_t>();
    options.name = "g";
    options.expert_parallel_size = 1;
    options.num_experts = 4;
    options.hidden = 128;
    options.top_k = 1;
    options.max_tokens = 8;
    options.dispatch_dtypes = EXPERTD_DISPATCH_BF16;
    return session->join(options);
  }

  FakeDaemon daemon_;
};

TEST_F(ClientCpp, GivesErrorsAsValues) {
  auto options = make<expertd_attach_options_t>();
  options.socket_path = "/tmp/expertd-no-such-socket";
  options.device = "host:0";
  const Result<Session> session = Session::attach(options);
  ASSERT_FALSE(session.ok());
  EXPECT_EQ(EXPERTD_REASON_UNAVAILABLE, session.error().reason());
  EXPECT_TRUE(session.error().retryable());
  EXPECT_EQ(0u, session.error().text().find("UNAVAILABLE: "));
}

TEST_F(ClientCpp, OwnsWindowsAndAllocations) {
  auto session = attach();
  ASSERT_TRUE(session.ok()) << session.error().text();
  {
    auto window = session->window(5000);
    ASSERT_TRUE(window.ok()) << window.error().text();
    ASSERT_NE(nullptr, window->data());
    EXPECT_EQ(5000u, window->bytes());
    Buffer moved = std::move(*window);
    EXPECT_NE(nullptr, moved.data());
    EXPECT_EQ(1u, daemon_.buffer_count());
  }
  EXPECT_EQ(0u, daemon_.buffer_count()) << "released with its owner";
  auto memory = session->alloc<float>(10);
  ASSERT_TRUE(memory.ok());
  EXPECT_EQ(10u, memory->size());
  EXPECT_TRUE(session->free(memory->data()).ok());
}

TEST_F(ClientCpp, RunsOperationsOfAGroup) {
  auto session = attach();
  ASSERT_TRUE(session.ok()) << session.error().text();
  auto group = join(&*session);
  ASSERT_TRUE(group.ok()) << group.error().text();
  EXPECT_EQ(1u, daemon_.config().dispatch_dtypes());
  auto barrier = group->barrier();
  ASSERT_TRUE(barrier.ok()) << barrier.error().text();
  ASSERT_TRUE(barrier->wait().ok());
  auto done = barrier->done();
  ASSERT_TRUE(done.ok());
  EXPECT_TRUE(*done);
  std::vector<uint16_t> x(128, 7);
  std::vector<uint16_t> received(128);
  std::vector<int64_t> idx(1, 2);
  auto args = make<expertd_dispatch_args_t>();
  args.x = x.data();
  args.dtype = EXPERTD_BF16;
  args.topk_idx = idx.data();
  args.idx_type = EXPERTD_I64;
  args.tokens = 1;
  args.capacity_rows = 1;
  args.recv_x = received.data();
  auto dispatched = group->dispatch(args);
  ASSERT_TRUE(dispatched.ok()) << dispatched.error().text();
  auto result = dispatched->event.wait();
  ASSERT_TRUE(result.ok()) << result.error().text();
  EXPECT_EQ(1u, result->recv_rows);
  EXPECT_EQ(x, received);
  EXPECT_TRUE(group->free_handle(dispatched->handle).ok());
  EXPECT_TRUE(group->leave().ok());
  EXPECT_TRUE(session->detach().ok());
}

}  // namespace
}  // namespace expertd::test
