// SPDX-License-Identifier: Apache-2.0
// Goal: the library's C interface against a whole attachment. Method: a stand-in daemon in this process with a real
// attach socket, ring and gRPC server.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "expertd.h"
#include "tests/unit/client_session_fixture.h"

namespace expertd::test {
namespace {

TEST_F(ClientSession, MasksNameRanksOfEveryWordThatTheGroupHas) {
  expertd_group_options_t options = group_options();
  options.expert_parallel_size = 130;
  options.num_experts = 260;
  expertd_group_t* group = nullptr;
  ASSERT_EQ(0, expertd_group_join(session_, &options, &group).reason) << message();
  expertd_rank_masks_t masks = EXPERTD_INIT(expertd_rank_masks_t);
  masks.exclude[0] = 4;
  masks.exclude[1] = uint64_t{1} << 63;
  masks.readmit[2] = 2;
  masks.lost[7] = masks.excluded[7] = 5;  // left over
  ASSERT_EQ(0, expertd_group_masks(group, &masks).reason) << message();
  EXPECT_EQ(4U, masks.excluded[0]);
  EXPECT_EQ(uint64_t{1} << 63, masks.excluded[1]);
  EXPECT_EQ(2U, masks.lost[2]) << "the stand-in tells what was asked for";
  EXPECT_EQ(0U, masks.lost[7] | masks.excluded[7]);
  EXPECT_EQ(3U, masks.epoch);
  masks.readmit[2] = 4;
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, expertd_group_masks(group, &masks).reason) << "rank 130 of 130";
  uint64_t excluded = 0;
  EXPECT_EQ(0, expertd_group_mask(group, 6, 0, nullptr, &excluded, nullptr).reason) << message();
  EXPECT_EQ(6U, excluded);
  ASSERT_EQ(0, expertd_group_leave(group).reason) << message();
}

TEST_F(ClientSession, TellsWhatItIsAttachedTo) {
  expertd_session_info_t info = EXPERTD_INIT(expertd_session_info_t);
  ASSERT_EQ(0, expertd_session_info(session_, &info).reason);
  EXPECT_STREQ("host:0", info.device);
  EXPECT_EQ(EXPERTD_HOST, info.device_type);
  EXPECT_EQ(FakeDaemon::kSlots, info.ring_slots);
  EXPECT_EQ(32u, info.handles_max);
  EXPECT_EQ(0, expertd_session_state(session_).reason);
}

TEST_F(ClientSession, AllocatesAlignedMemoryThatTheDaemonKnows) {
  void* data = nullptr;
  ASSERT_EQ(0, expertd_alloc(session_, 1000, &data).reason) << message();
  EXPECT_EQ(0u, reinterpret_cast<uintptr_t>(data) % 128);
  EXPECT_EQ(1u, daemon_.buffer_count());
  memset(data, 1, 1000);
  ASSERT_EQ(0, expertd_free(session_, data).reason) << message();
  EXPECT_EQ(0u, daemon_.buffer_count());
  EXPECT_EQ(EXPERTD_REASON_NO_SUCH_BUFFER, expertd_free(session_, data).reason);
}

TEST_F(ClientSession, RefusesPlainHostMemoryByName) {
  std::vector<char> plain(4096);
  expertd_buffer_t* buffer = nullptr;
  EXPECT_EQ(EXPERTD_REASON_UNSEALED_MEMORY, expertd_register(session_, plain.data(), plain.size(), &buffer).reason);
  EXPECT_NE(std::string::npos, message().find("expertd_alloc")) << message();
}

TEST_F(ClientSession, RegistersAnAllocationAsAView) {
  void* data = nullptr;
  ASSERT_EQ(0, expertd_alloc(session_, 8192, &data).reason);
  expertd_buffer_t* view = nullptr;
  ASSERT_EQ(0, expertd_register(session_, static_cast<char*>(data) + 4096, 4096, &view).reason) << message();
  EXPECT_EQ(static_cast<char*>(data) + 4096, expertd_buffer_data(view));
  EXPECT_EQ(0, expertd_buffer_release(view).reason);
  EXPECT_EQ(1u, daemon_.buffer_count());
}

TEST_F(ClientSession, DispatchesAndCombinesTensorsOutsideEveryBuffer) {
  expertd_group_t* group = join();
  ASSERT_NE(nullptr, group);
  DispatchTensors tensors;
  const expertd_dispatch_args_t args = tensors.args(5);
  expertd_handle_t handle{};
  expertd_event_t event{};
  ASSERT_EQ(0, expertd_dispatch(group, &args, nullptr, &handle, &event).reason) << message();
  expertd_op_result_t result = EXPERTD_INIT(expertd_op_result_t);
  ASSERT_EQ(0, expertd_event_wait(event, 0, &result).reason) << message();
  EXPECT_EQ(5u, result.recv_rows);
  ASSERT_EQ(1u, result.expert_count_entries);
  EXPECT_EQ(5u, result.expert_counts[0]);
  EXPECT_EQ(0, memcmp(tensors.x.data(), tensors.recv_x.data(), 5 * kHidden * 2));
  EXPECT_EQ(0xffff, tensors.recv_x[5 * kHidden]) << "rows that did not arrive stay as they were";
  EXPECT_EQ(1, tensors.recv_idx[9]);
  EXPECT_EQ(-7, tensors.recv_idx[10]);

  std::vector<uint16_t> combined(kMaxTokens * kHidden);
  expertd_combine_args_t combine = EXPERTD_INIT(expertd_combine_args_t);
  combine.x = tensors.recv_x.data();
  combine.rows = 5;
  combine.handle = handle;
  combine.tokens = 5;
  combine.combined_x = combined.data();
  ASSERT_EQ(0, expertd_combine(group, &combine, nullptr, &event).reason) << message();
  ASSERT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
  EXPECT_EQ(0, memcmp(tensors.x.data(), combined.data(), 5 * kHidden * 2));

  const std::vector<expertd_slot> seen = daemon_.seen();
  ASSERT_EQ(2u, seen.size());
  EXPECT_EQ(handle.index, seen[1].handle_index);
  EXPECT_EQ(handle.generation, seen[1].handle_generation);
  EXPECT_EQ(1, seen[0].trace_id[0]);
  EXPECT_EQ(16, seen[0].trace_id[15]);
  EXPECT_EQ(EXPERTD_SLOT_ZERO_FOREIGN_WEIGHTS, seen[0].flags);
}

TEST_F(ClientSession, UsesAllocatedTensorsWithoutACopy) {
  expertd_group_t* group = join();
  void* data = nullptr;
  ASSERT_EQ(0, expertd_alloc(session_, 1 << 20, &data).reason);
  DispatchTensors tensors;
  expertd_dispatch_args_t args = tensors.args(4);
  memcpy(data, tensors.x.data(), 4 * kHidden * 2);
  args.x = data;
  args.recv_x = static_cast<char*>(data) + (512 << 10);
  expertd_handle_t handle{};
  expertd_event_t event{};
  ASSERT_EQ(0, expertd_dispatch(group, &args, nullptr, &handle, &event).reason) << message();
  ASSERT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
  EXPECT_EQ(0, memcmp(data, args.recv_x, 4 * kHidden * 2));
  const expertd_slot slot = daemon_.seen()[0];
  EXPECT_EQ(slot.tensors[EXPERTD_IN_X].buffer, slot.tensors[EXPERTD_OUT_X].buffer);
  EXPECT_EQ(512u << 10, slot.tensors[EXPERTD_OUT_X].offset);

  args.recv_x = static_cast<char*>(data) + (1 << 20) - 256;
  EXPECT_EQ(EXPERTD_REASON_OUT_OF_BOUNDS, expertd_dispatch(group, &args, nullptr, &handle, &event).reason);
  EXPECT_NE(std::string::npos, message().find("OUT_OF_BOUNDS: out = 4096 bytes")) << message();
}

TEST_F(ClientSession, GivesAPlanAsFarAsTheCallersStructReaches) {
  const expertd_group_options_t options = group_options();
  expertd_group_plan_t plan = EXPERTD_INIT(expertd_group_plan_t);
  ASSERT_EQ(0, expertd_group_plan(session_, &options, &plan).reason) << message();
  EXPECT_EQ(kMaxTokens, plan.worst_rows);
  EXPECT_EQ(9u, plan.handles);
  EXPECT_EQ(uint64_t{1} << 33, plan.pinned_bytes);
  expertd_group_plan_t older{};
  older.struct_size = offsetof(expertd_group_plan_t, handles);
  older.handles = 77;
  ASSERT_EQ(0, expertd_group_plan(session_, &options, &older).reason) << message();
  EXPECT_EQ(kMaxTokens, older.worst_rows);
  EXPECT_EQ(77u, older.handles) << "behind the end of the caller's struct";
  older.struct_size -= 1;
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, expertd_group_plan(session_, &options, &older).reason);
}

