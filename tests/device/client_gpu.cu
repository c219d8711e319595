// SPDX-License-Identifier: Apache-2.0
#include "tests/device/client_gpu.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <condition_variable>
#include <cstdio>
#include <mutex>

#include "daemon/device/cuda/driver.h"

namespace expertd::device_test {
namespace {

// Host functions wait here; the process may end while one does.
std::mutex gate_mutex;
std::condition_variable gate_changed;
bool gate_open = true;  // under gate_mutex

void CUDART_CB wait_at_gate(void* /*nothing*/) {
  std::unique_lock lock(gate_mutex);
  gate_changed.wait(lock, [] { return gate_open; });
}

__global__ void store(uint64_t* address) {
  *address = 1;
}

std::string failed(const char* call, cudaError_t error) {
  return error == cudaSuccess ? std::string() : std::string(call) + ": " + cudaGetErrorName(error);
}

std::string uuid_text(const cudaUUID_t& uuid) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    char hex[3];
    std::snprintf(hex, sizeof(hex), "%02x", static_cast<unsigned char>(uuid.bytes[i]));
    text += i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "";
    text += hex;
  }
  return text;
}

int count_gpus(std::string* problem) {
  int count = 0;
  *problem = failed("cudaGetDeviceCount", cudaGetDeviceCount(&count));
  return problem->empty() ? count : 0;
}

}  // namespace

std::string ClientGpu::open(int ordinal) {
  std::string problem = failed("cudaSetDevice", cudaSetDevice(ordinal));
  if (problem.empty()) {
    problem = failed("making a context", cudaFree(nullptr));
  }
  cudaStream_t stream = nullptr;
  if (problem.empty()) {
    problem = failed("cudaStreamCreate", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  if (problem.empty()) {
    // What a first use sets up must not be set up beside a stream that is held back.
    problem = failed("cudaLaunchHostFunc", cudaLaunchHostFunc(stream, wait_at_gate, nullptr));
  }
  if (problem.empty()) {
    problem = failed("cudaStreamSynchronize", cudaStreamSynchronize(stream));
  }
  if (problem.empty()) {
    ordinal_ = ordinal;
    stream_ = stream;
  }
  return problem;
}

std::string ClientGpu::allocate(const std::string& kind, uint64_t bytes, void** data) {
  if (kind == "vmm" || kind == "private") {
    return allocate_vmm(kind == "vmm", bytes, data);
  }
  return kind == "malloc" ? failed("cudaMalloc", cudaMalloc(data, bytes)) : "no such kind of memory: " + kind;
}

std::string ClientGpu::allocate_host(uint64_t bytes, void** data) {
  return failed("cudaMallocHost", cudaMallocHost(data, bytes));
}

std::string ClientGpu::allocate_vmm(bool exportable, uint64_t bytes, void** data) {
  const auto loaded = device::cuda::Driver::load();
  if (!loaded.is_ok()) {
    return loaded.status().message();
  }
  const device::cuda::Driver& driver = *loaded.value();
  const auto make = [&]() -> base::Status {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = exportable ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_NONE;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = ordinal_;
    size_t granularity = 0;
    EXPERTD_DRIVER_CALL(driver,
                        cuMemGetAllocationGranularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
    const size_t rounded = (bytes + granularity - 1) / granularity * granularity;
    CUmemGenericAllocationHandle handle = 0;
    CUdeviceptr address = 0;
    CUmemAccessDesc access{};
    access.location = properties.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    EXPERTD_DRIVER_CALL(driver, cuMemCreate(&handle, rounded, &properties, 0));
    EXPERTD_DRIVER_CALL(driver, cuMemAddressReserve(&address, rounded, 0, 0, 0));
    EXPERTD_DRIVER_CALL(driver, cuMemMap(address, rounded, 0, handle, 0));
    EXPERTD_DRIVER_CALL(driver, cuMemSetAccess(address, rounded, &access, 1));
    *data = reinterpret_cast<void*>(address);
    return base::Status::ok();
  };
  const base::Status made = make();
  return made.is_ok() ? std::string() : made.message();
}

std::string ClientGpu::close_gate() {
  {
    const std::lock_guard lock(gate_mutex);
    gate_open = false;
  }
  return failed("cudaLaunchHostFunc", cudaLaunchHostFunc(static_cast<cudaStream_t>(stream_), wait_at_gate, nullptr));
}

void ClientGpu::open_gate() {
  {
    const std::lock_guard lock(gate_mutex);
    gate_open = true;
  }
  gate_changed.notify_all();
}

std::string ClientGpu::synchronize() {
  return cudaGetErrorName(cudaStreamSynchronize(static_cast<cudaStream_t>(stream_)));
}

std::string ClientGpu::store_to_nowhere() {
  const auto stream = static_cast<cudaStream_t>(stream_);
  store<<<1, 1, 0, stream>>>(reinterpret_cast<uint64_t*>(uintptr_t{0x10000}));
  const cudaError_t launched = cudaGetLastError();
  return cudaGetErrorName(launched != cudaSuccess ? launched : cudaStreamSynchronize(stream));
}

std::string list_gpus(std::string* problem) {
  const int count = count_gpus(problem);
  int mps = 0;
  std::string text;
  for (int i = 0; i < count && problem->empty(); ++i) {
    cudaDeviceProp properties{};
    *problem = failed("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, i));
    int shared = 0;
    // A driver that does not know the attribute has no MPS of the kind that is asked for.
    static_cast<void>(cudaDeviceGetAttribute(&shared, cudaDevAttrMpsEnabled, i));
    mps |= shared;
    text += " uuid" + std::to_string(i) + "=" + uuid_text(properties.uuid);
  }
  return " count=" + std::to_string(count) + " mps=" + std::to_string(mps) + text;
}

std::string free_memory(std::string* problem) {
  const int count = count_gpus(problem);
  std::string text;
  for (int i = 0; i < count && problem->empty(); ++i) {
    size_t free = 0;
    size_t total = 0;
    *problem = failed("cudaSetDevice", cudaSetDevice(i));
    if (problem->empty()) {
      *problem = failed("cudaMemGetInfo", cudaMemGetInfo(&free, &total));
    }
    text += " free" + std::to_string(i) + "=" + std::to_string(free) + " total" + std::to_string(i) + "=" +
            std::to_string(total);
  }
  return text;
}

}  // namespace expertd::device_test
