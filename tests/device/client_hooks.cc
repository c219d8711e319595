// SPDX-License-Identifier: Apache-2.0
#include "tests/device/client_hooks.h"

#include <bit>

#include "tests/device/client_rounds.h"
#include "tests/device/client_work.h"
#include "tests/support/rank_threads.h"

namespace expertd::device_test {
namespace {

using support::outcome_of;

constexpr uint32_t kTokens = Rounds::kTokens;
constexpr uint32_t kHidden = Rounds::kHidden;
constexpr uint32_t kTopK = Rounds::kTopK;
constexpr uint64_t kXBytes = uint64_t{kTokens} * kHidden * 2;
constexpr uint64_t kIdxBytes = uint64_t{kTokens} * kTopK * sizeof(int64_t);
constexpr uint64_t kWeightBytes = uint64_t{kTokens} * kTopK * sizeof(float);
constexpr uint64_t kBatchBytes = 2 * kXBytes + kIdxBytes + kWeightBytes;
constexpr uint32_t kLocalExperts = 2;
constexpr uint32_t kSteps = 5;
constexpr uint64_t kMostDelayNs = 60'000;
constexpr uint16_t kPoison = 0xffff;  // a NaN

uint16_t bf16_of(float value) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}
float float_of(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

std::string problem_of(const char* what, expertd_status_t status) {
  const support::Outcome outcome = outcome_of(status);
  return outcome.ok() ? std::string() : std::string(what) + ": " + support::describe(outcome);
}

/// What the experts of a batch do to a row, so that a batch's rows in the other's place are seen.
float factor_of(uint32_t batch) {
  return batch == 0 ? 1.0f : 2.0f;
}

float weight_of(uint32_t lane) {
  return lane == 0 ? 0.5f : 0.25f;
}

/// Every fifth token has no second lane.
bool has_lane(uint32_t token, uint32_t lane) {
  return lane == 0 || token % 5 != 0;
}

}  // namespace

std::vector<HookAction> hook_order(uint32_t seed) {
  using enum HookStep;
  if (seed == 0) {
    return {{0, kSendDispatch},   {1, kSendDispatch},    {0, kReceiveDispatch}, {0, kCompute},
            {0, kSendCombine},    {1, kReceiveDispatch}, {1, kCompute},         {1, kSendCombine},
            {0, kReceiveCombine}, {1, kReceiveCombine}};
  }
  std::minstd_rand random(seed);
  std::array<uint32_t, Hooks::kBatches> done{};
  std::vector<HookAction> order;
  while (order.size() < Hooks::kBatches * kSteps) {
    const auto chosen = static_cast<uint32_t>(random() >> 8) % Hooks::kBatches;
    const uint32_t batch = done[chosen] < kSteps ? chosen : 1 - chosen;
    order.push_back({batch, static_cast<HookStep>(done[batch]++)});
  }
  return order;
}

std::string Hooks::open(expertd_session_t* session, ClientGpu* gpu) {
  session_ = session;
  gpu_ = gpu;
  host_x_.resize(kXBytes / 2);
  void* block = nullptr;
  std::string problem = problem_of("memory for hooks", expertd_alloc(session, Hooks::kBatches * kBatchBytes, &block));
  if (!problem.empty()) {
    return problem;
  }
  char* at = static_cast<char*>(block);
  for (Batch& batch : batches_) {
    batch.x = reinterpret_cast<uint16_t*>(at);
    batch.combined = reinterpret_cast<uint16_t*>(at + kXBytes);
    batch.topk_idx = reinterpret_cast<int64_t*>(at + 2 * kXBytes);
    batch.weights = reinterpret_cast<float*>(at + 2 * kXBytes + kIdxBytes);
    at += kBatchBytes;
  }
  for (void*& stream : receive_streams_) {
    if (gpu != nullptr && problem.empty()) {
      problem = make_stream(&stream);
      problem = problem.empty() ? load_work(stream) : problem;
    }
  }
  return problem;
}

std::string Hooks::copy(void* destination, const void* source, uint64_t bytes) {
  return problem_of("copy", expertd_copy(session_, destination, source, bytes, send_stream()));
}

std::string Hooks::synchronize() {
  constexpr uint64_t kStreamNs = 10'000'000'000;
  std::string problem = problem_of("the send stream", expertd_stream_synchronize(session_, send_stream(), kStreamNs));
  for (void* stream : receive_streams_) {
    if (gpu_ != nullptr && problem.empty()) {
      problem = problem_of("a receive stream", expertd_stream_synchronize(session_, stream, kStreamNs));
    }
  }
  return problem;
}

/// Small integers, others in every round, batch and rank.
float Hooks::sent(uint32_t batch, uint32_t token, uint32_t channel) const {
  return static_cast<float>((number_ * 7 + batch * 31 + rank_ * 5 + token * 3 + channel) % 59);
}

// Lane 0 goes to the even expert of a rank, lane 1 to the odd expert of the next one, and the batches elsewhere.
std::string Hooks::upload() {
  std::vector<int64_t> idx(uint64_t{kTokens} * kTopK);
  std::vector<float> weights(idx.size());
  std::string problem;
  for (uint32_t index = 0; index < kBatches && problem.empty(); ++index) {
    for (uint32_t token = 0; token < kTokens; ++token) {
      for (uint32_t lane = 0; lane < kTopK; ++lane) {
        const uint32_t to = (rank_ + token + lane + index) % ranks_;
        idx[token * kTopK + lane] = has_lane(token, lane) ? int64_t{to} * kLocalExperts + lane : -1;
        weights[token * kTopK + lane] = weight_of(lane);
      }
      for (uint32_t channel = 0; channel < kHidden; ++channel) {
        host_x_[token * kHidden + channel] = bf16_of(sent(index, token, channel));
      }
    }
    const Batch& batch = batches_[index];
    problem = copy(batch.x, host_x_.data(), kXBytes);
    problem = problem.empty() ? copy(batch.topk_idx, idx.data(), kIdxBytes) : problem;
    problem = problem.empty() ? copy(batch.weights, weights.data(), kWeightBytes) : problem;
    host_x_.assign(host_x_.size(), kPoison);
    problem = problem.empty() ? copy(batch.combined, host_x_.data(), kXBytes) : problem;
    // The host's memory is used again.
    problem = problem.empty() ? synchronize() : problem;
  }
  return problem;
}

std::string Hooks::send_dispatch(Batch* batch) {
  auto args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.x = batch->x;
  args.dtype = EXPERTD_BF16;
  args.topk_idx = batch->topk_idx;
  args.idx_type = EXPERTD_I64;
  args.tokens = kTokens;
  args.flags = EXPERTD_ASYNC;
  std::string problem = problem_of(
      "send of a dispatch", expertd_ll_dispatch(group_, &args, send_stream(), &batch->handle, &batch->dispatched));
  batch->outputs = EXPERTD_INIT(expertd_ll_outputs_t);
  return problem.empty() ? problem_of("outputs", expertd_ll_handle_outputs(group_, batch->handle, &batch->outputs))
                         : problem;
}

/// On a host device nothing is ordered by a stream, so this thread waits.
std::string Hooks::receive(const expertd_event_t& event, void* stream) {
  std::string problem = problem_of("receive", expertd_event_stream_wait(event, stream));
  return problem.empty() && gpu_ == nullptr ? problem_of("receive", expertd_event_wait(event, 0, nullptr)) : problem;
}

std::string Hooks::compute(uint32_t index) {
  const Batch& batch = batches_[index];
  const uint64_t elements = uint64_t{kLocalExperts} * batch.outputs.rows_per_expert * kHidden;
  const auto* source = static_cast<const uint16_t*>(batch.outputs.recv_x);
  auto* target = static_cast<uint16_t*>(batch.outputs.combine_x);
  if (gpu_ != nullptr) {
    return enqueue_scale(source, target, elements, factor_of(index), batch.receive_stream);
  }
  for (uint64_t i = 0; i < elements; ++i) {
    target[i] = bf16_of(factor_of(index) * float_of(source[i]));
  }
  return {};
}

/// On the stream that computed: nothing else orders it behind that.
std::string Hooks::send_combine(Batch* batch) {
  auto args = EXPERTD_INIT(expertd_ll_combine_args_t);
  args.topk_idx = batch->topk_idx;
  args.idx_type = EXPERTD_I64;
  args.topk_weights = batch->weights;
  args.handle = batch->handle;
  args.tokens = kTokens;
  args.combined_x = batch->combined;
  args.flags = EXPERTD_ASYNC;
  return problem_of("send of a combine",
                    expertd_ll_combine(group_, &args, batch->receive_stream, &batch->combined_event));
}

void* Hooks::random_receive_stream() {
  return receive_streams_[(random_() >> 8) % receive_streams_.size()];
}

std::string Hooks::act(const HookAction& action) {
  Batch& batch = batches_[action.batch];
  switch (action.step) {
    case HookStep::kSendDispatch:
      return send_dispatch(&batch);
    case HookStep::kReceiveDispatch:
      batch.receive_stream = random_receive_stream();
      return receive(batch.dispatched, batch.receive_stream);
    case HookStep::kCompute:
      return compute(action.batch);
    case HookStep::kSendCombine:
      return send_combine(&batch);
    case HookStep::kReceiveCombine:
      // The outputs are fetched by the first stream, so that this one is what they wait for.
      return receive(batch.combined_event, send_stream());
  }
  return "no such step";
}

std::string Hooks::check(uint32_t index) {
  for (uint32_t token = 0; token < kTokens; ++token) {
    float factor = 0;
    for (uint32_t lane = 0; lane < kTopK; ++lane) {
      factor += has_lane(token, lane) ? weight_of(lane) * factor_of(index) : 0;
    }
    for (uint32_t channel = 0; channel < kHidden; ++channel) {
      const float expected = factor * sent(index, token, channel);
      const float found = float_of(host_x_[token * kHidden + channel]);
      if (found != expected) {
        return "WRONG_RESULT batch " + std::to_string(index) + " token " + std::to_string(token) + " channel " +
               std::to_string(channel) + " is " + std::to_string(found) + ", expected " + std::to_string(expected);
      }
    }
  }
  return {};
}

std::string Hooks::finish() {
  std::string problem;
  for (uint32_t index = 0; index < kBatches && problem.empty(); ++index) {
    problem = copy(host_x_.data(), batches_[index].combined, kXBytes);
    problem = problem.empty() ? synchronize() : problem;
    for (const expertd_event_t& event : {batches_[index].dispatched, batches_[index].combined_event}) {
      problem = problem.empty() ? problem_of("the end of a half", expertd_event_wait(event, 0, nullptr)) : problem;
    }
    problem = problem.empty() ? check(index) : problem;
  }
  return problem;
}

std::string Hooks::round(const std::vector<HookAction>& order) {
  ++number_;
  std::string problem = upload();
  for (const HookAction& action : order) {
    // Now and then one stream is held up, so that the streams get ahead of each other in every way.
    if (problem.empty() && gpu_ != nullptr && random_() % 4 == 0) {
      void* const stream = random_() % 2 == 0 ? send_stream() : random_receive_stream();
      problem = enqueue_delay(random_() % kMostDelayNs, stream);
    }
    problem = problem.empty() ? act(action) : problem;
  }
  return problem.empty() ? finish() : problem;
}

std::string Hooks::run(expertd_group_t* group, uint32_t rank, uint32_t ranks, uint32_t seed, uint32_t rounds) {
  group_ = group;
  rank_ = rank;
  ranks_ = ranks;
  random_.seed(seed * 16 + rank + 1);
  for (uint32_t i = 0; i < rounds; ++i) {
    const uint32_t own_seed = seed == 0 ? 0 : seed + i;
    const std::string problem = round(hook_order(own_seed));
    if (!problem.empty()) {
      return problem + " in double batch " + std::to_string(i) + " of seed " + std::to_string(own_seed);
    }
  }
  return {};
}

}  // namespace expertd::device_test
