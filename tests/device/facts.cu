// SPDX-License-Identifier: Apache-2.0
// Facts that the daemon's CUDA device relies on, asked of the driver: what may run while a stream is parked in a wait,
// and whether the rescue stream reaches parked streams. Each probe runs in a child of its own with a time limit and
// says every observation when it is made, so that a hang costs seconds and what was seen before it stays. Lines that
// begin with "fact" are the outcome. Needs one GPU. Not a test: nothing passes or fails.
#include <cuda.h>
#include <cuda_runtime.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr double kLimitMs = 10'000;                        // of a probe
constexpr double kDeathMs = 5'000;                         // of a probe that was killed
constexpr auto kSettle = std::chrono::milliseconds(200);   // a call that does not block is back by then
constexpr auto kParked = std::chrono::milliseconds(1000);  // launches are watched this long before the release
constexpr double kAfterMs = 3'000;                         // and everything this long after it
constexpr uint64_t kAbort = 0x7fffffffffffffffull;

using Clock = std::chrono::steady_clock;

double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

/// A line, at once.
__attribute__((format(printf, 1, 2))) void say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::putchar('\n');
  std::fflush(stdout);
}

void need(bool ok, const char* what) {
  if (!ok) {
    say("  (cannot run: %s failed)", what);
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
  uint64_t* source = nullptr;     // pinned
  uint64_t* host_word = nullptr;  // pinned, a word to park behind that needs no call to be released

  Bench() {
    need(cudaSetDevice(0) == cudaSuccess && cudaFree(nullptr) == cudaSuccess, "cudaSetDevice");
    words = make_vmm();
    need(cudaMemset(reinterpret_cast<void*>(words.address), 0, words.bytes) == cudaSuccess, "memset");
    need(cudaMallocHost(&source, 4096) == cudaSuccess, "pinned memory");
    need(cudaMallocHost(&host_word, 4096) == cudaSuccess, "pinned memory");
    *host_word = 0;
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
  void park_behind_host_word(CUstream stream) {
    const auto address = reinterpret_cast<CUdeviceptr>(host_word);  // one address space
    need(cuStreamWaitValue64(stream, address, 1, CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS, "wait on a host word");
    touch<<<1, 1, 0, stream>>>(word(0));
  }
  void release_by_store() const { std::atomic_ref<uint64_t>(*host_word).store(kAbort); }
  void release_by_copy(uint64_t i) { cuMemcpyHtoDAsync(reinterpret_cast<CUdeviceptr>(word(i)), source, 8, rescue); }
};

enum class Word { kDevice, kHost };

const char* name_of(Word word) {
  return word == Word::kDevice ? "device word, released by a copy" : "host word, released by a store";
}

/// When each call came back, in ms since the probe's begin; below 0: not yet.
struct Seen {
  std::atomic<double> blocking{-1};
  std::atomic<double> launch{-1};
  std::atomic<double> query{-1};
  std::atomic<double> release{-1};
  std::atomic<double> drained{-1};
};

template <typename Call>
void in_thread(const char* what, Clock::time_point begin, std::atomic<double>* when, Call call) {
  std::thread([=] {
    cudaSetDevice(0);
    const auto called = Clock::now();
    call();
    when->store(ms_since(begin));
    say("    %s returned after %.2f ms", what, ms_since(called));
  }).detach();
}

const char* verdict(double when, double released) {
  return when < 0 ? "NEVER" : when < released ? "before the release" : "only after the release";
}

/// Runs `blocking` in a thread of its own while a stream is parked, and launches from another one meanwhile. Ends the
/// process: threads that hang cannot be joined.
template <typename Blocking>
void beside_parked(const char* name, Word word, Bench* bench, Blocking blocking) {
  static Seen seen;  // threads that hang outlive this frame
  say("  %s beside a parked stream (%s)", name, name_of(word));
  word == Word::kDevice ? bench->park(bench->parked, 2) : bench->park_behind_host_word(bench->parked);
  const auto begin = Clock::now();
  in_thread(name, begin, &seen.blocking, blocking);
  std::this_thread::sleep_for(kSettle);
  say("    after %.0f ms the call %s", ms_since(begin), seen.blocking < 0 ? "is still inside" : "has returned");
  in_thread("a launch from another thread", begin, &seen.launch,
            [bench] { touch<<<1, 1, 0, bench->free_stream>>>(bench->word(1)); });
  in_thread("a memory operation and a query of a third", begin, &seen.query, [bench] {
    CUstreamBatchMemOpParams op{};
    op.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    op.writeValue.address = reinterpret_cast<CUdeviceptr>(bench->word(3));
    op.writeValue.value64 = 7;
    cuStreamBatchMemOp(bench->rescue, 1, &op, 0);
    cuStreamQuery(bench->rescue);
  });
  std::this_thread::sleep_for(kParked);
  say("    before the release the launch %s, the memory operation %s", seen.launch < 0 ? "is BLOCKED" : "went through",
      seen.query < 0 ? "is BLOCKED" : "went through");
  const double released = ms_since(begin);
  in_thread("the release", begin, &seen.release,
            [=] { word == Word::kDevice ? bench->release_by_copy(2) : bench->release_by_store(); });
  in_thread("waiting for the parked stream", begin, &seen.drained, [bench] { cudaStreamSynchronize(bench->parked); });
  while (ms_since(begin) < released + kAfterMs && (seen.blocking < 0 || seen.launch < 0 || seen.drained < 0)) {
    usleep(1000);
  }
  say("fact %s, %s: call back %s; launch of another thread back %s; memory operation back %s; stream drained: %s", name,
      name_of(word), verdict(seen.blocking, released), verdict(seen.launch, released), verdict(seen.query, released),
      seen.drained < 0 ? "NO" : "yes");
  _exit(0);
}

void free_beside_parked(Word word) {
  Bench bench;
  void* memory = nullptr;
  need(cudaMalloc(&memory, 1 << 20) == cudaSuccess, "cudaMalloc");
  beside_parked("cudaFree", word, &bench, [=] { cudaFree(memory); });
}

void free_host_beside_parked(Word word) {
  Bench bench;
  void* memory = nullptr;
  need(cudaMallocHost(&memory, 1 << 20) == cudaSuccess, "cudaMallocHost");
  beside_parked("cuMemFreeHost", word, &bench, [=] { cuMemFreeHost(memory); });
}

void unmap_beside_parked(Word word) {
  Bench bench;
  const VmmBlock block = make_vmm();
  beside_parked("cuMemUnmap + release", word, &bench, [=] {
    cuMemUnmap(block.address, block.bytes);
    cuMemRelease(block.handle);
    cuMemAddressFree(block.address, block.bytes);
  });
}

void allocate_beside_parked(Word word) {
  Bench bench;
  beside_parked("VMM create + map + memset", word, &bench, [] {
    const VmmBlock block = make_vmm();
    CUstream stream = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cuMemsetD8Async(block.address, 0, block.bytes, stream);
    cudaStreamSynchronize(stream);
  });
}

void stream_beside_parked(Word word) {
  Bench bench;
  beside_parked("stream create + destroy", word, &bench, [] {
    CUstream stream = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaStreamDestroy(stream);
  });
}

void pinned_beside_parked(Word word) {
  Bench bench;
  beside_parked("pinned allocation", word, &bench, [] {
    void* memory = nullptr;
    cudaMallocHost(&memory, 1 << 20);
  });
}

/// Memory of another process, which stays until this one has ended. Called before this process uses CUDA.
CUipcMemHandle memory_of_another_process() {
  int handles[2] = {-1, -1};
  need(pipe(handles) == 0, "pipe");
  const pid_t owner = fork();
  if (owner == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    CUipcMemHandle handle{};
    void* memory = nullptr;
    need(cudaSetDevice(0) == cudaSuccess && cudaMalloc(&memory, 8 << 20) == cudaSuccess, "cudaMalloc");
    need(cuIpcGetMemHandle(&handle, reinterpret_cast<CUdeviceptr>(memory)) == CUDA_SUCCESS, "cuIpcGetMemHandle");
    need(write(handles[1], &handle, sizeof(handle)) == sizeof(handle), "write");
    for (;;) {
      pause();
    }
  }
  close(handles[1]);
  CUipcMemHandle handle{};
  need(owner > 0 && read(handles[0], &handle, sizeof(handle)) == sizeof(handle), "reading the handle");
  return handle;
}

void ipc_open_beside_parked(Word word) {
  const CUipcMemHandle handle = memory_of_another_process();
  Bench bench;
  beside_parked("cuIpcOpenMemHandle", word, &bench, [=] {
    CUdeviceptr address = 0;
    const CUresult opened = cuIpcOpenMemHandle(&address, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    say("    it said %d", opened);
  });
}

void ipc_close_beside_parked(Word word) {
  const CUipcMemHandle handle = memory_of_another_process();
  Bench bench;
  CUdeviceptr address = 0;
  need(cuIpcOpenMemHandle(&address, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) == CUDA_SUCCESS, "cuIpcOpenMemHandle");
  beside_parked("cuIpcCloseMemHandle", word, &bench, [=] { cuIpcCloseMemHandle(address); });
}

/// `count` streams, each parked behind its own word, released together from the rescue stream.
void release_many(uint32_t count, bool by_copy) {
  Bench bench;
  std::vector<CUstream> streams(count);
  for (uint32_t i = 0; i < count; ++i) {
    need(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking) == cudaSuccess, "stream");
    bench.park(streams[i], 8 + i);
  }
  const char* const how = by_copy ? "copies" : "memory operations";
  say("  %u streams are parked, to be released by %s", count, how);
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
  say("    all releases were sent after %.2f ms", sent);
  uint32_t done = 0;
  while (done < count && ms_since(begin) < 5000) {
    done = 0;
    for (const CUstream stream : streams) {
      done += cudaStreamQuery(stream) == cudaSuccess ? 1 : 0;
    }
  }
  say("fact %u parked streams released by %s: sent in %.2f ms, %u of %u drained after %.2f ms", count, how, sent, done,
      count, ms_since(begin));
  _exit(0);  // parked streams that are left would block the exit
}

/// A chain of the daemon's length behind one wait, many times on one stream.
void queue_depth(uint32_t entries) {
  static std::atomic<uint32_t> queued{0};  // a thread that hangs outlives this frame
  Bench bench;
  std::thread([&bench, entries] {
    cudaSetDevice(0);
    bench.park(bench.parked, 2);
    for (uint32_t i = 0; i < entries; ++i) {
      touch<<<1, 1, 0, bench.parked>>>(bench.word(0));
      queued = i + 1;
    }
  }).detach();
  std::this_thread::sleep_for(kParked);
  const uint32_t before = queued;
  say("fact %u kernels behind a wait: %u were queued before its release", entries, before);
  bench.release_by_copy(2);
  const auto begin = Clock::now();
  while (queued < entries && ms_since(begin) < kAfterMs) {
    usleep(1000);
  }
  say("    and %u within %.0f ms of it", queued.load(), ms_since(begin));
  _exit(0);
}

void attributes() {
  Bench bench;
  const auto get = [](CUdevice_attribute which) {
    int value = -1;
    cuDeviceGetAttribute(&value, which, 0);
    return value;
  };
  say("fact attributes: 64-bit memory operations %d, flush of remote writes %d, MPS client %d, VMM %d",
      get(CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS), get(CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES),
      get(CU_DEVICE_ATTRIBUTE_MPS_ENABLED), get(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED));
  _exit(0);
}

/// False when it has not ended in time.
bool ends_within(pid_t child, double limit_ms, int* status) {
  const auto begin = Clock::now();
  while (waitpid(child, status, WNOHANG) == 0) {
    if (ms_since(begin) > limit_ms) {
      return false;
    }
    usleep(10000);
  }
  return true;
}

template <typename Probe>
void in_child(const char* name, Probe probe) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    probe();
    _exit(0);
  }
  int status = 0;
  if (ends_within(child, kLimitMs, &status)) {
    if (status != 0) {
      say("fact %s: ended with status %x", name, static_cast<unsigned>(status));
    }
    return;
  }
  say("fact %s: HUNG for %.0f s and is killed", name, kLimitMs / 1e3);
  kill(child, SIGKILL);
  if (!ends_within(child, kDeathMs, &status)) {
    say("fact %s: does not even end when it is killed", name);
  }
}

struct Named {
  const char* name;
  void (*probe)(Word word);
};

}  // namespace

