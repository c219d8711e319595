// SPDX-License-Identifier: Apache-2.0
// What NVML, the driver's management library, says of the memory of a GPU: how much is in use, and how much of it this
// process holds. No call of CUDA tells what a context takes. Asked by the starting thread before and after the contexts
// are made, never later; needs no CUDA header, so that it is tested without the toolkit.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace expertd::device::cuda {

/// nvmlMemory_t and nvmlProcessInfo_t as the calls below fill them.
struct NvmlMemory {
  unsigned long long total = 0;
  unsigned long long free = 0;
  unsigned long long used = 0;
};
struct NvmlProcess {
  unsigned pid = 0;
  unsigned long long used_bytes = 0;
  unsigned gpu_instance = 0;
  unsigned compute_instance = 0;
};

/// NVML's functions as far as they are used; null where the library lacks one. Zero means success.
struct NvmlCalls {
  int (*device_by_uuid)(const char* uuid, void** device) = nullptr;
  int (*memory)(void* device, NvmlMemory* memory) = nullptr;
  int (*processes)(void* device, unsigned* count, NvmlProcess* list) = nullptr;
  int (*mps_processes)(void* device, unsigned* count, NvmlProcess* list) = nullptr;
};

/// The library of this machine, initialised while the object lives. Without a usable one every call is null.
class NvmlLibrary {
 public:
  NvmlLibrary();
  ~NvmlLibrary();
  NvmlLibrary(const NvmlLibrary&) = delete;
  NvmlLibrary& operator=(const NvmlLibrary&) = delete;
  const NvmlCalls& calls() const { return calls_; }

 private:
  void* library_ = nullptr;
  int (*shutdown_)() = nullptr;
  NvmlCalls calls_;
};

/// One GPU at one moment; what could not be learnt is empty.
struct GpuUse {
  std::optional<uint64_t> device_bytes;   // of everybody
  std::optional<uint64_t> process_bytes;  // of the process asked for
};
GpuUse look_at_gpu(const NvmlCalls& nvml, const std::string& uuid, uint32_t pid);

/// What a context takes, and how that is known.
struct ContextUse {
  uint64_t bytes = 0;
  std::string source;  // "process", "device", or empty: not known
};
/// From what was in use before the context and after the device's start. `pool_bytes` is what the device has allocated
/// by then, which is no part of the context. Under MPS the GPU's total says nothing: the server's own memory comes and
/// goes with it.
ContextUse context_use(const GpuUse& before, const GpuUse& after, uint64_t pool_bytes, bool mps);

}  // namespace expertd::device::cuda