TEST_F(ClientSession, TurnsLowLatencyOutputsOverBetweenTwoSets) {
  expertd_group_t* group = join();
  DispatchTensors tensors;
  expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.x = tensors.x.data();
  args.dtype = EXPERTD_BF16;
  args.topk_idx = tensors.idx.data();
  args.idx_type = EXPERTD_I64;
  args.tokens = 3;
  std::vector<expertd_handle_t> handles(5);
  std::vector<void*> places;
  for (expertd_handle_t& handle : handles) {
    expertd_event_t event{};
    ASSERT_EQ(0, expertd_ll_dispatch(group, &args, nullptr, &handle, &event).reason) << message();
    ASSERT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
    expertd_ll_outputs_t outputs = EXPERTD_INIT(expertd_ll_outputs_t);
    ASSERT_EQ(0, expertd_ll_handle_outputs(group, handle, &outputs).reason) << message();
    EXPECT_EQ(0, memcmp(outputs.recv_x, tensors.x.data(), 3 * kHidden * 2));
    EXPECT_EQ(kMaxTokens, outputs.rows_per_expert);
    places.push_back(outputs.recv_x);
  }
  EXPECT_NE(places[0], places[1]);
  EXPECT_EQ(places[0], places[2]);
  EXPECT_NE(handles[0].index, handles[3].index);
  EXPECT_EQ(handles[0].index, handles[4].index);
  EXPECT_GT(handles[4].generation, handles[0].generation);
  expertd_ll_outputs_t outputs = EXPERTD_INIT(expertd_ll_outputs_t);
  EXPECT_EQ(EXPERTD_REASON_STALE_HANDLE, expertd_ll_handle_outputs(group, handles[2], &outputs).reason);
  EXPECT_EQ(0, expertd_ll_handle_outputs(group, handles[3], &outputs).reason);
  EXPECT_EQ(EXPERTD_REASON_STALE_HANDLE, expertd_handle_free(group, handles[0]).reason);
}

