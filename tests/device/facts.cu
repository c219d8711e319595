// SPDX-License-Identifier: Apache-2.0
// Facts that the daemon's CUDA device relies on, asked of the driver: what may run while a stream is parked in a wait,
// and whether the rescue stream reaches parked streams. Each experiment runs in a child of its own with a watchdog, so
// that a hang costs seconds and not the run; one line each. Needs one GPU. Not a test: nothing passes or fails.
#include <cuda.h>
#include <cuda_runtime.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr unsigned kWatchdogSeconds = 20;
constexpr auto kPark = std::chrono::milliseconds(1500);
constexpr uint64_t kAbort = 0x7fffffffffffffffull;

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

void need(bool ok, const char* what) {
  if (!ok) {
    std::printf("  (cannot run: %s failed)\n", what);
    std::fflush(stdout);
    _exit(3);
  }
}

__global__ void touch(uint64_t* word) {
  if (word != nullptr) {
    *word += 1;
  }
}

struct VmmBlock {
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr address = 0;
  size_t bytes = 0;
};

VmmBlock make_vmm() {
  VmmBlock block;
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  need(cuMemGetAllocationGranularity(&block.bytes, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) == CUDA_SUCCESS,
       "granularity");
  need(cuMemCreate(&block.handle, block.bytes, &properties, 0) == CUDA_SUCCESS, "cuMemCreate");
  need(cuMemAddressReserve(&block.address, block.bytes, 0, 0, 0) == CUDA_SUCCESS, "reserve");
  need(cuMemMap(block.address, block.bytes, 0, block.handle, 0) == CUDA_SUCCESS, "map");
  CUmemAccessDesc access{};
  access.location = properties.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  need(cuMemSetAccess(block.address, block.bytes, &access, 1) == CUDA_SUCCESS, "access");
  return block;
}

/// A GPU with one stream parked behind a word, another one free, and a word to touch.
struct Bench {
  CUstream parked = nullptr;
  CUstream free_stream = nullptr;
  CUstream rescue = nullptr;
  VmmBlock words;
  uint64_t* source = nullptr;  // pinned

  Bench() {
    need(cudaSetDevice(0) == cudaSuccess && cudaFree(nullptr) == cudaSuccess, "cudaSetDevice");
    words = make_vmm();
    need(cudaMemset(reinterpret_cast<void*>(words.address), 0, words.bytes) == cudaSuccess, "memset");
    need(cudaMallocHost(&source, 4096) == cudaSuccess, "pinned memory");
    for (CUstream* stream : {&parked, &free_stream, &rescue}) {
      need(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking) == cudaSuccess, "stream");
    }
    touch<<<1, 1, 0, free_stream>>>(word(1));
    need(cudaDeviceSynchronize() == cudaSuccess, "first launch");
    source[0] = kAbort;
  }
  uint64_t* word(uint64_t i) const { return reinterpret_cast<uint64_t*>(words.address + 128 * i); }
  void park(CUstream stream, uint64_t i) {
    const auto address = reinterpret_cast<CUdeviceptr>(word(i));
    need(cuStreamWaitValue64(stream, address, 1, CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS, "wait");
    touch<<<1, 1, 0, stream>>>(word(0));
  }
  void release_by_copy(uint64_t i) { cuMemcpyHtoDAsync(reinterpret_cast<CUdeviceptr>(word(i)), source, 8, rescue); }
};

