// SPDX-License-Identifier: Apache-2.0
// From a request to the ring: tensors become places in buffers, unknown ones travel through staging (host) or are
// registered (GPU), then the descriptor is published and the doorbell rung. On the caller's thread.
#include <cstring>

#include "client/src/clock.h"
#include "client/src/message.h"
#include "client/src/metrics.h"
#include "client/src/op_request.h"
#include "client/src/session.h"

namespace expertd::client {
namespace {

constexpr uint64_t kStagedAlignment = 128;
// CU_STREAM_PER_THREAD: one name for a stream of each thread.
constexpr uintptr_t kPerThreadStream = 2;
constexpr int kRegistrationsMax = 4;  // of one tensor

uint64_t aligned(uint64_t bytes) {
  return (bytes + kStagedAlignment - 1) & ~(kStagedAlignment - 1);
}

const char* lowest_byte(const TensorArg& tensor) {
  return static_cast<const char*>(tensor.pointer) - tensor.lead;
}

const char* name_of(uint32_t tensor) {
  return argument_name(EXPERTD_ARGUMENT_IN_X + tensor);
}

void set_ref(OpRequest* request, uint32_t index, uint32_t buffer, uint64_t offset) {
  request->slot.tensors[index] = {buffer, 0, offset};
}

Status out_of_bounds(uint32_t index, const TensorArg& tensor, const Place& place, const Buffer& buffer) {
  return about(
      error(EXPERTD_REASON_OUT_OF_BOUNDS, "%s = %llu bytes at offset %llu, allowed 0..%llu bytes of its buffer",
            name_of(index), static_cast<unsigned long long>(tensor.bytes),
            static_cast<unsigned long long>(place.offset), static_cast<unsigned long long>(buffer.bytes)),
      {EXPERTD_ARGUMENT_OF_TENSOR(index), static_cast<int64_t>(place.offset + tensor.bytes), 0,
       static_cast<int64_t>(buffer.bytes)});
}

}  // namespace

Status Session::place_device_tensor(OpRequest* request, uint32_t index) {
  const TensorArg& tensor = request->tensors[index];
  const char* low = lowest_byte(tensor);
  // One registration suffices unless memory is freed and allocated at this address meanwhile. Dropping what is stale is
  // not counted: each time there is one registration less, and several may overlap.
  for (int registrations = 0; registrations < kRegistrationsMax;) {
    Place place;
    Buffer* buffer = nullptr;
    const Resolved resolved = memory_->resolve(low, tensor.bytes, &place, &buffer);
    if (resolved != Resolved::kUnknown && buffer->kind == BufferKind::kDevice) {
      // The caller's allocator may have freed the memory and given its address to another tensor.
      uint64_t identity = 0;
      Status status = device_->buffer_id(tensor.pointer, &identity);
      if (!status.ok()) {
        return status;
      }
      if (identity != buffer->identity) {
        registrations += buffer->automatic ? 0 : 1;
        status = memory_->refresh(buffer);
        if (!status.ok()) {
          return status;
        }
        continue;
      }
    }
    if (resolved == Resolved::kOutOfBounds) {
      return out_of_bounds(index, tensor, place, *buffer);
    }
    if (resolved == Resolved::kFound) {
      buffer->last_use = connection_->ring()->next_seq();
      if (request->captured) {
        memory_->keep_captured(buffer, request->slot.group);
      }
      set_ref(request, index, place.buffer, place.offset + tensor.lead);
      return {};
    }
    void* base = nullptr;
    uint64_t bytes = 0;
    Status status = device_->allocation_of(low, &base, &bytes);
    if (status.ok()) {
      status = memory_->register_allocation(base, bytes, &buffer);
    }
    if (!status.ok()) {
      return {status.reason,
              format("%s at %p: %s", name_of(index), tensor.pointer, status.text.c_str()),
              {.argument = EXPERTD_ARGUMENT_OF_TENSOR(index)}};
    }
    ++registrations;
  }
  return error(EXPERTD_REASON_INTERNAL, "%s at %p changes its allocation while it is registered", name_of(index),
               tensor.pointer);
}

Status Session::place_tensor(OpRequest* request, uint32_t index, bool* staged) {
  const TensorArg& tensor = request->tensors[index];
  if (device_->is_cuda()) {
    return place_device_tensor(request, index);
  }
  Place place;
  Buffer* buffer = nullptr;
  switch (memory_->resolve(lowest_byte(tensor), tensor.bytes, &place, &buffer)) {
    case Resolved::kFound:
      set_ref(request, index, place.buffer, place.offset + tensor.lead);
      break;
    case Resolved::kOutOfBounds:
      return out_of_bounds(index, tensor, place, *buffer);
    case Resolved::kUnknown:
      *staged = true;
      break;
  }
  return {};
}

Status Session::stage_tensors(OpRequest* request, const std::vector<uint32_t>& staged, OpRecord* record) {
  uint64_t total = 0;
  for (const uint32_t index : staged) {
    total += aligned(request->tensors[index].bytes);
  }
  Buffer* chunk = nullptr;
  Status status = staging_->take(total, &record->staging_chunk, &chunk);
  if (!status.ok()) {
    // Operations that ended keep their chunks until somebody asks for their results.
    ops_->collect_all(*connection_->ring());
    status = staging_->take(total, &record->staging_chunk, &chunk);
  }
  if (!status.ok()) {
    record->staging_chunk = -1;
    return status;
  }
  uint64_t offset = 0;
  for (const uint32_t index : staged) {
    const TensorArg& tensor = request->tensors[index];
    char* copy = static_cast<char*>(chunk->data) + offset;
    if (tensor.direction != Direction::kOut) {
      std::memcpy(copy, lowest_byte(tensor), tensor.bytes);
      count_staged_copy(tensor.bytes);
    }
    if (tensor.direction != Direction::kIn) {
      record->outputs.push_back({const_cast<void*>(tensor.pointer), copy, tensor.bytes, tensor.row_bytes, tensor.rows});
    }
    set_ref(request, index, chunk->id, offset + tensor.lead);
    offset += aligned(tensor.bytes);
  }
  return {};
}

Status Session::resolve_tensors(OpRequest* request, OpRecord* record, expertd_stream_t) {
  std::vector<uint32_t> staged_tensors;
  for (uint32_t index = 0; index < EXPERTD_TENSOR_COUNT; ++index) {
    if (request->tensors[index].pointer == nullptr) {
      continue;
    }
    bool staged = false;
    Status status = place_tensor(request, index, &staged);
    if (!status.ok()) {
      return status;
    }
    if (staged) {
      staged_tensors.push_back(index);
    }
  }
  return staged_tensors.empty() ? Status() : stage_tensors(request, staged_tensors, record);
}

// Under the submit lock; the place of the next sequence is free afterwards and its old operation collected.
Status Session::wait_for_slot(uint64_t deadline_ns) {
  RingClient* ring = connection_->ring();
  const uint64_t seq = ring->next_seq();
  if (seq <= ring->slot_count()) {
    return {};
  }
  const uint64_t before = seq - ring->slot_count();
  const WaitEnd end = ring->next_slot_free() ? WaitEnd::kComplete : ring->wait(before, deadline_ns);
  if (end == WaitEnd::kClosed) {
    return connection_->over("the daemon is gone; call expertd_reattach when it is back");
  }
  if (end == WaitEnd::kDeadline) {
    return range_error(EXPERTD_REASON_RING_OVERFLOW, "operations in flight", int64_t{ring->slot_count()} + 1, 0,
                       ring->slot_count());
  }
  ops_->collect(*ring, before);
  return {};
}

// Under the submit lock.
void Session::stamp(expertd_slot* slot) const {
  slot->seq = connection_->ring()->next_seq();
  slot->submit_ns = now_ns();
  std::memcpy(slot->trace_id, trace_id_.data(), trace_id_.size());
}

// Whether another stream may still write a lower sequence into the slot's doorbell. The daemon waits for the doorbell
// of an operation that ends well; one that it refused or aborted has completed without, and the write stays enqueued
// until its stream gets there. When by then the slot's next operation was rung from a stream that is ahead, the late
// write takes its sequence back: the daemon's stream would wait until the deadline. On one stream the writes keep
// their order.
bool Session::rings_late(uint32_t slot, expertd_stream_t stream) {
  Doorbell& last = doorbells_[slot];
  if (last.seq == 0) {
    return false;
  }
  const uint64_t event = (incarnation_ << kIncarnationShift) | last.seq;
  OpOutcome outcome;
  uint64_t deadline_ns = 0;
  const Lookup found = ops_->find(connection_->ring(), event, last.seq, &outcome, &deadline_ns);
  if (found == Lookup::kDone && outcome.completion.reason == EXPERTD_REASON_NONE) {
    last = Doorbell();
    return false;
  }
  return last.stream != stream || reinterpret_cast<uintptr_t>(stream) == kPerThreadStream;
}

Status Session::submit(OpRequest* request, expertd_stream_t stream, expertd_event_t* event) {
  // The slot first: its wait collects finished operations, whose staging chunks this one may need.
  const std::lock_guard lock(submit_mutex_);
  RingClient* ring = connection_->ring();
  const uint64_t deadline_ns = deadline_after(request->timeout_ns);
  if (request->slot.token_bound != 0 && !ring->takes_token_bounds()) {
    return error(EXPERTD_REASON_UNSUPPORTED, "token_bound = %u: the daemon's ring is older than 1.3, allowed 0",
                 request->slot.token_bound);
  }
  Status status = wait_for_slot(deadline_ns);
  OpRecord record;
  if (status.ok()) {
    status = resolve_tensors(request, &record, stream);
  }
  if (!status.ok()) {
    return status;
  }
  expertd_slot& slot = request->slot;
  const uint32_t index = ring->slot_index(ring->next_seq());
  const bool rung = device_->is_cuda() && rings_late(index, stream);
  if (rung && request->exchange == nullptr && request->ht == nullptr) {
    // The word cannot be relied on, so this waits in its place and tells the daemon not to.
    status = device_->synchronize(stream, deadline_ns);
    if (!status.ok()) {
      return status;
    }
    slot.flags |= EXPERTD_SLOT_RUNG;
  }
  stamp(&slot);
  record.event = (incarnation_ << kIncarnationShift) | slot.seq;
  record.seq = slot.seq;
  record.op = slot.op;
  record.rows_per_expert = request->rows_per_expert;
  record.submit_ns = slot.submit_ns;
  record.deadline_ns = deadline_after(request->timeout_ns);
  *event = {wrap(this), record.event};
  ops_->begin(std::move(record), index);
  if (request->exchange != nullptr) {
    return issue_exchange(request, index, rung, stream);
  }
  if (request->ht != nullptr) {
    return issue_ht(request, index, rung, stream);
  }
  // Before the doorbell: the daemon arms its stream as soon as the descriptor is there.
  ring->submit(slot);
  request->submitted = true;
  const bool waits = (request->flags & EXPERTD_ASYNC) == 0;
  if (rung) {
    return waits ? device_->wait_completion(index, slot.seq, stream) : status;
  }
  status = waits ? device_->call(index, slot.seq, stream) : device_->ring_doorbell(index, slot.seq, stream);
  doorbells_[index] = status.ok() ? Doorbell{slot.seq, stream} : doorbells_[index];
  return status;
}

// No record is kept: nobody asks for the result, and the slot is free again when its completion is there. No word is
// written and no stream waits either, so that whatever state the caller's stream is in stays as it is.
Status Session::submit_refusal(OpRequest* refusal) {
  const std::lock_guard lock(submit_mutex_);
  Status status = wait_for_slot(deadline_after(refusal->timeout_ns));
  if (status.ok()) {
    stamp(&refusal->slot);
    connection_->ring()->submit(refusal->slot);
    refusal->submitted = true;
  }
  return status;
}

}  // namespace expertd::client
