// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/memory.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace expertd::device::cuda {
namespace {

CUmemAllocationProp allocation_properties(const Reach& reach) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = reach.home.device;
  properties.allocFlags.gpuDirectRDMACapable = reach.adapters ? 1 : 0;
  return properties;
}

}  // namespace

base::Result<uint64_t> VmmMemory::allocation_bytes(const Reach& reach, uint64_t bytes) {
  const Driver& driver = *reach.driver;
  const CUmemAllocationProp properties = allocation_properties(reach);
  size_t granularity = 0;
  EXPERTD_DRIVER_CALL(driver,
                      cuMemGetAllocationGranularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
  const uint64_t limit = uint64_t{1} << 46;  // beyond any GPU; keeps the rounding from wrapping
  if (bytes > limit) {
    return base::Status(EXPERTD_REASON_POOL_EXHAUSTED, "no GPU has " + std::to_string(bytes) + " bytes");
  }
  return (std::max<uint64_t>(bytes, 1) + granularity - 1) / granularity * granularity;
}

base::Result<std::unique_ptr<VmmMemory>> VmmMemory::create(const Reach& reach, uint64_t bytes, Pool* pool) {
  const Driver& driver = *reach.driver;
  const CUmemAllocationProp properties = allocation_properties(reach);
  const auto wanted = allocation_bytes(reach, bytes);
  if (!wanted.is_ok()) {
    return wanted.status();
  }
  const uint64_t rounded = wanted.value();
  EXPERTD_RETURN_IF_ERROR(pool->take(rounded));
  std::unique_ptr<VmmMemory> memory(new VmmMemory());
  memory->driver_ = &driver;
  memory->pool_ = pool;
  memory->allocated_bytes_ = rounded;
  const CUresult created = driver.cuMemCreate(&memory->handle_, rounded, &properties, 0);
  if (created == CUDA_ERROR_OUT_OF_MEMORY) {
    return base::Status(EXPERTD_REASON_POOL_EXHAUSTED,
                        "the GPU has no " + std::to_string(rounded) + " bytes of free memory");
  }
  EXPERTD_RETURN_IF_ERROR(driver.check(created, "cuMemCreate"));
  memory->has_handle_ = true;
  EXPERTD_RETURN_IF_ERROR(memory->map(reach));
  Import whole;
  whole.bytes = rounded;
  memory->fill_mapping(reach, whole);
  return memory;
}

base::Result<std::unique_ptr<VmmMemory>> VmmMemory::import(const Reach& reach, const Import& import) {
  const Driver& driver = *reach.driver;
  if (import.bytes == 0 || import.offset > import.allocation_bytes ||
      import.bytes > import.allocation_bytes - import.offset) {
    return base::Status(EXPERTD_REASON_OUT_OF_BOUNDS, "the range does not lie inside the allocation");
  }
  std::unique_ptr<VmmMemory> memory(new VmmMemory());
  memory->driver_ = &driver;
  memory->allocated_bytes_ = import.allocation_bytes;
  // The API takes the descriptor as a pointer-sized integer.
  auto* descriptor = reinterpret_cast<void*>(static_cast<intptr_t>(import.fd.get()));
  const CUresult imported =
      driver.cuMemImportFromShareableHandle(&memory->handle_, descriptor, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  if (imported != CUDA_SUCCESS) {
    return base::Status(EXPERTD_REASON_IPC_OPEN_FAILED,
                        "the descriptor is not an importable VMM allocation: " +
                            driver.check(imported, "cuMemImportFromShareableHandle").message());
  }
  memory->has_handle_ = true;
  CUmemAllocationProp properties{};
  EXPERTD_DRIVER_CALL(driver, cuMemGetAllocationPropertiesFromHandle(&properties, memory->handle_));
  const bool known = std::any_of(reach.gpus.begin(), reach.gpus.end(), [&](const GpuView& gpu) {
    return properties.location.type == CU_MEM_LOCATION_TYPE_DEVICE && properties.location.id == gpu.device;
  });
  if (!known) {
    return base::Status(EXPERTD_REASON_WRONG_DEVICE_KIND,
                        "the VMM allocation does not lie on a GPU that the session's device can reach");
  }
  if (const base::Status mapped = memory->map(reach); !mapped.is_ok()) {
    return base::Status(
        EXPERTD_REASON_IPC_OPEN_FAILED,
        mapped.with_context("mapping the imported allocation (is allocation_bytes its size?)").message());
  }
  memory->fill_mapping(reach, import);
  return memory;
}

base::Status VmmMemory::map(const Reach& reach) {
  const Driver& driver = *driver_;
  EXPERTD_DRIVER_CALL(driver, cuMemAddressReserve(&address_, allocated_bytes_, 0, 0, 0));
  EXPERTD_DRIVER_CALL(driver, cuMemMap(address_, allocated_bytes_, 0, handle_, 0));
  mapped_ = true;
  std::vector<CUmemAccessDesc> access;
  for (const GpuView& gpu : reach.gpus) {
    CUmemAccessDesc description{};
    description.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    description.location.id = gpu.device;
    description.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    access.push_back(description);
  }
  EXPERTD_DRIVER_CALL(driver, cuMemSetAccess(address_, allocated_bytes_, access.data(), access.size()));
  return base::Status::ok();
}

void VmmMemory::fill_mapping(const Reach& reach, const Import& part) {
  mapping_.bytes = part.bytes;
  mapping_.home = reach.home.index;
  for (const GpuView& gpu : reach.gpus) {
    mapping_.base[gpu.index.value] = reinterpret_cast<void*>(address_ + part.offset);
  }
}

VmmMemory::~VmmMemory() {
  if (mapped_) {
    driver_->cuMemUnmap(address_, allocated_bytes_);
  }
  if (address_ != 0) {
    driver_->cuMemAddressFree(address_, allocated_bytes_);
  }
  if (has_handle_) {
    driver_->cuMemRelease(handle_);
  }
  if (pool_ != nullptr) {
    pool_->give(allocated_bytes_);
  }
}

base::Result<base::ScopedFd> VmmMemory::export_fd() const {
  int fd = -1;
  EXPERTD_DRIVER_CALL(*driver_,
                      cuMemExportToShareableHandle(&fd, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
  return base::ScopedFd(fd);
}

base::Result<std::unique_ptr<IpcMemory>> IpcMemory::open(const Reach& reach, const void* handle, const Range& range) {
  const Driver& driver = *reach.driver;
  std::unique_ptr<IpcMemory> memory(new IpcMemory());
  memory->closer_ = reach.closer;
  memory->mapping_.bytes = range.bytes;
  memory->mapping_.home = reach.home.index;
  CUipcMemHandle ipc{};
  std::memcpy(&ipc, handle, sizeof(ipc));
  for (const GpuView& gpu : reach.gpus) {
    const ScopedContext context(driver, gpu.context);
    CUdeviceptr address = 0;
    const CUresult opened = driver.cuIpcOpenMemHandle(&address, ipc, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    if (opened != CUDA_SUCCESS) {
      return base::Status(EXPERTD_REASON_IPC_OPEN_FAILED,
                          "on device " + std::to_string(gpu.index.value) + ": " +
                              driver.check(opened, "cuIpcOpenMemHandle").message() +
                              "; VMM memory and equal process ids have no handle: pass a descriptor or use a window");
    }
    memory->opened_.push_back({gpu.context, address, gpu.gate});
    CUdeviceptr first = 0;
    size_t size = 0;
    EXPERTD_DRIVER_CALL(driver, cuMemGetAddressRange(&first, &size, address));
    if (range.bytes == 0 || range.offset > size || range.bytes > size - range.offset) {
      return base::Status(EXPERTD_REASON_OUT_OF_BOUNDS, "the range does not lie inside the allocation of " +
                                                            std::to_string(size) + " bytes behind the handle");
    }
    memory->mapping_.base[gpu.index.value] = reinterpret_cast<void*>(address + range.offset);
  }
  return memory;
}

IpcMemory::~IpcMemory() {
  for (const Opened& opened : opened_) {
    closer_->close_later(opened.context, opened.address, opened.gate);
  }
}

base::Result<std::unique_ptr<PinnedMemory>> PinnedMemory::create(const Driver& driver, CUcontext context,
                                                                 uint64_t bytes, Closer* closer) {
  std::unique_ptr<PinnedMemory> memory(new PinnedMemory(driver, context, closer));
  const ScopedContext current(driver, context);
  const CUresult allocated =
      driver.cuMemHostAlloc(&memory->host_, bytes, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
  if (allocated == CUDA_ERROR_OUT_OF_MEMORY) {
    memory->host_ = nullptr;
    return base::Status(EXPERTD_REASON_POOL_EXHAUSTED,
                        "the host has no " + std::to_string(bytes) + " bytes of memory to pin");
  }
  EXPERTD_RETURN_IF_ERROR(driver.check(allocated, "cuMemHostAlloc"));
  std::memset(memory->host_, 0, bytes);
  EXPERTD_DRIVER_CALL(driver, cuMemHostGetDevicePointer(&memory->device_, memory->host_, 0));
  return memory;
}

PinnedMemory::~PinnedMemory() {
  if (host_ == nullptr) {
    return;
  }
  if (closer_ != nullptr) {
    closer_->free_host_later(context_, host_);
    return;
  }
  const ScopedContext current(driver_, context_);
  driver_.cuMemFreeHost(host_);
}

}  // namespace expertd::device::cuda