/// Runs `blocking` in another thread while a stream is parked; says whether it returned before the release, and whether
/// launches from this thread went on meanwhile.
template <typename Blocking>
void beside_parked(const char* name, Bench* bench, Blocking blocking) {
  bench->park(bench->parked, 2);
  std::atomic<bool> returned{false};
  double took = 0;
  std::thread other([&] {
    cudaSetDevice(0);
    const auto begin = Clock::now();
    blocking();
    took = ms_since(begin);
    returned = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const bool early = returned;
  const auto begin = Clock::now();
  std::atomic<bool> launched{false};
  double launch_ms = 0;
  double wait_ms = 0;
  std::thread launcher([&] {
    cudaSetDevice(0);
    touch<<<1, 1, 0, bench->free_stream>>>(bench->word(1));
    launch_ms = ms_since(begin);
    CUstreamBatchMemOpParams op{};
    op.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    op.writeValue.address = reinterpret_cast<CUdeviceptr>(bench->word(3));
    op.writeValue.value64 = 7;
    cuStreamBatchMemOp(bench->free_stream, 1, &op, 0);
    cuStreamQuery(bench->free_stream);
    wait_ms = ms_since(begin);
    launched = true;
  });
  std::this_thread::sleep_for(kPark);
  const bool launch_early = launched;
  bench->release_by_copy(2);
  launcher.join();
  other.join();
  std::printf("%-46s returned %s the release (%.1f ms); meanwhile launch %s (%.2f ms), with memory operation %.2f ms\n",
              name, early ? "before" : "after ", took, launch_early ? "went through" : "BLOCKED", launch_ms, wait_ms);
}

void free_beside_parked() {
  Bench bench;
  void* memory = nullptr;
  need(cudaMalloc(&memory, 1 << 20) == cudaSuccess, "cudaMalloc");
  beside_parked("cudaFree beside a parked stream:", &bench, [&] { cudaFree(memory); });
}

void free_host_beside_parked() {
  Bench bench;
  void* memory = nullptr;
  need(cudaMallocHost(&memory, 1 << 20) == cudaSuccess, "cudaMallocHost");
  beside_parked("cuMemFreeHost beside a parked stream:", &bench, [&] { cuMemFreeHost(memory); });
}

void unmap_beside_parked() {
  Bench bench;
  VmmBlock block = make_vmm();
  beside_parked("cuMemUnmap + release beside a parked stream:", &bench, [&] {
    cuMemUnmap(block.address, block.bytes);
    cuMemRelease(block.handle);
    cuMemAddressFree(block.address, block.bytes);
  });
}

void allocate_beside_parked() {
  Bench bench;
  beside_parked("VMM create + map + memset beside a parked one:", &bench, [&] {
    const VmmBlock block = make_vmm();
    CUstream stream = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cuMemsetD8Async(block.address, 0, block.bytes, stream);
    cudaStreamSynchronize(stream);
  });
}

void stream_beside_parked() {
  Bench bench;
  beside_parked("stream create + destroy beside a parked one:", &bench, [&] {
    CUstream stream = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaStreamDestroy(stream);
  });
}

void pinned_beside_parked() {
  Bench bench;
  beside_parked("pinned allocation beside a parked stream:", &bench, [&] {
    void* memory = nullptr;
    cudaMallocHost(&memory, 1 << 20);
  });
}

/// `count` streams, each parked behind its own word, released together from the rescue stream.
void release_many(uint32_t count, bool by_copy) {
  Bench bench;
  std::vector<CUstream> streams(count);
  for (uint32_t i = 0; i < count; ++i) {
    need(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking) == cudaSuccess, "stream");
    bench.park(streams[i], 8 + i);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const auto begin = Clock::now();
  for (uint32_t i = 0; i < count; ++i) {
    if (by_copy) {
      bench.release_by_copy(8 + i);
    } else {
      cuStreamWriteValue64(bench.rescue, reinterpret_cast<CUdeviceptr>(bench.word(8 + i)), kAbort, 0);
    }
  }
  const double sent = ms_since(begin);
  uint32_t done = 0;
  while (done < count && ms_since(begin) < 5000) {
    done = 0;
    for (const CUstream stream : streams) {
      done += cudaStreamQuery(stream) == cudaSuccess ? 1 : 0;
    }
  }
  std::printf("%3u parked streams released by %-22s sent in %.2f ms, %u of %u drained after %.2f ms\n", count,
              by_copy ? "copies:" : "memory operations:", sent, done, count, ms_since(begin));
  std::fflush(stdout);
  _exit(0);  // parked streams that are left would block the exit
}

/// A chain of the daemon's length behind one wait, many times on one stream.
void queue_depth(uint32_t entries) {
  Bench bench;
  std::atomic<uint32_t> queued{0};
  std::thread filler([&] {
    cudaSetDevice(0);
    bench.park(bench.parked, 2);
    for (uint32_t i = 0; i < entries; ++i) {
      touch<<<1, 1, 0, bench.parked>>>(bench.word(0));
      queued = i + 1;
    }
  });
  std::this_thread::sleep_for(kPark);
  const uint32_t before = queued;
  bench.release_by_copy(2);
  filler.join();
  std::printf("%u kernels behind a wait: %u were queued before its release\n", entries, before);
}

void attributes() {
  Bench bench;
  const auto get = [](CUdevice_attribute which) {
    int value = -1;
    cuDeviceGetAttribute(&value, which, 0);
    return value;
  };
  std::printf("attributes: 64-bit memory operations %d, flush of remote writes %d, MPS client %d, VMM %d\n",
              get(CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS), get(CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES),
              get(CU_DEVICE_ATTRIBUTE_MPS_ENABLED), get(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED));
}

template <typename Experiment>
void in_child(const char* name, Experiment experiment) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    experiment();
    std::fflush(stdout);
    _exit(0);
  }
  int status = 0;
  const auto begin = Clock::now();
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (ms_since(begin) > kWatchdogSeconds * 1000.0) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      std::printf("%-46s HUNG for %u s and was killed\n", name, kWatchdogSeconds);
      return;
    }
    usleep(10000);
  }
  if (status != 0) {
    std::printf("%-46s ended with status %x\n", name, static_cast<unsigned>(status));
  }
}

}  // namespace

int main() {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  in_child("attributes", attributes);
  in_child("cudaFree", free_beside_parked);
  in_child("cuMemFreeHost", free_host_beside_parked);
  in_child("cuMemUnmap", unmap_beside_parked);
  in_child("VMM create", allocate_beside_parked);
  in_child("stream create", stream_beside_parked);
  in_child("pinned allocation", pinned_beside_parked);
  for (const uint32_t count : {24u, 31u, 64u}) {
    in_child("release by copies", [count] { release_many(count, true); });
    in_child("release by memory operations", [count] { release_many(count, false); });
  }
  in_child("queue of 256", [] { queue_depth(256); });
  in_child("queue of 512", [] { queue_depth(512); });
  return 0;
}
