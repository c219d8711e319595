// SPDX-License-Identifier: Apache-2.0
// One GPU: its memory and tables for control threads (Device), its parts for its loop (DevicePort). Control calls
// serialise on a mutex that the loop thread never takes; what both sides share are the lookup tables and atomics.
// Owned by main and outlived by no window, session or group of it. The port never blocks and calls nothing of CUDA
// that can synchronise; its kernels wait for other ranks as kernels/cuda/exchange_steps.cuh says.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "daemon/device/cuda/gpu_use.h"
#include "daemon/device/cuda/memory.h"
#include "daemon/device/cuda/tables.h"
#include "daemon/device/device.h"
#include "daemon/engine/ports.h"

namespace expertd::device::cuda {

class WordBatch;

/// One GPU as it was found, before a device is made of it.
struct GpuFacts {
  GpuView view;
  std::string uuid;
  std::string name;
  uint32_t multiprocessors = 0;
  bool mps = false;
  bool has_bulk_copies = false;
  bool can_flush_remote_writes = false;
  uint64_t peer_mask = 0;  // device indices that this GPU may access, itself included
};

class CudaDevice : public Device, public engine::DevicePort {
 public:
  struct Setup {
    const Driver* driver = nullptr;
    GpuFacts gpu;
    std::vector<GpuFacts> all;  // every device of the process, this one included
    std::shared_ptr<Registry> registry;
    uint64_t pool_max_bytes = 0;
    bool bulk_copies = false;  // the kernels with them are used
    uint32_t link_sms = 0;
  };
  /// Streams, part words and one null launch of every kernel. The primary context is retained by the caller and is
  /// released by the device's destructor from then on.
  static base::Result<std::unique_ptr<CudaDevice>> create(Setup setup);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  /// What the context took; told once, before any other thread knows the device.
  void set_context_use(ContextUse use) { context_ = std::move(use); }

  /// What closes of memory hold launches back with.
  LaunchGate* gate() { return gpu_.view.gate; }

  void watch_context(LossObserver* observer) override { loss_observer_ = observer; }
  bool can_lose_context() const override { return true; }
  void probe_context() override;
  base::DeviceIndex index() const override { return gpu_.view.index; }
  DeviceInfo info() const override;
  engine::DevicePort& port() override { return *this; }
  base::Status share_host_memory(void* data, uint64_t bytes) override;
  base::Result<std::unique_ptr<HeldMemory>> create_fabric_memory(uint64_t bytes) override;
  base::Status copy_and_wait(void* to, const void* from, uint64_t bytes) override;
  base::Result<Window> create_window(uint64_t bytes) override;
  base::Result<uint64_t> window_size(uint64_t bytes) const override;
  base::Result<std::unique_ptr<HeldMemory>> import_fd(base::ScopedFd fd, uint64_t offset, uint64_t bytes,
                                                      uint64_t allocation_bytes) override;
  base::Result<std::unique_ptr<HeldMemory>> import_ipc(const void* handle, uint64_t offset, uint64_t bytes) override;
  base::Result<SessionGrant> open_session(base::SessionId session) override;
  void close_session(base::SessionId session) override;
  void* session_flag_page(base::SessionId session) override;
  base::Status create_group(const engine::GroupShape& shape, uint32_t handle_limit) override;
  base::Result<GroupMemory> plan_group(const engine::GroupShape& shape, uint32_t handle_limit) const override;
  void destroy_group(base::GroupId group, base::Rank rank) override;
  /// Handles that the rank's tables hold: at most what create_group() asked for, fewer for large groups; 0 if unknown.
  uint32_t handle_capacity(base::GroupId group, base::Rank rank) const override;
  base::Result<Window> exchange_window(base::GroupId group, base::Rank rank) override;

