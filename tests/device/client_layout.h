// SPDX-License-Identifier: Apache-2.0
// Layouts of a client process, compared with the reference: random shapes and ids of both widths, ids that are none or
// out of range, results read on the same stream and on another, an operation whose stream is held back, and the time
// that one takes. On GPUs these are kernels of the client library, on host devices operations of the daemon. Of the
// client program, one thread.
#pragma once

#include <cstdint>
#include <string>

#include "tests/device/client_gpu.h"
#include "tests/support/rank_threads.h"

namespace expertd::device_test {

class Layouts {
 public:
  /// `gpu` is null on host devices. All return what was wrong, empty for nothing.
  std::string open(expertd_session_t* session, ClientGpu* gpu);
  std::string run(uint64_t cases);
  /// The stream is held back beyond the operation's deadline.
  std::string time_out();
  /// Microseconds on the stream for 4096 tokens, top 8 of 256 experts on 8 ranks: of a hundred, and of one alone.
  std::string time(double* of_many_us, double* alone_us);
  /// What the library says that its own kernels have executed.
  static uint64_t local_operations();

 private:
  struct Case;

  std::string run_case(const Case& it);
  expertd_layout_args_t upload(const Case& it, std::string* problem);
  std::string compare(const Case& it) const;
  std::string copy(void* destination, const void* source, uint64_t bytes, void* stream);
  std::string synchronize(void* stream);
  void* stream() const { return gpu_ == nullptr ? nullptr : gpu_->stream(); }

  expertd_session_t* session_ = nullptr;
  ClientGpu* gpu_ = nullptr;
  char* block_ = nullptr;  // where the tensors lie
  char* host_ = nullptr;   // as large
};

}  // namespace expertd::device_test
