// SPDX-License-Identifier: Apache-2.0
// The words between the caller's streams and the daemon: flag page, doorbells, waits, and their release when the daemon
// is gone. Callers' threads; release_waiters() on the client thread.
#include <sched.h>

#include <algorithm>

#include "client/src/clock.h"
#include "client/src/cuda_side.h"
#include "client/src/metrics.h"
#include "proto/abi/exchange_ht_v1.h"

namespace expertd::client {
namespace {

using cuda::Pointer;

// What a slot's stream may wait for in an operation by copy engines: two steps of all ranks.
constexpr uint32_t kAbortWords = 2 * EXPERTD_STEP_RANKS;
constexpr uint64_t kReleaseNs = 1 * kNsPerS;

}  // namespace

// Everything that release_waiters() needs is made now: with waits pending, allocating could block.
Status CudaSide::reserve_for_abort() {
  if (abort_stream_ != nullptr) {
    return {};
  }
  void* words = nullptr;
  Status status = check("cuMemHostAlloc", driver_.host_alloc(&words, kAbortWords * sizeof(uint64_t), 0));
  if (!status.ok()) {
    return status;
  }
  abort_word_ = static_cast<uint64_t*>(words);
  std::fill_n(abort_word_, kAbortWords, EXPERTD_ABORT_WORD);
  status = check("cuStreamCreate", driver_.stream_create(&receive_stream_, cuda::kStreamNonBlocking));
  return status.ok() ? check("cuStreamCreate", driver_.stream_create(&abort_stream_, cuda::kStreamNonBlocking))
                     : status;
}

// Loaded and launched once here: the first launch of a lazily loaded kernel never returns while a stream is parked.
Status CudaSide::load_kernels() {
  Status status;
  if (module_ == nullptr) {
    status = check("cuModuleLoadData", driver_.module_load(&module_, cuda::kWordKernels));
  }
  if (status.ok()) {
    status = check("cuModuleGetFunction", driver_.module_function(&signal_, module_, "expertd_signal"));
  }
  if (status.ok()) {
    status = check("cuModuleGetFunction", driver_.module_function(&wait_, module_, "expertd_wait"));
  }
  if (status.ok()) {
    status = check("cuModuleGetFunction", driver_.module_function(&take_, module_, "expertd_take"));
  }
  if (status.ok()) {
    status = check("cuModuleGetFunction", driver_.module_function(&call_, module_, "expertd_call"));
  }
  const Pointer page = to_pointer(flags_.data);
  if (status.ok()) {
    // Doorbell 0 is 0 before the first operation, and every word is at least 0.
    status = launch(signal_, page + EXPERTD_DOORBELL_OFFSET(0), 0, abort_stream_);
  }
  if (status.ok()) {
    status = launch(wait_, page + EXPERTD_COMPLETION_WORD_OFFSET(0), 0, abort_stream_);
  }
  if (status.ok()) {
    status = launch(take_, page + EXPERTD_COMPLETION_WORD_OFFSET(0), 0, abort_stream_);
  }
  if (status.ok()) {
    status =
        launch_call(page + EXPERTD_DOORBELL_OFFSET(0), 0, page + EXPERTD_COMPLETION_WORD_OFFSET(0), 0, abort_stream_);
  }
  return status.ok() ? synchronize(abort_stream_, deadline_after(kReleaseNs)) : status;
}

// A session without them is whole, only slower: the daemon executes local work, and the library's metrics count it.
void CudaSide::load_local_kernels() {
  if (kernels_tried_) {
    return;
  }
  kernels_tried_ = true;
  if (!CudaKernels::create(&driver_, context_, device_, abort_stream_, &kernels_).ok()) {
    count_missing_kernels();
  }
}

Status CudaSide::begin(const expertd_attach_welcome& welcome, OwnedFd flag_page, uint32_t slots) {
  if (welcome.device_kind != EXPERTD_DEVICE_CUDA || welcome.flag_page_bytes < EXPERTD_CAPTURE_DOORBELL_OFFSET(0)) {
    return error(EXPERTD_REASON_WRONG_DEVICE_KIND, "the daemon serves %s as kind %u with a flag page of %llu bytes",
                 uuid_.c_str(), welcome.device_kind, static_cast<unsigned long long>(welcome.flag_page_bytes));
  }
  const Current current(this);
  Status status = reserve_for_abort();
  MappedWindow page;
  if (status.ok()) {
    status = map_fd(flag_page.get(), welcome.flag_page_bytes, 0, &page);
  }
  if (!status.ok()) {
    return status;
  }
  {
    const std::lock_guard lock(flags_mutex_);
    if (flags_.data != nullptr) {
      retired_flags_.push_back(flags_);
    }
    flags_ = page;
    slots_ = slots;
    ht_words_ = welcome.flag_page_bytes >= EXPERTD_HT_FLAG_PAGE_BYTES;
    capture_words_ = welcome.flag_page_bytes < EXPERTD_FLAG_PAGE_BYTES ? 0 : EXPERTD_CAPTURE_LANES_MAX;
  }
  mps_.store(welcome.mps_active != 0, std::memory_order_relaxed);
  load_local_kernels();
  return welcome.mps_active != 0 ? load_kernels() : Status();
}

void CudaSide::release_waiters() {
  const Current current(this);
  {
    const std::lock_guard lock(flags_mutex_);
    if (flags_.data == nullptr) {
      return;
    }
    for (uint32_t slot = 0; slot < slots_; ++slot) {
      const Pointer word = to_pointer(flags_.data) + EXPERTD_COMPLETION_WORD_OFFSET(slot);
      driver_.copy_to_device_async(word, abort_word_, sizeof(uint64_t), abort_stream_);
    }
    for (uint32_t words = 0; words < capture_words_; ++words) {
      const Pointer word = to_pointer(flags_.data) + EXPERTD_CAPTURE_COMPLETION_OFFSET(words);
      driver_.copy_to_device_async(word, abort_word_, sizeof(uint64_t), abort_stream_);
    }
    // Behind the completion words, as kernels that see these must see that the operation has ended.
    for (uint32_t slot = 0; slot < slots_; ++slot) {
      const Pointer words = to_pointer(flags_.data) + EXPERTD_STEP_ARRIVED_OFFSET(slot, 0, 0);
      driver_.copy_to_device_async(words, abort_word_, kAbortWords * sizeof(uint64_t), abort_stream_);
    }
    for (uint32_t slot = 0; slot < (ht_words_ ? slots_ : 0); ++slot) {
      const Pointer words = to_pointer(flags_.data) + EXPERTD_HT_STEP_OFFSET(slot);
      driver_.copy_to_device_async(words, abort_word_, EXPERTD_HT_STEP_PLAN + sizeof(uint64_t), abort_stream_);
    }
  }
  // Nothing more can be done when it fails: the context is lost, and with it the waits.
  static_cast<void>(synchronize(abort_stream_, deadline_after(kReleaseNs)));
}

Status CudaSide::check_stream(expertd_stream_t stream, bool* capturing) {
  const Current current(this);
  int captures = 0;
  const cuda::Result result = driver_.stream_is_capturing(to_stream(stream), &captures);
  Status status = check("cuStreamIsCapturing", result);
  *capturing = status.ok() && captures != 0;
  if (result == cuda::kStreamCaptureImplicit) {
    // It takes part in every capture of the context's blocking streams.
    return error(EXPERTD_REASON_UNSUPPORTED, "the legacy default stream cannot be used while a stream is captured");
  }
  return status;
}

Status CudaSide::ring_captured(uint32_t words, uint64_t entry, expertd_stream_t stream) {
  if (words >= capture_words_) {
    return error(EXPERTD_REASON_BAD_MESSAGE, "the daemon named capture words %u of %u", words, capture_words_);
  }
  const Current current(this);
  const Pointer word = to_pointer(flags_.data) + EXPERTD_CAPTURE_DOORBELL_OFFSET(words);
  if (mps_.load(std::memory_order_relaxed)) {
    return launch(signal_, word, entry, to_stream(stream));
  }
  return check("cuStreamWriteValue64", driver_.stream_write(to_stream(stream), word, entry, 0));
}

Status CudaSide::take_captured(uint32_t words, expertd_stream_t stream) {
  const Current current(this);
  const Pointer word = to_pointer(flags_.data) + EXPERTD_CAPTURE_COMPLETION_OFFSET(words);
  if (mps_.load(std::memory_order_relaxed)) {
    return launch(take_, word, 1, to_stream(stream));
  }
  Status status =
      check("cuStreamWaitValue64", driver_.stream_wait(to_stream(stream), word, 1, cuda::kWaitGreaterOrEqual));
  return status.ok() ? check("cuStreamWriteValue64", driver_.stream_write(to_stream(stream), word, 0, 0)) : status;
}

void CudaSide::exchange_capture_mode(int* mode) {
  const Current current(this);
  driver_.exchange_capture_mode(mode);
}

Status CudaSide::launch(cuda::Function function, Pointer word, uint64_t value, cuda::Stream stream) {
  void* arguments[] = {&word, &value};
  return check("cuLaunchKernel", driver_.launch(function, 1, 1, 1, 1, 1, 1, 0, stream, arguments, nullptr));
}

/// `least` 0: `value`, and the word at `end` stays; else it is set back to 0.
Status CudaSide::launch_call(Pointer word, uint64_t value, Pointer end, uint64_t least, cuda::Stream stream) {
  uint64_t awaited = least == 0 ? value : least;
  uint64_t takes = least == 0 ? 0 : 1;
  void* arguments[] = {&word, &value, &end, &awaited, &takes};
  return check("cuLaunchKernel", driver_.launch(call_, 1, 1, 1, 1, 1, 1, 0, stream, arguments, nullptr));
}

Status CudaSide::call(uint32_t slot, uint64_t seq, expertd_stream_t stream) {
  if (!mps_.load(std::memory_order_relaxed)) {
    return DeviceSide::call(slot, seq, stream);
  }
  const Current current(this);
  const Pointer page = to_pointer(flags_.data);
  return launch_call(page + EXPERTD_DOORBELL_OFFSET(slot), seq, page + EXPERTD_COMPLETION_WORD_OFFSET(slot), 0,
                     to_stream(stream));
}

Status CudaSide::call_captured(uint32_t words, uint64_t entry, expertd_stream_t stream) {
  if (!mps_.load(std::memory_order_relaxed) || words >= capture_words_) {
    return DeviceSide::call_captured(words, entry, stream);
  }
  const Current current(this);
  const Pointer page = to_pointer(flags_.data);
  return launch_call(page + EXPERTD_CAPTURE_DOORBELL_OFFSET(words), entry,
                     page + EXPERTD_CAPTURE_COMPLETION_OFFSET(words), 1, to_stream(stream));
}

Status CudaSide::ring_doorbell(uint32_t slot, uint64_t seq, expertd_stream_t stream) {
  const Current current(this);
  const Pointer word = to_pointer(flags_.data) + EXPERTD_DOORBELL_OFFSET(slot);
  if (mps_.load(std::memory_order_relaxed)) {
    return launch(signal_, word, seq, to_stream(stream));
  }
  return check("cuStreamWriteValue64", driver_.stream_write(to_stream(stream), word, seq, 0));
}

Status CudaSide::wait_completion(uint32_t slot, uint64_t seq, expertd_stream_t stream) {
  return wait_word(static_cast<const char*>(flags_.data) + EXPERTD_COMPLETION_WORD_OFFSET(slot), seq, stream);
}

Status CudaSide::wait_word(const void* word, uint64_t value, expertd_stream_t stream) {
  const Current current(this);
  if (mps_.load(std::memory_order_relaxed)) {
    return launch(wait_, to_pointer(word), value, to_stream(stream));
  }
  return check("cuStreamWaitValue64",
               driver_.stream_wait(to_stream(stream), to_pointer(word), value, cuda::kWaitGreaterOrEqual));
}

// Under MPS each by a kernel of its own: see ring_doorbell().
Status CudaSide::stream_words(const StreamWord* words, uint32_t count, expertd_stream_t stream) {
  const Current current(this);
  if (mps_.load(std::memory_order_relaxed)) {
    Status status;
    for (uint32_t i = 0; i < count && status.ok(); ++i) {
      status = launch(words[i].writes ? signal_ : wait_, to_pointer(words[i].word), words[i].value, to_stream(stream));
    }
    return status;
  }
  cuda::WordOperation operations[kStreamWordsMax] = {};
  for (uint32_t i = 0; i < count; ++i) {
    operations[i].operation = words[i].writes ? cuda::kWordWrite : cuda::kWordWait;
    operations[i].address = to_pointer(words[i].word);
    operations[i].value = words[i].value;
  }
  return check("cuStreamBatchMemOp", driver_.stream_words(to_stream(stream), count, operations, 0));
}

Status CudaSide::copy(void* destination, const void* source, uint64_t bytes, expertd_stream_t stream) {
  const Current current(this);
  return check("cuMemcpyAsync",
               driver_.copy_async(to_pointer(destination), to_pointer(source), bytes, to_stream(stream)));
}

// cuStreamSynchronize has no deadline, so this asks until it has passed.
Status CudaSide::synchronize(expertd_stream_t stream, uint64_t deadline_ns) {
  const Current current(this);
  for (;;) {
    const cuda::Result result = driver_.stream_query(to_stream(stream));
    if (result != cuda::kNotReady) {
      return check("cuStreamQuery", result);
    }
    if (now_ns() >= deadline_ns) {
      return {EXPERTD_REASON_TIMEOUT, "work on the stream has not ended"};
    }
    sched_yield();
  }
}

}  // namespace expertd::client
