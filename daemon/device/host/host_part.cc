// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/host/host_part.h"

#include <algorithm>
#include <bit>

#include "daemon/base/clock.h"
#include "daemon/device/part_params.h"

namespace expertd::device {

namespace {

// One slice: bytes that are moved or cleared, or entries of tables that are read or written; some 50 us of either.
constexpr uint64_t kSliceBytes = uint64_t{512} * 1024;
constexpr uint64_t kSliceEntries = uint64_t{32} * 1024;

uint32_t per_slice(uint64_t budget, uint64_t cost_of_one) {
  return static_cast<uint32_t>(std::max<uint64_t>(1, budget / std::max<uint64_t>(1, cost_of_one)));
}

bool is_dispatch(kernels::OpKind kind) {
  return kind == kernels::OpKind::kDispatch || kind == kernels::OpKind::kLlDispatch;
}

}  // namespace

void HostPart::begin(const engine::LaunchSpec& spec, base::DeviceIndex device, HostGroupDirectory* groups,
                     engine::PartId id, engine::PartId behind) {
  id_ = id;
  behind_ = behind;
  progress_ = 0;
  start_ns_ = 0;
  arrived_ = {};
  kept_ = nullptr;
  exchange_ = nullptr;
  refused_ = false;
  stirred_ = false;
  peer_reason_ = 0;
  exchanged_ = engine::Exchanged{};
  report_ = kernels::OpReport{};
  broken_ = !prepare(spec, device, groups);
  size_slices();
  step_ = behind == 0 ? Step::kStart : Step::kBehind;
}

bool HostPart::prepare(const engine::LaunchSpec& spec, base::DeviceIndex device, HostGroupDirectory* groups) {
  params_ = own_params(spec, device);
  params_.shape.rank = spec.rank;
  flags_ = spec.flags;
  devices_ = spec.devices;
  placement_ = spec.placement;
  peers_ = nullptr;
  const kernels::OpShape& shape = params_.shape;
  routes_ = is_dispatch(shape.kind) && shape.cached == 0;
  if (spec.group.value == 0) {
    return shape.kind == kernels::OpKind::kLayout;
  }
  HostGroupTables* tables = groups->find(spec.group);
  if (tables == nullptr || flags_ == nullptr) {
    return false;
  }
  params_.counts = tables->counts(spec.page);
  peers_ = tables->peers(spec.rank, spec.page);
  if (peers_ == nullptr) {
    return false;
  }
  place_ = spec.place_of(spec.rank);
  local_ = 0;
  for (const uint32_t rank : spec.active_ranks) {
    local_ |= spec.is_local(rank) ? uint64_t{1} << spec.place_of(rank) : 0;
  }
  if (spec.placement != nullptr && !prepare_exchange(spec, tables)) {
    return false;
  }
  if (shape.kind != kernels::OpKind::kBarrier) {
    kept_ = tables->use(spec.rank, spec.own->handle_index);
    if (kept_ == nullptr) {
      return false;
    }
    params_.routing = tables->routing(spec.rank, spec.own->handle_index);
    use_ = {spec.own->handle_generation, shape.tokens, shape.top_k, shape.expanded};
  }
  if (routes_ && (local_ & ((uint64_t{1} << place_) - 1)) == 0) {
    tables->clear_inactive_rows(spec.page, spec.active_ranks);  // by the lowest rank, before its flag
  }
  for (uint32_t rank = 0; rank < spec.ranks; ++rank) {
    peers_[rank] = peer_view(spec, rank, device);
    peers_[rank].counts = params_.counts;
  }
  return true;
}

bool HostPart::prepare_exchange(const engine::LaunchSpec& spec, HostGroupTables* tables) {
  exchange_ = tables->exchange(spec.rank);
  refused_ = spec.own->rejected_reason != 0;
  if (refused_) {
    // What the request asks for was never found good: the part only tells the others.
    params_ = kernels::OpParams{};
    params_.counts = tables->counts(spec.page);
    params_.shape.kind = kernels::OpKind::kBarrier;
    params_.shape.rank = spec.rank;
    params_.shape.active_ranks = spec.active_ranks;
    routes_ = false;
  }
  params_.shape.ranks = spec.ranks;
  params_.shape.experts = tables->experts();
  node_.fabric = spec.fabric;
  node_.placement = spec.placement;
  node_.own = spec.own;
  node_.number = spec.group_op;
  node_.rank = spec.rank;
  node_.active = spec.active_ranks;
  node_.view = spec.epoch;
  node_.params = &params_;
  node_.peers = peers_;
  node_.notices = tables->notices(spec.page);
  node_.flags = flags_;
  node_.routes = routes_;
  return exchange_ != nullptr && spec.fabric != nullptr;
}

void HostPart::size_slices() {
  const kernels::OpShape& shape = params_.shape;
  const uint64_t top_k = std::max(1U, shape.top_k);
  route_tokens_ = per_slice(kSliceEntries, top_k + (shape.kind == kernels::OpKind::kLayout ? 0 : shape.ranks));
  count_tokens_ = per_slice(kSliceEntries, top_k * top_k + shape.ranks / 16);  // each lane looks at all before it
  // A mask may send a token to every rank, and a handle does not say whether one did.
  const bool by_expert = shape.expanded != 0 || shape.slots_per_expert != 0;
  const bool by_ids = routes_ && params_.in.token_rank_mask == nullptr;
  const uint64_t rows = by_expert || by_ids ? top_k : std::max<uint64_t>(top_k, shape.ranks);
  // Elements of a side tensor are gathered one by one where they have a stride.
  move_tokens_ = per_slice(kSliceBytes, rows * (shape.row_bytes + uint64_t{shape.side_elements} * 16));
}

bool HostPart::takes_slices(Step step) {
  return step == Step::kCheckIds || step == Step::kCountIds || step == Step::kRoute || step == Step::kMove ||
         step == Step::kFinish || step == Step::kClear;
}

bool HostPart::runs() const {
  if (exchanges() && (step_ == Step::kAwaitRouted || step_ == Step::kMove || step_ == Step::kAwaitMoved)) {
    return stirred_;  // else the fabric wakes the loop when something arrived or a buffer came back
  }
  return step_ != Step::kFree && step_ != Step::kBehind && step_ != Step::kAwaitRouted && step_ != Step::kAwaitMoved;
}

void HostPart::enter(Step step) {
  step_ = step;
  progress_ = 0;
}

void HostPart::follow(engine::PartId next) {
  behind_ = next;
  if (next == 0 && step_ == Step::kBehind) {
    step_ = Step::kReady;
  }
}

void HostPart::close_exchange() {
  if (exchanges() && step_ != Step::kBehind && step_ != Step::kReady && step_ != Step::kStart) {
    exchange_->close();
  }
  exchange_ = nullptr;
}

void HostPart::fail(uint32_t reason) {
  close_exchange();
  report_ = kernels::OpReport{};
  report_.reason = reason;
  if (step_ != Step::kClear) {
    enter(Step::kClear);
  }
}

bool HostPart::advance(engine::WakePort* wake) {
  switch (step_) {
    case Step::kFree:
      return true;
    case Step::kBehind:
      return false;
    case Step::kReady:
      enter(Step::kStart);
      return false;
    case Step::kStart:
      start(wake);
      return false;
    case Step::kCheckIds:
      return check_ids();
    case Step::kCountIds:
      return count_ids();
    case Step::kRoute:
      route(wake);
      return false;
    case Step::kAwaitRouted:
      return await_routed(wake);
    case Step::kMove:
      move(wake);
      return false;
    case Step::kAwaitMoved:
      await_moved(wake);
      return false;
    case Step::kFinish:
      return finish();
    case Step::kClear:
      return clear();
  }
  return true;
}

// Release publishes these ranks' counts; the acquire that sees them is in await_routed. Of two that add the last ranks
// at once, each in another word, one sees both.
void HostPart::set_routed(const base::RankSet& ranks, engine::WakePort* wake) const {
  flags_->routed.add(ranks, std::memory_order_seq_cst);
  if (flags_->routed.load(std::memory_order_seq_cst) == active()) {
    wake_others(wake);
  }
}

// Likewise the rank's rows, with await_moved.
void HostPart::set_moved(engine::WakePort* wake) const {
  const uint64_t bit = uint64_t{1} << place_;
  if ((flags_->moved.fetch_or(bit, std::memory_order_seq_cst) | bit) == local_) {
    wake_others(wake);
  }
}

void HostPart::wake_others(engine::WakePort* wake) const {
  for (uint64_t left = local_ & ~(uint64_t{1} << place_); left != 0; left &= left - 1) {
    wake->wake(devices_[static_cast<uint32_t>(std::countr_zero(left))]);
  }
}

void HostPart::start(engine::WakePort* wake) {
  start_ns_ = base::now_ns();
  if (broken_) {
    fail(EXPERTD_REASON_INTERNAL);
    return;
  }
  if (params_.shape.kind == kernels::OpKind::kLayout) {
    enter(Step::kCheckIds);
    return;
  }
  if (exchanges()) {
    step_ = Step::kAwaitRouted;  // so that whatever ends the part closes what is opened here
    if (!exchange_->open(node_)) {
      fail(EXPERTD_REASON_INTERNAL);
      return;
    }
  }
  if (routes_) {
    *kept_ = HandleUse{};  // until this dispatch has succeeded nobody may go by the tables
    enter(Step::kRoute);
    return;
  }
  if (kept_ != nullptr) {
    // The session's parts run in order, so the handle is what the last dispatch on it made of it. A dispatch that
    // failed left rows that were never numbered for its outputs.
    const uint32_t reason = *kept_ == use_ ? EXPERTD_REASON_NONE : EXPERTD_REASON_STALE_HANDLE;
    kernels::host::announce(params_, reason, use_.generation);
  } else if (exchanges()) {
    kernels::host::announce(params_, EXPERTD_REASON_NONE, 0);
  }
  routed(wake);
}

// The own row of the matrix is there.
void HostPart::routed(engine::WakePort* wake) {
  if (exchanges()) {
    exchange_->announce();
  }
  // Published with the own bit.
  flags_->routed_ns[params_.shape.rank].store(base::now_ns(), std::memory_order_relaxed);
  set_routed(base::RankSet::one(params_.shape.rank), wake);
  enter(Step::kAwaitRouted);
}

// A turn of what goes on with other nodes beside the step.
void HostPart::turn_exchange(engine::WakePort* wake) {
  if (!exchanges()) {
    return;
  }
  stirred_ = exchange_->turn();
  const base::RankSet counted = exchange_->take_counted();
  if (counted.any()) {
    set_routed(counted, wake);
  }
}

// The end of the next slice of a step over tokens.
uint32_t HostPart::slice_end(uint32_t tokens) const {
  return static_cast<uint32_t>(std::min<uint64_t>(params_.shape.tokens, progress_ + tokens));
}

bool HostPart::check_ids() {
  const uint32_t end = slice_end(route_tokens_);
  if (!kernels::host::layout_check(params_, static_cast<uint32_t>(progress_), end, &report_)) {
    return true;
  }
  progress_ = end;
  if (end == params_.shape.tokens) {
    enter(Step::kCountIds);
  }
  return false;
}

bool HostPart::count_ids() {
  const uint32_t end = slice_end(count_tokens_);
  kernels::host::layout_count(params_, static_cast<uint32_t>(progress_), end);
  progress_ = end;
  return end == params_.shape.tokens;
}

void HostPart::route(engine::WakePort* wake) {
  const uint32_t end = slice_end(route_tokens_);
  kernels::host::route_range(params_, static_cast<uint32_t>(progress_), end);
  progress_ = end;
  if (end == params_.shape.tokens) {
    routed(wake);
  }
}

void HostPart::add_waits(const base::RankSet& routed) {
  int64_t* stats = params_.out.wait_stats;
  if (stats == nullptr || routed == arrived_) {
    return;
  }
  const uint64_t waited = base::now_ns() - start_ns_;
  for (const uint32_t rank : routed - arrived_) {
    // Client memory: whatever it holds, the addition must be defined.
    stats[rank] = static_cast<int64_t>(static_cast<uint64_t>(stats[rank]) + waited);
  }
  arrived_ = routed;
}

// Whose counts came last held the part up. By when they came and not by what each look found: between two looks this
// loop may have slept, since only the last rank wakes it, or may not have run.
void HostPart::note_last() {
  const uint32_t own = params_.shape.rank;
  const uint64_t own_ns = flags_->routed_ns[own].load(std::memory_order_relaxed);  // ordered by the look at `routed`
  uint32_t last = own;
  uint64_t last_ns = own_ns;
  for (const uint32_t rank : active()) {
    const uint64_t routed_ns = flags_->routed_ns[rank].load(std::memory_order_relaxed);
    if (routed_ns > last_ns) {
      last = rank;
      last_ns = routed_ns;
    }
  }
  exchanged_.last_rank = static_cast<int32_t>(last);
  exchanged_.waited_ns = last_ns - own_ns;
}

// True for a barrier that ended.
bool HostPart::await_routed(engine::WakePort* wake) {
  turn_exchange(wake);
  const base::RankSet routed = flags_->routed.load(std::memory_order_acquire);  // pairs with set_routed
  add_waits(routed);
  if (routed != active() || (exchanges() && !exchange_->announced())) {
    return false;
  }
  note_last();
  if (exchanges() && !exchange_->decide({&report_, &peer_reason_})) {
    close_exchange();
    enter(Step::kClear);  // not even of the same kind may the ranks' operations be: nobody waits for anybody
    return false;
  }
  if (params_.shape.kind == kernels::OpKind::kBarrier) {
    close_exchange();
    return true;
  }
  enter(Step::kMove);
  if ((!routes_ && kernels::host::check_announced(params_, &report_) != 0) ||
      kernels::host::check_matrix(params_, peers_, &report_) != 0) {
    progress_ = params_.shape.tokens;  // nobody moves anything: all ranks see the same
  } else if (exchanges()) {
    exchange_->begin_moving();
  }
  return false;
}

void HostPart::move(engine::WakePort* wake) {
  turn_exchange(wake);
  if (exchanges()) {
    if (report_.reason == 0 && !exchange_->moved(progress_)) {
      stirred_ |= exchange_->move(&progress_, move_tokens_, &report_);
    }
    if (exchange_->moved(progress_)) {
      set_moved(wake);
      enter(Step::kAwaitMoved);
    }
    return;
  }
  const uint32_t end = slice_end(move_tokens_);
  if (progress_ < end) {
    kernels::host::move_range(params_, peers_, static_cast<uint32_t>(progress_), end, &report_);
    progress_ = end;
  }
  if (progress_ >= params_.shape.tokens) {
    set_moved(wake);
    enter(Step::kAwaitMoved);
  }
}

void HostPart::await_moved(engine::WakePort* wake) {
  turn_exchange(wake);
  if (flags_->moved.load(std::memory_order_acquire) != local_ ||  // pairs with set_moved
      (exchanges() && !exchange_->complete())) {
    return;
  }
  if (exchanges()) {
    exchanged_.fabric_bytes = exchange_->fabric_bytes();
    if (report_.reason == 0 && exchange_->bad_rank() >= 0) {
      report_.reason = EXPERTD_REASON_INTERNAL;
      report_.rank = exchange_->bad_rank();
    }
    close_exchange();
  }
  if (report_.reason != 0) {
    enter(Step::kClear);
    return;
  }
  kernels::host::finish_counts(params_, &report_);
  enter(Step::kFinish);
  progress_ = kernels::host::rows_to_clear(params_, report_).begin;
}

uint32_t HostPart::missing(base::RankSet* ranks) const {
  *ranks = {};
  if (flags_ == nullptr) {
    return EXPERTD_MISSING_NONE;
  }
  const base::RankSet routed = flags_->routed.load(std::memory_order_acquire);
  if (routed != active()) {
    *ranks = active() - routed;
    return EXPERTD_MISSING_COUNTS;
  }
  const uint64_t unmoved = local_ & ~flags_->moved.load(std::memory_order_acquire);
  for (uint64_t left = unmoved; left != 0; left &= left - 1) {
    const auto place = static_cast<uint32_t>(std::countr_zero(left));
    ranks->add(placement_ == nullptr ? place : placement_->ranks_of[placement_->own_node][place]);
  }
  if (exchanges() && exchange_->is_open()) {
    *ranks |= exchange_->missing();
  }
  return EXPERTD_MISSING_ROWS;
}

bool HostPart::finish() {
  const kernels::OpShape& shape = params_.shape;
  const uint64_t rows = kernels::host::rows_to_clear(params_, report_).end;
  const uint64_t row_bytes = uint64_t{shape.topk_idx_bytes + 4} * (shape.expanded != 0 ? 1 : shape.top_k);
  const uint64_t end = std::min(rows, progress_ + per_slice(kSliceBytes, row_bytes));
  if (progress_ < end) {
    kernels::host::finish_rows(params_, report_, {progress_, end});
    progress_ = end;
  }
  if (progress_ < rows) {
    return false;
  }
  if (routes_) {
    *kept_ = use_;
  }
  return true;
}

// A failed operation must not be mistaken for data by whoever reads the outputs without looking at the completion.
bool HostPart::clear() {
  const kernels::OpShape& shape = params_.shape;
  if (!is_dispatch(shape.kind)) {
    return true;
  }
  if (params_.out.expert_counts != nullptr && progress_ == 0) {
    std::fill_n(params_.out.expert_counts, shape.local_experts, 0);
  }
  if (shape.kind != kernels::OpKind::kDispatch || params_.out.topk_idx == nullptr) {
    return true;
  }
  const uint64_t ids = uint64_t{shape.capacity_rows} * (shape.expanded != 0 ? 1 : shape.top_k);
  const uint64_t bytes = ids * shape.topk_idx_bytes;
  const uint64_t end = std::min(bytes, progress_ + kSliceBytes);
  std::fill_n(static_cast<uint8_t*>(params_.out.topk_idx) + progress_, end - progress_, uint8_t{0xff});
  progress_ = end;
  return end == bytes;
}

}  // namespace expertd::device