TEST_F(ClientSession, KeepsResultsAfterTheSlotWasUsedAgain) {
  expertd_group_t* group = join();
  std::vector<expertd_event_t> events(FakeDaemon::kSlots * 4);
  daemon_.set_script([](const expertd_slot& slot, expertd_completion* completion) {
    if (slot.seq == 2) {
      completion->reason = EXPERTD_REASON_TIMEOUT;
      completion->missing = EXPERTD_MISSING_SUBMISSION;
      completion->rank = 1;
    }
  });
  for (expertd_event_t& event : events) {
    ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason) << message();
  }
  EXPECT_EQ(0, expertd_event_wait(events[0], 0, nullptr).reason) << message();
  expertd_op_result_t result = EXPERTD_INIT(expertd_op_result_t);
  EXPECT_EQ(EXPERTD_REASON_TIMEOUT, expertd_event_wait(events[1], 0, &result).reason);
  EXPECT_EQ("TIMEOUT: rank 1 had not submitted the operation", message());
  EXPECT_EQ(1, result.rank);
  EXPECT_EQ(0, expertd_event_wait(events.back(), 0, nullptr).reason);
}

TEST_F(ClientSession, TellsWhatExecutedAnOperationToWhoeverHasRoomForIt) {
  expertd_group_t* group = join();
  daemon_.set_script([](const expertd_slot& slot, expertd_completion* completion) {
    completion->executor = EXPERTD_COMPLETION_EXECUTOR_SM;
    completion->sms = 24;
    completion->start_ns = slot.submit_ns + 5;
    completion->end_ns = slot.submit_ns + 12;
    completion->complete_ns = slot.submit_ns + 14;
  });
  expertd_event_t event{};
  ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason) << message();
  expertd_op_result_t result = EXPERTD_INIT(expertd_op_result_t);
  ASSERT_EQ(0, expertd_event_wait(event, 0, &result).reason) << message();
  EXPECT_EQ(uint32_t{EXPERTD_EXECUTOR_SM}, result.executor);
  EXPECT_EQ(24u, result.sms);
  EXPECT_EQ(5u, result.queue_ns);
  EXPECT_EQ(7u, result.execute_ns);
  EXPECT_EQ(14u, result.total_ns);
  expertd_op_result_t older{};
  older.struct_size = offsetof(expertd_op_result_t, executor);
  older.executor = 77;
  ASSERT_EQ(0, expertd_event_wait(event, 0, &older).reason) << message();
  EXPECT_EQ(7u, older.execute_ns);
  EXPECT_EQ(77u, older.executor) << "behind the struct of before";
  older.struct_size -= 1;
  EXPECT_EQ(EXPERTD_REASON_ARGUMENT_RANGE, expertd_event_wait(event, 0, &older).reason);
}

