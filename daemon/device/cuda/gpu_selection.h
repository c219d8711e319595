// SPDX-License-Identifier: Apache-2.0
// Which of the machine's GPUs a daemon serves, decided from their identities and names alone, so that it is tested
// where there is no GPU. Pure; any thread; needs no CUDA header.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "daemon/base/status.h"
#include "daemon/device/cuda/cuda_devices.h"

namespace expertd::device::cuda {

/// A GPU as the driver describes it; its place in a list is its ordinal.
struct FoundGpu {
  std::string uuid;
  std::string name;
};

/// Ordinals of the GPUs that options.gpus names, in that order; every one when it names none. NO_GPU when one is not
/// there, UNSUPPORTED when they are too many, MIG_UNSUPPORTED when one is a slice of a GPU.
base::Result<std::vector<size_t>> choose_gpus(const std::vector<FoundGpu>& found, const CudaOptions& options);

}  // namespace expertd::device::cuda
