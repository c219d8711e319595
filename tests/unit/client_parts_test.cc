// SPDX-License-Identifier: Apache-2.0
// Goal: the parts of the client library that need no daemon: messages, handles, descriptors, the descriptor exchange,
// the low-latency window and the fork handler.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "client/src/attach_socket.h"
#include "client/src/clock.h"
#include "client/src/fd_exchange.h"
#include "client/src/handle_table.h"
#include "client/src/ll_window.h"
#include "client/src/message.h"
#include "client/src/metrics.h"
#include "client/src/op_request.h"
#include "client/src/owned_fd.h"

namespace expertd::client {
namespace {

constexpr uint64_t kPatienceNs = 20 * kNsPerS;

expertd_completion completion_of(int32_t reason) {
  expertd_completion completion{};
  completion.reason = static_cast<uint32_t>(reason);
  completion.rank = -1;
  return completion;
}

std::string message_of(const expertd_completion& completion) {
  publish(completion_status(completion));
  return last_message();
}

TEST(ClientMessage, NamesArgumentValueAndRange) {
  expertd_completion completion = completion_of(EXPERTD_REASON_TOKENS_EXCEED_MAX);
  completion.argument = EXPERTD_ARGUMENT_TOKENS;
  completion.value = 300;
  completion.maximum = 256;
  EXPECT_EQ("TOKENS_EXCEED_MAX: tokens = 300, allowed 0..256", message_of(completion));
  completion = completion_of(EXPERTD_REASON_EXPERT_OUT_OF_RANGE);
  completion.argument = EXPERTD_ARGUMENT_EXPERT_ID;
  completion.value = 64;
  completion.minimum = -1;
  completion.maximum = 63;
  EXPECT_EQ("EXPERT_OUT_OF_RANGE: topk_idx value = 64, allowed -1..63", message_of(completion));
  completion = completion_of(EXPERTD_REASON_CAPACITY_EXCEEDED);
  completion.argument = EXPERTD_ARGUMENT_RECV_ROWS;
  completion.value = 40;
  completion.maximum = 32;
  completion.rank = 2;
  EXPECT_EQ("CAPACITY_EXCEEDED: received rows = 40, allowed 0..32 (rank 2)", message_of(completion));
}

TEST(ClientMessage, NamesTheDtypeAndThoseOfTheGroup) {
  expertd_completion completion = completion_of(EXPERTD_REASON_WRONG_DTYPE);
  completion.argument = EXPERTD_ARGUMENT_DISPATCH_DTYPE;
  completion.value = EXPERTD_PAYLOAD_FP8;
  completion.maximum = EXPERTD_PAYLOAD_BF16 | EXPERTD_PAYLOAD_BYTES;
  EXPECT_EQ("WRONG_DTYPE: dispatch dtype = fp8, allowed bf16, bytes (dispatch_dtypes of the group)",
            message_of(completion));
}

TEST(ClientMessage, NamesTheRankAndWhatWasMissing) {
  expertd_completion completion = completion_of(EXPERTD_REASON_TIMEOUT);
  completion.rank = 1;
  completion.missing = EXPERTD_MISSING_SUBMISSION;
  EXPECT_EQ("TIMEOUT: rank 1 had not submitted the operation", message_of(completion));
  completion.missing = EXPERTD_MISSING_ROWS;
  EXPECT_EQ("TIMEOUT: rank 1 had not delivered its rows", message_of(completion));
  completion.rank = -1;
  completion.missing = EXPERTD_MISSING_COUNTS;
  EXPECT_EQ("TIMEOUT: a rank had not delivered its row counts", message_of(completion));
  completion.minimum = 2;
  completion.maximum = 5;
  EXPECT_EQ(
      "TIMEOUT: nothing came of the node of ranks 2 to 5: one of its ranks had not submitted the operation, and the "
      "results of the others name it",
      message_of(completion));
  completion = completion_of(EXPERTD_REASON_PEER_REJECTED);
  completion.rank = 3;
  completion.peer_reason = EXPERTD_REASON_CAPACITY_EXCEEDED;
  EXPECT_EQ("PEER_REJECTED: rank 3's part of the operation was refused with CAPACITY_EXCEEDED", message_of(completion));
  completion = completion_of(EXPERTD_REASON_PEER_LOST);
  completion.rank = 0;
  EXPECT_EQ("PEER_LOST: rank 0 of the group is gone", message_of(completion));
}

TEST(ClientMessage, SaysSomethingForEveryReason) {
  const int32_t reasons[] = {
#define EXPERTD_TEST_REASON(name, number, code, retryable, sentence) number,
      EXPERTD_REASONS(EXPERTD_TEST_REASON)
#undef EXPERTD_TEST_REASON
  };
  for (const int32_t reason : reasons) {
    if (reason == 0) {
      EXPECT_TRUE(completion_status(completion_of(0)).ok());
      continue;
    }
    const std::string name = reason_name(reason);
    expertd_completion completion = completion_of(reason);
    EXPECT_EQ(0u, message_of(completion).find(name + ": "));
    EXPECT_GT(message_of(completion).size(), name.size() + 5) << name;
    completion.argument = 9999;
    completion.missing = 77;
    completion.peer_reason = 12345;
    completion.rank = -5;
    EXPECT_EQ(0u, message_of(completion).find(name + ": ")) << "odd numbers of the daemon do no harm";
  }
  EXPECT_STREQ("UNKNOWN", reason_name(4711));
  EXPECT_EQ(EXPERTD_CODE_UNKNOWN, to_c(4711).code);
}

TEST(ClientHandles, CountGenerationsAndKeepOwnersApart) {
  HandleTable table;
  table.reset(2);
  expertd_handle_t first{};
  expertd_handle_t second{};
  expertd_handle_t third{};
  ASSERT_TRUE(table.take(7, &first).ok());
  ASSERT_TRUE(table.take(8, &second).ok());
  EXPECT_NE(first.index, second.index);
  EXPECT_EQ(1u, first.generation);
  EXPECT_EQ(EXPERTD_REASON_HANDLE_LIMIT, table.take(7, &third).reason);
  EXPECT_EQ(EXPERTD_REASON_STALE_HANDLE, table.check(8, first).reason);
  ASSERT_TRUE(table.give_back(7, first).ok());
  EXPECT_EQ(EXPERTD_REASON_STALE_HANDLE, table.give_back(7, first).reason);
  ASSERT_TRUE(table.take(7, &third).ok());
  EXPECT_EQ(first.index, third.index);
  EXPECT_EQ(2u, third.generation);
  EXPECT_EQ(EXPERTD_REASON_STALE_HANDLE, table.check(7, first).reason);
  EXPECT_EQ(EXPERTD_REASON_STALE_HANDLE, table.check(7, {99, 1}).reason);
  EXPECT_EQ(EXPERTD_REASON_MISSING_ARGUMENT, table.check(7, {0, 0}).reason);
  table.reset(2);
  ASSERT_TRUE(table.take(7, &first).ok());
  EXPECT_GT(first.generation, 1u) << "a handle from before a re-attach stays stale";
}

GroupConfig config() {
  GroupConfig made;
  made.name = "g";
  made.ranks = 2;
  made.num_experts = 8;
  made.hidden = 256;
  made.top_k = 2;
  made.max_tokens = 16;
  made.mode = EXPERTD_MODE_AUTO;
  made.op_timeout_ns = 5;
  made.first_op_timeout_ns = 9;
  return made;
}

template <typename Struct>
Struct zeroed() {
  Struct made{};
  made.struct_size = sizeof(Struct);
  return made;
}

TEST(ClientDescriptor, OfADispatchHasEveryField) {
  const Group group(nullptr, config());
  char memory[64] = {};
  auto args = zeroed<expertd_dispatch_args_t>();
  args.x = memory;
  args.dtype = EXPERTD_BYTES;
  args.row_bytes = 48;
  args.side = memory + 1;
  args.side_elements = 6;
  args.side_element_bytes = 2;
  args.topk_idx = memory + 2;
  args.idx_type = EXPERTD_I32;
  args.tokens = 10;
  args.capacity_rows = 20;
  args.expert_alignment = 8;
  args.recv_x = memory + 3;
  args.recv_side = memory + 4;
  args.recv_topk_idx = memory + 5;
  args.flags = EXPERTD_ASYNC | EXPERTD_EXPANDED | EXPERTD_WORST_TOKENS | EXPERTD_KEEP_FOREIGN_WEIGHTS;
  args.timeout_ns = 77;
  OpRequest request;
  ASSERT_TRUE(build_dispatch(group, args, &request).ok());
  expertd_slot golden{};
  golden.op = EXPERTD_OP_DISPATCH;
  golden.flags = EXPERTD_SLOT_EXPANDED | EXPERTD_SLOT_WORST_TOKENS;
  golden.timeout_ns = 77;
  golden.tokens = 10;
  golden.top_k = 2;
  golden.hidden = 256;
  golden.dtype = EXPERTD_DTYPE_BYTES;
  golden.row_bytes = 48;
  golden.topk_idx_bytes = 4;
  golden.side_elements = 6;
  golden.side_element_bytes = 2;
  golden.side_row_stride = 12;
  golden.side_element_stride = 2;
  golden.capacity_rows = 20;
  golden.expert_alignment = 8;
  EXPECT_EQ(0, memcmp(&golden, &request.slot, sizeof(golden)));
  EXPECT_EQ(10u * 48, request.tensors[EXPERTD_IN_X].bytes);
  EXPECT_EQ(9u * 12 + 5 * 2 + 2, request.tensors[EXPERTD_IN_SIDE].bytes);
  EXPECT_EQ(10u * 2 * 4, request.tensors[EXPERTD_IN_TOPK_IDX].bytes);
  EXPECT_EQ(20u * 48, request.tensors[EXPERTD_OUT_X].bytes);
  EXPECT_EQ(20u * 12, request.tensors[EXPERTD_OUT_SIDE].bytes);
  EXPECT_EQ(20u * 4, request.tensors[EXPERTD_OUT_TOPK_IDX].bytes) << "expanded: one index a row";
  EXPECT_EQ(77u, request.timeout_ns);
}

TEST(ClientDescriptor, KeepsTooManyTokensForTheDaemonToRefuse) {
  const Group group(nullptr, config());
  char memory[64] = {};
  auto args = zeroed<expertd_dispatch_args_t>();
  args.x = memory;
  args.dtype = EXPERTD_BF16;
  args.tokens = UINT32_MAX;
  OpRequest request;
  ASSERT_TRUE(build_dispatch(group, args, &request).ok());
  EXPECT_EQ(UINT32_MAX, request.slot.tokens);
  EXPECT_EQ(16u * 512, request.tensors[EXPERTD_IN_X].bytes) << "but sizes follow the group's limit";
  EXPECT_EQ(static_cast<uint32_t>(EXPERTD_SLOT_ZERO_FOREIGN_WEIGHTS), request.slot.flags);
  EXPECT_EQ(9u, request.timeout_ns) << "the first operation has the longer deadline";
}

TEST(ClientDescriptor, SpansNegativeStrides) {
  const Group group(nullptr, config());
  char memory[4096] = {};
  auto args = zeroed<expertd_dispatch_args_t>();
  args.dtype = EXPERTD_BYTES;
  args.row_bytes = 16;
  args.side = memory + 2048;
  args.side_elements = 4;
  args.side_element_bytes = 4;
  args.side_row_stride = -64;
  args.side_element_stride = 8;
  args.tokens = 3;
  OpRequest request;
  ASSERT_TRUE(build_dispatch(group, args, &request).ok());
  EXPECT_EQ(128u, request.tensors[EXPERTD_IN_SIDE].lead);
  EXPECT_EQ(128u + 24 + 4, request.tensors[EXPERTD_IN_SIDE].bytes);
}

TEST(ClientDescriptor, RefusesUnknownFlagsAndTypes) {
  const Group group(nullptr, config());
  OpRequest request;
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, build_barrier(group, 1u << 20, 0, &request).reason);
  auto args = zeroed<expertd_dispatch_args_t>();
  args.dtype = EXPERTD_F32;
  EXPECT_EQ(EXPERTD_REASON_WRONG_DTYPE, build_dispatch(group, args, &request).reason);
  auto layout = zeroed<expertd_layout_args_t>();
  layout.idx_type = EXPERTD_F32;
  EXPECT_EQ(EXPERTD_REASON_WRONG_DTYPE, build_layout(layout, 1, &request).reason);
  EXPECT_EQ(EXPERTD_REASON_MODE_MISMATCH, [&] {
    expertd_ll_outputs_t outputs{};
    return ll_outputs(group, 0, &outputs).reason;
  }());
}

TEST(ClientLlWindow, PlacesRegionsBehindEachOther) {
  const LlWindowShape shape = {2, 8, 256, 3};
  const LlWindowLayout first = ll_window_layout(shape, 0, 0);
  const LlWindowLayout second = ll_window_layout(shape, 0, 1);
  const uint64_t rows = 4 * 2 * 3;
  EXPECT_EQ(0u, first.recv_x);
  EXPECT_EQ(rows * 512, first.recv_scales);
  EXPECT_EQ(first.recv_scales + 256, first.combine_x) << "24 rows of 2 scales are 192 bytes, rounded up to 128s";
  EXPECT_EQ(first.combine_x + rows * 512, first.src_info);
  EXPECT_EQ(first.src_info + 128, first.layout_range);
  EXPECT_EQ(first.layout_range + 128, first.expert_counts);
  EXPECT_EQ(first.expert_counts + 128, first.set_bytes);
  EXPECT_EQ(2 * first.set_bytes, first.total_bytes);
  EXPECT_EQ(first.combine_x + first.set_bytes, second.combine_x);
  const LlWindowLayout quantised = ll_window_layout(shape, EXPERTD_PAYLOAD_FP8, 0);
  EXPECT_EQ(rows * 256, quantised.recv_scales) << "one byte a channel";
  const LlWindowLayout plain = ll_window_layout(shape, EXPERTD_PAYLOAD_BF16, 0);
  EXPECT_EQ(plain.recv_scales, plain.combine_x) << "no scales";
  const LlWindowShape wrong = {3, 8, 256, 3};
  EXPECT_EQ(0u, ll_window_layout(wrong, 0, 0).total_bytes);
  const LlWindowShape largest = {64, 2048, 16384, 4096};
  EXPECT_LT(ll_window_layout(largest, 0, 0).total_bytes, uint64_t{1} << 46);
}

class ClientFdExchange : public ::testing::Test {
 protected:
  ClientFdExchange() {
    int pair[2];
    EXPECT_EQ(0, socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair));
    ours_ = OwnedFd(pair[0]);
    theirs_ = OwnedFd(pair[1]);
  }
  void reply(uint64_t token, uint32_t reason = 0) {
    expertd_attach_fd packet{};
    packet.magic = EXPERTD_ATTACH_MAGIC;
    packet.type = EXPERTD_ATTACH_FD_REPLY;
    packet.token = token;
    packet.reason = reason;
    ASSERT_TRUE(send_packet(theirs_.get(), &packet, sizeof(packet), -1, deadline_after(kPatienceNs)).ok());
  }

