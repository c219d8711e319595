// SPDX-License-Identifier: Apache-2.0
// FabricMemory: buffers of the fabric that kernels of the GPUs read and write too. Memory that a GPU has registered is
// kept for the next group: taking it back would wait for every kernel. So a daemon keeps what its groups had at most.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "daemon/device/device.h"
#include "daemon/fabric/options.h"

namespace expertd::app {

class FabricMemory final : public fabric::MemoryPort {
 public:
  /// `gpu` registers the memory, for all GPUs; it outlives this.
  explicit FabricMemory(device::Device* gpu) : gpu_(gpu) {}
  ~FabricMemory() override = default;
  FabricMemory(const FabricMemory&) = delete;
  FabricMemory& operator=(const FabricMemory&) = delete;

  base::Result<std::byte*> allocate(uint64_t bytes) override;
  void free(std::byte* data, uint64_t bytes) override;

 private:
  struct Block {
    std::byte* data = nullptr;
    uint64_t bytes = 0;  // as it was mapped
    bool used = false;
  };
  device::Device* gpu_;
  std::mutex mutex_;
  std::vector<Block> blocks_;
};

}  // namespace expertd::app
