// SPDX-License-Identifier: Apache-2.0
// UcxProbe: the proof of backend.h against the UCX that is there, with a context of its own that ends with it. Control
// thread, before the fabric opens; each step blocks for at most kStepNs.
#pragma once

#include <memory>

#include "daemon/fabric/backend.h"

namespace expertd::fabric {

/// Memory of one GPU for the probe, of whoever serves it. Any control thread.
class GpuMemory {
 public:
  virtual ~GpuMemory() = default;
  virtual base::Result<void*> allocate(uint64_t bytes) = 0;
  virtual void free(void* data) = 0;
  virtual base::Status write(void* to, const std::vector<std::byte>& from) = 0;
  virtual base::Result<std::vector<std::byte>> read(const void* from, uint64_t bytes) = 0;
};

class UcxProbe final : public DirectProbe {
 public:
  static constexpr uint64_t kStepNs = 2'000'000'000;

  /// Null: there is no such memory, which is the cause when the library itself would do.
  explicit UcxProbe(GpuMemory* memory);
  ~UcxProbe() override;
  UcxProbe(const UcxProbe&) = delete;
  UcxProbe& operator=(const UcxProbe&) = delete;

  base::Status check_library() override;
  base::Status register_memory() override;
  base::Result<bool> is_gpu_memory() override;
  base::Result<std::vector<std::byte>> round_trip(const std::vector<std::byte>& pattern) override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace expertd::fabric
