// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/fabric_gpu_memory.h"

#include <algorithm>
#include <string>
#include <utility>

namespace expertd::app {

namespace {

void* address_in(const device::Device& gpu, const device::HeldMemory& memory) {
  return memory.mapping().base[gpu.index().value];
}

}  // namespace

base::Result<void*> ProbeGpuMemory::allocate(uint64_t bytes) {
  base::Result<std::unique_ptr<device::HeldMemory>> held = gpu_->create_fabric_memory(bytes);
  if (!held.is_ok()) {
    return held.status();
  }
  void* const data = address_in(*gpu_, *held.value());
  held_[data] = std::move(held).value();
  return data;
}

base::Status ProbeGpuMemory::write(void* to, const std::vector<std::byte>& from) {
  return gpu_->copy_and_wait(to, from.data(), from.size());
}

base::Result<std::vector<std::byte>> ProbeGpuMemory::read(const void* from, uint64_t bytes) {
  std::vector<std::byte> found(bytes);
  EXPERTD_RETURN_IF_ERROR(gpu_->copy_and_wait(found.data(), from, bytes));
  return found;
}

base::Result<std::byte*> FabricGpuMemory::allocate(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Block& block : blocks_) {
    const uint64_t has = block.held->mapping().bytes;
    if (!block.used && has >= bytes && has / 2 <= bytes) {
      block.used = true;
      return block.data;
    }
  }
  base::Result<std::unique_ptr<device::HeldMemory>> held = gpu_->create_fabric_memory(bytes);
  if (!held.is_ok()) {
    return held.status().with_context("taking " + std::to_string(bytes) + " bytes of a GPU for a group on the fabric");
  }
  auto* const data = static_cast<std::byte*>(address_in(*gpu_, *held.value()));
  blocks_.push_back({std::move(held).value(), data, true});
  return data;
}

void FabricGpuMemory::free(std::byte* data, uint64_t /*bytes*/) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found =
      std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& block) { return block.data == data; });
  if (found != blocks_.end()) {
    found->used = false;
  }
}

}  // namespace expertd::app
