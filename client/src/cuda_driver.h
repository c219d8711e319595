// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA driver interface that the library uses, declared here because no toolkit is needed to build it:
// types, constants of cuda.h by value, and the table of functions that cuda_import.cc fills from libcuda.so.1. Included
// by cuda_side.h and the local kernels only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "client/src/status.h"

namespace expertd::client::cuda {

using Result = int;
using Device = int;
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;
using Pointer = unsigned long long;
using Allocation = unsigned long long;

struct Uuid {
  unsigned char bytes[16];
};
struct IpcHandle {
  unsigned char bytes[64];
};
struct Location {
  int type;
  int id;
};
struct AccessDescription {
  Location location;
  int flags;
};
/// A word to wait for (WAIT_64) or to write (WRITE_64): CUstreamBatchMemOpParams.
struct WordOperation {
  int operation;
  Pointer address;
  uint64_t value;
  unsigned flags;
  Pointer alias;
  uint64_t padding;
};
static_assert(sizeof(WordOperation) == 48);
struct AllocationProperties {
  int type;
  int requested_handle_types;
  Location location;
  void* win32_metadata;
  struct {
    unsigned char compression_type;
    unsigned char rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};
static_assert(sizeof(AllocationProperties) == 32 && sizeof(AccessDescription) == 12);

inline constexpr Result kSuccess = 0;
inline constexpr Result kNotReady = 600;
inline constexpr Result kStreamCaptureImplicit = 906;
inline constexpr int kLocationDevice = 1;
inline constexpr int kAccessReadWrite = 3;
inline constexpr int kHandlePosixFd = 1;
inline constexpr int kAllocationPinned = 1;
inline constexpr int kGranularityMinimum = 0;
inline constexpr int kAttributeBufferId = 7;
inline constexpr int kAttributeDeviceOrdinal = 9;
inline constexpr int kAttributeIsLegacyIpcCapable = 10;
inline constexpr unsigned kWaitGreaterOrEqual = 0;
inline constexpr int kWordWait = 4;
inline constexpr int kWordWrite = 5;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr int kCaptureModeRelaxed = 2;

// X(member, name in libcuda, arguments)
#define EXPERTD_CUDA_FUNCTIONS(X)                                                                \
  X(init, "cuInit", (unsigned))                                                                  \
  X(get_error_name, "cuGetErrorName", (Result, const char**))                                    \
  X(device_get_count, "cuDeviceGetCount", (int*))                                                \
  X(device_get, "cuDeviceGet", (Device*, int))                                                   \
  X(device_get_uuid, "cuDeviceGetUuid", (Uuid*, Device))                                         \
  X(device_get_uuid_v2, "cuDeviceGetUuid_v2", (Uuid*, Device))                                   \
  X(primary_retain, "cuDevicePrimaryCtxRetain", (Context*, Device))                              \
  X(primary_release, "cuDevicePrimaryCtxRelease_v2", (Device))                                   \
  X(push, "cuCtxPushCurrent_v2", (Context))                                                      \
  X(pop, "cuCtxPopCurrent_v2", (Context*))                                                       \
  X(context_synchronize, "cuCtxSynchronize", ())                                                 \
  X(mem_address_range, "cuMemGetAddressRange_v2", (Pointer*, size_t*, Pointer))                  \
  X(ipc_get_handle, "cuIpcGetMemHandle", (IpcHandle*, Pointer))                                  \
  X(pointer_attribute, "cuPointerGetAttribute", (void*, int, Pointer))                           \
  X(import_handle, "cuMemImportFromShareableHandle", (Allocation*, void*, int))                  \
  X(export_handle, "cuMemExportToShareableHandle", (void*, Allocation, int, unsigned long long)) \
  X(retain_handle, "cuMemRetainAllocationHandle", (Allocation*, void*))                          \
  X(release_handle, "cuMemRelease", (Allocation))                                                \
  X(granularity, "cuMemGetAllocationGranularity", (size_t*, const AllocationProperties*, int))   \
  X(reserve, "cuMemAddressReserve", (Pointer*, size_t, size_t, Pointer, unsigned long long))     \
  X(unreserve, "cuMemAddressFree", (Pointer, size_t))                                            \
  X(map, "cuMemMap", (Pointer, size_t, size_t, Allocation, unsigned long long))                  \
  X(unmap, "cuMemUnmap", (Pointer, size_t))                                                      \
  X(set_access, "cuMemSetAccess", (Pointer, size_t, const AccessDescription*, size_t))           \
  X(mem_alloc, "cuMemAlloc_v2", (Pointer*, size_t))                                              \
  X(mem_free, "cuMemFree_v2", (Pointer))                                                         \
  X(memset_async, "cuMemsetD8Async", (Pointer, unsigned char, size_t, Stream))                   \
  X(host_alloc, "cuMemHostAlloc", (void**, size_t, unsigned))                                    \
  X(host_free, "cuMemFreeHost", (void*))                                                         \
  X(copy_async, "cuMemcpyAsync", (Pointer, Pointer, size_t, Stream))                             \
  X(copy_to_device_async, "cuMemcpyHtoDAsync_v2", (Pointer, const void*, size_t, Stream))        \
  X(stream_create, "cuStreamCreate", (Stream*, unsigned))                                        \
  X(stream_destroy, "cuStreamDestroy_v2", (Stream))                                              \
  X(stream_query, "cuStreamQuery", (Stream))                                                     \
  X(stream_is_capturing, "cuStreamIsCapturing", (Stream, int*))                                  \
  X(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", (int*))                          \
  X(stream_write, "cuStreamWriteValue64_v2", (Stream, Pointer, uint64_t, unsigned))              \
  X(stream_wait, "cuStreamWaitValue64_v2", (Stream, Pointer, uint64_t, unsigned))                \
  X(stream_words, "cuStreamBatchMemOp_v2", (Stream, unsigned, WordOperation*, unsigned))         \
  X(module_load, "cuModuleLoadData", (Module*, const void*))                                     \
  X(module_unload, "cuModuleUnload", (Module))                                                   \
  X(module_function, "cuModuleGetFunction", (Function*, Module, const char*))                    \
  X(launch, "cuLaunchKernel",                                                                    \
    (Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**))

struct Driver {
#define EXPERTD_CUDA_MEMBER(member, name, arguments) Result(*member) arguments = nullptr;
  EXPERTD_CUDA_FUNCTIONS(EXPERTD_CUDA_MEMBER)
#undef EXPERTD_CUDA_MEMBER
};

// Makes a context current for a scope and restores the caller's own afterwards.
class CurrentContext {
 public:
  CurrentContext(const Driver* driver, Context context) : driver_(driver), result_(driver->push(context)) {}
  ~CurrentContext() {
    Context before = nullptr;
    if (result_ == kSuccess) {
      driver_->pop(&before);
    }
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const Driver* const driver_;
  const Result result_;
};

// Signal and wait as kernels of one thread, for MPS, where a busy client's stream memory operation waits for its kernel
// boundary. System scope, because the other side is another process and maybe another GPU. Release on the signal orders
// the stream's earlier writes before the word; acquire on the wait orders later reads behind it. The wait ends by the
// signed compare, so that the abort word releases it too. Take waits in the same way and sets the word back to 0.
// Call is signal and then wait or take, which saves a launch.
inline constexpr const char* kWordKernels = R"ptx(
.version 7.0
.target sm_80
.address_size 64

.visible .entry expertd_signal(.param .u64 p_word, .param .u64 p_value)
{
  .reg .b64 %rd<3>;
  ld.param.u64 %rd1, [p_word];
  ld.param.u64 %rd2, [p_value];
  st.release.sys.global.u64 [%rd1], %rd2;
  ret;
}

.visible .entry expertd_call(.param .u64 p_word, .param .u64 p_value, .param .u64 p_end, .param .u64 p_least,
                            .param .u64 p_take)
{
  .reg .b64 %rd<7>;
  .reg .pred %p<3>;
  ld.param.u64 %rd1, [p_word];
  ld.param.u64 %rd2, [p_value];
  ld.param.u64 %rd3, [p_end];
  ld.param.u64 %rd4, [p_least];
  ld.param.u64 %rd5, [p_take];
  st.release.sys.global.u64 [%rd1], %rd2;
AGAIN:
  ld.acquire.sys.global.u64 %rd6, [%rd3];
  setp.ge.s64 %p1, %rd6, %rd4;
  @%p1 bra DONE;
  nanosleep.u32 20;
  bra AGAIN;
DONE:
  setp.eq.u64 %p2, %rd5, 0;
  @%p2 ret;
  mov.b64 %rd6, 0;
  st.relaxed.sys.global.u64 [%rd3], %rd6;
  ret;
}

.visible .entry expertd_wait(.param .u64 p_word, .param .u64 p_value)
{
  .reg .b64 %rd<4>;
  .reg .pred %p<2>;
  ld.param.u64 %rd1, [p_word];
  ld.param.u64 %rd2, [p_value];
AGAIN:
  ld.acquire.sys.global.u64 %rd3, [%rd1];
  setp.ge.s64 %p1, %rd3, %rd2;
  @%p1 bra DONE;
  nanosleep.u32 20;
  bra AGAIN;
DONE:
  ret;
}

.visible .entry expertd_take(.param .u64 p_word, .param .u64 p_value)
{
  .reg .b64 %rd<4>;
  .reg .pred %p<2>;
  ld.param.u64 %rd1, [p_word];
  ld.param.u64 %rd2, [p_value];
AGAIN:
  ld.acquire.sys.global.u64 %rd3, [%rd1];
  setp.ge.s64 %p1, %rd3, %rd2;
  @%p1 bra DONE;
  nanosleep.u32 20;
  bra AGAIN;
DONE:
  mov.b64 %rd3, 0;
  st.relaxed.sys.global.u64 [%rd1], %rd3;
  ret;
}
)ptx";

}  // namespace expertd::client::cuda

namespace expertd::client {

/// Fills the table from libcuda.so.1: NO_GPU, or UNSUPPORTED when it is too old.
Status load_driver(cuda::Driver* driver);
/// "call: NAME (number)" with Reason CUDA.
Status cuda_error(const cuda::Driver& driver, const char* call, cuda::Result result);

}  // namespace expertd::client
