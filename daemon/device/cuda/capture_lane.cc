// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/capture_lane.h"

#include <algorithm>
#include <cstring>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/device/cuda/host_word.h"
#include "daemon/device/cuda/tables.h"
#include "daemon/kernels/cuda/launch.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {
namespace {

using kernels::cuda::ArmParams;
using kernels::cuda::launch_await_arm;
using kernels::cuda::launch_await_flags;
using kernels::cuda::LowLatencyEntry;
using kernels::cuda::PartFacts;
using kernels::cuda::PartParams;

/// Arms enqueued in one turn of the loop, so that the sessions beside this one are served too.
constexpr uint32_t kArmsPerTurn = 8;
/// A doorbell that holds what no wait lets through (a client may write anything) is overwritten after this time.
constexpr uint64_t kDrainPatienceNs = 1'000'000'000;

/// What one lane has in pinned memory.
struct Pinned {
  std::array<PartFacts, kArms> facts;
  kernels::cuda::Progress progress;
  uint64_t swapped;
  std::array<std::array<PartParams, 2>, EXPERTD_RING_SLOTS_MAX> staging;  // by ring slot
};

CUstreamBatchMemOpParams write_op(const void* address, uint64_t value) {
  CUstreamBatchMemOpParams write{};
  write.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
  write.writeValue.address = reinterpret_cast<CUdeviceptr>(address);
  write.writeValue.value64 = value;
  write.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;
  return write;
}

Pinned* pinned(const std::unique_ptr<PinnedMemory>& memory) {
  return static_cast<Pinned*>(memory->host());
}

}  // namespace

base::Result<std::unique_ptr<CaptureLane>> CaptureLane::create(const Setup& setup, Closer* closer) {
  std::unique_ptr<CaptureLane> lane(new CaptureLane(setup));
  EXPERTD_RETURN_IF_ERROR(lane->start(closer));
  return lane;
}

base::Status CaptureLane::start(Closer* closer) {
  const ScopedContext context(driver_, setup_.view.context);
  auto memory = PinnedMemory::create(driver_, setup_.view.context, sizeof(Pinned), closer);
  if (!memory.is_ok()) {
    return memory.status().with_context("words of a capture lane");
  }
  pinned_ = std::move(memory).value();
  requests_.reserve(kernels::cuda::kMostCapturedEntries);
  sms_.reserve(kernels::cuda::kMostCapturedEntries);
  int low = 0;
  int high = 0;
  EXPERTD_DRIVER_CALL(driver_, cuCtxGetStreamPriorityRange(&low, &high));
  EXPERTD_DRIVER_CALL(driver_, cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, high));
  EXPERTD_DRIVER_CALL(driver_, cuStreamCreateWithPriority(&late_stream_, CU_STREAM_NON_BLOCKING, high));
  return base::Status::ok();
}

CaptureLane::~CaptureLane() {
  const ScopedContext context(driver_, setup_.view.context);
  for (const CUstream stream : {stream_, late_stream_}) {
    if (stream != nullptr) {
      driver_.cuStreamDestroy(stream);
    }
  }
}

PartFacts* CaptureLane::facts(uint64_t id) const {
  return &pinned(pinned_)->facts[id % kArms];
}

CUdeviceptr CaptureLane::device_word(const void* host_word) const {
  return pinned_->device() +
         static_cast<uint64_t>(static_cast<const char*>(host_word) - static_cast<const char*>(pinned_->host()));
}

uint64_t* CaptureLane::doorbell() const {
  return reinterpret_cast<uint64_t*>(static_cast<char*>(setup_.flag_page) +
                                     EXPERTD_CAPTURE_DOORBELL_OFFSET(setup_.words));
}

uint32_t CaptureLane::add(const engine::Request& request, const std::array<PartParams, 2>& params, uint64_t* done,
                          uint64_t mark) {
  const auto place = static_cast<uint32_t>(requests_.size());
  // The slot is not used again before its operation has completed, and that is behind the copies.
  std::array<PartParams, 2>& staged = pinned(pinned_)->staging[request.slot % EXPERTD_RING_SLOTS_MAX];
  staged = params;
  for (uint32_t page = 0; page < params.size(); ++page) {
    const auto entry = reinterpret_cast<CUdeviceptr>(setup_.group->captured(setup_.lane, page) + place);
    if (driver_.cuMemcpyHtoDAsync(entry, &staged[page], sizeof(PartParams), setup_.rescue) != CUDA_SUCCESS) {
      return 0;
    }
  }
  CUstreamBatchMemOpParams write = write_op(done, mark);
  if (driver_.cuStreamBatchMemOp(setup_.rescue, 1, &write, 0) != CUDA_SUCCESS) {
    return 0;
  }
  requests_.push_back(request);
  sms_.push_back(std::min(params[0].captured.blocks, setup_.multiprocessors));
  return place + 1;
}

