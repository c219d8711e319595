// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/fabric_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace expertd::app {

base::Result<std::byte*> FabricMemory::allocate(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Block* best = nullptr;
  for (Block& block : blocks_) {
    // A much larger one may be wanted whole soon.
    const bool fits = !block.used && block.bytes >= bytes && block.bytes / 2 <= bytes;
    best = fits && (best == nullptr || block.bytes < best->bytes) ? &block : best;
  }
  if (best != nullptr) {
    best->used = true;
    std::memset(best->data, 0, bytes);
    return best->data;
  }
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (mapped == MAP_FAILED) {
    return base::errno_status("mapping " + std::to_string(bytes) + " bytes for a group on the fabric");
  }
  if (const base::Status shared = gpu_->share_host_memory(mapped, bytes); !shared.is_ok()) {
    (void)::munmap(mapped, bytes);
    return shared.with_context("pinning " + std::to_string(bytes) + " bytes for a group on the fabric");
  }
  blocks_.push_back({static_cast<std::byte*>(mapped), bytes, true});
  return blocks_.back().data;
}

void FabricMemory::free(std::byte* data, uint64_t /*bytes*/) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found =
      std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& block) { return block.data == data; });
  if (found != blocks_.end()) {
    found->used = false;
  }
}

}  // namespace expertd::app
