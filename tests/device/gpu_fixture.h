// SPDX-License-Identifier: Apache-2.0
// What every GPU test stands on: one GpuGroup for the suite, opened once; a visible skip where there is no GPU. Without
// peer access the ranks exchange through pinned memory, which every machine with two GPUs can test.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>

#include "tests/device/gpu_group.h"

namespace expertd::device_test {

template <bool kPeerAccess, bool kGeneric = false>
class GpuTestWith : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    group_ = std::make_unique<GpuGroup>();
    device::cuda::CudaOptions options;
    options.peer_access = kPeerAccess;
    options.kernels = kGeneric ? "generic" : "auto";
    if (const char* kernels = std::getenv("EXPERTD_KERNELS"); kernels != nullptr) {
      options.kernels = kernels;  // "generic": the kernels of sm_80 on any GPU
    }
    status_ = group_->open(options);
  }
  static void TearDownTestSuite() { group_.reset(); }
  void SetUp() override {
    if (status_.reason() == EXPERTD_REASON_NO_GPU) {
      GTEST_SKIP() << status_.message();
    }
    ASSERT_TRUE(status_.is_ok()) << status_.message();
  }

  inline static std::unique_ptr<GpuGroup> group_;
  inline static base::Status status_;
};
using GpuTest = GpuTestWith<true>;

}  // namespace expertd::device_test
