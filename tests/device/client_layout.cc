// SPDX-License-Identifier: Apache-2.0
#include "tests/device/client_layout.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tests/support/random_case.h"
#include "tests/support/reference_moe.h"

namespace expertd::device_test {
namespace {

using support::Outcome;
using support::outcome_of;
using support::Random;

// Places in the block, multiples of 256.
constexpr uint64_t kIdsAt = 0;
constexpr uint64_t kRanksAt = uint64_t{4} << 20;
constexpr uint64_t kNodesAt = kRanksAt + 8192;
constexpr uint64_t kExpertsAt = kNodesAt + 256;
constexpr uint64_t kMaskAt = kExpertsAt + 16384;
constexpr uint32_t kMaskBytesMax = 4u << 20;
constexpr uint64_t kBlockBytes = kMaskAt + kMaskBytesMax;
constexpr uint32_t kIdsMax = (4u << 20) / 8;
constexpr uint32_t kReferenceMax = 8u << 20;  // ranks times lanes, which the reference looks at one by one
constexpr char kPoison = 0x5a;
constexpr uint64_t kStreamNs = 5'000'000'000;
constexpr uint64_t kNsPerMs = 1'000'000;

std::string failed(const char* what, const Outcome& outcome) {
  return outcome.ok() ? std::string() : std::string(what) + ": " + outcome.message;
}

std::string failed(const char* call, cudaError_t error) {
  return error == cudaSuccess ? std::string() : std::string(call) + ": " + cudaGetErrorName(error);
}

}  // namespace

struct Layouts::Case {
  explicit Case(uint64_t seed);
  std::string text() const;

