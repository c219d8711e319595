// SPDX-License-Identifier: Apache-2.0
// cuda_devices.h for builds without the CUDA toolkit.
#include "daemon/device/cuda/cuda_devices.h"

namespace expertd::device::cuda {

base::Result<std::vector<std::unique_ptr<device::Device>>> create_cuda_devices(const CudaOptions& /*options*/) {
  return base::Status(EXPERTD_REASON_NO_GPU, "this expertd was built without CUDA");
}

CudaVersions cuda_versions() {
  return {};
}

}  // namespace expertd::device::cuda