  bool launch(const engine::LaunchSpec& spec, const engine::SlotWords& words, engine::PartId* part) override;
  bool poll(engine::PartId part, engine::Outcome* outcome) override;
  void abort(engine::PartId part, uint32_t reason) override;
  uint32_t missing(engine::PartId part, base::RankSet* ranks) override;
  bool busy() const override;
  bool polls() const override { return parts_in_flight_ != 0 || launch_refused_ || capturing_; }
  bool tend(uint64_t now_ns) override;
  bool next_replay(const engine::Request** request, engine::Outcome* outcome) override;
  bool captured(const engine::Mapping* mapping) const override;
  bool end_captures(base::SessionId session, base::GroupId group) override;
  bool settle(engine::PartId part) override;
  void release_words(const engine::SlotWords& words, uint32_t reason) override;

 private:
  /// A part between launch() and the poll() that reports it. Loop thread only.
  struct Part {
    engine::PartId id = 0;      // 0: free
    uint32_t end_reason = 0;    // of abort(), or why launch failed; 0: the report's
    bool chain_broken = false;  // not everything was enqueued: `done` may never come
    bool rescue_sent = false;
    bool restore_sent = false;
    bool words_owed = false;  // ended but for the caller's words, which settle() writes
    bool words_sent = false;
    bool waits_doorbell = false;
    bool links = false;  // its chain is that of the link kernels
    bool low_latency = false;
    bool copies = false;      // its chain is one of copies, beside kernels of the client
    bool ht = false;          // with `copies`: that of high throughput
    bool nodes = false;       // of a group over several nodes
    bool nodes_open = false;  // and more of its chain is to come
    kernels::OpShape shape;   // with `copies`
    uint32_t sms = 0;         // multiprocessors that its largest kernel takes; 0: it has no kernels
    uint32_t entries = 0;     // counted against its stream
    uint32_t capture_entry = 0;
    uint32_t capture_words = 0;
    uint64_t launch_ns = 0;
    uint64_t group_op = 0;
    uint32_t rank = 0;
    uint64_t active_ranks = 0;  // bits: GPUs have groups of at most kMaxGpuRanks over all nodes
    uint64_t flag_ranks = 0;    // of them, those that write words of this GPU: the ones on this node
    SessionEntry* session = nullptr;
    GroupEntry* group = nullptr;  // null for local operations
    kernels::cuda::SyncPage* page = nullptr;
    engine::SlotWords words;
    std::array<base::DeviceIndex, base::kMaxGpuRanks> devices{};
    uint32_t ranks = 0;
  };

  explicit CudaDevice(Setup setup);
  base::Status start();
  Reach reach(bool peers) const;
  base::Status zero(const VmmMemory& memory);
  bool take_progress(GroupEntry* entry);
  /// Whether this GPU and the other one reach each other's memory.
  bool reaches(const GpuFacts& other) const;
  /// The ranks of a group whose GPUs and this one do not reach each other. UNSUPPORTED when one is no GPU of the
  /// daemon.
  base::Result<uint64_t> relay_ranks(const engine::GroupShape& shape) const;
  /// Whether the link kernels serve the group: the same answer on all its devices.
  bool is_linked(const engine::GroupShape& shape) const;
  /// Whether they may serve such a group, as far as that is known before it has devices.
  bool may_be_linked(const engine::GroupShape& shape) const;
  base::Status allocate_tables(GroupEntry* entry);
  /// The group's capture lanes, with words of its session.
  base::Status create_lanes(GroupEntry* entry);
  void give_back_words(const GroupEntry& entry);
  base::Status allocate_exchange(const engine::GroupShape& shape, GroupEntry* entry);
  base::Status allocate_nodes(const engine::GroupShape& shape, GroupEntry* entry);
  static void share_inboxes(GroupEntry* entry);
  base::Status warm_up(CUstream stream);