bool CaptureLane::uses(const engine::Mapping* mapping) const {
  return !ending_ && std::any_of(requests_.begin(), requests_.end(), [mapping](const engine::Request& request) {
    return std::any_of(request.tensors.begin(), request.tensors.end(),
                       [mapping](const engine::TensorView& view) { return view.mapping == mapping; });
  });
}

ArmParams CaptureLane::arm_params(uint64_t id, uint64_t number) const {
  const auto* page = static_cast<const char*>(setup_.flag_page);
  ArmParams params;
  params.words.part = id;
  params.words.group_op = number;
  params.words.seq = 1;
  params.words.state = setup_.group->arm_states(setup_.lane) + id % kArms;
  params.words.facts = reinterpret_cast<PartFacts*>(device_word(facts(id)));
  params.words.progress = reinterpret_cast<kernels::cuda::Progress*>(device_word(&pinned(pinned_)->progress));
  params.words.completion =
      reinterpret_cast<uint64_t*>(const_cast<char*>(page) + EXPERTD_CAPTURE_COMPLETION_OFFSET(setup_.words));
  params.words.result =
      reinterpret_cast<uint64_t*>(const_cast<char*>(page) + EXPERTD_CAPTURE_RESULT_OFFSET(setup_.words));
  params.entries = setup_.group->captured(setup_.lane, number % 2);
  params.doorbell = doorbell();
  params.lane = setup_.group->lane_state(setup_.lane);
  params.generation = generation_;
  params.experts = setup_.group->shape.experts;
  params.multiprocessors = setup_.multiprocessors;
  params.after_wait = setup_.awaits_by_kernel ? 1 : 0;
  return params;
}

