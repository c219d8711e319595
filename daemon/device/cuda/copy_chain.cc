// SPDX-License-Identifier: Apache-2.0
// The chain of a part that is executed by copy engines: words and copies on the session's armed stream and no kernel,
// because beside a client that fills every multiprocessor a kernel waits for its time slice and these do not. The local
// work is done by a kernel of the client on its own stream; exchange_v1.h says where what lies.
//
//   8 bytes -> host; wait doorbell >= seq; write active, arrived[0][self], arrived[*][inactive] = seq; started,
//   progress dispatch: for each other rank: copy header, lanes and rows; write its arrived[0][self] = its seq combine:
//   for each other rank: copy lane weights;           write its arrived[0][self]
//             wait rung >= seq
//             for each other rank: copy its partial sums;       write its arrived[1][self]
//   progress; wait ended >= seq; report and ended -> host; done
//
// What the client gives decides nothing here: addresses are those of the group's windows, sizes come of the admitted
// requests and the group's shape. The client writes its own completion word when its kernels are through, so no hop
// lies between the last kernel and the caller; `done` follows behind the chain's wait for `ended`.
//
// Only copies to a peer and to the host, and words behind them: measured beside a process that fills the GPU, without
// MPS, those take 11 us, but anything that the driver gives to the compute engine's channel waits 1.8 to 3.9 ms for its
// time slice: copies inside one GPU, small copies from the host, and words on a stream that has nothing else under way,
// which is why a copy comes first.
//
// Ending early. A chain has nothing that could be skipped, so an aborted one copies whatever lies there and announces
// it. Before the rescue stream releases its waits, the same stream writes `voided` of every other rank: their kernels
// find it behind the arrived word and do nothing. Neither is a part's end taken for a good one that was aborted before
// (judge_copies).
//
// Order and visibility. A stream's copy has ended before the next entry begins, and a peer's copy is acknowledged by
// the memory it wrote; the destination's client starts its kernel behind a wait for the word in its own GPU's memory.
// Buffers are four, and operation n is launched when all parts of n - 4 have ended (GroupShared::set_copy_engine), or
// of n - 2 where high throughput goes by copies too.
#include <algorithm>
#include <array>

#include "daemon/base/clock.h"
#include "daemon/device/cuda/chain_words.h"
#include "daemon/device/cuda/cuda_device.h"
#include "daemon/device/cuda/word_batch.h"
#include "daemon/kernels/numerics.h"
#include "proto/abi/exchange_v1.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {

using engine::LaunchSpec;
using engine::Request;
using kernels::OpKind;
using kernels::OpShape;
using kernels::Payload;

struct alignas(128) CudaDevice::CopyFacts {
  uint64_t voided[base::kMaxGpuRanks];  // of rank j: the address of its word, 0 for none; the host's own
  uint64_t seqs[base::kMaxGpuRanks];    // and the sequence of its slot
  uint64_t ended;                       // copied from the client's word when the chain is through
  uint64_t reserved[15];
  expertd_exchange_report report;  // the client's
};

namespace {

static_assert(base::kMaxGpuRanks <= EXPERTD_STEP_RANKS && base::kMaxGpuRanks <= EXPERTD_EXCHANGE_RANKS_MAX);

bool is_low_latency(const OpShape& shape) {
  return shape.kind == OpKind::kLlDispatch || shape.kind == OpKind::kLlCombine;
}

bool is_active(uint64_t mask, uint32_t rank) {
  return ((mask >> rank) & 1) != 0;
}

/// What travels beside a dispatched row.
uint64_t side_bytes(const OpShape& shape) {
  if (shape.payload != Payload::kFp8) {
    return uint64_t{shape.side_elements} * shape.side_element_bytes;
  }
  const uint64_t groups = shape.hidden / kernels::kScaleGroup;
  return shape.scale == kernels::ScaleForm::kUe8m0 ? groups : groups * sizeof(float);
}

/// The report of the client, as far as a completion may say it.
void fill_report(const expertd_exchange_report& said, const OpShape& shape, kernels::OpReport* report) {
  const bool dispatch = shape.kind == OpKind::kLlDispatch;
  report->rank = -1;
  if (dispatch && said.reason == EXPERTD_REASON_EXPERT_OUT_OF_RANGE) {
    report->reason = said.reason;
    report->argument = EXPERTD_ARGUMENT_EXPERT_ID;
    report->value = said.value;
    report->minimum = -1;
    report->maximum = int64_t{shape.experts} - 1;
    return;
  }
  const uint32_t slots = shape.ranks * shape.max_tokens;
  if (said.reason != 0) {
    report->rank = said.rank >= 0 && said.rank < static_cast<int32_t>(shape.ranks) ? said.rank : -1;
    report->reason = EXPERTD_REASON_PEER_REJECTED;
    if (said.reason == EXPERTD_REASON_CAPACITY_EXCEEDED) {
      report->reason = said.reason;
      report->argument = EXPERTD_ARGUMENT_RECV_ROWS;
      report->value = said.value;
      report->maximum = slots;
    }
    return;
  }
  const uint64_t row_bytes = dispatch ? shape.out_row_bytes + side_bytes(shape) : 2ull * shape.hidden;
  const uint32_t lanes = shape.tokens * shape.top_k;
  report->local_bytes = std::min(said.local_rows, lanes) * row_bytes;
  report->remote_bytes = std::min(said.remote_rows, lanes) * row_bytes;
  if (dispatch) {
    report->recv_rows = std::min(said.recv_rows, slots * shape.local_experts);
    report->expert_count_entries = shape.local_experts;
    for (uint32_t e = 0; e < shape.local_experts; ++e) {
      report->expert_counts[e] = std::min(said.expert_counts[e], slots);
    }
  }
}

}  // namespace