  uint64_t seed;
  kernels::OpShape shape;
  std::vector<int64_t> ids;
  bool is_bad = false;
  int64_t first_bad = 0;
  bool narrow = false;
  bool async = false;
  bool on_other_stream = false;
  bool without_mask = false;
};

Layouts::Case::Case(uint64_t given) : seed(given) {
  Random random(seed);
  constexpr uint32_t kRanks[] = {1, 2, 3, 8, 8, 16, 64, 512};
  constexpr uint32_t kTokens[] = {0, 1, 63, 64, 65, 128, 1000, 4096, 16384};
  shape.ranks = kRanks[random.below(8)];
  shape.local_experts = random.between(1, std::min(64u, 2048 / shape.ranks));
  shape.experts = shape.ranks * shape.local_experts;
  shape.top_k = random.chance(50) ? 8 : random.between(1, 32);
  shape.tokens = kTokens[random.below(9)];
  shape.tokens = std::min<uint32_t>(
      {shape.tokens, kIdsMax / shape.top_k, kMaskBytesMax / shape.ranks, kReferenceMax / (shape.ranks * shape.top_k)});
  narrow = random.chance(50);
  async = random.chance(50);
  on_other_stream = random.chance(50);
  without_mask = random.chance(20);
  const bool skewed = random.chance(30);
  const bool with_bad = random.chance(20);
  for (uint32_t i = 0; i < shape.tokens * shape.top_k; ++i) {
    int64_t id = random.chance(10) ? -1 : int64_t{random.below(skewed ? std::min(shape.experts, 3u) : shape.experts)};
    if (with_bad && random.below(500) == 0) {
      id = random.chance(50) ? int64_t{shape.experts} + random.below(4) : -2 - int64_t{random.below(1000)};
      first_bad = is_bad ? first_bad : id;
      is_bad = true;
    }
    ids.push_back(id);
  }
}

std::string Layouts::Case::text() const {
  return "layout of seed " + std::to_string(seed) + " (T=" + std::to_string(shape.tokens) +
         " K=" + std::to_string(shape.top_k) + " E=" + std::to_string(shape.experts) +
         " R=" + std::to_string(shape.ranks) + (narrow ? ", int32" : ", int64") + (is_bad ? ", bad" : "") + "): ";
}

std::string Layouts::open(expertd_session_t* session, ClientGpu* gpu) {
  session_ = session;
  gpu_ = gpu;
  if (block_ != nullptr) {
    return {};
  }
  void* block = nullptr;
  void* host = nullptr;
  std::string problem;
  if (gpu != nullptr) {
    problem = gpu->allocate("malloc", kBlockBytes, &block);
    problem = problem.empty() ? gpu->allocate_host(kBlockBytes, &host) : problem;
  } else {
    problem = failed("expertd_alloc", outcome_of(expertd_alloc(session, kBlockBytes, &block)));
    host = std::malloc(kBlockBytes);
  }
  block_ = static_cast<char*>(block);
  host_ = static_cast<char*>(host);
  return problem;
}

std::string Layouts::copy(void* destination, const void* source, uint64_t bytes, void* stream) {
  return bytes == 0 ? std::string()
                    : failed("copy", outcome_of(expertd_copy(session_, destination, source, bytes, stream)));
}

std::string Layouts::synchronize(void* stream) {
  return failed("synchronize", outcome_of(expertd_stream_synchronize(session_, stream, kStreamNs)));
}

// Ids go up, outputs are poisoned; all of it has happened when this returns.
expertd_layout_args_t Layouts::upload(const Case& it, std::string* problem) {
  std::memset(host_, kPoison, kBlockBytes);
  for (size_t i = 0; i < it.ids.size(); ++i) {
    if (it.narrow) {
      const auto id = static_cast<int32_t>(it.ids[i]);
      std::memcpy(host_ + i * 4, &id, 4);
    } else {
      std::memcpy(host_ + i * 8, &it.ids[i], 8);
    }
  }
  *problem = copy(block_, host_, kBlockBytes, stream());
  *problem = problem->empty() ? synchronize(stream()) : *problem;
  expertd_layout_args_t args = EXPERTD_INIT(expertd_layout_args_t);
  args.topk_idx = block_ + kIdsAt;
  args.idx_type = it.narrow ? EXPERTD_I32 : EXPERTD_I64;
  args.tokens = it.shape.tokens;
  args.top_k = it.shape.top_k;
  args.num_experts = it.shape.experts;
  args.num_ranks = it.shape.ranks;
  args.tokens_per_rank = reinterpret_cast<int32_t*>(block_ + kRanksAt);
  args.tokens_per_node = reinterpret_cast<int32_t*>(block_ + kNodesAt);
  args.tokens_per_expert = reinterpret_cast<int32_t*>(block_ + kExpertsAt);
  args.token_rank_mask = it.without_mask ? nullptr : reinterpret_cast<uint8_t*>(block_ + kMaskAt);
  args.flags = it.async ? EXPERTD_ASYNC : 0;
  return args;
}

// What lies behind each output is still poison.
std::string Layouts::compare(const Case& it) const {
  const support::LayoutResult wanted = support::reference_layout(it.shape, it.ids);
  const auto equal = [this](uint64_t at, const void* values, uint64_t bytes, uint64_t until) {
    return std::memcmp(host_ + at, values, bytes) == 0 &&
           std::all_of(host_ + at + bytes, host_ + until, [](char c) { return c == kPoison; });
  };
  if (!equal(kRanksAt, wanted.tokens_per_rank.data(), wanted.tokens_per_rank.size() * 4, kNodesAt)) {
    return "tokens_per_rank differs";
  }
  if (!equal(kNodesAt, wanted.tokens_per_node.data(), wanted.tokens_per_node.size() * 4, kExpertsAt)) {
    return "tokens_per_node differs";
  }
  if (!equal(kExpertsAt, wanted.tokens_per_expert.data(), wanted.tokens_per_expert.size() * 4, kMaskAt)) {
    return "tokens_per_expert differs";
  }
  const uint64_t mask_bytes = it.without_mask ? 0 : wanted.token_rank_mask.size();
  return equal(kMaskAt, wanted.token_rank_mask.data(), mask_bytes, kBlockBytes) ? "" : "token_rank_mask differs";
}

std::string Layouts::run_case(const Case& it) {
  std::string problem;
  const expertd_layout_args_t args = upload(it, &problem);
  if (!problem.empty()) {
    return problem;
  }
  expertd_event_t event{};
  const Outcome issued = outcome_of(expertd_layout(session_, &args, stream(), &event));
  if (!issued.ok()) {
    return failed("issue", issued);
  }
  void* reader = it.on_other_stream || gpu_ == nullptr ? nullptr : stream();
  problem = failed("stream_wait", outcome_of(expertd_event_stream_wait(event, reader)));
  if (gpu_ == nullptr && problem.empty()) {
    // Host sessions copy at once, so the results must be there.
    static_cast<void>(expertd_event_wait(event, 0, nullptr));
  }
  if (problem.empty()) {
    problem = copy(host_ + kRanksAt, block_ + kRanksAt, kBlockBytes - kRanksAt, reader);
  }
  if (problem.empty()) {
    problem = synchronize(reader);
  }
  if (!problem.empty()) {
    return problem;
  }
  const support::OpEnd end = support::finish(event);
  if (!it.is_bad) {
    return end.outcome.ok() ? compare(it) : failed("end", end.outcome);
  }
  const std::string about = std::to_string(it.first_bad) + ", allowed -1.." + std::to_string(it.shape.experts - 1);
  const bool named = end.outcome.status.reason == EXPERTD_REASON_EXPERT_OUT_OF_RANGE &&
                     end.result.status.reason == EXPERTD_REASON_EXPERT_OUT_OF_RANGE &&
                     end.outcome.message.find(about) != std::string::npos;
  return named ? "" : "expected EXPERT_OUT_OF_RANGE about " + about + ", got " + end.outcome.message;
}

std::string Layouts::run(uint64_t cases) {
  for (uint64_t seed = 1; seed <= cases; ++seed) {
    const Case it(seed);
    const std::string problem = run_case(it);
    if (!problem.empty()) {
      return it.text() + problem;
    }
  }
  return {};
}

std::string Layouts::time_out() {
  const Case it(1);
  std::string problem;
  expertd_layout_args_t args = upload(it, &problem);
  problem = problem.empty() ? gpu_->close_gate() : problem;
  if (!problem.empty()) {
    return problem;
  }
  args.timeout_ns = 50 * kNsPerMs;
  expertd_event_t event{};
  Outcome outcome = outcome_of(expertd_layout(session_, &args, stream(), &event));
  if (outcome.ok()) {
    const support::OpEnd late = support::finish(event);
    int done = 0;
    outcome = outcome_of(expertd_event_query(event, &done));
    if (late.outcome.status.reason != EXPERTD_REASON_TIMEOUT || late.result.status.reason != EXPERTD_REASON_TIMEOUT ||
        done != 1) {
      problem = "expected TIMEOUT of an operation that its stream does not reach, got: " + late.outcome.message;
    }
  }
  gpu_->open_gate();
  problem = problem.empty() ? failed("held back", outcome) : problem;
  problem = problem.empty() ? synchronize(stream()) : problem;
  if (!problem.empty()) {
    return problem;
  }
  const support::OpEnd end = support::finish(event);
  return it.is_bad == end.outcome.ok() ? "after its deadline: " + end.outcome.message : "";
}

std::string Layouts::time(double* of_many_us, double* alone_us) {
  constexpr int kMany = 100;
  Case it(1);
  it.shape.ranks = 8;
  it.shape.experts = 256;
  it.shape.top_k = 8;
  it.shape.tokens = 4096;
  it.narrow = it.without_mask = it.async = it.is_bad = false;
  it.ids.clear();
  Random random(1);
  for (uint32_t i = 0; i < it.shape.tokens * it.shape.top_k; ++i) {
    it.ids.push_back(random.below(it.shape.experts));
  }
  std::string problem;
  const expertd_layout_args_t args = upload(it, &problem);
  const auto on_stream = static_cast<cudaStream_t>(stream());
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  if (problem.empty() && (cudaEventCreate(&begin) != cudaSuccess || cudaEventCreate(&end) != cudaSuccess)) {
    problem = "cudaEventCreate";
  }
  const auto run = [&](int count) {
    expertd_event_t event{};
    float ms = 0;
    problem = problem.empty() ? failed("cudaEventRecord", cudaEventRecord(begin, on_stream)) : problem;
    for (int i = 0; i < count && problem.empty(); ++i) {
      problem = failed("issue", outcome_of(expertd_layout(session_, &args, on_stream, &event)));
    }
    problem = problem.empty() ? failed("cudaEventRecord", cudaEventRecord(end, on_stream)) : problem;
    problem = problem.empty() ? failed("cudaEventSynchronize", cudaEventSynchronize(end)) : problem;
    problem = problem.empty() ? failed("cudaEventElapsedTime", cudaEventElapsedTime(&ms, begin, end)) : problem;
    return double{ms} * 1e3 / count;
  };
  std::vector<double> alone;
  std::vector<double> many;
  for (int i = 0; i < 20; ++i) {
    alone.push_back(run(1));
    many.push_back(run(kMany));
  }
  std::sort(alone.begin(), alone.end());
  std::sort(many.begin(), many.end());
  *alone_us = alone[alone.size() / 2];
  *of_many_us = many[many.size() / 2];
  return problem;
}

uint64_t Layouts::local_operations() {
  std::string text(expertd_client_metrics_text(nullptr, 0) + 1, '\0');
  expertd_client_metrics_text(text.data(), text.size());
  const std::string name = "\nexpertd_client_local_ops_total ";
  const size_t at = text.find(name);
  return at == std::string::npos ? 0 : std::strtoull(text.c_str() + at + name.size(), nullptr, 10);
}

}  // namespace expertd::device_test
