// SPDX-License-Identifier: Apache-2.0
// NCCL as far as an all-to-all needs it, loaded at run time because it may not be there: $EXPERTD_NCCL_LIBRARY, else
// libnccl.so.2. Made and ended by the main thread, which owns it; a rank's thread sends and receives with its own rank.
// Failures are thrown as std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace expertd::bench {

class Nccl {
 public:
  /// A rank on each of these GPUs. Null, with the reason in `problem`, when there is no library.
  static std::unique_ptr<Nccl> open(const std::vector<int>& devices, std::string* problem);
  ~Nccl();
  Nccl(const Nccl&) = delete;
  Nccl& operator=(const Nccl&) = delete;

  /// "2.27.7".
  std::string version() const;
  void group_begin() const;
  void group_end() const;
  struct Peer {
    uint32_t rank;
    uint32_t peer;
  };
  void send(const Peer& to, const void* data, uint64_t bytes, cudaStream_t stream) const;
  void receive(const Peer& from, void* data, uint64_t bytes, cudaStream_t stream) const;

 private:
  struct Functions;

  Nccl();
  void check(int result, const char* what) const;

  std::unique_ptr<Functions> functions_;
  std::vector<void*> communicators_;  // by rank
};

}  // namespace expertd::bench
