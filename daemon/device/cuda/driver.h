// SPDX-License-Identifier: Apache-2.0
// The CUDA driver API through dlopen, so that the daemon starts on machines without a driver. One table, filled once by
// Driver::load() in main before any thread and never changed; every call may come from any thread. Names are those of
// cuda.h, so that its own macros choose the versioned entry points. Owns nothing; the library stays loaded.
#pragma once

#include <cuda.h>

#include <string>

#include "daemon/base/status.h"

// clang-format off
#define EXPERTD_DRIVER_FUNCTIONS(X)                                                                     \
  X(cuInit) X(cuDriverGetVersion) X(cuGetErrorName) X(cuGetErrorString)                                 \
  X(cuDeviceGetCount) X(cuDeviceGet) X(cuDeviceGetName) X(cuDeviceGetUuid) X(cuDeviceGetAttribute)      \
  X(cuDeviceCanAccessPeer) X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease)                     \
  X(cuCtxPushCurrent) X(cuCtxPopCurrent) X(cuCtxGetStreamPriorityRange)                                 \
  X(cuStreamCreateWithPriority) X(cuStreamDestroy) X(cuStreamQuery) X(cuStreamSynchronize)              \
  X(cuStreamWaitValue64) X(cuStreamWriteValue64) X(cuStreamBatchMemOp)                                  \
  X(cuMemHostAlloc) X(cuMemFreeHost) X(cuMemHostGetDevicePointer) X(cuMemsetD8Async) X(cuMemcpyAsync)   \
  X(cuMemcpyHtoDAsync) X(cuMemHostRegister)                                                             \
  X(cuMemGetAllocationGranularity) X(cuMemCreate) X(cuMemRelease) X(cuMemAddressReserve)                \
  X(cuMemAddressFree) X(cuMemMap) X(cuMemUnmap) X(cuMemSetAccess) X(cuMemExportToShareableHandle)       \
  X(cuMemImportFromShareableHandle) X(cuMemGetAllocationPropertiesFromHandle)                           \
  X(cuIpcOpenMemHandle) X(cuIpcCloseMemHandle) X(cuMemGetAddressRange) X(cuMemGetInfo)
// clang-format on

namespace expertd::device::cuda {

struct Driver {
#define EXPERTD_DRIVER_MEMBER(name) decltype(&::name) name = nullptr;
  EXPERTD_DRIVER_FUNCTIONS(EXPERTD_DRIVER_MEMBER)
#undef EXPERTD_DRIVER_MEMBER

  /// The table of this process. NO_GPU when there is no driver library or it lacks a function (named in the message).
  static base::Result<const Driver*> load();

  /// Empty for success, else CUDA with "call: ERROR_NAME (text)".
  base::Status check(CUresult result, const char* call) const;
};

/// Makes a context current for one scope. Every entry into a device from another thread needs one.
class ScopedContext {
 public:
  ScopedContext(const Driver& driver, CUcontext context) : driver_(driver) {
    pushed_ = driver_.cuCtxPushCurrent(context) == CUDA_SUCCESS;
  }
  ~ScopedContext() {
    CUcontext popped = nullptr;
    if (pushed_) {
      driver_.cuCtxPopCurrent(&popped);
    }
  }
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;
  bool ok() const { return pushed_; }

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

}  // namespace expertd::device::cuda

/// Evaluates a driver call and returns its Status from the calling function when it failed.
#define EXPERTD_DRIVER_CALL(driver, call)            \
  do {                                               \
    const CUresult expertd_result_ = (driver).call;  \
    if (expertd_result_ != CUDA_SUCCESS) {           \
      return (driver).check(expertd_result_, #call); \
    }                                                \
  } while (false)
