// SPDX-License-Identifier: Apache-2.0
// Goal: which staging memory is used again. Method: as in client_session_test.cc, with outputs so large that two chunks
// are all that may be staged.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "tests/unit/client_session_fixture.h"

namespace expertd::test {
namespace {

// Address space of the test's own: of a large output only the rows that arrive are touched.
class LargeOutput {
 public:
  explicit LargeOutput(uint64_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~LargeOutput() { munmap(data_, bytes_); }
  LargeOutput(const LargeOutput&) = delete;
  LargeOutput& operator=(const LargeOutput&) = delete;
  void* data() const { return data_; }

 private:
  const uint64_t bytes_;
  void* const data_;
};

class ClientStaging : public ClientSession {
 protected:
  static constexpr uint32_t kRowBytes = 32 << 10;
  static constexpr uint32_t kRows = 65536;                   // more than 2 GiB with the inputs: a chunk of 4 GiB
  static constexpr uint32_t kThreeQuarters = kRows * 3 / 4;  // a chunk of 2 GiB, of which two may be staged

  void SetUp() override {
    ClientSession::SetUp();
    expertd_group_options_t options = group_options();
    options.mode = EXPERTD_MODE_NORMAL;
    options.hidden = kRowBytes / 2;
    options.max_tokens = kRows;
    ASSERT_EQ(0, expertd_group_join(session_, &options, &group_).reason) << message();
  }
  expertd_status_t dispatch(uint32_t rows, expertd_event_t* event) {
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.x = row_.data();
    args.dtype = EXPERTD_BF16;
    args.topk_idx = idx_.data();
    args.idx_type = EXPERTD_I64;
    args.tokens = 1;
    args.capacity_rows = rows;
    args.recv_x = output_.data();
    expertd_handle_t handle{};
    return expertd_dispatch(group_, &args, nullptr, &handle, event);
  }

  expertd_group_t* group_ = nullptr;
  std::vector<char> row_ = std::vector<char>(kRowBytes, 'x');
  std::vector<int64_t> idx_ = std::vector<int64_t>(kTopK, 1);
  LargeOutput output_{uint64_t{kRows} * kRowBytes};
};

TEST_F(ClientStaging, TakesTheChunksOfOperationsThatEnded) {
  expertd_event_t event{};
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(0, dispatch(kThreeQuarters, &event).reason) << message();
    ASSERT_EQ(0, dispatch(kThreeQuarters, &event).reason) << message();
    // Behind both of them; nobody asks for their own results.
    ASSERT_EQ(0, expertd_barrier(group_, nullptr, 0, 0, &event).reason) << message();
    ASSERT_EQ(0, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
  }
  EXPECT_EQ(2u, daemon_.buffer_count());
  EXPECT_EQ(0, memcmp(row_.data(), output_.data(), kRowBytes));
}

TEST_F(ClientStaging, ReplacesIdleChunksThatAreTooSmall) {
  expertd_event_t event{};
  for (const uint32_t rows : {kThreeQuarters, kThreeQuarters, kRows, kThreeQuarters}) {
    ASSERT_EQ(0, dispatch(rows, &event).reason) << message();
    ASSERT_EQ(0, expertd_barrier(group_, nullptr, 0, 0, &event).reason) << message();
    ASSERT_EQ(0, expertd_event_wait(event, kPatienceNs, nullptr).reason) << message();
  }
  EXPECT_EQ(1u, daemon_.buffer_count()) << "one chunk of all that may be staged";
}

TEST_F(ClientStaging, RefusesWhatOperationsInFlightLeaveNoRoomFor) {
  daemon_.hold(true);
  expertd_event_t event{};
  ASSERT_EQ(0, dispatch(kThreeQuarters, &event).reason) << message();
  EXPECT_EQ(EXPERTD_REASON_POOL_EXHAUSTED, dispatch(kRows, &event).reason);
  EXPECT_EQ(0u, message().find("POOL_EXHAUSTED: staged bytes in flight = 6442450944, allowed 0..4294967296"))
      << message();
  daemon_.hold(false);
}

}  // namespace
}  // namespace expertd::test
