// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/gpu_selection.h"

#include <algorithm>
#include <numeric>

#include "daemon/base/limits.h"

namespace expertd::device::cuda {

base::Result<std::vector<size_t>> choose_gpus(const std::vector<FoundGpu>& found, const CudaOptions& options) {
  std::vector<size_t> chosen;
  if (options.gpus.empty()) {
    chosen.resize(found.size());
    std::iota(chosen.begin(), chosen.end(), size_t{0});
  }
  for (const std::string& wanted : options.gpus) {
    size_t ordinal = 0;
    while (ordinal < found.size() && wanted != found[ordinal].uuid && wanted != std::to_string(ordinal)) {
      ++ordinal;
    }
    if (ordinal == found.size()) {
      return base::Status(EXPERTD_REASON_NO_GPU,
                          "there is no GPU " + wanted + " here (" + std::to_string(found.size()) + " found)");
    }
    chosen.push_back(ordinal);
  }
  if (chosen.empty()) {
    return base::Status(EXPERTD_REASON_NO_GPU, "the driver finds no GPU");
  }
  if (chosen.size() > base::kMaxGpuRanks || options.first_index.value + chosen.size() > base::kMaxDevices) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED,
                        std::to_string(chosen.size()) + " GPUs are more than one daemon serves");
  }
  for (const size_t ordinal : chosen) {
    // The name of a slice carries its profile: "NVIDIA H200 MIG 1g.18gb".
    const FoundGpu& gpu = found[ordinal];
    if (gpu.name.find(" MIG ") != std::string::npos) {
      return base::Status(EXPERTD_REASON_MIG_UNSUPPORTED,
                          gpu.uuid + " (" + gpu.name + ") is a MIG instance; peer access needs whole GPUs");
    }
  }
  return chosen;
}

}  // namespace expertd::device::cuda
