// SPDX-License-Identifier: Apache-2.0
// What the cases of the client library against the stand-in daemon share: an attached session, a group of one rank and
// tensors of a dispatch in plain memory.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "expertd.h"
#include "tests/unit/client_fake_daemon.h"

namespace expertd::test {

inline constexpr uint32_t kHidden = 128;
inline constexpr uint32_t kTopK = 2;
inline constexpr uint32_t kMaxTokens = 16;
inline constexpr uint64_t kPatienceNs = 20'000'000'000;

inline expertd_attach_options_t options_for(const FakeDaemon& daemon, const char* device = "host:0") {
  expertd_attach_options_t options = EXPERTD_INIT(expertd_attach_options_t);
  options.socket_path = daemon.path().c_str();
  options.device = device;
  options.name = "test";
  options.traceparent = "00-0102030405060708090a0b0c0d0e0f10-0102030405060708-01";
  options.timeout_ns = kPatienceNs;
  return options;
}

inline std::string message() {
  return expertd_last_message();
}

class ClientSession : public ::testing::Test {
 protected:
  void SetUp() override {
    const expertd_attach_options_t options = options_for(daemon_, device_);
    ASSERT_EQ(0, expertd_attach(&options, &session_).reason) << message();
  }
  void TearDown() override {
    if (session_ != nullptr) {
      EXPECT_EQ(0, expertd_detach(session_).reason) << message();
    }
  }
  expertd_group_options_t group_options() const {
    expertd_group_options_t options = EXPERTD_INIT(expertd_group_options_t);
    options.name = "g";
    options.expert_parallel_size = 1;
    options.num_experts = 4;
    options.hidden = kHidden;
    options.top_k = kTopK;
    options.max_tokens = kMaxTokens;
    options.join_timeout_ns = kPatienceNs;
    return options;
  }
  expertd_group_t* join() {
    const expertd_group_options_t options = group_options();
    expertd_group_t* group = nullptr;
    EXPECT_EQ(0, expertd_group_join(session_, &options, &group).reason) << message();
    return group;
  }

  const char* device_ = "host:0";
  FakeDaemon daemon_;
  expertd_session_t* session_ = nullptr;
};

struct DispatchTensors {
  std::vector<uint16_t> x = std::vector<uint16_t>(kMaxTokens * kHidden);
  std::vector<int64_t> idx = std::vector<int64_t>(kMaxTokens * kTopK, 1);
  std::vector<float> weights = std::vector<float>(kMaxTokens * kTopK, 0.5f);
  std::vector<uint16_t> recv_x = std::vector<uint16_t>(kMaxTokens * kHidden, 0xffff);
  std::vector<int64_t> recv_idx = std::vector<int64_t>(kMaxTokens * kTopK, -7);
  std::vector<float> recv_weights = std::vector<float>(kMaxTokens * kTopK, -7);

  DispatchTensors() {
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = static_cast<uint16_t>(i * 7);
    }
  }
  expertd_dispatch_args_t args(uint32_t tokens) {
    expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
    args.x = x.data();
    args.dtype = EXPERTD_BF16;
    args.topk_idx = idx.data();
    args.idx_type = EXPERTD_I64;
    args.topk_weights = weights.data();
    args.tokens = tokens;
    args.capacity_rows = kMaxTokens;
    args.recv_x = recv_x.data();
    args.recv_topk_idx = recv_idx.data();
    args.recv_topk_weights = recv_weights.data();
    return args;
  }
};

}  // namespace expertd::test