  bool has_room(const engine::LaunchSpec& spec, const SessionEntry* session) const;
  Part* take_part();
  /// Keeps the operation for replays instead of running it.
  void capture(const engine::LaunchSpec& spec, Part* part);
  /// The Reason of a lane that broke on another rank of the group; 0 for none. `all_detached`: every other rank's lane
  /// has let go of this one.
  uint32_t peers_broken(const GroupEntry& group, uint32_t lane, bool* all_detached) const;
  /// Also decides whether the part takes the chain of the link kernels.
  bool fill_params(const engine::LaunchSpec& spec, Part* taken, kernels::cuda::PartParams* params) const;
  bool fill_low_latency(const engine::LaunchSpec& spec, const Part& part, kernels::cuda::PartParams* params) const;
  bool fill_lanes(const engine::LaunchSpec& spec, kernels::cuda::PartParams* params) const;
  /// The tables of a rank of the operation's group, on whichever device; null for none.
  const GroupEntry* find_peer(const engine::LaunchSpec& spec, uint32_t rank) const;
  bool fill_peers(const engine::LaunchSpec& spec, const Part& part, kernels::cuda::PartParams* params) const;
  bool enqueue_route(const Part& part, const kernels::cuda::PartParams& params);
  static uint32_t sms_of(const Part& part, const kernels::cuda::PartParams& params);
  bool enqueue_chain(const Part& part, const kernels::cuda::PartParams& params);
  bool enqueue_flags(const Part& part, const kernels::cuda::PartParams& params, bool moved);
  bool enqueue_doorbell(const Part& part, const kernels::cuda::PartParams& params) const;
  /// Under MPS a thread that polls has the doorbell sooner than a stream's wait and disturbs nobody; without MPS it
  /// would hold the time slice. The kernel behind it starts early where the GPU can do that.
  bool awaits_by_kernel() const { return gpu_.mps && bulk_copies_; }
  bool enqueue_exchange_wait(const Part& part, CUstream stream, bool moved) const;
  bool enqueue_link(const Part& part, const kernels::cuda::PartParams& params);
  bool enqueue_low_latency(const Part& part, const kernels::cuda::PartParams& params);
  bool enqueue_barrier(const Part& part, const kernels::cuda::PartParams& params);
  bool enqueue_move(const Part& part, const kernels::cuda::PartParams& params);
  void fail_launch(Part* part, uint32_t reason);
  void send_rescue(Part* part);
  void send_restore(Part* part);
  bool chain_drained(const Part& part);
  void send_words(Part* part);
  void report_part(const Part& part, engine::Outcome* outcome) const;
  void free_part(Part* part);
  void check_health();

  // Chains of copies (copy_chain.cc).
  /// What such a part and the host tell each other, in pinned memory.
  struct CopyFacts;
  /// A chain of copies as it is enqueued.
  class CopyChain;
  bool takes_copies(const engine::LaunchSpec& spec) const;
  uint32_t entries_of(const engine::LaunchSpec& spec) const;
  bool launch_copies(const engine::LaunchSpec& spec, Part* part);
  /// Tells the other ranks that this rank's copies say nothing.
  void void_copies(const Part& part, WordBatch* batch) const;
  void judge_copies(const Part& part);
  CopyFacts* copy_facts(engine::PartId part) const;
  CUdeviceptr device_copy_facts(engine::PartId part) const;
  base::Status start_copies();

  // High throughput by copy engines (ht_parts.cc, ht_chain.cc).
  struct HtFacts;
  struct HtState;
  class HtChain;
  base::Status start_ht();
  base::Status allocate_ht(const engine::GroupShape& shape, GroupEntry* entry);
  void keep_ht_pinned(GroupEntry* entry);
  bool launch_ht(const engine::LaunchSpec& spec, Part* part);
  void advance_ht(Part* part);
  void close_ht(Part* part);
  bool ht_is_open(const Part& part) const;
  bool ht_is_voided(const Part& part) const;
  void void_ht(const Part& part, WordBatch* batch) const;
  void judge_ht(const Part& part);
  HtFacts* ht_facts(engine::PartId part) const;
  HtState* ht_state(engine::PartId part) const;