TEST_F(ClientSession, EndsWithRingOverflowWhenNoSlotBecomesFree) {
  expertd_group_t* group = join();
  daemon_.hold(true);
  expertd_event_t event{};
  for (uint32_t i = 0; i < FakeDaemon::kSlots; ++i) {
    ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason) << message();
  }
  EXPECT_EQ(EXPERTD_REASON_RING_OVERFLOW, expertd_barrier(group, nullptr, 0, 10'000'000, &event).reason);
  EXPECT_EQ("RING_OVERFLOW: operations in flight = 9, allowed 0..8", message());
  EXPECT_EQ(EXPERTD_REASON_TIMEOUT, expertd_event_wait(event, 1'000'000, nullptr).reason);
  daemon_.hold(false);
  EXPECT_EQ(0, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
}

TEST_F(ClientSession, NamesFieldAndBothValuesOfAConfigMismatch) {
  v1::ErrorInfo info;
  info.set_reason(EXPERTD_REASON_CONFIG_MISMATCH);
  info.set_rank(1);
  info.set_field("hidden");
  info.set_value("128");
  info.set_other_value("256");
  daemon_.fail_join(info, "the configurations of the ranks differ");
  const expertd_group_options_t options = group_options();
  expertd_group_t* group = nullptr;
  EXPECT_EQ(EXPERTD_REASON_CONFIG_MISMATCH, expertd_group_join(session_, &options, &group).reason);
  EXPECT_EQ(nullptr, group);
  EXPECT_EQ("CONFIG_MISMATCH: the configurations of the ranks differ; hidden: 128 here, 256 on the other side (rank 1)",
            message());
}

TEST_F(ClientSession, ReturnsUnavailableSoonAfterTheDaemonsEnd) {
  expertd_group_t* group = join();
  expertd_event_t done{};
  ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &done).reason);
  ASSERT_EQ(0, expertd_event_wait(done, 0, nullptr).reason);
  daemon_.hold(true);
  expertd_event_t event{};
  ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason);
  std::thread killer([this] { daemon_.crash(); });
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_event_wait(event, kPatienceNs, nullptr).reason);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
  killer.join();
  EXPECT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_session_state(session_).reason);
  EXPECT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_barrier(group, nullptr, 0, 0, &event).reason);
  EXPECT_EQ(0, expertd_event_wait(done, 0, nullptr).reason) << "what ended before stays known";
}

