// SPDX-License-Identifier: Apache-2.0
// How a kernel that may stand behind one that waits (doorbell.cu) is launched. Host side, no state.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

namespace expertd::kernels::cuda {

/// A launch with its attributes; not copied, for the configuration points into it.
class LaunchConfig {
 public:
  LaunchConfig(uint32_t blocks, uint32_t threads, size_t shared_bytes, cudaStream_t stream) {
    config_.gridDim = blocks;
    config_.blockDim = threads;
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_.data();
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  void cluster(uint32_t blocks) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }

  /// The kernel in front is one of those that wait, and this one starts as soon as that lets it. It reads nothing that
  /// the other wrote; everything before that has ended.
  void starts_early(bool is_behind_wait) {
    if (is_behind_wait) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  std::array<cudaLaunchAttribute, 2> attributes_{};
};

}  // namespace expertd::kernels::cuda
