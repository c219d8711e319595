// SPDX-License-Identifier: Apache-2.0
// The one file that loads libcuda: the driver's functions, finding the device, mapping the daemon's memory and
// exporting the caller's. Callers' threads.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "client/src/cuda_side.h"

namespace expertd::client {
namespace {

using cuda::Driver;
using cuda::kSuccess;
using cuda::Pointer;

std::string uuid_text(const cuda::Uuid& uuid) {
  std::string text = "GPU-";
  for (size_t i = 0; i < sizeof(uuid.bytes); ++i) {
    text += i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "";
    text += format("%02x", uuid.bytes[i]);
  }
  return text;
}

}  // namespace

Status load_driver(Driver* driver) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return error(EXPERTD_REASON_NO_GPU, "libcuda.so.1 cannot be loaded: %s", dlerror());
  }
  // It stays loaded: other libraries of the process use it too.
  const char* missing = nullptr;
#define EXPERTD_CUDA_LOAD(member, name, arguments)                                   \
  driver->member = reinterpret_cast<decltype(driver->member)>(dlsym(library, name)); \
  missing = driver->member == nullptr && missing == nullptr ? name : missing;
  EXPERTD_CUDA_FUNCTIONS(EXPERTD_CUDA_LOAD)
#undef EXPERTD_CUDA_LOAD
  if (missing != nullptr) {
    return error(EXPERTD_REASON_UNSUPPORTED, "the GPU driver has no %s; CUDA 12 or newer is needed", missing);
  }
  return {};
}

Status cuda_error(const Driver& driver, const char* call, cuda::Result result) {
  const char* name = nullptr;
  if (driver.get_error_name(result, &name) != kSuccess || name == nullptr) {
    name = "unknown";
  }
  return error(EXPERTD_REASON_CUDA, "%s: %s (%d)", call, name, result);
}

Status CudaSide::open(const std::string& device) {
  Status status = load_driver(&driver_);
  if (!status.ok()) {
    return status;
  }
  int count = 0;
  cuda::Result result = driver_.init(0);
  if (result != kSuccess || driver_.device_get_count(&count) != kSuccess || count == 0) {
    return error(EXPERTD_REASON_NO_GPU, "%s", cuda_error(driver_, "cuInit", result).text.c_str());
  }
  status = find_device(device, count);
  if (status.ok()) {
    status = check("cuDevicePrimaryCtxRetain", driver_.primary_retain(&context_, device_));
  }
  if (!status.ok()) {
    return status;
  }
  const Current current(this);
  cuda::AllocationProperties properties{};
  properties.type = cuda::kAllocationPinned;
  properties.requested_handle_types = cuda::kHandlePosixFd;
  properties.location = {cuda::kLocationDevice, device_};
  size_t granularity = 0;
  status =
      check("cuMemGetAllocationGranularity", driver_.granularity(&granularity, &properties, cuda::kGranularityMinimum));
  granularity_ = granularity;
  return status;
}

Status CudaSide::find_device(const std::string& device, int count) {
  const bool by_ordinal = device.rfind("cuda:", 0) == 0;
  char* end = nullptr;
  const long wanted = by_ordinal ? strtol(device.c_str() + 5, &end, 10) : -1;
  if (by_ordinal && (end == device.c_str() + 5 || *end != '\0' || wanted < 0 || wanted >= count)) {
    return error(EXPERTD_REASON_NO_SUCH_DEVICE, "device = \"%s\", allowed \"cuda:0\"..\"cuda:%d\"", device.c_str(),
                 count - 1);
  }
  for (int i = 0; i < count; ++i) {
    cuda::Uuid uuid{};
    cuda::Device candidate = -1;
    if (driver_.device_get(&candidate, i) != kSuccess || driver_.device_get_uuid_v2(&uuid, candidate) != kSuccess) {
      continue;
    }
    if (by_ordinal ? i == wanted : uuid_text(uuid) == device) {
      ordinal_ = i;
      device_ = candidate;
      uuid_ = uuid_text(uuid);
      return check_not_mig(i);
    }
  }
  return error(EXPERTD_REASON_NO_SUCH_DEVICE, "device = \"%s\" is not among the %d GPUs of this process",
               device.c_str(), count);
}

