// SPDX-License-Identifier: Apache-2.0
// The chain of a high throughput part by copy engines. As with low latency (copy_chain.cc) it has copies to the peers
// and to the host and words behind them, and no kernel; the local work is done by kernels of the client. But how many
// rows go where is first known when the clients have counted them, so a chain is enqueued in two steps and the loop,
// which polls, decides in between:
//
//   copy -> host; wait doorbell; [dispatch: counts -> host, counted; wait packed of the first piece]
//   the loop: checks the counts, lets the loops of the other ranks have them, waits for theirs, decides
//   dispatch: for each other rank: rows of the first piece, straight into its outputs
//             wait packed of all; for each other rank: records, into its window; the progress of all of them
//             [plan -> window, plan; on the rescue stream]
//             for each other rank: the other rows
//   combine:  for every chunk: for each other rank: rows of the own input, into its window, and with the first chunk
//             all weights; the progress of all of them, of the last one with what follows
//             [copy -> host, rows that may be taken, plan; on the rescue stream; between the first two chunks]
//   progress of all; own progress; wait ended; voided and ended -> host; done
//
// Rows come first, since until the first large copy is enqueued the links are idle: every call into the driver in front
// of it is 2 to 3 us, and every entry of the stream as well. Where rows go somewhere they are the copy that has to
// stand in front of words; else one of 8 bytes to the host does (send()). What ends a copy costs the link about 3 us, a
// word behind it 3 us more (two H100, 2026-11-26, tests/bench/link_chain; a second stream costs as much as it saves),
// so a chain has few of both, and one submission of words tells all ranks.
//
// A cached dispatch knows its counts and still tells that its doorbell has rung: until then its outputs belong to what
// the caller's stream runs before it. Between the two steps nothing else is launched on the session's stream, since it
// would stand in front of the rest. A rank whose client cannot go (a bad id, counts that cannot be true, a handle that
// is not there) publishes that as well, so that all ranks end alike and nobody moves anything.
//
// What a client wrote decides nothing before it was checked: counts are no more than its tokens have (ht_take_counts),
// rows of all ranks fit the outputs that admission saw (ht_decide), rows of a handle are clipped to the tensors of this
// operation. Records are written by one client and spread by another one, which clamps to its own outputs. What two
// loops share they share in their own memory.
//
// Ending early. Before the second step a part is ended by its end alone. Behind it the copies go on with whatever lies
// there: the rescue stream writes `voided` of every other rank before it releases anything, and a part that was voided
// does not end before its own abort. The caller's stream is let go by settle(), when all parts have ended, for until
// then other ranks may write its outputs.
#include "daemon/device/cuda/ht_chain.h"

#include <algorithm>

#include "daemon/device/cuda/word_batch.h"
#include "proto/abi/ring_v1.h"

