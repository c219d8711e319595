// SPDX-License-Identifier: Apache-2.0
// DeviceSide: what a session needs of its device on the caller's side: mapping windows, handing over the caller's
// memory, and the words on the caller's stream. HostSide maps memfds; the CUDA one is in cuda_import.cc. Any thread;
// release_waiters() by the client thread when the lease is over. Owned by the Session.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "client/src/owned_fd.h"
#include "client/src/status.h"
#include "proto/abi/attach_v1.h"

namespace expertd::client {

struct MappedWindow {
  void* data = nullptr;
  uint64_t bytes = 0;
  /// The device side's own name for the mapping; 0 on the host.
  uint64_t handle = 0;
};

/// The caller's GPU memory, in one of the two forms that can travel.
struct ExportedMemory {
  bool has_ipc_handle = false;
  unsigned char ipc_handle[64] = {};
  OwnedFd fd;
  /// From the start of the underlying allocation to the buffer.
  uint64_t offset = 0;
  uint64_t allocation_bytes = 0;
  uint64_t buffer_id = 0;
};

/// A word of the GPU's memory that a stream waits for, until it is at least `value`, or writes.
struct StreamWord {
  const void* word = nullptr;
  uint64_t value = 0;
  bool writes = false;
};
inline constexpr uint32_t kStreamWordsMax = 40;

class LocalKernels;

class DeviceSide {
 public:
  DeviceSide() = default;
  DeviceSide(const DeviceSide&) = delete;
  DeviceSide& operator=(const DeviceSide&) = delete;
  virtual ~DeviceSide() = default;

  virtual bool is_cuda() const = 0;
  /// What the hello names: "host:0" or the GPU's UUID.
  virtual const std::string& name() const = 0;
  /// At every attach, before the first operation.
  virtual Status begin(const expertd_attach_welcome& welcome, OwnedFd flag_page, uint32_t slots) = 0;
  /// Releases every stream that waits for a completion of the ended session.
  virtual void release_waiters() = 0;

  /// `at` is where it was mapped before a re-attach, or null.
  virtual Status map_window(OwnedFd fd, uint64_t bytes, const MappedWindow& at, MappedWindow* mapped) = 0;
  virtual void unmap_window(const MappedWindow& mapped) = 0;

  virtual Status export_memory(const void* data, uint64_t bytes, bool same_pid, ExportedMemory* exported) = 0;
  /// The identity of the allocation behind a pointer, which a freed and re-used address does not keep.
  virtual Status buffer_id(const void* data, uint64_t* id) = 0;
  /// Extent of the allocation behind a pointer.
  virtual Status allocation_of(const void* data, void** base, uint64_t* bytes) = 0;

  /// Whether the stream is being captured. UNSUPPORTED for the legacy default stream while another one is.
  virtual Status check_stream(expertd_stream_t stream, bool* capturing) = 0;
  /// The words of captured operations (ring_v1.h), into the stream's capture: `entry` into the doorbell; a wait for the
  /// completion that takes it back to 0.
  virtual Status ring_captured(uint32_t words, uint64_t entry, expertd_stream_t stream) = 0;
  virtual Status take_captured(uint32_t words, expertd_stream_t stream) = 0;
  /// The calling thread's capture mode, of which calls of the driver depend that have nothing to do with the capture.
  virtual void exchange_capture_mode(int* mode) = 0;
  virtual Status ring_doorbell(uint32_t slot, uint64_t seq, expertd_stream_t stream) = 0;
  virtual Status wait_completion(uint32_t slot, uint64_t seq, expertd_stream_t stream) = 0;
  /// The two together, for a stream that goes on with the result; and ring_captured() with take_captured().
  virtual Status call(uint32_t slot, uint64_t seq, expertd_stream_t stream) {
    Status status = ring_doorbell(slot, seq, stream);
    return status.ok() ? wait_completion(slot, seq, stream) : status;
  }
  virtual Status call_captured(uint32_t words, uint64_t entry, expertd_stream_t stream) {
    Status status = ring_captured(words, entry, stream);
    return status.ok() ? take_captured(words, stream) : status;
  }
  /// Makes the stream wait until the word, 8 bytes of the GPU's memory, has reached the value.
  virtual Status wait_word(const void* word, uint64_t value, expertd_stream_t stream) = 0;
  /// In order; at most kStreamWordsMax.
  virtual Status stream_words(const StreamWord* words, uint32_t count, expertd_stream_t stream) {
    Status status;
    for (uint32_t i = 0; i < count && status.ok(); ++i) {
      status = words[i].writes ? Status{EXPERTD_REASON_UNSUPPORTED, "the device has no words that streams write"}
                               : wait_word(words[i].word, words[i].value, stream);
    }
    return status;
  }
  /// The session's flag page as kernels see it; null on the host.
  virtual char* flag_page() { return nullptr; }
  /// A stream of the library for receive halves that the caller's stream does not wait for.
  virtual expertd_stream_t receive_stream() { return nullptr; }
  /// Null where the daemon does local work. Of the device side, from begin() on.
  virtual LocalKernels* local_kernels() = 0;
  virtual Status copy(void* destination, const void* source, uint64_t bytes, expertd_stream_t stream) = 0;
  virtual Status synchronize(expertd_stream_t stream, uint64_t deadline_ns) = 0;
};

/// Interprets "host:0", "cuda:1" and "GPU-...".
Status create_device_side(const std::string& device, std::unique_ptr<DeviceSide>* side);
std::unique_ptr<DeviceSide> create_host_side(std::string name);
/// In cuda_import.cc.
Status create_cuda_side(const std::string& device, std::unique_ptr<DeviceSide>* side);

}  // namespace expertd::client
