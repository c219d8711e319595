// SPDX-License-Identifier: Apache-2.0
// What a serving process brings to its session on a GPU: a context, a stream, memory of every kind that can be handed
// over, and a gate that holds the stream back until it is told. Of the client program (process_client.cc), one thread.
// Nothing is freed: the process ends soon, and a free may wait for a stream that is held back on purpose.
#pragma once

#include <cstdint>
#include <string>

namespace expertd::device_test {

class ClientGpu {
 public:
  /// All return what failed, empty for success.
  std::string open(int ordinal);
  bool is_open() const { return ordinal_ >= 0; }
  int ordinal() const { return ordinal_; }
  void* stream() const { return stream_; }

  /// "malloc": cudaMalloc; "vmm": cuMemCreate, exportable as a descriptor; "private": cuMemCreate, not exportable.
  std::string allocate(const std::string& kind, uint64_t bytes, void** data);
  /// Page-locked, so that copies do not block the thread.
  std::string allocate_host(uint64_t bytes, void** data);

  /// Work issued on the stream from now on waits for open_gate().
  std::string close_gate();
  void open_gate();
  /// cudaStreamSynchronize: blocks for as long as it takes; "cudaSuccess" or the error's name.
  std::string synchronize();
  /// A kernel stores to an address that nobody has; the error's name.
  std::string store_to_nowhere();

 private:
  std::string allocate_vmm(bool exportable, uint64_t bytes, void** data);

  int ordinal_ = -1;
  void* stream_ = nullptr;
};

/// " count=2 mps=0 uuid0=GPU-... uuid1=..." of what this process sees; what failed in `problem`.
std::string list_gpus(std::string* problem);
/// " free0=BYTES total0=BYTES ...". Keeps a context on every GPU from the first call on.
std::string free_memory(std::string* problem);

}  // namespace expertd::device_test
