// SPDX-License-Identifier: Apache-2.0
// The control side of a GPU. The port is in cuda_port.cc, the chain of a part in chain.cc.
#include "daemon/device/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <string>

#include "daemon/base/log.h"
#include "daemon/device/cuda/ht_chain.h"
#include "daemon/kernels/cuda/launch.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {
namespace {

/// The window that create_window() hands out; it keeps the device's account of window bytes.
class WindowMemory : public HeldMemory {
 public:
  WindowMemory(std::unique_ptr<VmmMemory> memory, std::atomic<uint64_t>* account)
      : memory_(std::move(memory)), account_(account) {
    mapping_ = memory_->mapping();
    account_->fetch_add(mapping_.bytes, std::memory_order_relaxed);
  }
  ~WindowMemory() override { account_->fetch_sub(mapping_.bytes, std::memory_order_relaxed); }

 private:
  std::unique_ptr<VmmMemory> memory_;
  std::atomic<uint64_t>* account_;
};

base::Status check_shape(const engine::GroupShape& shape) {
  const auto refuse = [](const char* what, uint64_t value) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE,
                        std::string("a group on GPUs cannot have ") + std::to_string(value) + " " + what);
  };
  if (shape.ranks == 0 || shape.ranks > base::kMaxGpuRanks || shape.rank >= shape.ranks) {
    return refuse("ranks (at most 16)", shape.ranks);
  }
  if (shape.experts == 0 || shape.experts > base::kMaxExperts || shape.experts % shape.ranks != 0 ||
      shape.experts / shape.ranks > base::kMaxLocalExperts) {
    return refuse("experts", shape.experts);
  }
  if (shape.top_k == 0 || shape.top_k > base::kMaxTopK) {
    return refuse("top-k lanes", shape.top_k);
  }
  if (shape.max_tokens == 0 || shape.max_tokens > base::kMaxTokens) {
    return refuse("tokens per rank", shape.max_tokens);
  }
  if (shape.hidden == 0 || shape.hidden > base::kMaxHidden || shape.hidden % 128 != 0) {
    return refuse("hidden channels", shape.hidden);
  }
  return base::Status::ok();
}

}  // namespace

CudaDevice::CudaDevice(Setup setup)
    : driver_(*setup.driver),
      gpu_(std::move(setup.gpu)),
      all_(std::move(setup.all)),
      registry_(std::move(setup.registry)),
      bulk_copies_(setup.bulk_copies),
      link_sms_(setup.link_sms),
      pool_(setup.pool_max_bytes) {}

base::Result<std::unique_ptr<CudaDevice>> CudaDevice::create(Setup setup) {
  std::unique_ptr<CudaDevice> device(new CudaDevice(std::move(setup)));
  const base::Status started = device->start();
  if (!started.is_ok()) {
    return started.with_context("starting GPU " + device->gpu_.uuid);
  }
  return device;
}

base::Status CudaDevice::start() {
  const ScopedContext context(driver_, gpu_.view.context);
  int low = 0;
  int high = 0;
  EXPERTD_DRIVER_CALL(driver_, cuCtxGetStreamPriorityRange(&low, &high));
  EXPERTD_DRIVER_CALL(driver_, cuStreamCreateWithPriority(&rescue_stream_, CU_STREAM_NON_BLOCKING, high));
  EXPERTD_DRIVER_CALL(driver_, cuStreamCreateWithPriority(&control_stream_, CU_STREAM_NON_BLOCKING, low));
  auto states = VmmMemory::create(reach(false), kMaxPartsInFlight * sizeof(kernels::cuda::PartState), &pool_);
  if (!states.is_ok()) {
    return states.status();
  }
  states_ = std::move(states).value();
  EXPERTD_RETURN_IF_ERROR(zero(*states_));
  auto facts = PinnedMemory::create(driver_, gpu_.view.context, kMaxPartsInFlight * sizeof(kernels::cuda::PartFacts));
  if (!facts.is_ok()) {
    return facts.status();
  }
  facts_ = std::move(facts).value();
  auto progress =
      PinnedMemory::create(driver_, gpu_.view.context, kMaxGroupsPerDevice * sizeof(kernels::cuda::Progress));
  if (!progress.is_ok()) {
    return progress.status();
  }
  progress_ = std::move(progress).value();
  EXPERTD_RETURN_IF_ERROR(start_copies());
  EXPERTD_RETURN_IF_ERROR(warm_up(control_stream_));
  EXPERTD_RETURN_IF_ERROR(warm_up(rescue_stream_));
  registry_->groups[gpu_.view.index.value].store(&groups_, std::memory_order_release);  // acquired by fill_peers()
  return base::Status::ok();
}