/// Enqueues the chain of one part. Loop thread, with the context current; every function is false when the driver
/// refused something, after which only a piece of the chain is there.
class CudaDevice::CopyChain {
 public:
  CopyChain(const CudaDevice& device, const LaunchSpec& spec, const Part& part)
      : device_(device),
        driver_(device.driver_),
        spec_(spec),
        part_(part),
        group_(*part.group),
        layout_(group_.exchange_layout),
        shape_(spec.own->shape),
        stream_(part.session->stream) {}

  /// Finds the windows of all ranks; false when one is not there, or rows are longer than the windows have room for.
  bool find();
  bool enqueue();

 private:
  struct Peer {
    CUdeviceptr buffer = 0;  // of this operation; 0: takes no part
    CUdeviceptr flag_page = 0;
    uint32_t slot = 0;
    uint32_t tokens = 0;
    uint64_t seq = 0;
  };

  CUdeviceptr own_word(uint64_t offset) const { return address_of(part_.words.flag_page) + offset; }
  bool begin();
  bool send_to_all(uint32_t step);
  bool copy_to(uint32_t rank, uint32_t step);
  bool copy(CUdeviceptr to, CUdeviceptr from, uint64_t bytes) {
    return driver_.cuMemcpyAsync(to, from, bytes, stream_) == CUDA_SUCCESS;
  }
  bool end();

  const CudaDevice& device_;
  const Driver& driver_;
  const LaunchSpec& spec_;
  const Part& part_;
  const GroupEntry& group_;
  const expertd_exchange_layout& layout_;
  const OpShape& shape_;
  const CUstream stream_;
  uint64_t row_stride_ = 0;
  std::array<Peer, base::kMaxGpuRanks> peers_{};
};

bool CudaDevice::CopyChain::find() {
  row_stride_ = expertd_exchange_row_stride(shape_.out_row_bytes, side_bytes(shape_));
  if (part_.words.flag_page == nullptr || layout_.total_bytes == 0 ||
      (shape_.kind == OpKind::kLlDispatch && row_stride_ > layout_.row_stride)) {
    return false;
  }
  for (uint32_t j = 0; j < spec_.ranks; ++j) {
    if (!is_active(spec_.active_ranks.low(), j)) {
      continue;
    }
    const GroupEntry* peer = device_.find_peer(spec_, j);
    const Request* request = spec_.request_of(j);
    if (peer == nullptr || request == nullptr || peer->exchange == nullptr || peer->shape.rank != j ||
        request->slot >= EXPERTD_RING_SLOTS_MAX) {
      return false;
    }
    const uint64_t buffer = spec_.group_op % EXPERTD_EXCHANGE_BUFFERS * layout_.buffer_bytes;
    peers_[j] = {peer->exchange->address() + buffer, peer->flag_page, request->slot,
                 std::min(request->shape.tokens, group_.shape.max_tokens), request->seq};
    if (j != spec_.rank) {
      device_.copy_facts(part_.id)->voided[j] = peer->flag_page + EXPERTD_STEP_VOIDED_OFFSET(request->slot);
      device_.copy_facts(part_.id)->seqs[j] = request->seq;
    }
  }
  return peers_[spec_.rank].buffer != 0;
}

