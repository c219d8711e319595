// SPDX-License-Identifier: Apache-2.0
// Memory of a GPU for a fabric whose UCX reaches it (`direct`): for the proof at the start, and for the entries of
// groups. What groups had is kept for the next ones, as in FabricMemory: whoever frees it may be a thread of a lane.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "daemon/device/device.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/ucx_probe.h"

namespace expertd::app {

/// For the proof. One thread.
class ProbeGpuMemory final : public fabric::GpuMemory {
 public:
  /// `gpu` outlives it.
  explicit ProbeGpuMemory(device::Device* gpu) : gpu_(gpu) {}
  base::Result<void*> allocate(uint64_t bytes) override;
  void free(void* data) override { held_.erase(data); }
  base::Status write(void* to, const std::vector<std::byte>& from) override;
  base::Result<std::vector<std::byte>> read(const void* from, uint64_t bytes) override;

 private:
  device::Device* gpu_;
  std::map<void*, std::unique_ptr<device::HeldMemory>> held_;
};

class FabricGpuMemory final : public fabric::MemoryPort {
 public:
  /// `gpu` outlives it.
  explicit FabricGpuMemory(device::Device* gpu) : gpu_(gpu) {}
  base::Result<std::byte*> allocate(uint64_t bytes) override;
  void free(std::byte* data, uint64_t bytes) override;
  bool is_gpu_memory() const override { return true; }

 private:
  struct Block {
    std::unique_ptr<device::HeldMemory> held;
    std::byte* data = nullptr;
    bool used = false;
  };
  device::Device* gpu_;
  std::mutex mutex_;
  std::vector<Block> blocks_;
};

}  // namespace expertd::app