// The first form of the call names the GPU, the second one the instance.
Status CudaSide::check_not_mig(int ordinal) const {
  cuda::Uuid whole{};
  cuda::Uuid instance{};
  Status status = check("cuDeviceGetUuid", driver_.device_get_uuid(&whole, device_));
  if (status.ok()) {
    status = check("cuDeviceGetUuid_v2", driver_.device_get_uuid_v2(&instance, device_));
  }
  if (status.ok() && memcmp(&whole, &instance, sizeof(whole)) != 0) {
    return error(EXPERTD_REASON_MIG_UNSUPPORTED, "cuda:%d is a MIG instance; peer access needs whole GPUs", ordinal);
  }
  return status;
}

CudaSide::~CudaSide() {
  if (context_ == nullptr) {
    return;
  }
  {
    const Current current(this);
    if (flags_.data != nullptr) {
      retired_flags_.push_back(flags_);
    }
    // Every wait of the library has been released; a page must not go before the streams have passed them.
    if (!retired_flags_.empty() && driver_.context_synchronize() == kSuccess) {
      for (const MappedWindow& page : retired_flags_) {
        unmap_window(page);
      }
    }
    kernels_.reset();
    if (module_ != nullptr) {
      driver_.module_unload(module_);
    }
    if (receive_stream_ != nullptr) {
      driver_.stream_destroy(receive_stream_);
    }
    if (abort_stream_ != nullptr) {
      driver_.stream_destroy(abort_stream_);
    }
    if (abort_word_ != nullptr) {
      driver_.host_free(abort_word_);
    }
  }
  driver_.primary_release(device_);
}

Status CudaSide::map_fd(int fd, uint64_t bytes, Pointer at, MappedWindow* mapped) {
  cuda::Allocation allocation = 0;
  void* handle = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  Status status =
      check("cuMemImportFromShareableHandle", driver_.import_handle(&allocation, handle, cuda::kHandlePosixFd));
  if (!status.ok()) {
    return status;
  }
  status = map_allocation(allocation, (bytes + granularity_ - 1) / granularity_ * granularity_, at, mapped);
  // The mapping keeps the memory.
  driver_.release_handle(allocation);
  return status;
}

Status CudaSide::map_allocation(cuda::Allocation allocation, uint64_t bytes, Pointer at, MappedWindow* mapped) {
  Pointer address = at;
  Status status;
  if (address == 0) {
    status = check("cuMemAddressReserve", driver_.reserve(&address, bytes, 0, 0, 0));
  }
  if (!status.ok()) {
    return status;
  }
  status = check("cuMemMap", driver_.map(address, bytes, 0, allocation, 0));
  if (status.ok()) {
    const cuda::AccessDescription access = {{cuda::kLocationDevice, device_}, cuda::kAccessReadWrite};
    status = check("cuMemSetAccess", driver_.set_access(address, bytes, &access, 1));
    if (!status.ok()) {
      driver_.unmap(address, bytes);
    }
  }
  if (!status.ok()) {
    driver_.unreserve(address, bytes);
    return status;
  }
  *mapped = {to_data(address), bytes, 1};
  return {};
}

Status CudaSide::map_window(OwnedFd fd, uint64_t bytes, const MappedWindow& at, MappedWindow* mapped) {
  const Current current(this);
  const uint64_t rounded = (bytes + granularity_ - 1) / granularity_ * granularity_;
  Pointer address = 0;
  if (at.data != nullptr && at.bytes == rounded) {
    // The same addresses as before the re-attach, so that the caller's pointers stay good.
    address = to_pointer(at.data);
    driver_.unmap(address, at.bytes);
  } else if (at.data != nullptr) {
    unmap_window(at);
  }
  return map_fd(fd.get(), bytes, address, mapped);
}

