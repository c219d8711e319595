// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/gpu_use.h"

#include <dlfcn.h>

#include <array>

namespace expertd::device::cuda {
namespace {

constexpr size_t kMostProcesses = 512;  // on one GPU; MPS serves fewer
// NVML's word for "the driver does not tell", as under some MPS and container setups.
constexpr unsigned long long kNotAvailable = ~0ULL;

template <typename Function>
Function find(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

std::optional<uint64_t> used_by(int (*list_processes)(void*, unsigned*, NvmlProcess*), void* device, uint32_t pid) {
  if (list_processes == nullptr) {
    return std::nullopt;
  }
  std::array<NvmlProcess, kMostProcesses> processes{};
  auto count = static_cast<unsigned>(processes.size());
  if (list_processes(device, &count, processes.data()) != 0) {
    return std::nullopt;
  }
  for (unsigned i = 0; i < count && i < processes.size(); ++i) {
    if (processes[i].pid == pid && processes[i].used_bytes != kNotAvailable) {
      return processes[i].used_bytes;
    }
  }
  return std::nullopt;
}

}  // namespace

NvmlLibrary::NvmlLibrary() : library_(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {
  if (library_ == nullptr) {
    return;
  }
  const auto init = find<int (*)()>(library_, "nvmlInit_v2");
  if (init == nullptr || init() != 0) {
    return;
  }
  shutdown_ = find<int (*)()>(library_, "nvmlShutdown");
  calls_.device_by_uuid = find<decltype(calls_.device_by_uuid)>(library_, "nvmlDeviceGetHandleByUUID");
  calls_.memory = find<decltype(calls_.memory)>(library_, "nvmlDeviceGetMemoryInfo");
  // Only the third version has the struct above; older drivers leave these two null.
  calls_.processes = find<decltype(calls_.processes)>(library_, "nvmlDeviceGetComputeRunningProcesses_v3");
  calls_.mps_processes = find<decltype(calls_.mps_processes)>(library_, "nvmlDeviceGetMPSComputeRunningProcesses_v3");
}

NvmlLibrary::~NvmlLibrary() {
  if (shutdown_ != nullptr) {
    shutdown_();
  }
  if (library_ != nullptr) {
    dlclose(library_);
  }
}

GpuUse look_at_gpu(const NvmlCalls& nvml, const std::string& uuid, uint32_t pid) {
  GpuUse use;
  void* device = nullptr;
  if (nvml.device_by_uuid == nullptr || nvml.device_by_uuid(uuid.c_str(), &device) != 0) {
    return use;
  }
  NvmlMemory memory;
  if (nvml.memory != nullptr && nvml.memory(device, &memory) == 0) {
    use.device_bytes = memory.used;
  }
  use.process_bytes = used_by(nvml.processes, device, pid);
  if (!use.process_bytes.has_value()) {
    use.process_bytes = used_by(nvml.mps_processes, device, pid);
  }
  return use;
}

ContextUse context_use(const GpuUse& before, const GpuUse& after, uint64_t pool_bytes, bool mps) {
  // A process without a context holds nothing (seen on an H100: in no list, and with 0 bytes in that of MPS). Whoever
  // held something under our number lives in another pid namespace.
  if (after.process_bytes.has_value() && before.process_bytes.value_or(0) == 0 && *after.process_bytes > pool_bytes) {
    return {*after.process_bytes - pool_bytes, "process"};
  }
  if (!mps && before.device_bytes.has_value() && after.device_bytes.has_value() &&
      *after.device_bytes > *before.device_bytes && *after.device_bytes - *before.device_bytes > pool_bytes) {
    return {*after.device_bytes - *before.device_bytes - pool_bytes, "device"};
  }
  return {};
}

}  // namespace expertd::device::cuda
