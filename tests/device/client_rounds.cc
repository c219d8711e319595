// SPDX-License-Identifier: Apache-2.0
#include "tests/device/client_rounds.h"

#include <bit>
#include <cstdlib>
#include <utility>

namespace expertd::device_test {
namespace {

using support::Outcome;
using support::outcome_of;

constexpr uint64_t kXBytes = uint64_t{Rounds::kTokens} * Rounds::kHidden * 2;
constexpr uint64_t kIdxBytes = uint64_t{Rounds::kTokens} * Rounds::kTopK * 8;
constexpr uint64_t kWeightBytes = uint64_t{Rounds::kTokens} * Rounds::kTopK * 4;
constexpr uint64_t kStreamNs = 5'000'000'000;  // for copies and what they wait for

uint16_t bf16_of(float value) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}
float float_of(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

Outcome failure(const std::string& what) {
  return {{EXPERTD_CODE_INTERNAL, EXPERTD_REASON_SYSTEM}, what};
}

Outcome from_problem(const std::string& problem) {
  return problem.empty() ? Outcome() : failure(problem);
}

}  // namespace

Outcome Rounds::add(uint64_t bytes, const std::string& kind, void** data) {
  Outcome outcome = from_problem(gpu_->allocate(kind, bytes, data));
  expertd_buffer_t* buffer = nullptr;
  if (outcome.ok()) {
    outcome = outcome_of(expertd_register(session_, *data, bytes, &buffer));
  }
  if (outcome.ok()) {
    buffers_.push_back(buffer);
  }
  return outcome;
}

template <typename T>
void Rounds::add_tensor(uint64_t bytes, T** tensor, Outcome* outcome) {
  void* data = nullptr;
  if (outcome->ok()) {
    *outcome = add(bytes, "malloc", &data);
    *tensor = static_cast<T*>(data);
  }
}

template <typename T>
void Rounds::add_host(uint64_t bytes, T** memory, Outcome* outcome) {
  if (!outcome->ok() || *memory != nullptr) {
    return;
  }
  void* data = nullptr;
  if (gpu_ != nullptr) {
    *outcome = from_problem(gpu_->allocate_host(bytes, &data));
  } else {
    data = std::malloc(bytes);
    *outcome = data != nullptr ? Outcome() : failure("malloc");
  }
  *memory = static_cast<T*>(data);
}

// The tensors one behind the other; every size is a multiple of 256 bytes.
void Rounds::take_block(void* block) {
  char* at = static_cast<char*>(block);
  const auto next = [&at](uint64_t bytes) { return std::exchange(at, at + bytes); };
  x_ = reinterpret_cast<uint16_t*>(next(kXBytes));
  topk_idx_ = reinterpret_cast<int64_t*>(next(kIdxBytes));
  weights_ = reinterpret_cast<float*>(next(kWeightBytes));
  recv_x_ = reinterpret_cast<uint16_t*>(next(kMostRanks * kXBytes));
  recv_idx_ = reinterpret_cast<int64_t*>(next(kMostRanks * kIdxBytes));
  combined_ = reinterpret_cast<uint16_t*>(next(kXBytes));
  static_assert((4 + kMostRanks) * kXBytes < kBlockBytes);
}

Outcome Rounds::place(expertd_session_t* session, ClientGpu* gpu, const std::string& kind) {
  session_ = session;
  gpu_ = gpu;
  buffers_.clear();
  window_ = nullptr;
  Outcome outcome;
  add_host(kXBytes, &host_x_, &outcome);
  add_host(kXBytes, &host_out_, &outcome);
  add_host(kIdxBytes, &host_idx_, &outcome);
  add_host(kWeightBytes, &host_weights_, &outcome);
  if (!outcome.ok()) {
    return outcome;
  }
  if (gpu != nullptr && kind == "small") {
    add_tensor(kXBytes, &x_, &outcome);
    add_tensor(kIdxBytes, &topk_idx_, &outcome);
    add_tensor(kWeightBytes, &weights_, &outcome);
    add_tensor(kMostRanks * kXBytes, &recv_x_, &outcome);
    add_tensor(kMostRanks * kIdxBytes, &recv_idx_, &outcome);
    add_tensor(kXBytes, &combined_, &outcome);
    return outcome;
  }
  void* block = nullptr;
  if (gpu == nullptr || kind == "window") {
    outcome = outcome_of(expertd_alloc(session, kBlockBytes, &block));
    window_ = block;
  } else if (kind == "automatic") {
    outcome = from_problem(gpu->allocate("malloc", kBlockBytes, &block));
  } else {
    outcome = add(kBlockBytes, kind, &block);
  }
  if (outcome.ok()) {
    take_block(block);
  }
  return outcome;
}

Outcome Rounds::release() {
  Outcome first;
  for (expertd_buffer_t* buffer : std::exchange(buffers_, {})) {
    const Outcome outcome = outcome_of(expertd_buffer_release(buffer));
    first = first.ok() ? outcome : first;
  }
  if (window_ != nullptr) {
    const Outcome outcome = outcome_of(expertd_free(session_, std::exchange(window_, nullptr)));
    first = first.ok() ? outcome : first;
  }
  return first;
}

Outcome Rounds::join(const std::string& name, uint32_t rank, uint32_t ranks, const std::string& mode, uint64_t op_ns) {
  const bool low_latency = !mode.ends_with("normal");
  const uint32_t executor = mode == "copy" || mode == "copy-normal" ? EXPERTD_GROUP_EXECUTOR_COPY_ENGINE
                            : mode == "sm"                          ? EXPERTD_GROUP_EXECUTOR_SM
                                                                    : EXPERTD_GROUP_EXECUTOR_AUTO;
  if (ranks == 0 || ranks > kMostRanks || x_ == nullptr) {
    return failure("there is no memory for that group");
  }
  rank_ = rank;
  ranks_ = ranks;
  low_latency_ = low_latency;
  mixed_ = mode.starts_with("mixed-");
  expected_ = mode.find("copy") != std::string::npos ? EXPERTD_EXECUTOR_COPY_ENGINE
              : mode.find("sm") != std::string::npos ? EXPERTD_EXECUTOR_SM
                                                     : EXPERTD_EXECUTOR_NONE;
  issued_rounds_ = 0;
  number_ = 0;
  handles_.clear();
  expertd_group_options_t options = support::small_group(name.c_str(), rank, ranks);
  options.hidden = kHidden;
  options.top_k = kTopK;
  options.max_tokens = kTokens;
  options.mode = low_latency ? EXPERTD_MODE_INFERENCE : EXPERTD_MODE_NORMAL;
  options.capture_lanes = mode.ends_with("captured") ? 2 : 0;
  options.on_rank_loss = mode.starts_with("mask-") ? EXPERTD_RANK_LOSS_MASK : EXPERTD_RANK_LOSS_FAIL;
  options.executor = executor;
  options.communication.use_nvlink = mode.starts_with("no-nvlink-") ? EXPERTD_USE_NO : EXPERTD_USE_DEFAULT;
  options.op_timeout_ns = op_ns;
  options.first_op_timeout_ns = op_ns;
  return outcome_of(expertd_group_join(session_, &options, &group_));
}

Outcome Rounds::leave() {
  return outcome_of(expertd_group_leave(std::exchange(group_, nullptr)));
}

Outcome Rounds::copy(void* destination, const void* source, uint64_t bytes) {
  return outcome_of(expertd_copy(session_, destination, source, bytes, stream()));
}

Outcome Rounds::synchronize() {
  return outcome_of(expertd_stream_synchronize(session_, stream(), kStreamNs));
}

/// Small integers, different in every batch, so that an output of an earlier one is seen.
float Rounds::sent(uint32_t token, uint32_t channel) const {
  return static_cast<float>((number_ + rank_ * 5 + token * 3 + channel) % 61);
}

// Lane 0 goes to the even expert of a rank, lane 1 to the odd expert of the next one; every fifth token has no lane 1.
Outcome Rounds::upload() {
  Outcome outcome = synchronize();
  if (!outcome.ok()) {
    return outcome;
  }
  ++number_;
  for (uint32_t token = 0; token < kTokens; ++token) {
    host_idx_[token * kTopK] = int64_t{target(token, 0)} * 2;
    host_idx_[token * kTopK + 1] = token % 5 == 0 ? -1 : int64_t{target(token, 1)} * 2 + 1;
    host_weights_[token * kTopK] = 0.5f;
    host_weights_[token * kTopK + 1] = 0.25f;
    for (uint32_t channel = 0; channel < kHidden; ++channel) {
      host_x_[token * kHidden + channel] = bf16_of(sent(token, channel));
    }
  }
  outcome = copy(x_, host_x_, kXBytes);
  if (outcome.ok()) {
    outcome = copy(topk_idx_, host_idx_, kIdxBytes);
  }
  return outcome.ok() ? copy(weights_, host_weights_, kWeightBytes) : outcome;
}

void Rounds::note_issued(expertd_event_t event, OpCounts* counts, bool split) {
  issued_.push_back({event, false, split ? uint32_t{EXPERTD_EXECUTOR_COPY_ENGINE} : expected_});
  counts->issued.fetch_add(1, std::memory_order_relaxed);
}

Outcome Rounds::issue_dispatch(expertd_handle_t* handle, expertd_event_t* event) {
  expertd_dispatch_args_t dispatch = EXPERTD_INIT(expertd_dispatch_args_t);
  dispatch.x = x_;
  dispatch.dtype = EXPERTD_BF16;
  dispatch.topk_idx = topk_idx_;
  dispatch.idx_type = EXPERTD_I64;
  dispatch.tokens = kTokens;
  dispatch.capacity_rows = ranks_ * kTokens;
  dispatch.recv_x = recv_x_;
  dispatch.recv_topk_idx = recv_idx_;
  return outcome_of(expertd_dispatch(group_, &dispatch, stream(), handle, event));
}

Outcome Rounds::issue_combine(expertd_handle_t handle, expertd_event_t* event) {
  expertd_combine_args_t combine = EXPERTD_INIT(expertd_combine_args_t);
  combine.x = recv_x_;
  combine.rows = ranks_ * kTokens;  // of which those that arrived are read
  combine.handle = handle;
  combine.tokens = kTokens;
  combine.combined_x = combined_;
  return outcome_of(expertd_combine(group_, &combine, stream(), event));
}

Outcome Rounds::issue_normal(OpCounts* counts) {
  expertd_handle_t handle{};
  expertd_event_t event{};
  Outcome outcome = issue_dispatch(&handle, &event);
  if (!outcome.ok()) {
    return outcome;
  }
  note_issued(event, counts);
  handles_.push_back(handle);
  outcome = issue_combine(handle, &event);
  if (outcome.ok()) {
    note_issued(event, counts);
  }
  return outcome;
}

Outcome Rounds::issue_ll_dispatch(uint32_t tokens, uint32_t flags, expertd_handle_t* handle, expertd_event_t* event) {
  expertd_ll_dispatch_args_t dispatch = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  dispatch.x = x_;
  dispatch.dtype = EXPERTD_BF16;
  dispatch.topk_idx = topk_idx_;
  dispatch.idx_type = EXPERTD_I64;
  dispatch.tokens = tokens;
  dispatch.flags = flags;
  return outcome_of(expertd_ll_dispatch(group_, &dispatch, stream(), handle, event));
}

// The experts of this rank, two of them, give back what they got.
Outcome Rounds::give_back(expertd_handle_t handle) {
  expertd_ll_outputs_t outputs = EXPERTD_INIT(expertd_ll_outputs_t);
  Outcome outcome = outcome_of(expertd_ll_handle_outputs(group_, handle, &outputs));
  return outcome.ok() ? copy(outputs.combine_x, outputs.recv_x, uint64_t{2} * outputs.rows_per_expert * kHidden * 2)
                      : outcome;
}

Outcome Rounds::issue_ll_combine(uint32_t tokens, uint32_t flags, expertd_handle_t handle, uint16_t* out,
                                 expertd_event_t* event) {
  expertd_ll_combine_args_t combine = EXPERTD_INIT(expertd_ll_combine_args_t);
  combine.topk_idx = topk_idx_;
  combine.idx_type = EXPERTD_I64;
  combine.topk_weights = weights_;
  combine.handle = handle;
  combine.tokens = tokens;
  combine.combined_x = out;
  combine.flags = flags;
  return outcome_of(expertd_ll_combine(group_, &combine, stream(), event));
}

Outcome Rounds::issue_low_latency(OpCounts* counts, BatchEnd* batch) {
  expertd_handle_t handle{};
  expertd_event_t event{};
  const bool split = mixed_ && issued_rounds_++ % 2 == 1;
  const uint32_t flags = split ? EXPERTD_ASYNC : 0;
  Outcome outcome = issue_ll_dispatch(kTokens, flags, &handle, &event);
  if (!outcome.ok()) {
    return outcome;
  }
  note_issued(event, counts, split);
  if (split) {
    outcome = receive(event);
    if (!outcome.ok()) {
      return outcome;
    }
  }
  if (gpu_ == nullptr) {
    // Host sessions copy at once, so the rows must be there.
    collect(&issued_.back(), counts, batch);
    if (!batch->end.outcome.ok()) {
      return batch->end.outcome;
    }
  }
  outcome = give_back(handle);
  if (outcome.ok()) {
    outcome = issue_ll_combine(kTokens, flags, handle, combined_, &event);
  }
  if (outcome.ok()) {
    note_issued(event, counts, split);
  }
  return outcome.ok() && split ? receive(event) : outcome;
}

Outcome Rounds::receive(expertd_event_t event) {
  return outcome_of(expertd_event_stream_wait(event, stream()));
}

Outcome Rounds::fetch() {
  const Outcome outcome = copy(host_out_, combined_, kXBytes);
  return outcome.ok() ? synchronize() : outcome;
}

void Rounds::collect(Issued* op, OpCounts* counts, BatchEnd* batch) {
  if (op->seen) {
    return;
  }
  op->seen = true;
  const support::OpEnd end = support::finish(op->event);
  counts->ended.fetch_add(1, std::memory_order_relaxed);
  if (end.outcome.ok() && op->executor != EXPERTD_EXECUTOR_NONE && end.result.executor != op->executor) {
    batch->wrong =
        "WRONG_EXECUTOR " + std::to_string(end.result.executor) + ", expected " + std::to_string(op->executor);
  }
  if (batch->end.outcome.ok()) {
    batch->end = end;
    batch->ran = !end.outcome.ok() && (end.result.execute_ns != 0 || end.result.queue_ns != 0);
  }
}

std::string Rounds::check(uint32_t tokens, uint64_t mask) const {
  for (uint32_t token = 0; token < tokens; ++token) {
    const bool first = (mask >> target(token, 0) & 1) != 0;
    const bool second = token % 5 != 0 && (mask >> target(token, 1) & 1) != 0;
    const float rows =
        (first ? 1.0f : 0.0f) + (second && (!first || target(token, 0) != target(token, 1)) ? 1.0f : 0.0f);
    const float factor = low_latency_ ? (first ? 0.5f : 0.0f) + (second ? 0.25f : 0.0f) : rows;
    for (uint32_t channel = 0; channel < kHidden; ++channel) {
      const float expected = factor * sent(token, channel);
      const float found = float_of(host_out_[token * kHidden + channel]);
      if (found != expected) {
        return "WRONG_RESULT token " + std::to_string(token) + " channel " + std::to_string(channel) + " is " +
               std::to_string(found) + ", expected " + std::to_string(expected);
      }
    }
  }
  return {};
}

BatchEnd Rounds::batch(uint32_t depth, OpCounts* counts) {
  BatchEnd batch;
  batch.end.result.rank = -1;
  issued_.clear();
  Outcome problem = upload();
  for (uint32_t i = 0; i < depth && problem.ok(); ++i) {
    problem = low_latency_ ? issue_low_latency(counts, &batch) : issue_normal(counts);
  }
  for (Issued& op : issued_) {
    collect(&op, counts, &batch);
  }
  if (!problem.ok() && batch.end.outcome.ok()) {
    batch.end.outcome = problem;
  }
  // Handles of a failed batch go with the group.
  for (const expertd_handle_t handle : std::exchange(handles_, {})) {
    if (batch.end.outcome.ok()) {
      static_cast<void>(expertd_handle_free(group_, handle));
    }
  }
  if (batch.end.outcome.ok()) {
    batch.end.outcome = fetch();
  }
  if (batch.end.outcome.ok()) {
    batch.wrong = batch.wrong.empty() ? check(kTokens) : batch.wrong;
  }
  return batch;
}

}  // namespace expertd::device_test