void CudaSide::unmap_window(const MappedWindow& mapped) {
  if (mapped.data == nullptr) {
    return;
  }
  const Current current(this);
  driver_.unmap(to_pointer(mapped.data), mapped.bytes);
  driver_.unreserve(to_pointer(mapped.data), mapped.bytes);
}

Status CudaSide::allocation_of(const void* data, void** base, uint64_t* bytes) {
  const Current current(this);
  Pointer address = 0;
  size_t size = 0;
  Status status = check("cuMemGetAddressRange", driver_.mem_address_range(&address, &size, to_pointer(data)));
  if (!status.ok()) {
    return error(EXPERTD_REASON_WRONG_DEVICE_KIND, "not memory of %s (%s)", uuid_.c_str(), status.text.c_str());
  }
  *base = to_data(address);
  *bytes = size;
  return {};
}

Status CudaSide::buffer_id(const void* data, uint64_t* id) {
  const Current current(this);
  unsigned long long value = 0;
  const cuda::Result result = driver_.pointer_attribute(&value, cuda::kAttributeBufferId, to_pointer(data));
  // Freed memory has no id: 0 differs from every id, so that the caller registers anew and learns why it cannot.
  *id = result == kSuccess ? value : 0;
  return {};
}

Status CudaSide::export_memory(const void* data, uint64_t bytes, bool same_pid, ExportedMemory* exported) {
  void* base = nullptr;
  uint64_t size = 0;
  Status status = allocation_of(data, &base, &size);
  if (!status.ok()) {
    return status;
  }
  exported->offset = to_pointer(data) - to_pointer(base);
  if (bytes > size - exported->offset) {
    return range_error(EXPERTD_REASON_OUT_OF_BOUNDS, "bytes", static_cast<int64_t>(bytes), 1,
                       static_cast<int64_t>(size - exported->offset));
  }
  status = buffer_id(data, &exported->buffer_id);
  const Current current(this);
  int legacy = 0;
  const cuda::Result asked = driver_.pointer_attribute(&legacy, cuda::kAttributeIsLegacyIpcCapable, to_pointer(base));
  if (asked != kSuccess || legacy == 0) {
    return export_descriptor(to_pointer(base), size, exported);
  }
  if (same_pid) {
    return error(EXPERTD_REASON_IPC_SAME_PID,
                 "client and daemon both have the local pid %d; use expertd_alloc or a window", getpid());
  }
  cuda::IpcHandle handle{};
  status = check("cuIpcGetMemHandle", driver_.ipc_get_handle(&handle, to_pointer(base)));
  exported->has_ipc_handle = status.ok();
  memcpy(exported->ipc_handle, handle.bytes, sizeof(handle.bytes));
  return status;
}

Status CudaSide::export_descriptor(Pointer base, uint64_t bytes, ExportedMemory* exported) {
  cuda::Allocation allocation = 0;
  int fd = -1;
  cuda::Result result = driver_.retain_handle(&allocation, to_data(base));
  if (result == kSuccess) {
    result = driver_.export_handle(&fd, allocation, cuda::kHandlePosixFd, 0);
    driver_.release_handle(allocation);
  }
  if (result != kSuccess || fd < 0) {
    return error(EXPERTD_REASON_IPC_HANDLE_VMM,
                 "the memory at %p was not allocated exportable (%s); use expertd_alloc or a window", to_data(base),
                 cuda_error(driver_, "cuMemExportToShareableHandle", result).text.c_str());
  }
  exported->fd = OwnedFd(fd);
  exported->allocation_bytes = bytes;
  return {};
}

Status create_cuda_side(const std::string& device, std::unique_ptr<DeviceSide>* side) {
  auto made = std::make_unique<CudaSide>();
  Status status = made->open(device);
  if (status.ok()) {
    *side = std::move(made);
  }
  return status;
}

}  // namespace expertd::client