  // Groups over several nodes (node_parts.cc, node_chain.cc).
  class NodeChain;
  bool is_exchanging(base::GroupId group) const;
  // Captured operations over nodes (node_lanes.cc).
  base::Status create_node_lane(SessionEntry* session, uint32_t index, uint32_t words, GroupEntry* entry);
  bool open_capture(const engine::LaunchSpec& spec, Part* part);
  static void keep_capture(Part* part, uint32_t lane);
  static void break_node_lane(NodeLane* lane, uint32_t reason);
  bool arm_node_lane(NodeLane* lane);
  Part part_of(const GroupEntry& group, const NodeLane& lane) const;
  bool start_replay(GroupEntry* group, NodeLane* lane, uint64_t entry, uint64_t now_ns);
  bool abort_replay(GroupEntry* group, NodeLane* lane);
  bool release_replay(GroupEntry* group, NodeLane* lane, bool tells);
  void note_replay(NodeLane* lane, uint64_t now_ns) const;
  bool turn_replay(GroupEntry* group, NodeLane* lane, uint64_t now_ns, bool* moved);
  bool turn_arm(GroupEntry* group, NodeLane* lane, uint64_t now_ns, bool* moved);
  bool tend_node_lane(GroupEntry* group, NodeLane* lane, uint64_t now_ns, uint32_t peers_broken);
  static bool end_node_lane(NodeLane* lane);
  void forget_node_lane(NodeLane* lane);
  bool launch_nodes(const engine::LaunchSpec& spec, Part* part);
  bool open_nodes(const engine::LaunchSpec& spec, Part* part);
  void advance_nodes(Part* part);
  bool close_nodes(Part* part);
  void drop_nodes(const Part& part);
  uint32_t missing_nodes(const Part& part, uint64_t* ranks) const;

  kernels::cuda::PartFacts* host_facts(engine::PartId part) const;
  kernels::cuda::PartFacts* device_facts(engine::PartId part) const;
  kernels::cuda::PartState* part_state(engine::PartId part) const;

  const Driver& driver_;
  GpuFacts gpu_;
  std::vector<GpuFacts> all_;
  std::shared_ptr<Registry> registry_;
  bool bulk_copies_;
  uint32_t link_sms_;
  Pool pool_;
  ContextUse context_;
  std::atomic<bool> healthy_{true};
  LossObserver* loss_observer_ = nullptr;
  std::atomic<uint64_t> window_bytes_{0};
  std::atomic<uint32_t> open_sessions_{0};
  std::atomic<uint32_t> lane_streams_{0};  // of the groups that are here

  mutable std::mutex control_mutex_;  // control threads only
  std::map<uint64_t, std::unique_ptr<SessionEntry>> sessions_owned_;
  std::map<std::pair<uint64_t, uint32_t>, std::unique_ptr<GroupEntry>> groups_owned_;
  CUstream control_stream_ = nullptr;
  // Of groups that ended, for the next ones: freeing pinned memory would synchronise.
  std::vector<std::unique_ptr<PinnedMemory>> ht_pinned_;
  std::unique_ptr<PinnedMemory> progress_;  // one Progress per group: freeing pinned memory would synchronise
  std::array<bool, kMaxGroupsPerDevice> progress_used_{};

  LookupTable<SessionEntry, kMaxArmedStreams> sessions_;
  Registry::GroupTable groups_;

  // Loop thread.
  CUstream rescue_stream_ = nullptr;  // nothing on it ever waits
  std::unique_ptr<VmmMemory> states_;
  std::unique_ptr<PinnedMemory> facts_;
  std::unique_ptr<PinnedMemory> copy_facts_;
  std::unique_ptr<PinnedMemory> ht_facts_;
  std::unique_ptr<HtState[]> ht_states_;  // by part
  uint32_t ht_open_ = 0;                  // parts whose chain waits for the loop, those over several nodes too
  uint64_t ht_spin_until_ns_ = 0;
  std::array<Part, kMaxPartsInFlight> parts_{};
  uint32_t parts_in_flight_ = 0;
  bool launch_refused_ = false;  // nobody wakes the loop when a close that held launches back is over
  uint64_t next_part_ = 1;
  bool capturing_ = false;   // a group has capture lanes
  bool node_lanes_ = false;  // and one over several nodes does
  uint64_t health_checked_ns_ = 0;
};

}  // namespace expertd::device::cuda