TEST_F(ClientSession, ReattachesAndRecreatesItsMemory) {
  expertd_group_t* group = join();
  void* data = nullptr;
  ASSERT_EQ(0, expertd_alloc(session_, 4096, &data).reason);
  strcpy(static_cast<char*>(data), "kept");
  expertd_buffer_t* window = nullptr;
  ASSERT_EQ(0, expertd_window_create(session_, 4096, &window).reason);
  void* window_data = expertd_buffer_data(window);
  expertd_event_t event{};
  daemon_.hold(true);
  ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason);
  daemon_.crash();
  ASSERT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_event_wait(event, kPatienceNs, nullptr).reason);
  daemon_.hold(false);
  ASSERT_EQ(0, expertd_reattach(session_, kPatienceNs).reason) << message();
  EXPECT_EQ(2u, daemon_.buffer_count());
  EXPECT_STREQ("kept", static_cast<char*>(data));
  EXPECT_EQ(window_data, expertd_buffer_data(window));
  EXPECT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_event_wait(event, 0, nullptr).reason);
  EXPECT_EQ(EXPERTD_REASON_NO_SUCH_GROUP, expertd_barrier(group, nullptr, 0, 0, &event).reason);
  EXPECT_EQ(0, expertd_group_leave(group).reason) << message();
  group = join();
  ASSERT_NE(nullptr, group);
  ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason) << message();
  EXPECT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
}

TEST_F(ClientSession, EndsEveryCallWithTheReasonThatTheDaemonLeftBeforeItEnded) {
  expertd_group_t* group = join();
  ASSERT_NE(nullptr, group);
  expertd_event_t event{};
  daemon_.hold(true);
  ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason);
  daemon_.header()->end_reason = EXPERTD_REASON_GPU_LOST;
  daemon_.crash();
  EXPECT_EQ(EXPERTD_REASON_GPU_LOST, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
  EXPECT_EQ(EXPERTD_REASON_GPU_LOST, expertd_session_state(session_).reason) << message();
  void* data = nullptr;
  EXPECT_EQ(EXPERTD_REASON_GPU_LOST, expertd_alloc(session_, 4096, &data).reason) << message();
  expertd_event_t later{};
  EXPECT_EQ(EXPERTD_REASON_GPU_LOST, expertd_barrier(group, nullptr, 0, 0, &later).reason) << message();
  daemon_.hold(false);
  ASSERT_EQ(0, expertd_reattach(session_, kPatienceNs).reason) << message();
  EXPECT_EQ(0, expertd_session_state(session_).reason) << message();
}

TEST_F(ClientSession, EndsAWaitWithTheReasonBeforeTheEndOfTheLeaseAndMayReattachThen) {
  expertd_group_t* group = join();
  ASSERT_NE(nullptr, group);
  expertd_event_t event{};
  daemon_.hold(true);
  ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason);
  daemon_.header()->end_reason = EXPERTD_REASON_GPU_LOST;
  daemon_.header()->session_flags = EXPERTD_SESSION_CLOSED;
  EXPECT_EQ(EXPERTD_REASON_GPU_LOST, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
  // Not BAD_STATE: the session is over, although the stand-in does not let go of it yet and takes nobody else.
  EXPECT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_reattach(session_, 50'000'000).reason) << message();
  daemon_.hold(false);
  daemon_.crash();
  EXPECT_EQ(0, expertd_reattach(session_, kPatienceNs).reason) << message();
}

