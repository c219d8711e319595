// SPDX-License-Identifier: Apache-2.0
// Golden bytes and numbers of version 1. A difference here is an incompatible change: it needs a new major version, not
// a new golden file. A minor version adds numbers to the lists and files of its own, and leaves all bytes of the older
// ones as they are. EXPERTD_WRITE_GOLDEN=1 writes files that are missing.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "tests/abi/layout_facts.h"

namespace expertd::test {
namespace {

/// The samples are bytes of version 1.0.
constexpr uint16_t kSampleMinor = 0;

std::filesystem::path golden_path(const std::string& name) {
  return std::filesystem::path(EXPERTD_SOURCE_DIR "/tests/abi/golden") / name;
}

std::string golden(const std::string& name, const std::string& current) {
  const std::filesystem::path path = golden_path(name);
  if (!std::filesystem::exists(path) && std::getenv("EXPERTD_WRITE_GOLDEN") != nullptr) {
    std::ofstream(path) << current;
  }
  std::ifstream file(path);
  EXPECT_TRUE(file.is_open()) << path;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// "bytes N", then one line per 16 bytes that are not all zero.
template <typename T>
std::string to_hex(const T& value) {
  unsigned char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  std::string text = "bytes " + std::to_string(sizeof(T)) + "\n";
  for (size_t line = 0; line < sizeof(T); line += 16) {
    std::string row;
    bool zero = true;
    for (size_t i = line; i < line + 16 && i < sizeof(T); ++i) {
      char cell[8];
      std::snprintf(cell, sizeof(cell), " %02x", static_cast<unsigned>(bytes[i]));
      row += cell;
      zero = zero && bytes[i] == 0;
    }
    char head[16];
    std::snprintf(head, sizeof(head), "%04zx:", line);
    text += zero ? "" : head + row + "\n";
  }
  return text;
}

template <typename T>
T from_hex(const std::string& text) {
  unsigned char bytes[sizeof(T)] = {};
  std::istringstream lines(text);
  std::string line;
  std::getline(lines, line);
  EXPECT_EQ(line, "bytes " + std::to_string(sizeof(T)));
  while (std::getline(lines, line)) {
    size_t at = std::stoul(line.substr(0, 4), nullptr, 16);
    std::istringstream cells(line.substr(5));
    for (std::string cell; cells >> cell && at < sizeof(T); ++at) {
      bytes[at] = static_cast<unsigned char>(std::stoul(cell, nullptr, 16));
    }
  }
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

expertd_ring_header sample_header() {
  expertd_ring_header header{};
  header.magic = EXPERTD_RING_MAGIC;
  header.abi_major = EXPERTD_ABI_MAJOR;
  header.abi_minor = kSampleMinor;
  header.header_bytes = EXPERTD_RING_HEADER_BYTES;
  header.slot_count = 64;
  header.slot_bytes = EXPERTD_SLOT_BYTES;
  header.completion_bytes = EXPERTD_COMPLETION_BYTES;
  header.session_id = 0x0102030405060708;
  header.generation = 0x1112131415161718;
  header.slots_offset = 4096;
  header.completions_offset = 4096 + 64 * 512;
  header.total_bytes = 4096 + 64 * 2560;
  header.submit_tail = 0x2122232425262728;
  header.submit_head = 0x3132333435363738;
  header.daemon_sleeping = 1;
  header.client_waiters = 2;
  header.completion_futex = 0x41424344;
  header.session_flags = EXPERTD_SESSION_DRAINING | EXPERTD_SESSION_CLOSED;
  return header;
}

expertd_ring_header sample_ended_header() {
  expertd_ring_header header = sample_header();
  header.abi_minor = 3;
  header.session_flags = EXPERTD_SESSION_CLOSED;
  header.end_reason = EXPERTD_REASON_GPU_LOST;
  return header;
}

expertd_slot sample_slot() {
  expertd_slot slot{};
  slot.seq = 0x0102030405060708;
  slot.op = EXPERTD_OP_DISPATCH;
  slot.flags = EXPERTD_SLOT_EXPANDED | EXPERTD_SLOT_RUNG;
  slot.group = 3;
  slot.timeout_ns = 100'000'000'000;
  slot.submit_ns = 0x1112131415161718;
  for (uint8_t i = 0; i < 16; ++i) {
    slot.trace_id[i] = static_cast<uint8_t>(0xa0 + i);
  }
  slot.tokens = 4096;
  slot.top_k = 8;
  slot.hidden = 7168;
  slot.dtype = EXPERTD_DTYPE_BYTES;
  slot.row_bytes = 7168;
  slot.topk_idx_bytes = 8;
  slot.side_elements = 56;
  slot.side_element_bytes = 4;
  slot.side_row_stride = 224;
  slot.side_element_stride = -4;
  slot.capacity_rows = 32768;
  slot.expert_alignment = 128;
  slot.handle_index = 5;
  slot.handle_generation = 9;
  slot.num_experts = 256;
  slot.num_ranks = 8;
  for (uint32_t i = 0; i < EXPERTD_TENSOR_COUNT; ++i) {
    slot.tensors[i] = {i + 1, 0, 0x1000 * (i + 1)};
  }
  return slot;
}

/// Of version 1.3: the operation of a group whose ranks agree on the most tokens of any of them.
expertd_slot sample_bounded() {
  expertd_slot slot{};
  slot.seq = 0x0102030405060708;
  slot.op = EXPERTD_OP_LL_DISPATCH;
  slot.group = 3;
  slot.tokens = 16;
  slot.token_bound = 0x81828384;
  return slot;
}

/// Of version 1.3: an ll_dispatch for replays of a graph, and what its graph writes where.
expertd_slot sample_captured() {
  expertd_slot slot = sample_bounded();
  slot.flags = EXPERTD_SLOT_CAPTURED;
  slot.token_bound = 0;
  slot.capture_lane = 0x85868788;
  return slot;
}

expertd_completion sample_kept() {
  expertd_completion completion{};
  completion.seq = 0x0102030405060708;
  completion.rank = -1;
  completion.capture_entry = 0x91929394;
  completion.capture_words = 0x95969798;
  return completion;
}

/// Of version 1.1: an ll_combine that its rank refused, whose deadline and trace are the caller's.
expertd_slot sample_refusal() {
  expertd_slot slot{};
  slot.seq = 0x0102030405060708;
  slot.op = EXPERTD_OP_LL_COMBINE;
  slot.flags = EXPERTD_SLOT_REFUSED;
  slot.group = 3;
  slot.timeout_ns = 100'000'000'000;
  slot.submit_ns = 0x1112131415161718;
  slot.trace_id[15] = 0xaf;
  slot.refused_reason = EXPERTD_REASON_OUT_OF_BOUNDS;
  slot.refused_argument = EXPERTD_ARGUMENT_IN_X;
  slot.refused_value = 0x2122232425262728;
  slot.refused_minimum = -2;
  slot.refused_maximum = INT64_MAX;
  return slot;
}

expertd_completion sample_completion() {
  expertd_completion completion{};
  completion.seq = 0x0102030405060708;
  completion.reason = EXPERTD_REASON_TIMEOUT;
  completion.flags = EXPERTD_COMPLETION_DEGRADED;
  completion.argument = EXPERTD_ARGUMENT_TOKENS;
  completion.missing = EXPERTD_MISSING_ROWS;
  completion.value = -5;
  completion.minimum = INT64_MIN;
  completion.maximum = INT64_MAX;
  completion.rank = -1;
  completion.peer_reason = EXPERTD_REASON_OUT_OF_BOUNDS;
  completion.group_op = 77;
  completion.epoch = 2;
  completion.rank_mask = 0xf7;
  completion.recv_rows = 1234;
  completion.expert_count_entries = 256;
  completion.admit_ns = 11;
  completion.launch_ns = 12;
  completion.start_ns = 13;
  completion.end_ns = 14;
  completion.complete_ns = 15;
  completion.local_bytes = 16;
  completion.remote_bytes = 17;
  completion.expert_counts[0] = 0xc0;
  completion.expert_counts[255] = 0xff;
  return completion;
}

/// Of version 1.2: kernels on 24 multiprocessors did it.
expertd_completion sample_executed() {
  expertd_completion completion{};
  completion.seq = 0x0102030405060708;
  completion.rank = -1;
  completion.executor = EXPERTD_COMPLETION_EXECUTOR_SM;
  completion.sms = 24;
  return completion;
}

/// Of version 1.4: ranks 1, 64 and 511 took part.
expertd_completion sample_of_many_ranks() {
  expertd_completion completion{};
  completion.seq = 0x0102030405060708;
  completion.rank = 200;
  completion.rank_mask = 2;
  completion.rank_mask_more[0] = 1;
  completion.rank_mask_more[6] = uint64_t{1} << 63;
  return completion;
}

expertd_attach_hello sample_hello() {
  expertd_attach_hello hello{};
  hello.magic = EXPERTD_ATTACH_MAGIC;
  hello.type = EXPERTD_ATTACH_HELLO;
  hello.abi_major = EXPERTD_ABI_MAJOR;
  hello.abi_minor = kSampleMinor;
  hello.local_pid = 4242;
  std::strcpy(hello.device, "host:3");
  std::strcpy(hello.name, "prefill");
  return hello;
}

expertd_attach_welcome sample_welcome() {
  expertd_attach_welcome welcome{};
  welcome.magic = EXPERTD_ATTACH_MAGIC;
  welcome.type = EXPERTD_ATTACH_WELCOME;
  welcome.abi_major = EXPERTD_ABI_MAJOR;
  welcome.abi_minor = kSampleMinor;
  welcome.reason = EXPERTD_REASON_SESSION_LIMIT;
  welcome.local_pid = 1;
  welcome.device_kind = EXPERTD_DEVICE_CUDA;
  welcome.device_index = 7;
  welcome.fd_count = 4;
  welcome.mps_active = 1;
  welcome.session_id = 21;
  welcome.generation = 0x1112131415161718;
  welcome.ring_bytes = 167936;
  welcome.flag_page_bytes = 0x4000;  // as the vector has it: a value like any other
  welcome.handles_per_session = 512;
  welcome.op_timeout_ns = 100'000'000'000;
  std::strcpy(welcome.message, "the limit of sessions is reached");
  return welcome;
}

template <typename T>
void expect_golden(const std::string& name, const T& sample) {
  const std::string kept = golden(name, to_hex(sample));
  EXPECT_EQ(to_hex(sample), kept) << name << ": what this build writes";
  const T read = from_hex<T>(kept);
  EXPECT_EQ(std::memcmp(&read, &sample, sizeof(T)), 0) << name << ": what this build reads";
}

TEST(Golden, KeepsTheBytesOfARingHeader) {
  expect_golden("header_v1.hex", sample_header());
}
TEST(Golden, KeepsTheBytesOfARingHeaderWhoseDaemonSaidWhyItEnds) {
  expect_golden("header_ended_v1.hex", sample_ended_header());
}
TEST(Golden, KeepsTheBytesOfASlot) {
  expect_golden("slot_v1.hex", sample_slot());
}
TEST(Golden, KeepsTheBytesOfARefusal) {
  expect_golden("slot_refused_v1.hex", sample_refusal());
}
TEST(Golden, KeepsTheBytesOfASlotWithABound) {
  expect_golden("slot_bound_v1.hex", sample_bounded());
}
TEST(Golden, KeepsTheBytesOfACapture) {
  expect_golden("slot_captured_v1.hex", sample_captured());
  expect_golden("completion_captured_v1.hex", sample_kept());
}
TEST(Golden, KeepsTheBytesOfACompletion) {
  expect_golden("completion_v1.hex", sample_completion());
}
TEST(Golden, KeepsTheBytesOfACompletionThatTellsItsExecutor) {
  expect_golden("completion_executor_v1.hex", sample_executed());
}
TEST(Golden, KeepsTheBytesOfACompletionOfManyRanks) {
  expect_golden("completion_ranks_v1.hex", sample_of_many_ranks());
}
TEST(Golden, KeepsTheBytesOfAHello) {
  expect_golden("hello_v1.hex", sample_hello());
}
TEST(Golden, KeepsTheBytesOfAWelcome) {
  expect_golden("welcome_v1.hex", sample_welcome());
}

TEST(Golden, KeepsTheBytesOfADescriptorMessage) {
  expect_golden("fd_v1.hex", expertd_attach_fd{EXPERTD_ATTACH_MAGIC, EXPERTD_ATTACH_FD_REPLY,
                                               EXPERTD_REASON_NO_SUCH_TOKEN, 12, 4096});
}

TEST(Golden, KeepsTheNumberOfTheVersion) {
  EXPECT_EQ(std::to_string(EXPERTD_ABI_MAJOR) + "." + std::to_string(EXPERTD_ABI_MINOR) + "\n",
            golden("version_v1.txt", ""));
}

TEST(Golden, KeepsTheNumbersOfEveryReason) {
  std::string current;
#define EXPERTD_TEST_REASON(name, number, code, retryable, sentence) \
  current += std::to_string(number) + " " #name " " #code " " + std::to_string(retryable) + "\n";
  EXPERTD_REASONS(EXPERTD_TEST_REASON)
#undef EXPERTD_TEST_REASON
  EXPECT_EQ(current, golden("reasons_v1.txt", current));
}

TEST(Golden, GivesEveryReasonANumberANameAndASentenceOfItsOwn) {
  std::set<int> numbers;
  std::set<std::string> names;
  std::set<std::string> sentences;
  size_t count = 0;
#define EXPERTD_TEST_REASON(name, number, code, retryable, sentence) \
  numbers.insert(number);                                            \
  names.insert(#name);                                               \
  sentences.insert(sentence);                                        \
  ++count;
  EXPERTD_REASONS(EXPERTD_TEST_REASON)
#undef EXPERTD_TEST_REASON
  EXPECT_EQ(numbers.size(), count);
  EXPECT_EQ(names.size(), count);
  EXPECT_EQ(sentences.size(), count);
  EXPECT_EQ(*numbers.begin(), 0);
}

TEST(Golden, KeepsTheNumbersOfEveryArgument) {
  std::string current;
#define EXPERTD_TEST_ARGUMENT(name, number, text) current += std::to_string(number) + " " #name " " text "\n";
  EXPERTD_ARGUMENTS(EXPERTD_TEST_ARGUMENT)
#undef EXPERTD_TEST_ARGUMENT
  EXPECT_EQ(current, golden("arguments_v1.txt", current));
}

TEST(Golden, KeepsTheNumbersOfEveryOperationFlagAndDtype) {
  std::ostringstream current;
  current << "ops " << EXPERTD_OP_BARRIER << EXPERTD_OP_LAYOUT << EXPERTD_OP_DISPATCH << EXPERTD_OP_COMBINE
          << EXPERTD_OP_LL_DISPATCH << EXPERTD_OP_LL_COMBINE << EXPERTD_OP_COUNT << "\nflags " << EXPERTD_SLOT_CACHED
          << " " << EXPERTD_SLOT_EXPANDED << " " << EXPERTD_SLOT_WORST_TOKENS << " "
          << EXPERTD_SLOT_ZERO_FOREIGN_WEIGHTS << " " << EXPERTD_SLOT_ORDER_LAST_LANE << " "
          << EXPERTD_SLOT_QUANTISE_FP8 << " " << EXPERTD_SLOT_ROUND_SCALE << " " << EXPERTD_SLOT_UE8M0 << " "
          << EXPERTD_SLOT_RUNG << " " << EXPERTD_SLOT_REFUSED << " " << EXPERTD_SLOT_CAPTURED << " "
          << EXPERTD_SLOT_COPY_ENGINE << " " << EXPERTD_SLOT_SPLIT << " " << EXPERTD_SLOT_FLAGS_ALL << "\ndtypes "
          << EXPERTD_DTYPE_NONE << EXPERTD_DTYPE_BF16 << EXPERTD_DTYPE_BYTES << EXPERTD_DTYPE_FP8_E4M3
          << EXPERTD_DTYPE_F32 << EXPERTD_DTYPE_I32 << EXPERTD_DTYPE_I64 << EXPERTD_DTYPE_U8 << "\npayloads "
          << EXPERTD_PAYLOAD_BF16 << " " << EXPERTD_PAYLOAD_BYTES << " " << EXPERTD_PAYLOAD_FP8 << " "
          << EXPERTD_PAYLOADS_ALL << "\nmissing " << EXPERTD_MISSING_NONE << EXPERTD_MISSING_SUBMISSION
          << EXPERTD_MISSING_DOORBELL << EXPERTD_MISSING_COUNTS << EXPERTD_MISSING_ROWS << "\nattach "
          << EXPERTD_ATTACH_HELLO << EXPERTD_ATTACH_WELCOME << EXPERTD_ATTACH_REFUSED << EXPERTD_ATTACH_PUT_FD
          << EXPERTD_ATTACH_GET_FD << EXPERTD_ATTACH_FD_REPLY << "\nexecutors " << EXPERTD_COMPLETION_EXECUTOR_NONE
          << EXPERTD_COMPLETION_EXECUTOR_HOST << EXPERTD_COMPLETION_EXECUTOR_SM
          << EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE << "\n";
  EXPECT_EQ(current.str(), golden("enums_v1.txt", current.str()));
}

TEST(Golden, GivesTheTensorsTheArgumentsOfTheirNames) {
#define EXPERTD_TEST_TENSOR(name) EXPECT_EQ(EXPERTD_ARGUMENT_OF_TENSOR(EXPERTD_##name), EXPERTD_ARGUMENT_##name)
  EXPERTD_TEST_TENSOR(IN_X);
  EXPERTD_TEST_TENSOR(IN_TOPK_IDX);
  EXPERTD_TEST_TENSOR(IN_TOPK_WEIGHTS);
  EXPERTD_TEST_TENSOR(IN_SIDE);
  EXPERTD_TEST_TENSOR(IN_BIAS0);
  EXPERTD_TEST_TENSOR(IN_BIAS1);
  EXPERTD_TEST_TENSOR(IN_TOKEN_RANK_MASK);
  EXPERTD_TEST_TENSOR(OUT_X);
  EXPERTD_TEST_TENSOR(OUT_SIDE);
  EXPERTD_TEST_TENSOR(OUT_TOPK_IDX);
  EXPERTD_TEST_TENSOR(OUT_TOPK_WEIGHTS);
  EXPERTD_TEST_TENSOR(OUT_EXPERT_COUNTS);
  EXPERTD_TEST_TENSOR(OUT_RANK_PREFIX);
  EXPERTD_TEST_TENSOR(OUT_SRC_INFO);
  EXPERTD_TEST_TENSOR(OUT_LAYOUT_RANGE);
  EXPERTD_TEST_TENSOR(OUT_STATS);
  EXPERTD_TEST_TENSOR(OUT_WAIT_STATS);
  EXPERTD_TEST_TENSOR(OUT_TOKEN_RANK_MASK);
#undef EXPERTD_TEST_TENSOR
  static_assert(EXPERTD_OUT_TOKEN_RANK_MASK + 1 == EXPERTD_TENSOR_COUNT);
}

constexpr expertd_ll_window_shape kWindowShapes[] = {
    {1, 1, 128, 1}, {2, 6, 384, 7}, {8, 256, 7168, 128}, {64, 2048, 16384, 4096}};

std::string layout_line(const expertd_ll_window_shape& shape, uint32_t set, const expertd_ll_window_layout& layout) {
  std::ostringstream line;
  line << "R" << shape.ranks << " E" << shape.num_experts << " H" << shape.hidden << " M" << shape.max_tokens << " set "
       << set << ": " << layout.recv_x << " " << layout.recv_scales << " " << layout.combine_x << " " << layout.src_info
       << " " << layout.layout_range << " " << layout.expert_counts << " " << layout.set_bytes << " "
       << layout.total_bytes << "\n";
  return line.str();
}

TEST(Golden, KeepsTheLayoutOfLowLatencyWindows) {
  std::string current;
  for (const expertd_ll_window_shape& shape : kWindowShapes) {
    for (const uint32_t set : {0U, 1U}) {
      current += layout_line(shape, set, expertd_ll_window_place_all(&shape, set));
    }
  }
  EXPECT_EQ(current, golden("ll_window_v1.txt", current));
}

TEST(Golden, KeepsTheLayoutOfLowLatencyWindowsOfCertainPayloads) {
  std::string current;
  for (const expertd_ll_window_shape& shape : kWindowShapes) {
    for (uint32_t payloads = 1; payloads <= EXPERTD_PAYLOADS_ALL; ++payloads) {
      current += "payloads " + std::to_string(payloads) + " " +
                 layout_line(shape, 1, expertd_ll_window_place_payloads(&shape, payloads, 1));
    }
  }
  EXPECT_EQ(current, golden("ll_window_payloads_v1.txt", current));
}

}  // namespace
}  // namespace expertd::test
