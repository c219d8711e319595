// SPDX-License-Identifier: Apache-2.0
// The composition root's door to CUDA: makes one device::Device per selected GPU, or says why not. Called once by main
// before any other thread; the result is owned by main. Built twice: cuda_devices.cc with the toolkit, cuda_stub.cc
// without. Needs no CUDA header.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/base/ids.h"
#include "daemon/base/status.h"
#include "daemon/device/device.h"

namespace expertd::device::cuda {

struct CudaOptions {
  std::vector<std::string> gpus;  // indices ("0") or UUIDs ("GPU-..."); empty: every GPU
  base::DeviceIndex first_index;  // of the first device made; the others follow
  uint64_t pool_max_bytes = 0;    // per device; 0: no cap
  bool peer_access = true;        // false: groups over several GPUs exchange through pinned memory
  std::string kernels = "auto";   // "auto": bulk copies where the GPU has them; "generic": never
  uint32_t link_sms = 24;         // multiprocessors for the kernels with bulk copies, at least 1
};

struct CudaVersions {
  std::string toolkit;  // the build's, such as "13.0"; empty when built without
  std::string driver;   // the newest CUDA that the machine's driver knows; empty when there is none
};

/// The whole list or the first failure: NO_GPU (no driver, no such GPU), MIG_UNSUPPORTED, UNSUPPORTED, CUDA.
/// Sets CUDA_DEVICE_MAX_CONNECTIONS=32 and CUDA_MODULE_LOADING=EAGER in the environment, overriding what is there,
/// before the first CUDA call.
base::Result<std::vector<std::unique_ptr<device::Device>>> create_cuda_devices(const CudaOptions& options);

CudaVersions cuda_versions();

}  // namespace expertd::device::cuda
