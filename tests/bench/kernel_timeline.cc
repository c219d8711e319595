// SPDX-License-Identifier: Apache-2.0
// Where the time inside the kernels of one operation goes: two ranks on two GPUs in one process, without a daemon or
// its clients. Per phase the moment at which the first, the median and the last block came to it, since the first block
// of the rank's kernel began. The build needs EXPERTD_KERNEL_TIMELINE. One thread; README.md says what the figures
// mean.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "daemon/kernels/cuda/timeline.h"
#include "tests/bench/timeline_bell.h"
#include "tests/device/case_requests.h"
#include "tests/device/compare_outputs.h"
#include "tests/device/gpu_group.h"

namespace expertd::bench {
namespace {

using device_test::GpuGroup;
using kernels::OpKind;
using kernels::cuda::Stamp;
using kernels::cuda::Timeline;
using support::RandomCase;

constexpr uint32_t kRanks = 2;
constexpr uint32_t kRounds = 50;
constexpr uint32_t kWarmRounds = 5;
constexpr uint32_t kExperts = 256;
constexpr uint32_t kTopK = 8;
constexpr uint32_t kHidden = 7168;
constexpr uint64_t kMemoryBytes = 1ull << 30;  // a low latency combine of 128 tokens has 470 MB of rows
constexpr auto kStamps = static_cast<uint32_t>(Stamp::kCount);
constexpr std::array<const char*, kStamps> kNames = {
    "started",       "ids counted", "cluster met", "handed over",  "routed",     "prefetching",
    "passed routed", "first row",   "last issued", "rows done",    "books kept", "fenced",
    "counted in",    "announced",   "own sums",    "passed moved", "finished",   "released"};

/// A kernel's name and where its timeline is taken.
struct Kernel {
  const char* name;
  cudaError_t (*take)(Timeline*);
};

struct Spread {
  uint64_t least = 0;
  uint64_t median = 0;
  uint64_t most = 0;
  uint32_t blocks = 0;
};

uint64_t median_of(std::vector<uint64_t> values) {
  if (values.empty()) {
    return 0;
  }
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

uint64_t first_start(const Timeline& timeline) {
  uint64_t first = UINT64_MAX;
  for (const auto& block : timeline.ns) {
    first = block[0] == 0 ? first : std::min(first, block[0]);
  }
  return first;
}

Spread spread_of(const Timeline& timeline, uint32_t phase, uint64_t start_ns) {
  std::vector<uint64_t> times;
  for (const auto& block : timeline.ns) {
    if (block[phase] != 0) {
      times.push_back(block[phase] - start_ns);
    }
  }
  if (times.empty()) {
    return {};
  }
  const auto [least, most] = std::minmax_element(times.begin(), times.end());
  return {*least, median_of(times), *most, static_cast<uint32_t>(times.size())};
}

void stop_on(bool failed, const std::string& what) {
  if (failed || testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed()) {
    std::fprintf(stderr, "kernel_timeline: %s\n", what.c_str());
    std::exit(1);
  }
}

void check(cudaError_t error, const char* what) {
  stop_on(error != cudaSuccess, std::string(what) + ": " + cudaGetErrorString(error));
}

/// The bells of both GPUs, which one word of the host rings.
class Bells {
 public:
  explicit Bells(GpuGroup* group) : group_(group) {
    void* word = nullptr;
    check(cudaHostAlloc(&word, sizeof(uint64_t), cudaHostAllocPortable | cudaHostAllocMapped), "a word for both GPUs");
    gate_ = static_cast<volatile uint64_t*>(word);
    *gate_ = 0;
    for (uint32_t r = 0; r < kRanks; ++r) {
      check(cudaSetDevice(static_cast<int>(group_->device_index(r))), "cudaSetDevice");
      check(cudaStreamCreateWithFlags(&streams_[r], cudaStreamNonBlocking), "cudaStreamCreate");
      check(hang_bell({const_cast<uint64_t*>(gate_), static_cast<uint64_t*>(group_->flag_page(r)) + doorbell_at(0), 0},
                      streams_[r]),
            "loading the bell");
      check(cudaStreamSynchronize(streams_[r]), "the bell");
    }
  }

  /// Of the operation that was launched last.
  void ring() {
    const uint64_t seq = group_->seq();
    for (uint32_t r = 0; r < kRanks; ++r) {
      check(cudaSetDevice(static_cast<int>(group_->device_index(r))), "cudaSetDevice");
      auto* page = static_cast<uint64_t*>(group_->flag_page(r));
      check(hang_bell({const_cast<uint64_t*>(gate_), page + doorbell_at(group_->words(r).slot), seq}, streams_[r]),
            "hanging a bell");
    }
    // Both threads poll by now; where one does not, its rank is the one that finds the others' flags there.
    const uint64_t until = base::now_ns() + 200'000;
    while (base::now_ns() < until) {
    }
    *gate_ = seq;
  }

 private:
  static size_t doorbell_at(uint32_t slot) { return EXPERTD_DOORBELL_OFFSET(slot) / sizeof(uint64_t); }
  GpuGroup* group_;
  volatile uint64_t* gate_ = nullptr;
  std::array<cudaStream_t, kRanks> streams_{};
};

/// Top-k of different experts, all equally likely.
void fill_inputs(support::Random* random, uint32_t tokens, RandomCase* made) {
  made->inputs.resize(kRanks);
  for (support::RankInput& input : made->inputs) {
    input.tokens = tokens;
    for (uint32_t t = 0; t < tokens; ++t) {
      std::vector<int64_t> ids;
      while (ids.size() < kTopK) {
        const auto id = static_cast<int64_t>(random->below(kExperts));
        if (std::find(ids.begin(), ids.end(), id) == ids.end()) {
          ids.push_back(id);
          input.topk_weights.push_back(static_cast<float>(random->unit()));
        }
      }
      input.topk_idx.insert(input.topk_idx.end(), ids.begin(), ids.end());
    }
    const auto rows = support::random_rows(random, size_t{tokens} * kHidden);
    input.x.resize(size_t{tokens} * made->shape.row_bytes);
    std::memcpy(input.x.data(), rows.data(), input.x.size());
    const size_t side_bytes = size_t{tokens} * made->shape.side_elements * made->shape.side_element_bytes;
    for (size_t i = 0; i < side_bytes; ++i) {
      input.side.push_back(static_cast<uint8_t>(random->below(256)));
    }
  }
}

RandomCase make_case(OpKind kind, uint32_t tokens, bool fp8) {
  support::Random random(1);
  RandomCase made;
  made.seed = 1;
  kernels::OpShape& shape = made.shape;
  shape.kind = kind;
  shape.ranks = kRanks;
  shape.experts = kExperts;
  shape.local_experts = kExperts / kRanks;
  shape.top_k = kTopK;
  shape.hidden = kHidden;
  shape.max_tokens = tokens;
  shape.slots_per_expert = kRanks * tokens;
  shape.active_ranks = base::RankSet::first(kRanks);
  shape.row_bytes = kHidden * 2;
  shape.out_row_bytes = kHidden * 2;
  if (fp8 && kind == OpKind::kLlDispatch) {
    shape.payload = kernels::Payload::kFp8;
    shape.out_row_bytes = kHidden;
  } else if (fp8) {
    shape.payload = kernels::Payload::kBytes;
    shape.row_bytes = kHidden;
    shape.out_row_bytes = kHidden;
    shape.side_elements = kHidden / 128;
    shape.side_element_bytes = sizeof(float);
  }
  made.later_active = shape.active_ranks;
  made.optional_outputs = true;
  fill_inputs(&random, tokens, &made);
  const bool ll = kind == OpKind::kLlDispatch;
  made.capacities.assign(kRanks, ll ? shape.local_experts * shape.slots_per_expert : kRanks * tokens);
  return made;
}

/// One operation of both ranks.
void run_once(GpuGroup* group, Bells* bells, std::vector<engine::Request>* requests) {
  auto parts = group->launch(requests, (uint64_t{1} << kRanks) - 1);
  bells->ring();
  stop_on(!group->drain(&parts), "an operation did not end");
  for (const auto& part : parts) {
    stop_on(part.outcome.report.reason != 0, "an operation failed");
  }
}

void print_rounds(const std::string& title, const std::vector<std::array<Timeline, kRanks>>& rounds) {
  std::printf("\n%s\n", title.c_str());
  std::printf("  %-14s %28s   %28s\n", "", "rank 0: first median last (n)", "rank 1: first median last (n)");
  for (uint32_t phase = 0; phase < kStamps; ++phase) {
    std::string line;
    bool came = false;
    for (uint32_t r = 0; r < kRanks; ++r) {
      std::array<std::vector<uint64_t>, 4> values;
      for (const auto& round : rounds) {
        const Spread spread = spread_of(round[r], phase, first_start(round[r]));
        if (spread.blocks != 0) {
          values[0].push_back(spread.least);
          values[1].push_back(spread.median);
          values[2].push_back(spread.most);
          values[3].push_back(spread.blocks);
        }
      }
      came = came || !values[0].empty();
      char text[80];
      std::snprintf(text, sizeof(text), "   %7.2f %7.2f %7.2f (%3u)", static_cast<double>(median_of(values[0])) / 1000,
                    static_cast<double>(median_of(values[1])) / 1000, static_cast<double>(median_of(values[2])) / 1000,
                    static_cast<unsigned>(median_of(values[3])));
      line += text;
    }
    if (came) {
      std::printf("  %-14s%s\n", kNames[phase], line.c_str());
    }
  }
}

/// Runs the operation once and compares, then many times and prints.
void measure(GpuGroup* group, Bells* bells, const std::string& title, const Kernel& kernel,
             const std::vector<support::CombineInput>* rows, const RandomCase& made, const support::GroupMemory& host,
             support::GroupMemory* gpu) {
  std::vector<engine::Request> requests;
  for (uint32_t r = 0; r < kRanks; ++r) {
    group->arena(r).reset();
    requests.push_back(
        device_test::add_request(group, r, made.inputs[r], rows == nullptr ? nullptr : &(*rows)[r], gpu));
    requests.back().doorbell_rung = false;
    group->arena(r).upload(group->device_index(r));
  }
  run_once(group, bells, &requests);
  for (uint32_t r = 0; r < kRanks; ++r) {
    group->arena(r).download(group->device_index(r));
    device_test::expect_equal_outputs(host.ranks[r], gpu->ranks[r]);
  }
  stop_on(false, title + ": outputs differ from the host's");
  std::vector<std::array<Timeline, kRanks>> rounds(kRounds);
  for (uint32_t i = 0; i < kWarmRounds + kRounds; ++i) {
    run_once(group, bells, &requests);
    auto& round = rounds[i < kWarmRounds ? 0 : i - kWarmRounds];
    for (uint32_t r = 0; r < kRanks; ++r) {
      check(cudaSetDevice(static_cast<int>(group->device_index(r))), "cudaSetDevice");
      check(kernel.take(&round[r]), kernel.name);
      stop_on(first_start(round[r]) == UINT64_MAX, title + ": another kernel served the operation");
    }
  }
  print_rounds(title, rounds);
}

/// A dispatch and the combine behind it.
void measure_pair(GpuGroup* group, Bells* bells, const std::string& title, const RandomCase& made,
                  const std::array<Kernel, 2>& taken) {
  const base::Status created = group->create_group(made.shape);
  stop_on(!created.is_ok(), created.message());
  auto handles = support::make_handles(made);
  auto other_handles = support::make_handles(made);
  support::GroupMemory host = support::make_dispatch(made, &handles);
  support::GroupMemory gpu = support::make_dispatch(made, &other_handles);
  support::drive(support::Drive::kWhole, &host);
  measure(group, bells, title + " dispatch", taken[0], nullptr, made, host, &gpu);
  std::vector<uint32_t> in_rows(kRanks);
  std::vector<support::CombineInput> rows(kRanks);
  support::Random random(2);
  for (uint32_t r = 0; r < kRanks; ++r) {
    in_rows[r] = made.capacities[r];
    rows[r].x = support::random_rows(&random, size_t{in_rows[r]} * kHidden);
  }
  const RandomCase combine = device_test::combine_of(made);
  support::GroupMemory combine_host = support::make_combine(combine, &handles, rows, in_rows);
  support::GroupMemory combine_gpu = support::make_combine(combine, &other_handles, rows, in_rows);
  support::drive(support::Drive::kWhole, &combine_host);
  measure(group, bells, title + " combine", taken[1], &rows, combine, combine_host, &combine_gpu);
  group->destroy_group();
}

int run() {
  GpuGroup group(kMemoryBytes, kRanks);
  const base::Status opened = group.open({});
  stop_on(!opened.is_ok(), opened.message());
  stop_on(group.size() < kRanks, "needs two GPUs");
  Bells bells(&group);
  const std::array<Kernel, 2> ht = {Kernel{"link_dispatch", kernels::cuda::take_link_dispatch_timeline},
                                    Kernel{"link_combine", kernels::cuda::take_link_combine_timeline}};
  const std::array<Kernel, 2> ll = {Kernel{"link_ll_dispatch", kernels::cuda::take_link_ll_dispatch_timeline},
                                    Kernel{"link_ll_combine", kernels::cuda::take_link_ll_combine_timeline}};
  std::printf("us since the first block of the rank's kernel began; medians of %u rounds\n", kRounds);
  measure_pair(&group, &bells, "HT FP8, 4096 tokens", make_case(OpKind::kDispatch, 4096, true), ht);
  measure_pair(&group, &bells, "HT BF16, 4096 tokens", make_case(OpKind::kDispatch, 4096, false), ht);
  measure_pair(&group, &bells, "LL FP8, 16 tokens", make_case(OpKind::kLlDispatch, 16, true), ll);
  measure_pair(&group, &bells, "LL FP8, 128 tokens", make_case(OpKind::kLlDispatch, 128, true), ll);
  return 0;
}

}  // namespace
}  // namespace expertd::bench

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  return expertd::bench::run();
}
