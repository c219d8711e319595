// SPDX-License-Identifier: Apache-2.0
// What carries groups over several nodes: `staged`, through memory of the host, works with any UCX; `direct` lets UCX
// reach the memory of GPUs itself. A UCX without CUDA takes that memory for the host's and says nothing, so direct is
// chosen only when a probe at the start has proven it step by step, and never in silence. The choice is pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/status.h"

namespace expertd::fabric {

enum class Backend : uint32_t { kStaged = 0, kDirect = 1 };
const char* backend_name(Backend backend);

/// The steps of the proof, in this order; each fails with what is missing.
class DirectProbe {
 public:
  virtual ~DirectProbe() = default;
  /// The UCX is new enough and says that it knows memory of GPUs.
  virtual base::Status check_library() = 0;
  /// Memory of a GPU is registered.
  virtual base::Status register_memory() = 0;
  /// Whether UCX, asked back, takes the registered memory for a GPU's.
  virtual base::Result<bool> is_gpu_memory() = 0;
  /// Sends the pattern from that memory into memory of a GPU and gives what is there then.
  virtual base::Result<std::vector<std::byte>> round_trip(const std::vector<std::byte>& pattern) = 0;
};

struct BackendChoice {
  Backend live = Backend::kStaged;
  std::string cause;  // why it is not direct; empty for direct
};

/// UNAVAILABLE with the cause where direct is required and not proven.
base::Result<BackendChoice> choose_backend(bool require_direct, DirectProbe& probe);

}  // namespace expertd::fabric
