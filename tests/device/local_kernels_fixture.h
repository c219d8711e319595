// SPDX-License-Identifier: Apache-2.0
// What tests of the client library's kernels stand on: the kernels loaded into the first GPU's primary context, without
// a session. A visible skip where there is no GPU.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <memory>

#include "client/src/local_kernels/cuda_kernels.h"

namespace expertd::device_test {

class LocalKernelsTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no GPU";
    }
    ASSERT_EQ(cudaSuccess, cudaSetDevice(0));
    ASSERT_EQ(cudaSuccess, cudaFree(nullptr));
    ASSERT_TRUE(client::load_driver(&driver_).ok());
    client::cuda::Context context = nullptr;
    ASSERT_EQ(client::cuda::kSuccess, driver_.device_get(&device_, 0));
    ASSERT_EQ(client::cuda::kSuccess, driver_.primary_retain(&context, device_));
    retained_ = true;
    ASSERT_EQ(client::cuda::kSuccess, driver_.stream_create(&own_stream_, client::cuda::kStreamNonBlocking));
    const client::Status made = client::CudaKernels::create(&driver_, context, device_, own_stream_, &kernels_);
    ASSERT_TRUE(made.ok()) << made.text;
  }
  /// Behind everything that a fixture launches and owns.
  void TearDown() override {
    kernels_.reset();
    if (own_stream_ != nullptr) {
      driver_.stream_destroy(own_stream_);
    }
    if (retained_) {
      driver_.primary_release(device_);
    }
  }

  client::cuda::Driver driver_;
  client::cuda::Device device_ = 0;
  client::cuda::Stream own_stream_ = nullptr;
  bool retained_ = false;
  std::unique_ptr<client::CudaKernels> kernels_;
};

}  // namespace expertd::device_test