bool CudaDevice::CopyChain::enqueue() {
  const CUdeviceptr ended = own_word(EXPERTD_STEP_ENDED_OFFSET(part_.words.slot));
  bool sent = copy(device_.device_copy_facts(part_.id) + offsetof(CopyFacts, ended), ended, sizeof(uint64_t)) &&
              begin() && send_to_all(0);
  if (sent && shape_.kind == OpKind::kLlCombine) {
    ChainWords rung;
    rung.wait(own_word(EXPERTD_STEP_RUNG_OFFSET(part_.words.slot)), part_.words.seq);
    sent = rung.send(driver_, stream_) && send_to_all(1);
  }
  return sent && end();
}

bool CudaDevice::CopyChain::begin() {
  const uint32_t slot = part_.words.slot;
  ChainWords words;
  if (part_.waits_doorbell) {
    words.wait(own_word(EXPERTD_DOORBELL_OFFSET(slot)), part_.words.seq);
  }
  words.write(own_word(EXPERTD_STEP_ACTIVE_OFFSET(slot)), spec_.active_ranks.low());
  for (uint32_t j = 0; j < spec_.ranks; ++j) {
    if (!is_active(spec_.active_ranks.low(), j)) {
      words.write(own_word(EXPERTD_STEP_ARRIVED_OFFSET(slot, 0, j)), part_.words.seq);
      words.write(own_word(EXPERTD_STEP_ARRIVED_OFFSET(slot, 1, j)), part_.words.seq);
    }
  }
  words.write(own_word(EXPERTD_STEP_ARRIVED_OFFSET(slot, 0, spec_.rank)), part_.words.seq);
  words.write(address_of(&device_.device_facts(part_.id)->start_ns), 1);  // only that it has started is known
  words.write(address_of(&group_.device_progress->routed), spec_.group_op);
  return words.send(driver_, stream_);
}

/// One step's share of a rank's buffer: from the region of this rank for it to its region for this rank.
bool CudaDevice::CopyChain::copy_to(uint32_t rank, uint32_t step) {
  const CUdeviceptr own = peers_[spec_.rank].buffer;
  const CUdeviceptr other = peers_[rank].buffer;
  const uint32_t tokens = peers_[spec_.rank].tokens;
  if (shape_.kind == OpKind::kLlDispatch) {
    return copy(other + layout_.in_blocks + spec_.rank * layout_.block_bytes, own + layout_.out_block,
                expertd_exchange_block_copy(&layout_, tokens, row_stride_));
  }
  if (step == 0) {
    return copy(other + layout_.in_weights + spec_.rank * layout_.weights_bytes, own + layout_.out_weights,
                expertd_exchange_weights_copy(&layout_, tokens, group_.shape.top_k));
  }
  const uint64_t row = 2ull * group_.shape.hidden;
  const uint64_t sums = group_.shape.max_tokens * row;  // of one rank
  const uint64_t bytes = peers_[rank].tokens * row;
  return bytes == 0 || copy(other + layout_.in_sums + spec_.rank * sums, own + layout_.out_sums + rank * sums, bytes);
}

/// Begins behind this rank, so that not all ranks write to the same one.
bool CudaDevice::CopyChain::send_to_all(uint32_t step) {
  for (uint32_t i = 1; i < spec_.ranks; ++i) {
    const uint32_t j = (spec_.rank + i) % spec_.ranks;
    if (peers_[j].buffer == 0) {
      continue;
    }
    const CUdeviceptr arrived = peers_[j].flag_page + EXPERTD_STEP_ARRIVED_OFFSET(peers_[j].slot, step, spec_.rank);
    ChainWords announcement;
    announcement.write(arrived, peers_[j].seq);
    if (!copy_to(j, step) || !announcement.send(driver_, stream_)) {
      return false;
    }
  }
  return true;
}

bool CudaDevice::CopyChain::end() {
  const CUdeviceptr facts = device_.device_copy_facts(part_.id);
  const CUdeviceptr ended = own_word(EXPERTD_STEP_ENDED_OFFSET(part_.words.slot));
  ChainWords before;
  before.write(address_of(&group_.device_progress->moved), spec_.group_op);
  before.wait(ended, part_.words.seq);
  ChainWords behind;
  behind.write(address_of(&device_.device_facts(part_.id)->done), part_.id);
  return before.send(driver_, stream_) &&
         copy(facts + offsetof(CopyFacts, report), peers_[spec_.rank].buffer, sizeof(expertd_exchange_report)) &&
         copy(facts + offsetof(CopyFacts, ended), ended, sizeof(uint64_t)) && behind.send(driver_, stream_);
}

base::Status CudaDevice::start_copies() {
  auto facts = PinnedMemory::create(driver_, gpu_.view.context, kMaxPartsInFlight * sizeof(CopyFacts));
  if (!facts.is_ok()) {
    return facts.status();
  }
  copy_facts_ = std::move(facts).value();
  return start_ht();
}