namespace expertd::device::cuda {

using engine::LaunchSpec;
using engine::Request;
using engine::TensorView;
using kernels::OpKind;
using kernels::OpReport;

namespace {

bool is_active(uint64_t mask, uint32_t rank) {
  return ((mask >> rank) & 1) != 0;
}

/// A rank's place among those that are not `without`.
uint64_t place_of(uint32_t rank, uint32_t without) {
  return rank < without ? rank : rank - 1;
}

uint64_t progress_at(uint32_t slot, uint32_t rank) {
  return EXPERTD_HT_STEP_OFFSET(slot) + EXPERTD_HT_STEP_PROGRESS + uint64_t{rank} * sizeof(uint64_t);
}

constexpr uint32_t kCombineInputs[] = {EXPERTD_IN_X, EXPERTD_IN_TOPK_WEIGHTS};
/// Of a rank's word `rows`: it gave weights with them.
constexpr uint64_t kWithWeights = uint64_t{1} << 31;

}  // namespace

CUdeviceptr CudaDevice::HtChain::own_word(uint64_t offset) const {
  return address_of(part_.words.flag_page) + EXPERTD_HT_STEP_OFFSET(part_.words.slot) + offset;
}

CUdeviceptr CudaDevice::HtChain::word_of(uint32_t rank, uint64_t offset) const {
  return device_.find_peer(spec_, rank)->flag_page + offset;
}

CUdeviceptr CudaDevice::HtChain::buffer_of(uint32_t rank) const {
  const GroupEntry& entry = *device_.find_peer(spec_, rank);
  return entry.exchange->address() + ht_.window_offset + spec_.group_op % EXPERTD_HT_BUFFERS * ht_.layout.buffer_bytes;
}

CUdeviceptr CudaDevice::HtChain::facts() const {
  return device_.ht_facts_->device() + part_.id % kMaxPartsInFlight * sizeof(HtFacts);
}

CUdeviceptr CudaDevice::HtChain::tensor(uint32_t rank, uint32_t index) {
  const TensorView& view = spec_.request_of(rank)->tensors[index];
  if (view.mapping == nullptr) {
    return 0;
  }
  const uint32_t device = device_.gpu_.view.index.value;
  reachable_ = reachable_ && view.mapping->base[device] != nullptr;
  return address_of(view.on(device_.gpu_.view.index));
}

bool CudaDevice::HtChain::find() {
  if (part_.words.flag_page == nullptr || spec_.own->handle_index >= ht_.handles.size() ||
      expertd_exchange_ht_fits(&ht_.layout, shape_.out_row_bytes, side_bytes()) == 0 ||
      shape_.max_tokens * record_bytes() > ht_.layout.beside_bytes) {
    return false;
  }
  for (uint32_t j = 0; j < spec_.ranks; ++j) {
    if (!is_active(spec_.active_ranks.low(), j)) {
      continue;
    }
    const GroupEntry* peer = device_.find_peer(spec_, j);
    const Request* request = spec_.request_of(j);
    if (peer == nullptr || request == nullptr || peer->exchange == nullptr || peer->ht == nullptr ||
        peer->shape.rank != j || request->slot >= EXPERTD_RING_SLOTS_MAX) {
      return false;
    }
    if (j != spec_.rank) {
      state_.voided[j] = peer->flag_page + EXPERTD_HT_STEP_OFFSET(request->slot) + EXPERTD_HT_STEP_VOIDED;
      state_.seqs[j] = request->seq;
    }
    (void)(is_dispatch() ? tensor(j, EXPERTD_OUT_X) : 0);
  }
  for (const uint32_t input : kCombineInputs) {
    (void)(is_dispatch() ? 0 : tensor(spec_.rank, input));
  }
  return reachable_ && is_active(spec_.active_ranks.low(), spec_.rank);
}

/// The words of a stream that has nothing else under way go to the compute engine's channel, where they wait for the
/// time slice of their process; behind a copy to the host they do not (copy_chain.cc).
bool CudaDevice::HtChain::put_copy_first(CUstream stream) const {
  return driver_.cuMemcpyAsync(facts() + offsetof(HtFacts, begun), own_word(EXPERTD_HT_STEP_ENDED), sizeof(uint64_t),
                               stream) == CUDA_SUCCESS;
}

bool CudaDevice::HtChain::send(ChainWords* words) {
  if (!led_ && !put_copy_first(stream_)) {
    return false;
  }
  led_ = true;
  return words->send(driver_, stream_);
}

bool CudaDevice::HtChain::begin() {
  const CUdeviceptr routed = address_of(&group_.device_progress->routed);
  ChainWords words;
  if (part_.waits_doorbell) {
    words.wait(address_of(part_.words.flag_page) + EXPERTD_DOORBELL_OFFSET(part_.words.slot), part_.words.seq);
  }
  const CUdeviceptr started = address_of(&device_.device_facts(part_.id)->start_ns);  // only that it has is known
  if (!is_dispatch()) {
    words.write(started, 1);
    words.write(routed, spec_.group_op);
    return send(&words);
  }
  const uint64_t bytes = counts() ? ht_.layout.counts_bytes : sizeof(expertd_exchange_ht_counts);
  ChainWords behind;
  behind.write(facts() + offsetof(HtFacts, counted), part_.id);  // what the loop waits for comes first
  behind.write(started, 1);
  behind.write(routed, spec_.group_op);
  behind.wait(own_word(EXPERTD_HT_STEP_PACKED), part_.words.seq);  // here, so that the loop need not enqueue it
  return send(&words) && copy(ht_.pinned->device() + ht_.counts_at(spec_.group_op), buffer_of(spec_.rank), bytes) &&
         send(&behind);
}

void CudaDevice::HtChain::take_counts() {
  if (!counts()) {
    return;
  }
  const char* pinned = static_cast<const char*>(ht_.pinned->host()) + ht_.counts_at(spec_.group_op);
  const auto* said = reinterpret_cast<const expertd_exchange_ht_counts*>(pinned);
  ht_take_counts(*said, reinterpret_cast<const int32_t*>(said + 1), shape_, own_row());
}

bool CudaDevice::HtChain::is_stale() const {
  return ht_.handles[spec_.own->handle_index].generation != spec_.own->handle_generation;
}

void CudaDevice::HtChain::publish() {
  if (!counts()) {
    HtRow* row = own_row();
    *row = {};
    if (is_stale()) {
      row->reason = EXPERTD_REASON_STALE_HANDLE;
      row->argument = EXPERTD_ARGUMENT_HANDLE;
      row->value = spec_.own->handle_generation;
    }
  }
  // Pairs with the acquire in gather().
  ht_.published[spec_.group_op % EXPERTD_HT_BUFFERS].op.store(spec_.group_op, std::memory_order_release);
}

bool CudaDevice::HtChain::gather(HtRows* rows) const {
  *rows = {};
  for (uint32_t j = 0; j < spec_.ranks; ++j) {
    if (!is_active(spec_.active_ranks.low(), j)) {
      continue;
    }
    const GroupEntry* peer = device_.find_peer(spec_, j);
    if (peer == nullptr || peer->ht == nullptr) {
      return false;  // its GPU was lost: a group is left only when all parts of an operation have ended otherwise
    }
    const HtGroup::Published& published = peer->ht->published[spec_.group_op % EXPERTD_HT_BUFFERS];
    if (published.op.load(std::memory_order_acquire) != spec_.group_op) {
      return false;
    }
    (*rows)[j] = &published.row;
  }
  return true;
}

/// Of a dispatch rows of the outputs, of a combine rows of the inputs; 0 of ranks that take no part.
CudaDevice::HtChain::Capacities CudaDevice::HtChain::capacities() const {
  Capacities rows{};
  for (uint32_t j = 0; j < spec_.ranks; ++j) {
    const Request* request = is_active(spec_.active_ranks.low(), j) ? spec_.request_of(j) : nullptr;
    const uint32_t tensor = is_dispatch() ? EXPERTD_OUT_X : EXPERTD_IN_X;
    if (request != nullptr && request->tensors[tensor].mapping != nullptr) {
      rows[j] = request->shape.capacity_rows;
    }
  }
  return rows;
}

bool CudaDevice::HtChain::proceed(const HtRows& rows) {
  HtGroup::Handle& handle = ht_.handles[spec_.own->handle_index];
  HtTable fresh;
  if (counts()) {
    fresh = ht_table(rows, shape_, spec_.active_ranks.low());
  }
  const HtTable& table = counts() ? fresh : handle.table;
  const Capacities room = capacities();
  const bool go = ht_decide(rows, is_dispatch() ? &table : nullptr, room, shape_, &state_.report);
  bool sent = false;
  if (go) {
    sent = is_dispatch() ? send_dispatch(table, room) : send_combine(table, room);
    ht_report(table, room, shape_, &state_.report);
  } else {
    sent = is_dispatch() ? tell_plan(table, state_.report.reason) : tell_rows({}, {}, state_.report.reason);
  }
  if (counts()) {
    handle.generation = go ? spec_.own->handle_generation : 0;
    handle.table = fresh;
  }
  return sent && end(go);
}

/// Tells the other ranks how far this one's copies for them are: all of them at once, for what they wait for has come
/// only when all ranks' has, and each of those tells it last to another one.
void CudaDevice::HtChain::announce(uint32_t steps, ChainWords* words) const {
  for (uint32_t j = 0; j < spec_.ranks; ++j) {
    if (j != spec_.rank && is_active(spec_.active_ranks.low(), j)) {
      const Request& request = *spec_.request_of(j);
      words->write(word_of(j, progress_at(request.slot, spec_.rank)), EXPERTD_HT_PROGRESS(request.seq, steps));
    }
  }
}

/// The own client, on the rescue stream, on which nothing ever waits, beside the first copies. Behind a copy there.
bool CudaDevice::HtChain::tell(uint32_t verdict, ChainWords* words) {
  for (uint32_t j = 0; j < spec_.ranks; ++j) {
    if (!is_active(spec_.active_ranks.low(), j)) {  // nothing comes from it, which must not be waited for
      words->write(address_of(part_.words.flag_page) + progress_at(part_.words.slot, j),
                   EXPERTD_HT_PROGRESS(part_.words.seq, EXPERTD_HT_ALL));
    }
  }
  words->write(own_word(EXPERTD_HT_STEP_ACTIVE), spec_.active_ranks.low());
  words->write(own_word(EXPERTD_HT_STEP_VERDICT), verdict);
  words->write(own_word(EXPERTD_HT_STEP_PLAN), part_.words.seq);
  led_ = false;  // these calls take longer than small copies on the part's stream
  return words->send(driver_, device_.rescue_stream_);
}

bool CudaDevice::HtChain::tell_plan(const HtTable& table, uint32_t verdict) {
  ChainWords words;
  if (verdict != 0) {
    return put_copy_first(device_.rescue_stream_) && tell(verdict, &words);
  }
  const uint64_t at = ht_.plan_at(spec_.group_op);
  ht_fill_plan(table, shape_, reinterpret_cast<expertd_exchange_ht_plan*>(static_cast<char*>(ht_.pinned->host()) + at));
  return driver_.cuMemcpyAsync(buffer_of(spec_.rank) + ht_.layout.plan, ht_.pinned->device() + at,
                               sizeof(expertd_exchange_ht_plan), device_.rescue_stream_) == CUDA_SUCCESS &&
         tell(verdict, &words);
}

/// What travels beside the rows of all slices, one copy for each rank, and that it is there. In front of the last
/// piece, so that the clients spread it while that is on its way.
bool CudaDevice::HtChain::send_records(const HtTable& table, const Capacities& capacities) {
  const expertd_exchange_ht_layout& at = ht_.layout;
  if (record_bytes() == 0) {
    return true;
  }
  bool sent = true;
  for (uint32_t i = 1; i < spec_.ranks && sent; ++i) {
    const uint32_t j = (spec_.rank + i) % spec_.ranks;
    if (!is_active(spec_.active_ranks.low(), j)) {
      continue;
    }
    const uint64_t rows = ht_rows_inside(table.base(spec_.rank, j), table.rows[spec_.rank][j], capacities[j]);
    sent = copy(buffer_of(j) + at.beside_in + place_of(spec_.rank, j) * at.beside_bytes,
                buffer_of(spec_.rank) + at.beside + place_of(j, spec_.rank) * at.beside_bytes, rows * record_bytes());
  }
  ChainWords words;
  announce(EXPERTD_HT_BESIDE, &words);
  return sent && send(&words);
}

/// Begins behind this rank, so that not all ranks write to the same one.
bool CudaDevice::HtChain::send_piece(const HtTable& table, const Capacities& capacities, uint32_t piece) {
  const uint32_t first = piece == 0 ? 0 : EXPERTD_HT_FIRST_SLICES;
  const uint32_t end = piece + 1 == EXPERTD_HT_PIECES ? kHtSlices : EXPERTD_HT_FIRST_SLICES;
  bool sent = true;
  for (uint32_t i = 1; i < spec_.ranks && sent; ++i) {
    const uint32_t j = (spec_.rank + i) % spec_.ranks;
    if (!is_active(spec_.active_ranks.low(), j)) {
      continue;
    }
    const uint64_t row = table.base(spec_.rank, j);
    const uint64_t limit = ht_rows_inside(row, table.rows[spec_.rank][j], capacities[j]);
    const HtSpan span = ht_span(table.sent, j, first, end, limit);
    const CUdeviceptr from = buffer_of(spec_.rank) + ht_.layout.rows + place_of(j, spec_.rank) * ht_.layout.rows_bytes;
    const uint64_t bytes = shape_.out_row_bytes;
    sent = copy(tensor(j, EXPERTD_OUT_X) + (row + span.begin) * bytes, from + span.begin * bytes, span.count * bytes);
  }
  return sent;
}

/// The first rows need what begin() waits for, all else that everything is packed. The plan in front of copies, which
/// may begin on a stream that has nothing under way, as words may not.
bool CudaDevice::HtChain::send_dispatch(const HtTable& table, const Capacities& capacities) {
  static_assert(EXPERTD_HT_PIECES == 2);
  ChainWords packed;
  packed.wait(own_word(EXPERTD_HT_STEP_PACKED + sizeof(uint64_t)), part_.words.seq);
  return send_piece(table, capacities, 0) && send(&packed) && send_records(table, capacities) && tell_plan(table, 0) &&
         send_piece(table, capacities, 1);
}

bool CudaDevice::HtChain::tell_rows(const HtTable& table, const Capacities& given, uint32_t verdict) {
  ChainWords words;
  for (uint32_t j = 0; j < spec_.ranks; ++j) {
    const uint64_t base = table.base(spec_.rank, j);
    uint64_t rows =
        is_active(spec_.active_ranks.low(), j) ? ht_rows_inside(base, table.rows[spec_.rank][j], given[j]) : 0;
    if (rows != 0 && spec_.request_of(j)->with_weights) {
      rows |= kWithWeights;
    }
    words.write(own_word(EXPERTD_HT_STEP_ROWS + uint64_t{j} * sizeof(uint64_t)),
                rows | (j == spec_.rank ? base << 32 : 0));
  }
  return put_copy_first(device_.rescue_stream_) && tell(verdict, &words);
}

/// The rows of one chunk of each other rank's tokens, and with the first one the weights of all.
bool CudaDevice::HtChain::send_chunk(const HtTable& table, uint64_t given, uint32_t chunk) {
  const uint64_t bytes = 2ull * shape_.hidden;
  const uint64_t weight_bytes = uint64_t{shape_.top_k} * sizeof(float);
  bool sent = true;
  for (uint32_t i = 1; i < spec_.ranks && sent; ++i) {
    const uint32_t s = (spec_.rank + i) % spec_.ranks;
    if (!is_active(spec_.active_ranks.low(), s)) {
      continue;
    }
    const uint64_t row = table.base(s, spec_.rank);
    const uint64_t limit = is_active(table.active, s) ? ht_rows_inside(row, table.rows[s][spec_.rank], given) : 0;
    const HtSpan span =
        ht_span(table.received, s, chunk == 0 ? 0 : kHtChunkEnds[chunk - 1], kHtChunkEnds[chunk], limit);
    const uint64_t place = place_of(spec_.rank, s);
    const CUdeviceptr to = buffer_of(s);
    sent = copy(to + ht_.layout.rows + place * ht_.layout.rows_bytes + span.begin * bytes,
                tensor(spec_.rank, EXPERTD_IN_X) + (row + span.begin) * bytes, span.count * bytes);
    const bool weighted =
        spec_.own->with_weights && spec_.request_of(s)->tensors[EXPERTD_OUT_TOPK_WEIGHTS].mapping != nullptr;
    if (weighted && chunk == 0) {
      sent = sent && copy(to + ht_.layout.weights + place * ht_.layout.weights_bytes,
                          tensor(spec_.rank, EXPERTD_IN_TOPK_WEIGHTS) + row * weight_bytes, limit * weight_bytes);
    }
  }
  return sent;
}

/// The last chunk is announced at the end.
bool CudaDevice::HtChain::send_combine(const HtTable& table, const Capacities& given) {
  bool sent = send_chunk(table, given[spec_.rank], 0);
  for (uint32_t chunk = 1; chunk < EXPERTD_HT_CHUNKS && sent; ++chunk) {
    ChainWords words;
    announce(chunk, &words);
    sent = send(&words) && (chunk != 1 || tell_rows(table, given, 0)) && send_chunk(table, given[spec_.rank], chunk);
  }
  return sent;
}

/// `moved`: the other ranks wait for what this one copied, and each announces its own copies.
bool CudaDevice::HtChain::end(bool moved) {
  const uint32_t slot = part_.words.slot;
  const uint64_t all = EXPERTD_HT_PROGRESS(part_.words.seq, EXPERTD_HT_ALL);
  ChainWords before;
  if (moved) {
    announce(EXPERTD_HT_ALL, &before);
  }
  for (uint32_t j = 0; j < spec_.ranks; ++j) {
    if (j == spec_.rank || !moved) {
      before.write(address_of(part_.words.flag_page) + progress_at(slot, j), all);
    }
  }
  before.write(address_of(&group_.device_progress->moved), spec_.group_op);
  before.wait(own_word(EXPERTD_HT_STEP_ENDED), part_.words.seq);
  return send(&before) &&
         copy(facts() + offsetof(HtFacts, voided), own_word(EXPERTD_HT_STEP_VOIDED), 2 * sizeof(uint64_t)) && close();
}

bool CudaDevice::HtChain::close() {
  ChainWords behind;
  behind.write(address_of(&device_.device_facts(part_.id)->done), part_.id);
  return send(&behind);
}

}  // namespace expertd::device::cuda
