// SPDX-License-Identifier: Apache-2.0
// CudaSide: the CUDA device on the caller's side. It retains the primary context of the device, maps the daemon's
// windows and flag page, exports the caller's memory (cuda_import.cc), and rings and waits on the caller's streams
// (cuda_words.cc). Callers' threads, and the client thread for release_waiters(). Every entry makes the context current
// and restores the caller's own afterwards.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "client/src/cuda_driver.h"
#include "client/src/device_side.h"
#include "client/src/local_kernels/cuda_kernels.h"

namespace expertd::client {

class CudaSide final : public DeviceSide {
 public:
  ~CudaSide() override;

  Status open(const std::string& device);

  bool is_cuda() const override { return true; }
  const std::string& name() const override { return uuid_; }
  Status begin(const expertd_attach_welcome& welcome, OwnedFd flag_page, uint32_t slots) override;
  void release_waiters() override;
  Status map_window(OwnedFd fd, uint64_t bytes, const MappedWindow& at, MappedWindow* mapped) override;
  void unmap_window(const MappedWindow& mapped) override;
  Status export_memory(const void* data, uint64_t bytes, bool same_pid, ExportedMemory* exported) override;
  Status buffer_id(const void* data, uint64_t* id) override;
  Status allocation_of(const void* data, void** base, uint64_t* bytes) override;
  Status check_stream(expertd_stream_t stream, bool* capturing) override;
  Status ring_captured(uint32_t words, uint64_t entry, expertd_stream_t stream) override;
  Status take_captured(uint32_t words, expertd_stream_t stream) override;
  void exchange_capture_mode(int* mode) override;
  Status ring_doorbell(uint32_t slot, uint64_t seq, expertd_stream_t stream) override;
  Status wait_completion(uint32_t slot, uint64_t seq, expertd_stream_t stream) override;
  Status call(uint32_t slot, uint64_t seq, expertd_stream_t stream) override;
  Status call_captured(uint32_t words, uint64_t entry, expertd_stream_t stream) override;
  Status wait_word(const void* word, uint64_t value, expertd_stream_t stream) override;
  Status stream_words(const StreamWord* words, uint32_t count, expertd_stream_t stream) override;
  char* flag_page() override { return static_cast<char*>(flags_.data); }
  expertd_stream_t receive_stream() override { return receive_stream_; }
  LocalKernels* local_kernels() override { return kernels_.get(); }
  Status copy(void* destination, const void* source, uint64_t bytes, expertd_stream_t stream) override;
  Status synchronize(expertd_stream_t stream, uint64_t deadline_ns) override;

 private:
  struct Current : cuda::CurrentContext {
    explicit Current(const CudaSide* side) : CurrentContext(&side->driver_, side->context_) {}
  };

  Status check(const char* call, cuda::Result result) const {
    return result == cuda::kSuccess ? Status() : cuda_error(driver_, call, result);
  }
  Status find_device(const std::string& device, int count);
  Status check_not_mig(int ordinal) const;
  Status reserve_for_abort();
  Status load_kernels();
  void load_local_kernels();
  Status map_fd(int fd, uint64_t bytes, cuda::Pointer at, MappedWindow* mapped);
  Status map_allocation(cuda::Allocation allocation, uint64_t bytes, cuda::Pointer at, MappedWindow* mapped);
  Status export_descriptor(cuda::Pointer base, uint64_t bytes, ExportedMemory* exported);
  Status launch(cuda::Function function, cuda::Pointer word, uint64_t value, cuda::Stream stream);
  Status launch_call(cuda::Pointer word, uint64_t value, cuda::Pointer end, uint64_t least, cuda::Stream stream);

  cuda::Driver driver_;
  int ordinal_ = -1;
  cuda::Device device_ = -1;
  cuda::Context context_ = nullptr;
  uint64_t granularity_ = 0;
  std::string uuid_;

  std::mutex flags_mutex_;  // begin() against release_waiters()
  MappedWindow flags_;
  /// Flag pages of ended attachments: streams of the caller may still have waits on them.
  std::vector<MappedWindow> retired_flags_;
  uint32_t slots_ = 0;
  bool ht_words_ = false;       // the page has the words of high throughput by copy engines; under flags_mutex_
  uint32_t capture_words_ = 0;  // on the flag page
  std::atomic<bool> mps_{false};
  cuda::Module module_ = nullptr;
  cuda::Function signal_ = nullptr;
  cuda::Function wait_ = nullptr;
  cuda::Function take_ = nullptr;
  cuda::Function call_ = nullptr;
  cuda::Stream abort_stream_ = nullptr;
  uint64_t* abort_word_ = nullptr;  // pinned, several
  cuda::Stream receive_stream_ = nullptr;
  /// Made at the first attach; null when they cannot be had, and then the daemon does their work.
  std::unique_ptr<CudaKernels> kernels_;
  bool kernels_tried_ = false;
};

inline cuda::Pointer to_pointer(const void* data) {
  return reinterpret_cast<cuda::Pointer>(data);
}
inline void* to_data(cuda::Pointer pointer) {
  return reinterpret_cast<void*>(pointer);
}
inline cuda::Stream to_stream(expertd_stream_t stream) {
  return static_cast<cuda::Stream>(stream);
}

}  // namespace expertd::client