TEST_F(ClientSession, KnowsNoBufferBehindTheWindowOfAGroupFromBefore) {
  expertd_group_t* group = join();
  DispatchTensors tensors;
  expertd_ll_dispatch_args_t ll = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  ll.x = tensors.x.data();
  ll.dtype = EXPERTD_BF16;
  ll.topk_idx = tensors.idx.data();
  ll.idx_type = EXPERTD_I64;
  ll.tokens = 1;
  expertd_handle_t handle{};
  expertd_event_t event{};
  ASSERT_EQ(0, expertd_ll_dispatch(group, &ll, nullptr, &handle, &event).reason) << message();
  ASSERT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
  expertd_ll_outputs_t before = EXPERTD_INIT(expertd_ll_outputs_t);
  ASSERT_EQ(0, expertd_ll_handle_outputs(group, handle, &before).reason) << message();
  daemon_.hold(true);
  ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason);
  daemon_.crash();
  ASSERT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_event_wait(event, kPatienceNs, nullptr).reason);
  daemon_.hold(false);
  ASSERT_EQ(0, expertd_reattach(session_, kPatienceNs).reason) << message();
  expertd_group_t* anew = join();
  ASSERT_NE(nullptr, anew);
  ll.x = before.recv_x;
  ASSERT_EQ(0, expertd_ll_dispatch(anew, &ll, nullptr, &handle, &event).reason) << message();
  ASSERT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
  expertd_slot slot = daemon_.seen().back();
  EXPECT_EQ(UINT32_MAX, slot.tensors[EXPERTD_IN_X].buffer) << "the daemon is to refuse it by name";
  const uint32_t window = slot.tensors[EXPERTD_OUT_X].buffer;
  expertd_ll_outputs_t after = EXPERTD_INIT(expertd_ll_outputs_t);
  ASSERT_EQ(0, expertd_ll_handle_outputs(anew, handle, &after).reason) << message();
  ll.x = after.combine_x;
  ASSERT_EQ(0, expertd_ll_dispatch(anew, &ll, nullptr, &handle, &event).reason) << message();
  ASSERT_EQ(0, expertd_event_wait(event, 0, nullptr).reason) << message();
  slot = daemon_.seen().back();
  EXPECT_EQ(window, slot.tensors[EXPERTD_IN_X].buffer) << "the new group's window is known";
  EXPECT_EQ(0, expertd_group_leave(group).reason) << message();
}