CudaDevice::~CudaDevice() {
  registry_->groups[gpu_.view.index.value].store(nullptr, std::memory_order_release);
  {
    const ScopedContext context(driver_, gpu_.view.context);
    for (auto& [id, session] : sessions_owned_) {
      driver_.cuStreamDestroy(session->stream);
    }
    sessions_owned_.clear();
    groups_owned_.clear();
    for (const CUstream stream : {rescue_stream_, control_stream_}) {
      if (stream != nullptr) {
        driver_.cuStreamDestroy(stream);
      }
    }
    states_.reset();
    facts_.reset();
    copy_facts_.reset();
    ht_facts_.reset();
    ht_pinned_.clear();
    progress_.reset();
  }
  driver_.cuDevicePrimaryCtxRelease(gpu_.view.device);
}

/// Uses a new stream for everything that a chain is made of, so that nothing is set up lazily when it matters.
base::Status CudaDevice::warm_up(CUstream stream) {
  const cudaError_t launched = kernels::cuda::launch_all_null(bulk_copies_, stream);
  if (launched != cudaSuccess) {
    return base::Status(EXPERTD_REASON_CUDA,
                        std::string("the first launch of the kernels: ") + cudaGetErrorString(launched));
  }
  // A word that no part uses: the reserved tail of the first part's state.
  const CUdeviceptr word = states_->address() + offsetof(kernels::cuda::PartState, reserved);
  std::array<CUstreamBatchMemOpParams, 2> operations{};
  operations[0].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
  operations[0].writeValue.address = word;
  operations[0].writeValue.value64 = 1;
  operations[1].waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_64;
  operations[1].waitValue.address = word;
  operations[1].waitValue.value64 = 1;
  operations[1].waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
  EXPERTD_DRIVER_CALL(driver_, cuStreamBatchMemOp(stream, 2, operations.data(), 0));
  EXPERTD_DRIVER_CALL(driver_, cuStreamWaitValue64(stream, word, 1, CU_STREAM_WAIT_VALUE_GEQ));
  EXPERTD_DRIVER_CALL(driver_, cuMemcpyAsync(word + sizeof(uint64_t), word, sizeof(uint64_t), stream));
  EXPERTD_DRIVER_CALL(driver_, cuStreamSynchronize(stream));
  return base::Status::ok();
}

Reach CudaDevice::reach(bool peers) const {
  Reach reach;
  reach.driver = &driver_;
  reach.closer = &registry_->closer;
  reach.home = gpu_.view;
  reach.gpus.push_back(gpu_.view);
  for (const GpuFacts& other : all_) {
    // `other` must be able to reach this GPU's memory.
    if (peers && other.view.index != gpu_.view.index && ((other.peer_mask >> gpu_.view.index.value) & 1) != 0) {
      reach.gpus.push_back(other.view);
    }
  }
  return reach;
}

base::Status CudaDevice::zero(const VmmMemory& memory) {
  EXPERTD_DRIVER_CALL(driver_, cuMemsetD8Async(memory.address(), 0, memory.allocated_bytes(), control_stream_));
  EXPERTD_DRIVER_CALL(driver_, cuStreamSynchronize(control_stream_));
  return base::Status::ok();
}

DeviceInfo CudaDevice::info() const {
  DeviceInfo info;
  info.is_cuda = true;
  info.uuid = gpu_.uuid;
  info.name = gpu_.name;
  info.mps_active = gpu_.mps;
  info.kernels = bulk_copies_ ? "bulk" : "generic";
  info.doorbell_form = gpu_.mps ? "kernels" : "words";
  info.context_bytes = context_.bytes;
  info.context_source = context_.source;
  info.pool_used_bytes = pool_.used();
  info.window_bytes = window_bytes_.load(std::memory_order_relaxed);
  info.armed_streams_max = kMaxArmedStreams;
  info.parked_streams_max = kMaxParkedStreams;
  info.peer_access_mask = gpu_.peer_mask;
  info.healthy = healthy_.load(std::memory_order_relaxed);
  info.armed_streams = open_sessions_.load(std::memory_order_relaxed);
  info.lane_streams = lane_streams_.load(std::memory_order_relaxed);
  return info;
}

base::Result<Window> CudaDevice::create_window(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(control_mutex_);
  const ScopedContext context(driver_, gpu_.view.context);
  auto memory = VmmMemory::create(reach(true), bytes, &pool_);
  if (!memory.is_ok()) {
    return memory.status();
  }
  EXPERTD_RETURN_IF_ERROR(zero(*memory.value()));
  auto fd = memory.value()->export_fd();
  if (!fd.is_ok()) {
    return fd.status();
  }
  Window window;
  window.bytes = memory.value()->allocated_bytes();
  window.fd = std::move(fd).value();
  window.memory = std::make_unique<WindowMemory>(std::move(memory).value(), &window_bytes_);
  return window;
}

