// SPDX-License-Identifier: Apache-2.0
// A capture lane: how operations that a client captured in CUDA graphs run without a host (D14). A client's graph
// writes the operation's entry into the lane's doorbell; arms, enqueued before, wait for it on the lane's stream, and
// the kernel behind takes everything from the daemon's table on the GPU:
//
//   lane stream:  wait doorbell >= 1; link_ll_captured      once per arm, kArms of them ahead
//   late stream:  wait routed; link_ll_captured; wait moved; link_ll_captured      for an arm whose ranks were late
//
// The n-th operation of a lane is the same one on all ranks, because all issue their operations in one order; its arms
// are enqueued in that order too, so the exchange waits have their n. When arms run out (this thread was held up), an
// operation starts late, never wrong.
//
// Taking arms back. A stream that is parked holds up closes of memory (closer.h) and the end of a group, and its wait
// cannot be undone. So a compare-and-swap puts the cancel value into a doorbell that has not rung: the next arm takes
// itself back, those behind it do too, and the operations that they stood for come with arms of a later generation. A
// client that rings meanwhile is served by those.
//
// A lane that fails (a rank was late beyond its deadline, left, or replays another operation) stays broken on all ranks
// until the group is left: each further operation ends at once with the Reason. Made and destroyed by control threads,
// everything else by the loop thread, but for Shared.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "daemon/device/cuda/group_layout.h"
#include "daemon/device/cuda/memory.h"
#include "daemon/engine/ports.h"
#include "daemon/kernels/cuda/arm_params.h"

namespace expertd::device::cuda {

struct GroupEntry;

/// A captured operation ended; `request` is what was captured.
struct EndedReplay {
  const engine::Request* request = nullptr;
  engine::Outcome outcome;
};

class CaptureLane {
 public:
  struct Setup {
    const Driver* driver = nullptr;
    GpuView view;
    const GroupEntry* group = nullptr;
    uint32_t lane = 0;          // of the group
    uint32_t words = 0;         // of the session's flag page
    void* flag_page = nullptr;  // of the rank's session, as the GPU sees it
    CUstream rescue = nullptr;  // the device's: nothing on it ever waits
    uint32_t multiprocessors = 1;
    bool awaits_by_kernel = false;  // CudaDevice::awaits_by_kernel()
    bool flushes = false;           // exchange waits ask for remote writes to be flushed
    std::array<base::DeviceIndex, base::kMaxGpuRanks> devices{};
  };
  /// Streams, pinned words and the table's staging. CUDA, POOL_EXHAUSTED.
  static base::Result<std::unique_ptr<CaptureLane>> create(const Setup& setup, Closer* closer);
  ~CaptureLane();
  CaptureLane(const CaptureLane&) = delete;
  CaptureLane& operator=(const CaptureLane&) = delete;

  uint32_t words() const { return setup_.words; }
  bool full() const { return requests_.size() >= kernels::cuda::kMostCapturedEntries; }
  /// Keeps an operation, with parameters for both exchange pages; `done` gets `mark` when the GPU has them. Returns its
  /// entry, 0 when the copies could not be enqueued. Not when full().
  uint32_t add(const engine::Request& request, const std::array<kernels::cuda::PartParams, 2>& params, uint64_t* done,
               uint64_t mark);
  /// Whether a captured operation names the mapping.
  bool uses(const engine::Mapping* mapping) const;
  /// Advances what can be advanced; true when something moved. `peers_broken`: the Reason of a peer's lane that broke.
  bool tend(uint64_t now_ns, uint32_t peers_broken);
  /// Takes the next operation that ended since; false when there is none.
  bool next_ended(EndedReplay* ended);
  /// The rank leaves: no arm is enqueued any more, and those there are end.
  void end();
  bool ended() const { return ending_ && head_ == tail_ && !gated_; }
  /// The context is lost: whatever there was is gone.
  void forget();

  /// What the lanes of the other ranks read. Any thread.
  struct Shared {
    std::atomic<uint32_t> broken{0};    // expertd_reason
    std::atomic<bool> detached{false};  // broken, and nothing of it touches the other ranks any more
  };
  const Shared& shared() const { return shared_; }

 private:
  enum class Mode : uint32_t { kIdle, kArmed, kDraining, kClearing };
  struct Arm {
    uint64_t number = 0;  // n
    uint64_t late_since_ns = 0;
    bool late = false;
    bool aborted = false;
  };

  explicit CaptureLane(const Setup& setup) : setup_(setup), driver_(*setup.driver) {}
  base::Status start(Closer* closer);
  kernels::cuda::PartFacts* facts(uint64_t id) const;
  CUdeviceptr device_word(const void* host_word) const;
  uint64_t* doorbell() const;
  kernels::cuda::ArmParams arm_params(uint64_t id, uint64_t number) const;
  bool enqueue_arm();
  bool enqueue_late(uint64_t id, const Arm& arm);
  bool wait_for_peers(bool moved, const Arm& arm);
  bool take_head();
  bool serve_late(uint64_t now_ns);
  void abort_late(uint64_t id, Arm* arm);
  void release_caller();
  void break_lane(uint32_t reason);
  uint64_t head_timeout_ns() const;
  bool drain(uint64_t now_ns);
  bool arm(uint64_t now_ns);
  bool swap(uint64_t expected, uint64_t desired);
  bool swap_done() const;

  Setup setup_;
  const Driver& driver_;
  CUstream stream_ = nullptr;
  CUstream late_stream_ = nullptr;
  std::unique_ptr<PinnedMemory> pinned_;  // Pinned
  std::vector<engine::Request> requests_;
  std::vector<uint32_t> sms_;  // of each

  Mode mode_ = Mode::kIdle;
  std::array<Arm, kArms> arms_{};
  uint64_t head_ = 1;  // arms [head_, tail_) are enqueued; the id of an arm is its place, and never used again
  uint64_t tail_ = 1;
  uint64_t next_number_ = 1;
  uint64_t generation_ = 1;
  uint64_t swaps_ = 0;
  uint64_t drain_since_ns_ = 0;
  bool cancelled_ = false;  // arms of this generation were taken back
  bool gated_ = false;      // counts in the launch gate
  bool ending_ = false;
  uint32_t broken_ = 0;
  Shared shared_;

  std::array<EndedReplay, kArms> ended_{};
  uint64_t ended_head_ = 0;
  uint64_t ended_tail_ = 0;
};

}  // namespace expertd::device::cuda