  OwnedFd ours_;
  OwnedFd theirs_;
};

TEST_F(ClientFdExchange, DropsAReplyThatComesAfterTheDeadline) {
  FdExchange exchange(ours_.get());
  uint64_t token = 0;
  EXPECT_EQ(EXPERTD_REASON_TIMEOUT, exchange.put(0, deadline_after(kNsPerMs), &token).reason);
  reply(1);
  EXPECT_TRUE(exchange.on_readable());
  Status status;
  std::thread caller([&] { status = exchange.put(0, deadline_after(kPatienceNs), &token); });
  // The two requests are in the socket when the second one waits.
  expertd_attach_fd request{};
  Packet packet;
  for (int received = 0; received < 2;) {
    received += receive_packet(theirs_.get(), &request, sizeof(request), &packet) == Receive::kPacket ? 1 : 0;
    std::this_thread::yield();
  }
  reply(2);
  EXPECT_TRUE(exchange.on_readable());
  caller.join();
  EXPECT_TRUE(status.ok()) << status.text;
  EXPECT_EQ(2u, token);
}

TEST_F(ClientFdExchange, EndsWithTheLease) {
  FdExchange exchange(ours_.get());
  theirs_.reset();
  EXPECT_FALSE(exchange.on_readable());
  exchange.fail();
  uint64_t token = 0;
  EXPECT_EQ(EXPERTD_REASON_UNAVAILABLE, exchange.put(0, deadline_after(kPatienceNs), &token).reason);
}

