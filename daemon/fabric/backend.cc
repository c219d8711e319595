// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/backend.h"

namespace expertd::fabric {

namespace {

/// More than UCX sends eagerly from memory of a GPU, and no byte like its neighbour.
std::vector<std::byte> probe_pattern() {
  std::vector<std::byte> pattern(64 * 1024);
  uint32_t state = 0x9e3779b9;
  for (std::byte& byte : pattern) {
    state = state * 1664525 + 1013904223;
    byte = static_cast<std::byte>(state >> 24);
  }
  return pattern;
}

base::Status unproven(const std::string& what) {
  return base::Status(EXPERTD_REASON_UNAVAILABLE, what);
}

base::Status prove(DirectProbe& probe) {
  EXPERTD_RETURN_IF_ERROR(probe.check_library());
  EXPERTD_RETURN_IF_ERROR(probe.register_memory().with_context("registering memory of a GPU with UCX"));
  const base::Result<bool> known = probe.is_gpu_memory();
  EXPERTD_RETURN_IF_ERROR(known.status().with_context("asking UCX what it registered"));
  if (!known.value()) {
    return unproven("UCX registered memory of a GPU and takes it for the host's");
  }
  const std::vector<std::byte> pattern = probe_pattern();
  const base::Result<std::vector<std::byte>> arrived = probe.round_trip(pattern);
  EXPERTD_RETURN_IF_ERROR(arrived.status().with_context("sending from one GPU's memory to another by UCX"));
  if (arrived.value() != pattern) {
    return unproven("what UCX sent from one GPU's memory to another did not arrive as it was");
  }
  return base::Status::ok();
}

}  // namespace

const char* backend_name(Backend backend) {
  switch (backend) {
    case Backend::kStaged:
      return "staged";
    case Backend::kDirect:
      return "direct";
  }
  return "unknown";
}

base::Result<BackendChoice> choose_backend(bool require_direct, DirectProbe& probe) {
  const base::Status proven = prove(probe);
  if (proven.is_ok()) {
    return BackendChoice{Backend::kDirect, {}};
  }
  if (require_direct) {
    return unproven("fabric.require = direct, but the fabric cannot reach GPU memory itself: " + proven.message() +
                    "; serve GPUs with a UCX of version 1.18 or later that was built with CUDA, or set "
                    "fabric.require = any to go through host memory");
  }
  return BackendChoice{Backend::kStaged, proven.message()};
}

}  // namespace expertd::fabric