TEST_F(ClientSession, GivesAForkedChildNothing) {
  const pid_t child = fork();
  if (child == 0) {
    expertd_session_info_t info = EXPERTD_INIT(expertd_session_info_t);
    const bool forked = expertd_session_info(session_, &info).reason == EXPERTD_REASON_FORKED &&
                        expertd_detach(session_).reason == EXPERTD_REASON_FORKED;
    _exit(forked ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(child, waitpid(child, &status, 0));
  EXPECT_EQ(0, WEXITSTATUS(status));
  EXPECT_EQ(0, expertd_session_state(session_).reason) << "the parent's session goes on";
}

TEST_F(ClientSession, RunsHooksOfAPairInOrder) {
  expertd_group_t* group = join();
  expertd_buffer_pair_t* pair = nullptr;
  ASSERT_EQ(0, expertd_buffer_create(session_, 256, EXPERTD_BF16, &pair).reason) << message();
  ASSERT_NE(nullptr, expertd_buffer_send(pair));
  ASSERT_NE(expertd_buffer_send(pair), expertd_buffer_receive(pair));
  std::vector<uint64_t> order;
  daemon_.hold(true);
  for (int i = 0; i < 3; ++i) {
    expertd_event_t event{};
    ASSERT_EQ(0, expertd_barrier(group, nullptr, EXPERTD_ASYNC, 0, &event).reason);
    const auto hook = [](expertd_status_t status, const expertd_op_result_t* result, void* user) {
      static_cast<std::vector<uint64_t>*>(user)->push_back(status.reason == 0 ? result->struct_size : 0);
    };
    ASSERT_EQ(0, expertd_queue_record(pair, event, hook, &order).reason);
  }
  uint32_t count = 7;
  EXPECT_EQ(0, expertd_queue_poll(pair, &count).reason);
  EXPECT_EQ(0u, count);
  EXPECT_EQ(EXPERTD_REASON_TIMEOUT, expertd_queue_synchronize(pair, 1'000'000).reason);
  EXPECT_EQ(0, expertd_queue_query(pair, &count).reason);
  EXPECT_EQ(3u, count);
  daemon_.hold(false);
  EXPECT_EQ(0, expertd_queue_synchronize(pair, kPatienceNs).reason) << message();
  EXPECT_EQ(3u, order.size());
  EXPECT_EQ(0, expertd_buffer_pair_destroy(pair).reason) << message();
}

TEST_F(ClientSession, LimitsHandlesAndReusesFreedOnes) {
  expertd_group_options_t options = group_options();
  options.mode = EXPERTD_MODE_NORMAL;
  expertd_group_t* group = nullptr;
  ASSERT_EQ(0, expertd_group_join(session_, &options, &group).reason) << message();
  DispatchTensors tensors;
  const expertd_dispatch_args_t args = tensors.args(1);
  std::vector<expertd_handle_t> handles(32);
  expertd_event_t event{};
  for (expertd_handle_t& handle : handles) {
    ASSERT_EQ(0, expertd_dispatch(group, &args, nullptr, &handle, &event).reason) << message();
  }
  expertd_handle_t more{};
  EXPECT_EQ(EXPERTD_REASON_HANDLE_LIMIT, expertd_dispatch(group, &args, nullptr, &more, &event).reason);
  ASSERT_EQ(0, expertd_handle_free(group, handles[3]).reason) << message();
  EXPECT_EQ(EXPERTD_REASON_STALE_HANDLE, expertd_handle_free(group, handles[3]).reason);
  ASSERT_EQ(0, expertd_dispatch(group, &args, nullptr, &more, &event).reason) << message();
  EXPECT_EQ(handles[3].index, more.index);
  EXPECT_EQ(handles[3].generation + 1, more.generation);
}

TEST_F(ClientSession, PrintsItsMetrics) {
  expertd_group_t* group = join();
  expertd_event_t event{};
  ASSERT_EQ(0, expertd_barrier(group, nullptr, 0, 0, &event).reason);
  ASSERT_EQ(0, expertd_event_wait(event, 0, nullptr).reason);
  const size_t needed = expertd_client_metrics_text(nullptr, 0);
  std::string text(needed, '\0');
  EXPECT_EQ(needed, expertd_client_metrics_text(text.data(), text.size() + 1));
  EXPECT_NE(std::string::npos, text.find("expertd_client_op_duration_seconds_bucket{op=\"barrier\",le=\"5e-06\"}"));
  EXPECT_NE(std::string::npos, text.find("expertd_client_sessions 1\n"));
}

TEST(ClientAttach, SaysThatNoDaemonListens) {
  expertd_attach_options_t options = EXPERTD_INIT(expertd_attach_options_t);
  options.socket_path = "/tmp/expertd-no-such-socket";
  options.device = "host:0";
  expertd_session_t* session = nullptr;
  EXPECT_EQ(EXPERTD_REASON_UNAVAILABLE, expertd_attach(&options, &session).reason);
  EXPECT_EQ(nullptr, session);
  EXPECT_NE(std::string::npos, message().find("/tmp/expertd-no-such-socket")) << message();
}

TEST(ClientAttach, PassesARefusalOn) {
  FakeDaemon daemon;
  daemon.refuse_next(EXPERTD_REASON_SESSION_LIMIT, "sessions = 256, allowed 0..256");
  const expertd_attach_options_t options = options_for(daemon);
  expertd_session_t* session = nullptr;
  EXPECT_EQ(EXPERTD_REASON_SESSION_LIMIT, expertd_attach(&options, &session).reason);
  EXPECT_EQ("SESSION_LIMIT: sessions = 256, allowed 0..256", message());
}

TEST(ClientAttach, RefusesADeviceThatIsNone) {
  expertd_attach_options_t options = EXPERTD_INIT(expertd_attach_options_t);
  options.device = "MIG-1234";
  expertd_session_t* session = nullptr;
  EXPECT_EQ(EXPERTD_REASON_MIG_UNSUPPORTED, expertd_attach(&options, &session).reason);
  options.device = "tpu:0";
  EXPECT_EQ(EXPERTD_REASON_NO_SUCH_DEVICE, expertd_attach(&options, &session).reason);
}

}  // namespace
}  // namespace expertd::test