bool CaptureLane::enqueue_arm() {
  const uint64_t id = tail_;
  *facts(id) = {};
  arms_[id % kArms] = {.number = next_number_};
  const ArmParams params = arm_params(id, next_number_);
  const bool waits = params.after_wait != 0
                         ? launch_await_arm(params, stream_) == cudaSuccess
                         : driver_.cuStreamWaitValue64(stream_, reinterpret_cast<CUdeviceptr>(params.doorbell), 1,
                                                       CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS;
  if (!waits || launch_link_ll_captured(params, LowLatencyEntry::kWaits, stream_) != cudaSuccess) {
    return false;
  }
  ++tail_;
  ++next_number_;
  return true;
}

bool CaptureLane::wait_for_peers(bool moved, const Arm& arm) {
  const engine::GroupShape& shape = setup_.group->shape;
  kernels::cuda::SyncPage* page = setup_.group->sync_page(lane_page(setup_.lane, arm.number % 2));
  std::array<CUstreamBatchMemOpParams, base::kMaxGpuRanks> waits{};
  uint32_t count = 0;
  const uint64_t others = ((uint64_t{1} << shape.ranks) - 1) & ~(uint64_t{1} << shape.rank);
  if (setup_.awaits_by_kernel && others != 0) {
    return launch_await_flags({moved ? page->moved : page->routed, others, arm.number}, late_stream_) == cudaSuccess;
  }
  for (uint32_t s = 0; s < shape.ranks; ++s) {
    if (s != shape.rank) {
      CUstreamBatchMemOpParams& wait = waits[count++];
      wait.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_64;
      wait.waitValue.address = reinterpret_cast<CUdeviceptr>(moved ? &page->moved[s] : &page->routed[s]);
      wait.waitValue.value64 = arm.number;
      wait.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ | (setup_.flushes ? CU_STREAM_WAIT_VALUE_FLUSH : 0);
    }
  }
  return count == 0 || driver_.cuStreamBatchMemOp(late_stream_, count, waits.data(), 0) == CUDA_SUCCESS;
}

bool CaptureLane::enqueue_late(uint64_t id, const Arm& arm) {
  ArmParams params = arm_params(id, arm.number);
  params.after_wait = setup_.awaits_by_kernel && setup_.group->shape.ranks > 1 ? 1 : 0;
  return wait_for_peers(false, arm) &&
         launch_link_ll_captured(params, LowLatencyEntry::kBehindRouted, late_stream_) == cudaSuccess &&
         wait_for_peers(true, arm) &&
         launch_link_ll_captured(params, LowLatencyEntry::kBehindMoved, late_stream_) == cudaSuccess;
}

/// Releases what a late arm waits for; it ends without moving anything.
void CaptureLane::abort_late(uint64_t id, Arm* arm) {
  const engine::GroupShape& shape = setup_.group->shape;
  kernels::cuda::SyncPage* page = setup_.group->sync_page(lane_page(setup_.lane, arm->number % 2));
  std::array<CUstreamBatchMemOpParams, 1 + 2 * base::kMaxGpuRanks> writes{};
  uint32_t count = 0;
  writes[count++] = write_op(&(setup_.group->arm_states(setup_.lane) + id % kArms)->aborted_part, id);
  for (uint32_t s = 0; s < shape.ranks; ++s) {
    if (s != shape.rank) {
      writes[count++] = write_op(&page->routed[s], EXPERTD_ABORT_WORD);
      writes[count++] = write_op(&page->moved[s], EXPERTD_ABORT_WORD);
    }
  }
  arm->aborted = driver_.cuStreamBatchMemOp(setup_.rescue, count, writes.data(), 0) == CUDA_SUCCESS;
}

/// Lets the graph of an operation that was aborted go on.
void CaptureLane::release_caller() {
  const ArmParams params = arm_params(head_, 0);
  CUstreamBatchMemOpParams writes[] = {write_op(params.words.result, broken_), write_op(params.words.completion, 1)};
  driver_.cuStreamBatchMemOp(setup_.rescue, 2, writes, 0);
}

void CaptureLane::break_lane(uint32_t reason) {
  if (broken_ != 0) {
    return;
  }
  broken_ = reason;
  CUstreamBatchMemOpParams write = write_op(&setup_.group->lane_state(setup_.lane)->broken, reason);
  driver_.cuStreamBatchMemOp(setup_.rescue, 1, &write, 0);
  shared_.broken.store(reason, std::memory_order_release);  // acquired by the loops of the other ranks
  if (!ending_) {
    base::log_warn("captured operations of the group end with a failure until it is left",
                   {{"group", setup_.group->shape.id}, {"rank", setup_.group->shape.rank}, {"reason", reason}});
  }
  if (mode_ == Mode::kIdle) {
    shared_.detached.store(true, std::memory_order_release);
  } else {
    mode_ = Mode::kDraining;
  }
}

/// Takes the oldest arm off when it is over.
bool CaptureLane::take_head() {
  if (head_ == tail_ || load_word(facts(head_)->done) != head_) {
    return false;
  }
  const PartFacts& ended = *facts(head_);
  const Arm& arm = arms_[head_ % kArms];
  if (ended.verdict == kernels::cuda::kVerdictCancelled) {
    if (!cancelled_) {
      cancelled_ = true;
      next_number_ = arm.number;
      mode_ = Mode::kDraining;  // also when it was the client that wrote the cancel value
    }
    ++head_;
    return true;
  }
  const bool good = ended.verdict == kernels::cuda::kVerdictGo;
  if (!good) {
    break_lane(EXPERTD_REASON_OP_MISMATCH);
    release_caller();
  }
  if (ended_tail_ - ended_head_ < kArms && ended.entry >= 1 && ended.entry <= requests_.size()) {
    EndedReplay& replay = ended_[ended_tail_++ % kArms];
    replay = {};
    replay.request = &requests_[ended.entry - 1];
    replay.outcome.end_ns = base::now_ns();
    replay.outcome.launch_ns = replay.outcome.end_ns;
    if (good) {
      replay.outcome.report = ended.report;
    } else {
      replay.outcome.report.reason = broken_;
    }
    replay.outcome.executor = EXPERTD_COMPLETION_EXECUTOR_SM;
    replay.outcome.sms = sms_[ended.entry - 1];
    if (ended.start_ns != 0 && ended.end_ns >= ended.start_ns) {
      replay.outcome.start_ns = replay.outcome.end_ns - (ended.end_ns - ended.start_ns);
      replay.outcome.launch_ns = replay.outcome.start_ns;
    }
  }
  ++head_;
  return true;
}

/// What the operation of the oldest arm was given when it was captured; a doorbell that names none is over at once.
uint64_t CaptureLane::head_timeout_ns() const {
  const uint64_t entry = facts(head_)->entry;
  if (entry == 0 || entry > requests_.size()) {
    return 0;
  }
  const engine::Request& request = requests_[entry - 1];
  return request.deadline_ns - std::min(request.deadline_ns, request.admit_ns);
}

/// Enqueues what the oldest arm left, and ends it when its deadline is over or the lane is broken.
bool CaptureLane::serve_late(uint64_t now_ns) {
  Arm& arm = arms_[head_ % kArms];
  if (head_ == tail_ || load_word(facts(head_)->left) != head_) {
    return false;
  }
  if (arm.late && broken_ == 0 && now_ns - arm.late_since_ns > head_timeout_ns()) {
    break_lane(EXPERTD_REASON_TIMEOUT);
  }
  bool moved = false;
  if (broken_ != 0 && !arm.aborted) {
    abort_late(head_, &arm);
    moved = true;
  }
  if (!arm.late) {
    arm.late = true;
    arm.late_since_ns = now_ns;
    enqueue_late(head_, arm);
    moved = true;
  }
  return moved;
}

bool CaptureLane::swap_done() const {
  return load_word(pinned(pinned_)->swapped) == swaps_;
}

bool CaptureLane::swap(uint64_t expected, uint64_t desired) {
  kernels::cuda::SwapParams params;
  params.word = doorbell();
  params.expected = expected;
  params.desired = desired;
  params.done = reinterpret_cast<uint64_t*>(device_word(&pinned(pinned_)->swapped));
  params.mark = swaps_ + 1;
  if (launch_swap_word(params, setup_.rescue) != cudaSuccess) {
    return false;
  }
  ++swaps_;
  return true;
}

/// Takes the arms back until none is left; then the lane rests, without a place in the gate.
bool CaptureLane::drain(uint64_t now_ns) {
  drain_since_ns_ = drain_since_ns_ == 0 ? now_ns : drain_since_ns_;
  if (head_ == tail_) {
    mode_ = Mode::kIdle;
    drain_since_ns_ = 0;
    ++generation_;
    cancelled_ = false;
    if (gated_) {
      gated_ = false;
      setup_.view.gate->leave();
    }
    if (broken_ != 0) {
      shared_.detached.store(true, std::memory_order_release);  // acquired by the loops of the other ranks
    }
    return true;
  }
  if (!swap_done() || load_word(facts(head_)->entry) != 0) {
    return false;  // an arm that has taken its operation ends as any
  }
  if (ending_ || now_ns - drain_since_ns_ > kDrainPatienceNs) {
    if (!ending_) {
      break_lane(EXPERTD_REASON_DESCRIPTOR_MALFORMED);
    }
    CUstreamBatchMemOpParams write = write_op(doorbell(), EXPERTD_CAPTURE_CANCEL);
    return driver_.cuStreamBatchMemOp(setup_.rescue, 1, &write, 0) == CUDA_SUCCESS && swap(0, EXPERTD_CAPTURE_CANCEL);
  }
  return swap(0, EXPERTD_CAPTURE_CANCEL);
}

/// From rest to armed, and from then on as many arms ahead as there may be.
bool CaptureLane::arm(uint64_t now_ns) {
  if (mode_ == Mode::kIdle) {
    // Nothing to wait for yet, or the lane ends; a close that waits for the streams comes first.
    if (requests_.empty() || ending_ || setup_.view.gate->held() || !setup_.view.gate->try_enter()) {
      return false;
    }
    gated_ = true;
    mode_ = Mode::kClearing;
    return swap(EXPERTD_CAPTURE_CANCEL, 0);  // of this lane, or of one before it that had the words
  }
  if (mode_ == Mode::kClearing) {
    if (!swap_done()) {
      return false;
    }
    mode_ = Mode::kArmed;
  }
  if (setup_.view.gate->held() || ending_) {
    mode_ = Mode::kDraining;
    return drain(now_ns);
  }
  uint32_t enqueued = 0;
  while (enqueued < kArmsPerTurn && tail_ - head_ < kArms && enqueue_arm()) {
    ++enqueued;
  }
  return enqueued != 0;
}

bool CaptureLane::tend(uint64_t now_ns, uint32_t peers_broken) {
  if (peers_broken == broken_ && mode_ == Mode::kIdle && (requests_.empty() || ending_)) {
    return false;
  }
  const ScopedContext context(driver_, setup_.view.context);
  if (peers_broken != 0) {
    break_lane(peers_broken);
  }
  bool moved = false;
  while (take_head()) {
    moved = true;
  }
  moved |= serve_late(now_ns);
  return (mode_ == Mode::kDraining ? drain(now_ns) : arm(now_ns)) || moved;
}

bool CaptureLane::next_ended(EndedReplay* ended) {
  if (ended_head_ == ended_tail_) {
    return false;
  }
  *ended = ended_[ended_head_++ % kArms];
  return true;
}

void CaptureLane::end() {
  if (ending_) {
    return;
  }
  const ScopedContext context(driver_, setup_.view.context);
  ending_ = true;
  break_lane(EXPERTD_REASON_PEER_LOST);
  if (mode_ != Mode::kIdle) {
    mode_ = Mode::kDraining;  // also when it was broken before
  }
}

void CaptureLane::forget() {
  ending_ = true;
  head_ = tail_;
  mode_ = Mode::kIdle;
  if (gated_) {
    gated_ = false;
    setup_.view.gate->leave();
  }
  shared_.detached.store(true, std::memory_order_release);
}

}  // namespace expertd::device::cuda