int main() {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  in_child("attributes", attributes);
  // The daemon's words lie in device memory. A host word needs no call to be released, so that what follows the release
  // is seen even where the copy does not get through.
  for (const Named& it :
       {Named{"cudaFree", free_beside_parked}, Named{"cuIpcCloseMemHandle", ipc_close_beside_parked},
        Named{"cuIpcOpenMemHandle", ipc_open_beside_parked}, Named{"cuMemFreeHost", free_host_beside_parked}}) {
    in_child(it.name, [&it] { it.probe(Word::kDevice); });
    in_child(it.name, [&it] { it.probe(Word::kHost); });
  }
  for (const Named& it :
       {Named{"cuMemUnmap", unmap_beside_parked}, Named{"VMM create", allocate_beside_parked},
        Named{"stream create", stream_beside_parked}, Named{"pinned allocation", pinned_beside_parked}}) {
    in_child(it.name, [&it] { it.probe(Word::kDevice); });
  }
  for (const uint32_t count : {24u, 31u, 64u}) {
    in_child("release by copies", [count] { release_many(count, true); });
    in_child("release by memory operations", [count] { release_many(count, false); });
  }
  in_child("queue of 256", [] { queue_depth(256); });
  in_child("queue of 512", [] { queue_depth(512); });
  return 0;
}