TEST_F(ClientFdExchange, TakesGarbageForTheEndOfTheLease) {
  FdExchange exchange(ours_.get());
  const char garbage[40] = "not a packet of this protocol";
  ASSERT_TRUE(send_packet(theirs_.get(), garbage, sizeof(garbage), -1, deadline_after(kPatienceNs)).ok());
  EXPECT_FALSE(exchange.on_readable());
}

TEST(ClientFork, ClosesNotedDescriptorsInTheChild) {
  install_fork_handler();
  int pipe_ends[2];
  ASSERT_EQ(0, pipe(pipe_ends));
  OwnedFd noted(pipe_ends[0]);
  const uint32_t before = fork_generation();
  const pid_t child = fork();
  if (child == 0) {
    const bool closed = fcntl(pipe_ends[0], F_GETFD) < 0;
    const bool kept = fcntl(pipe_ends[1], F_GETFD) >= 0;
    _exit(closed && kept && fork_generation() != before ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(child, waitpid(child, &status, 0));
  EXPECT_EQ(0, WEXITSTATUS(status));
  EXPECT_EQ(before, fork_generation());
  EXPECT_GE(fcntl(noted.get(), F_GETFD), 0);
  close(pipe_ends[1]);
}

TEST(ClientMetrics, CountIntoTheRightBucket) {
  observe_op(EXPERTD_OP_LAYOUT, true, 7'000, 100);
  observe_op(EXPERTD_OP_LAYOUT, false, 200'000'000, 0);
  observe_op(99, true, 1, 1);
  const std::string text = metrics_text();
  const auto has = [&text](const char* line) { return text.find(line) != std::string::npos; };
  EXPECT_TRUE(has("expertd_client_op_duration_seconds_bucket{op=\"layout\",le=\"5e-06\"} 0\n")) << text;
  EXPECT_TRUE(has("expertd_client_op_duration_seconds_bucket{op=\"layout\",le=\"1e-05\"} 1\n")) << text;
  EXPECT_TRUE(has("expertd_client_op_duration_seconds_bucket{op=\"layout\",le=\"0.1\"} 1\n")) << text;
  EXPECT_TRUE(has("expertd_client_op_duration_seconds_bucket{op=\"layout\",le=\"+Inf\"} 2\n")) << text;
  EXPECT_TRUE(has("expertd_client_ops_total{op=\"layout\",result=\"failed\"} 1\n")) << text;
  EXPECT_TRUE(has("expertd_client_bytes_total{op=\"layout\"} 100\n")) << text;
}

}  // namespace
}  // namespace expertd::client