base::Result<uint64_t> CudaDevice::window_size(uint64_t bytes) const {
  const ScopedContext context(driver_, gpu_.view.context);
  return VmmMemory::allocation_bytes(reach(false), bytes);
}

base::Result<std::unique_ptr<HeldMemory>> CudaDevice::import_fd(base::ScopedFd fd, uint64_t offset, uint64_t bytes,
                                                                uint64_t allocation_bytes) {
  const std::lock_guard<std::mutex> lock(control_mutex_);
  const ScopedContext context(driver_, gpu_.view.context);
  VmmMemory::Import import;
  import.fd = std::move(fd);
  import.offset = offset;
  import.bytes = bytes;
  import.allocation_bytes = allocation_bytes;
  auto memory = VmmMemory::import(reach(true), import);
  if (!memory.is_ok()) {
    return memory.status();
  }
  return std::unique_ptr<HeldMemory>(std::move(memory).value());
}

base::Result<std::unique_ptr<HeldMemory>> CudaDevice::import_ipc(const void* handle, uint64_t offset, uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(control_mutex_);
  IpcMemory::Range range;
  range.offset = offset;
  range.bytes = bytes;
  auto memory = IpcMemory::open(reach(true), handle, range);
  if (!memory.is_ok()) {
    return memory.status();
  }
  return std::unique_ptr<HeldMemory>(std::move(memory).value());
}

base::Result<SessionGrant> CudaDevice::open_session(base::SessionId session) {
  const std::lock_guard<std::mutex> lock(control_mutex_);
  if (sessions_owned_.contains(session.value)) {
    return base::Status(EXPERTD_REASON_BAD_STATE, "the session is open on this device already");
  }
  if (sessions_owned_.size() >= kMaxArmedStreams) {
    return base::Status(EXPERTD_REASON_SESSION_LIMIT,
                        "GPU " + gpu_.uuid + " serves " + std::to_string(kMaxArmedStreams) + " sessions already");
  }
  const ScopedContext context(driver_, gpu_.view.context);
  auto entry = std::make_unique<SessionEntry>();
  entry->id = session.value;
  // Copies of other ranks write words of it.
  auto page = VmmMemory::create(reach(true), EXPERTD_HT_FLAG_PAGE_BYTES, &pool_);
  if (!page.is_ok()) {
    return page.status().with_context("flag page");
  }
  entry->flag_page = std::move(page).value();
  EXPERTD_RETURN_IF_ERROR(zero(*entry->flag_page));
  auto fd = entry->flag_page->export_fd();
  if (!fd.is_ok()) {
    return fd.status();
  }
  int low = 0;
  int high = 0;
  EXPERTD_DRIVER_CALL(driver_, cuCtxGetStreamPriorityRange(&low, &high));
  EXPERTD_DRIVER_CALL(driver_, cuStreamCreateWithPriority(&entry->stream, CU_STREAM_NON_BLOCKING, high));
  if (const base::Status warm = warm_up(entry->stream); !warm.is_ok()) {
    driver_.cuStreamDestroy(entry->stream);
    return warm;
  }
  SessionGrant grant;
  grant.flag_page_fd = std::move(fd).value();
  grant.flag_page_bytes = entry->flag_page->allocated_bytes();
  sessions_.insert(session.value, entry.get());  // as many slots as sessions_owned_ may have entries
  sessions_owned_[session.value] = std::move(entry);
  open_sessions_.fetch_add(1, std::memory_order_relaxed);
  return grant;
}

void CudaDevice::close_session(base::SessionId session) {
  std::unique_ptr<SessionEntry> closed;
  {
    const std::lock_guard<std::mutex> lock(control_mutex_);
    const auto found = sessions_owned_.find(session.value);
    if (found == sessions_owned_.end()) {
      return;
    }
    sessions_.erase(session.value);
    closed = std::move(found->second);
    sessions_owned_.erase(found);
  }
  // Unmapping may block behind a parked stream of another session, so not under the mutex.
  const ScopedContext context(driver_, gpu_.view.context);
  driver_.cuStreamSynchronize(rescue_stream_);  // a word written for the session's last operation may be under way
  driver_.cuStreamDestroy(closed->stream);
  closed.reset();
  open_sessions_.fetch_sub(1, std::memory_order_relaxed);
}