CudaDevice::CopyFacts* CudaDevice::copy_facts(engine::PartId part) const {
  return static_cast<CopyFacts*>(copy_facts_->host()) + part % kMaxPartsInFlight;
}

CUdeviceptr CudaDevice::device_copy_facts(engine::PartId part) const {
  return copy_facts_->device() + part % kMaxPartsInFlight * sizeof(CopyFacts);
}

bool CudaDevice::takes_copies(const LaunchSpec& spec) const {
  const GroupEntry* group = spec.group.value == 0 ? nullptr : groups_.find(spec.group.value);
  return group != nullptr && group->exchange != nullptr && spec.own->copies;
}

uint32_t CudaDevice::entries_of(const LaunchSpec& spec) const {
  if (!takes_copies(spec)) {
    return kEntriesPerPart;
  }
  return is_low_latency(spec.own->shape) ? copy_entries(spec.ranks) : ht_entries(spec.ranks);
}

/// Takes the part whatever comes of it, as launch() does.
bool CudaDevice::launch_copies(const LaunchSpec& spec, Part* part) {
  if (!is_low_latency(spec.own->shape)) {
    return launch_ht(spec, part);
  }
  part->copies = true;
  part->shape = spec.own->shape;
  part->group->last_op = spec.group_op;
  part->group->last_active = spec.active_ranks.low();
  *copy_facts(part->id) = {};
  CopyChain chain(*this, spec, *part);
  if (!chain.find()) {
    fail_launch(part, EXPERTD_REASON_UNSUPPORTED);
    return true;
  }
  const ScopedContext context(driver_, gpu_.view.context);
  part->entries = copy_entries(spec.ranks);
  part->session->queued_entries += part->entries;
  if (!chain.enqueue()) {
    part->chain_broken = true;
    fail_launch(part, EXPERTD_REASON_CUDA);
  }
  return true;
}

void CudaDevice::void_copies(const Part& part, WordBatch* batch) const {
  const CopyFacts& facts = *copy_facts(part.id);
  for (uint32_t j = 0; j < base::kMaxGpuRanks; ++j) {
    if (facts.voided[j] != 0) {
      batch->write(reinterpret_cast<const void*>(facts.voided[j]), facts.seqs[j]);
    }
  }
}

/// How a part went whose chain has drained. One that was aborted before counts as aborted, also if the client's kernels
/// had come to their end: its words are then put in order with the others'.
void CudaDevice::judge_copies(const Part& part) {
  kernels::cuda::PartFacts* facts = host_facts(part.id);
  const CopyFacts& said = *copy_facts(part.id);
  const bool good = part.end_reason == 0 && said.ended == part.words.seq;
  facts->verdict = good ? kernels::cuda::kVerdictGo : kernels::cuda::kVerdictAborted;
  if (good) {
    facts->report = {};
    fill_report(said.report, part.shape, &facts->report);
  }
}

base::Status CudaDevice::allocate_exchange(const engine::GroupShape& shape, GroupEntry* entry) {
  if (shape.copies == 0) {
    return base::Status::ok();
  }
  const auto session = sessions_owned_.find(entry->shape.session.value);
  if (session == sessions_owned_.end() || entry->relay_ranks != 0) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED, "copy engines need GPUs that reach each other");
  }
  const CopyLayout layout = copy_layout(shape);
  entry->exchange_layout = layout.low_latency;
  auto memory = VmmMemory::create(reach(true), layout.total_bytes, &pool_);
  if (!memory.is_ok()) {
    return memory.status().with_context("exchange window of the group");
  }
  entry->exchange = std::move(memory).value();
  entry->flag_page = session->second->flag_page->address();
  EXPERTD_RETURN_IF_ERROR(zero(*entry->exchange));
  return allocate_ht(shape, entry);
}

base::Result<Window> CudaDevice::exchange_window(base::GroupId group, base::Rank rank) {
  const std::lock_guard<std::mutex> lock(control_mutex_);
  const auto found = groups_owned_.find({group.value, rank.value});
  if (found == groups_owned_.end() || found->second->exchange == nullptr) {
    return base::Status(EXPERTD_REASON_UNSUPPORTED, "the group is not executed by copy engines");
  }
  const ScopedContext context(driver_, gpu_.view.context);
  auto fd = found->second->exchange->export_fd();
  if (!fd.is_ok()) {
    return fd.status();
  }
  Window window;
  window.fd = std::move(fd).value();
  window.bytes = found->second->exchange->allocated_bytes();
  return window;
}

}  // namespace expertd::device::cuda
