// SPDX-License-Identifier: Apache-2.0
// Commands from a GPU to a thread of the host, as the capture lanes and chains of groups over nodes tell the loop of a
// device: a word of pinned memory that a kernel stores with release. One thread; what it points to outlives the kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace expertd::bench {

/// In pinned memory; each side writes a line of its own.
struct PushPage {
  alignas(128) uint64_t command = 0;  // numbers from 1
  uint64_t payload = 0;               // kPushPayload times the command, written before it
  uint64_t stamp_ns = 0;              // globaltimer of stamp_timer()
  alignas(128) uint64_t answer = 0;   // the last command that was seen
  alignas(128) uint64_t failed = 0;   // a command whose answer did not come, or was another
};

/// Times the command: its payload.
inline constexpr uint64_t kPushPayload = 0x9e3779b97f4a7c15ULL;

/// One thread sends commands first .. first + count - 1, each when the one before was answered and `pause_ns` passed.
struct PushJob {
  PushPage* page = nullptr;
  uint64_t first = 1;
  uint32_t count = 0;
  uint64_t pause_ns = 0;
  /// Device memory, per command.
  uint64_t* sent_ns = nullptr;      // globaltimer before the store
  uint64_t* seen_ns = nullptr;      // and behind the answer
  uint64_t* trip_cycles = nullptr;  // between the two
};

cudaError_t launch_push_commands(const PushJob& job, cudaStream_t stream);
/// Writes globaltimer as its last store.
cudaError_t launch_stamp_timer(PushPage* page, cudaStream_t stream);
/// The smallest step that globaltimer made in some thousand reads, into device memory.
cudaError_t launch_timer_step(uint64_t* step_ns, cudaStream_t stream);

}  // namespace expertd::bench