void* CudaDevice::session_flag_page(base::SessionId session) {
  const SessionEntry* entry = sessions_.find(session.value);
  return entry == nullptr ? nullptr : reinterpret_cast<void*>(entry->flag_page->address());
}

bool CudaDevice::take_progress(GroupEntry* entry) {
  const auto free = std::find(progress_used_.begin(), progress_used_.end(), false);
  if (free == progress_used_.end()) {
    return false;
  }
  *free = true;
  entry->progress_index = static_cast<uint32_t>(free - progress_used_.begin());
  entry->host_progress = static_cast<kernels::cuda::Progress*>(progress_->host()) + entry->progress_index;
  entry->device_progress = reinterpret_cast<kernels::cuda::Progress*>(progress_->device()) + entry->progress_index;
  *entry->host_progress = {};
  return true;
}

bool CudaDevice::reaches(const GpuFacts& other) const {
  return ((gpu_.peer_mask >> other.view.index.value) & 1) != 0 && ((other.peer_mask >> gpu_.view.index.value) & 1) != 0;
}

base::Result<uint64_t> CudaDevice::relay_ranks(const engine::GroupShape& shape) const {
  uint64_t ranks = 0;
  for (uint32_t r = 0; r < shape.ranks; ++r) {
    if (!shape.is_local(r)) {
      continue;
    }
    const base::DeviceIndex device = shape.device_of(r);
    const auto other =
        std::find_if(all_.begin(), all_.end(), [&](const GpuFacts& gpu) { return gpu.view.index == device; });
    if (other == all_.end()) {
      return base::Status(EXPERTD_REASON_UNSUPPORTED, "rank " + std::to_string(r) + " is on device " +
                                                          std::to_string(device.value) +
                                                          ", which is no GPU: a group has one kind of device");
    }
    const bool direct = reaches(*other) && (shape.peer_access || other->view.index == gpu_.view.index);
    ranks |= direct ? 0 : uint64_t{1} << r;
  }
  return ranks;
}

bool CudaDevice::is_linked(const engine::GroupShape& shape) const {
  if (shape.placement != nullptr) {
    return false;
  }
  uint64_t members = 0;
  for (uint32_t r = 0; r < shape.ranks; ++r) {
    members |= uint64_t{1} << shape.device_of(r).value;
  }
  if (!shape.peer_access && shape.ranks > 1) {
    return false;
  }
  return bulk_copies_ && std::all_of(all_.begin(), all_.end(), [members](const GpuFacts& gpu) {
           const bool member = ((members >> gpu.view.index.value) & 1) != 0;
           return !member || (gpu.has_bulk_copies && (gpu.peer_mask & members) == members);
         });
}

bool CudaDevice::may_be_linked(const engine::GroupShape& shape) const {
  if (!shape.peer_access && shape.ranks > 1) {
    return false;
  }
  const auto reached = std::count_if(all_.begin(), all_.end(),
                                     [this](const GpuFacts& gpu) { return gpu.has_bulk_copies && reaches(gpu); });
  return bulk_copies_ && static_cast<uint64_t>(reached) >= shape.ranks;
}

base::Status CudaDevice::allocate_tables(GroupEntry* entry) {
  auto memory = VmmMemory::create(reach(true), entry->layout.total_bytes, &pool_);
  if (!memory.is_ok()) {
    return memory.status().with_context("tables of the group");
  }
  entry->memory = std::move(memory).value();
  EXPERTD_RETURN_IF_ERROR(zero(*entry->memory));
  if (entry->relay_ranks == 0) {
    return base::Status::ok();
  }
  const uint64_t bytes = pinned_bytes(entry->layout);
  auto shared = PinnedMemory::create(driver_, gpu_.view.context, bytes, &registry_->closer);
  if (!shared.is_ok()) {
    return shared.status().with_context("relay of the group");
  }
  entry->shared = std::move(shared).value();
  base::log_warn(
      "GPUs without peer access exchange through pinned host memory",
      {{"group", entry->shape.id}, {"rank", entry->shape.rank}, {"peers", entry->relay_ranks}, {"bytes", bytes}});
  return base::Status::ok();
}

base::Result<GroupMemory> CudaDevice::plan_group(const engine::GroupShape& shape, uint32_t handle_limit) const {
  EXPERTD_RETURN_IF_ERROR(check_shape(shape));
  engine::GroupShape served = shape;
  served.low_latency = shape.low_latency && may_be_linked(shape);
  const GroupLayout layout = group_layout(served, handle_limit);
  const ScopedContext context(driver_, gpu_.view.context);
  const auto allocated = VmmMemory::allocation_bytes(reach(false), layout.total_bytes);
  if (!allocated.is_ok()) {
    return allocated.status();
  }
  uint64_t exchange = 0;
  if (shape.copies != 0) {
    const auto bytes = VmmMemory::allocation_bytes(reach(false), copy_layout(shape).total_bytes);
    if (!bytes.is_ok()) {
      return bytes.status();
    }
    exchange = bytes.value();
  }
  const bool all_reached =
      std::all_of(all_.begin(), all_.end(), [this](const GpuFacts& other) { return reaches(other); });
  const bool relayed = shape.ranks > 1 && (!shape.peer_access || !all_reached);
  GroupMemory memory = group_memory(layout, allocated.value(), relayed);
  memory.table_bytes += exchange;
  if (const expertd_exchange_ht_layout ht = copy_layout(shape).ht; ht.total_bytes != 0) {
    memory.pinned_bytes += HtGroup::kPinnedBytes;
    memory.handle_count = std::min(memory.handle_count, static_cast<uint32_t>(ht.handle_count));
  }
  return memory;
}

base::Status CudaDevice::create_group(const engine::GroupShape& shape, uint32_t handle_limit) {
  EXPERTD_RETURN_IF_ERROR(check_shape(shape));
  const auto relayed = relay_ranks(shape);
  if (!relayed.is_ok()) {
    return relayed.status();
  }
  const std::lock_guard<std::mutex> lock(control_mutex_);
  if (groups_.find(shape.id.value) != nullptr) {
    return base::Status(EXPERTD_REASON_DEVICE_TAKEN, "another rank of the group is on GPU " + gpu_.uuid);
  }
  const ScopedContext context(driver_, gpu_.view.context);
  auto entry = std::make_unique<GroupEntry>();
  entry->shape = shape;
  entry->relay_ranks = relayed.value();
  entry->linked = is_linked(shape);
  entry->shape.low_latency = shape.low_latency && entry->linked;
  const bool captures = entry->shape.low_latency || (shape.placement != nullptr && shape.low_latency);
  if (shape.capture_lanes != 0 && !captures) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED,
                        "capture_lanes = " + std::to_string(shape.capture_lanes) +
                            ": operations are captured between GPUs that reach each other and have the bulk-copy "
                            "kernels (sm_90, device.kernels = auto), in groups of mode inference or any");
  }
  entry->layout = group_layout(entry->shape, handle_limit);
  EXPERTD_RETURN_IF_ERROR(allocate_tables(entry.get()));
  EXPERTD_RETURN_IF_ERROR(allocate_nodes(shape, entry.get()));
  EXPERTD_RETURN_IF_ERROR(create_lanes(entry.get()));
  share_inboxes(entry.get());
  EXPERTD_RETURN_IF_ERROR(allocate_exchange(shape, entry.get()));
  if (!take_progress(entry.get())) {
    give_back_words(*entry);
    keep_ht_pinned(entry.get());
    return base::Status(EXPERTD_REASON_GROUP_LIMIT,
                        "GPU " + gpu_.uuid + " has " + std::to_string(kMaxGroupsPerDevice) + " groups already");
  }
  groups_.insert(shape.id.value, entry.get());  // as many slots as there are progress words
  groups_owned_[{shape.id.value, shape.rank}] = std::move(entry);
  lane_streams_.fetch_add(2 * shape.capture_lanes, std::memory_order_relaxed);
  return base::Status::ok();
}

void CudaDevice::destroy_group(base::GroupId group, base::Rank rank) {
  std::unique_ptr<GroupEntry> destroyed;
  {
    const std::lock_guard<std::mutex> lock(control_mutex_);
    const auto found = groups_owned_.find({group.value, rank.value});
    if (found == groups_owned_.end()) {
      return;
    }
    groups_.erase(group.value);
    progress_used_[found->second->progress_index] = false;
    give_back_words(*found->second);
    keep_ht_pinned(found->second.get());
    destroyed = std::move(found->second);
    groups_owned_.erase(found);
    lane_streams_.fetch_sub(2 * destroyed->shape.capture_lanes, std::memory_order_relaxed);
  }
  const ScopedContext context(driver_, gpu_.view.context);
  destroyed.reset();  // may block like an unmap of close_session()
}

uint32_t CudaDevice::handle_capacity(base::GroupId group, base::Rank rank) const {
  const GroupEntry* entry = groups_.find(group.value);
  if (entry == nullptr || entry->shape.rank != rank.value) {
    return 0;
  }
  return entry->ht == nullptr ? entry->layout.handle_count : static_cast<uint32_t>(entry->ht->handles.size());
}

}  // namespace expertd::device::cuda
