// SPDX-License-Identifier: Apache-2.0
#include "tests/device/client_exchange.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "tests/integration/moe_case.h"

namespace expertd::device_test {
namespace {

using kernels::OpKind;
using kernels::OpShape;
using kernels::Payload;
using kernels::ScaleForm;
using support::Random;
using support::RandomCase;
using support::RankInput;

constexpr uint64_t kBlockBytes = 256u << 20;
constexpr char kPoison = 0x5a;
constexpr uint64_t kStreamNs = 10'000'000'000;
constexpr uint64_t kOpNs = 20'000'000'000;
constexpr int32_t kStatsBefore = 1000;

std::string failed(const std::string& what, const support::Outcome& outcome) {
  return outcome.ok() ? std::string() : what + ": " + support::describe(outcome);
}

/// Sizes from tiny to those of a decode step; every payload.
support::Wish wish_of(uint64_t seed) {
  Random random(seed);
  constexpr uint32_t kHidden[] = {128, 384, 512, 1024, 2048, 7168};
  constexpr uint32_t kTokens[] = {1, 2, 7, 16, 64, 128};
  support::Wish wish;
  wish.seed = seed;
  wish.ranks = Exchanges::kRanks;
  wish.local_experts = random.between(1, 16);
  wish.top_k = random.between(1, std::min(8u, wish.ranks * wish.local_experts));
  wish.hidden = kHidden[random.below(6)];
  wish.tokens = kTokens[random.below(6)];
  switch (random.below(5)) {
    case 0:
      break;
    case 1:
      wish.payload = Payload::kBytes;
      break;
    case 2:
      wish.payload = Payload::kFp8;
      break;
    case 3:
      wish.payload = Payload::kFp8;
      wish.scale = ScaleForm::kRounded;
      break;
    default:
      wish.payload = Payload::kFp8;
      wish.scale = wish.hidden % 512 == 0 ? ScaleForm::kUe8m0 : ScaleForm::kFloat32;
  }
  wish.narrow_ids = random.chance(50);
  wish.empty_rank = random.chance(10) ? static_cast<int32_t>(random.below(2)) : -1;
  return wish;
}

size_t side_row_bytes(const OpShape& shape) {
  if (shape.payload != Payload::kFp8) {
    return size_t{shape.side_elements} * shape.side_element_bytes;
  }
  return shape.scale == ScaleForm::kUe8m0 ? shape.hidden / 128 : shape.hidden / 128 * 4;
}

uint32_t payload_flags(const OpShape& shape) {
  if (shape.payload != Payload::kFp8) {
    return 0;
  }
  uint32_t flags = EXPERTD_USE_FP8;
  flags |= shape.scale != ScaleForm::kFloat32 ? EXPERTD_ROUND_SCALE : 0;
  flags |= shape.scale == ScaleForm::kUe8m0 ? EXPERTD_UE8M0 : 0;
  return flags;
}

expertd_data_type_t idx_type(const OpShape& shape) {
  return shape.topk_idx_bytes == 4 ? EXPERTD_I32 : EXPERTD_I64;
}

/// The row that an expert makes of a token: different for different (expert, source, token).
std::vector<uint16_t> expert_row(const RandomCase& it, uint64_t expert, uint64_t source, uint64_t token) {
  Random random(it.seed ^ (expert << 40) ^ (source << 20) ^ token);
  return support::random_rows(&random, it.shape.hidden);
}

std::vector<std::vector<uint16_t>> lane_rows(const RandomCase& it) {
  std::vector<std::vector<uint16_t>> lanes(it.shape.ranks);
  for (uint32_t source = 0; source < it.shape.ranks; ++source) {
    const RankInput& input = it.inputs[source];
    for (size_t at = 0; at < input.topk_idx.size(); ++at) {
      const int64_t id = input.topk_idx[at];
      const auto row = id < 0 ? std::vector<uint16_t>(it.shape.hidden)
                              : expert_row(it, static_cast<uint64_t>(id), source, at / it.shape.top_k);
      lanes[source].insert(lanes[source].end(), row.begin(), row.end());
    }
  }
  return lanes;
}

}  // namespace

/// Offsets in the block, device and host alike.
struct Exchanges::Places {
  uint64_t x = 0, side = 0, topk_idx = 0, weights = 0;
  uint64_t recv_x = 0, recv_side = 0, counts = 0, src_info = 0, range = 0, stats = 0;
  uint64_t rows = 0, combined = 0, end = 0;

  explicit Places(const OpShape& shape) {
    const auto place = [this](uint64_t bytes) {
      const uint64_t begin = end;
      end = (end + bytes + 511) / 256 * 256;
      return begin;
    };
    const uint64_t lanes = uint64_t{shape.max_tokens} * shape.top_k;
    const uint64_t slots = uint64_t{shape.local_experts} * shape.slots_per_expert;
    x = place(uint64_t{shape.max_tokens} * shape.row_bytes);
    side = place(shape.max_tokens * side_row_bytes(shape));
    topk_idx = place(lanes * shape.topk_idx_bytes);
    weights = place(lanes * 4);
    recv_x = place(slots * shape.out_row_bytes);
    recv_side = place(slots * side_row_bytes(shape));
    counts = place(shape.local_experts * 4);
    src_info = place(slots * 4);
    range = place(uint64_t{shape.local_experts} * shape.ranks * 8);
    stats = place(shape.local_experts * 4);
    rows = place(slots * shape.hidden * 2);
    combined = place(uint64_t{shape.max_tokens} * shape.hidden * 2);
  }
};

std::string Exchanges::open(expertd_session_t* session, ClientGpu* gpu) {
  session_ = session;
  gpu_ = gpu;
  if (gpu == nullptr) {
    return "copy engines are those of GPUs";
  }
  void* block = nullptr;
  void* host = nullptr;
  std::string problem = gpu->allocate("malloc", kBlockBytes, &block);
  problem = problem.empty() ? gpu->allocate_host(kBlockBytes, &host) : problem;
  block_ = static_cast<char*>(block);
  host_ = static_cast<char*>(host);
  return problem;
}

std::string Exchanges::copy(void* destination, const void* source, uint64_t bytes) {
  return failed("copy", support::outcome_of(expertd_copy(session_, destination, source, bytes, stream())));
}

std::string Exchanges::synchronize() {
  return failed("synchronize", support::outcome_of(expertd_stream_synchronize(session_, stream(), kStreamNs)));
}

/// Inputs, and poison wherever an output may be.
std::string Exchanges::upload(const RandomCase& it, uint32_t rank, const Places& at) {
  const RankInput& input = it.inputs[rank];
  std::memset(host_, kPoison, at.end);
  std::memcpy(host_ + at.x, input.x.data(), input.x.size());
  std::memcpy(host_ + at.side, input.side.data(), input.side.size());
  for (size_t i = 0; i < input.topk_idx.size(); ++i) {
    std::memcpy(host_ + at.topk_idx + i * it.shape.topk_idx_bytes, &input.topk_idx[i], it.shape.topk_idx_bytes);
  }
  std::memcpy(host_ + at.weights, input.topk_weights.data(), input.topk_weights.size() * 4);
  std::fill_n(reinterpret_cast<int32_t*>(host_ + at.stats), it.shape.local_experts, kStatsBefore);
  const std::string problem = copy(block_, host_, at.end);
  return problem.empty() ? synchronize() : problem;
}

std::string Exchanges::dispatch(const RandomCase& it, uint32_t rank, const Places& at, uint32_t flags, Issued* issued) {
  const OpShape& shape = it.shape;
  expertd_ll_dispatch_args_t args = EXPERTD_INIT(expertd_ll_dispatch_args_t);
  args.x = block_ + at.x;
  args.dtype = shape.payload == Payload::kBytes ? EXPERTD_BYTES : EXPERTD_BF16;
  args.row_bytes = shape.row_bytes;
  args.side = shape.payload == Payload::kBytes ? block_ + at.side : nullptr;
  args.side_elements = shape.side_elements;
  args.side_element_bytes = shape.side_element_bytes;
  args.topk_idx = block_ + at.topk_idx;
  args.idx_type = idx_type(shape);
  args.tokens = it.inputs[rank].tokens;
  args.recv_x = block_ + at.recv_x;
  args.recv_scales = side_row_bytes(shape) == 0 ? nullptr : block_ + at.recv_side;
  args.expert_counts = reinterpret_cast<int32_t*>(block_ + at.counts);
  args.recv_src_info = reinterpret_cast<int32_t*>(block_ + at.src_info);
  args.layout_range = reinterpret_cast<int64_t*>(block_ + at.range);
  args.stats = reinterpret_cast<int32_t*>(block_ + at.stats);
  args.flags = payload_flags(shape) | flags;
  return failed("ll_dispatch", support::outcome_of(
                                   expertd_ll_dispatch(group_, &args, stream(), &issued->handle, &issued->dispatched)));
}

std::string Exchanges::combine(const RandomCase& it, uint32_t rank, const Places& at, uint32_t flags, Issued* issued) {
  expertd_ll_combine_args_t args = EXPERTD_INIT(expertd_ll_combine_args_t);
  args.x = block_ + at.rows;
  args.topk_idx = block_ + at.topk_idx;
  args.idx_type = idx_type(it.shape);
  args.topk_weights = reinterpret_cast<const float*>(block_ + at.weights);
  args.handle = issued->handle;
  args.tokens = it.inputs[rank].tokens;
  args.combined_x = block_ + at.combined;
  args.flags = flags;
  return failed("ll_combine", support::outcome_of(expertd_ll_combine(group_, &args, stream(), &issued->combined)));
}

std::string Exchanges::check_dispatch(const RandomCase& it, uint32_t rank, const Places& at, const Issued& issued) {
  const support::OpEnd end = support::finish(issued.dispatched);
  std::string problem = failed("ll_dispatch", end.outcome);
  problem = problem.empty() ? copy(host_, block_, at.end) : problem;
  problem = problem.empty() ? synchronize() : problem;
  if (!problem.empty()) {
    return problem;
  }
  const auto expected = support::reference_ll_dispatch(it.shape, it.inputs);
  if (end.result.executor != executor() || (end.result.sms != 0) != over_nodes_) {
    return "executor " + std::to_string(end.result.executor) + " with " + std::to_string(end.result.sms) + " SMs";
  }
  if (end.result.local_bytes != expected[rank].local_bytes || end.result.remote_bytes != expected[rank].remote_bytes ||
      end.result.expert_count_entries != it.shape.local_experts) {
    return "result of ll_dispatch: " + std::to_string(end.result.local_bytes) + " and " +
           std::to_string(end.result.remote_bytes) + " bytes, expected " + std::to_string(expected[rank].local_bytes) +
           " and " + std::to_string(expected[rank].remote_bytes);
  }
  const auto* counts = reinterpret_cast<const int32_t*>(host_ + at.counts);
  const auto* stats = reinterpret_cast<const int32_t*>(host_ + at.stats);
  const uint64_t row_bytes = it.shape.out_row_bytes;
  for (uint32_t e = 0; e < it.shape.local_experts; ++e) {
    const auto count = static_cast<uint32_t>(expected[rank].expert_rows[e].size());
    if (end.result.expert_counts[e] != count || stats[e] != kStatsBefore + static_cast<int32_t>(count) ||
        static_cast<uint32_t>(counts[e]) != count) {
      return "counts or statistics of local expert " + std::to_string(e) + ": told " +
             std::to_string(end.result.expert_counts[e]) + ", stored " + std::to_string(counts[e]) + ", expected " +
             std::to_string(count);
    }
    const char* behind = host_ + at.recv_x + (uint64_t{e} * it.shape.slots_per_expert + count) * row_bytes;
    const uint64_t bytes = (it.shape.slots_per_expert - count) * row_bytes;
    if (!std::all_of(behind, behind + bytes, [](char byte) { return byte == kPoison; })) {
      return "rows behind those of local expert " + std::to_string(e) + " were written";
    }
  }
  const support::LlDispatchView view{reinterpret_cast<const uint8_t*>(host_ + at.recv_x),
                                     side_row_bytes(it.shape) == 0 ? nullptr : host_ + at.recv_side, counts,
                                     reinterpret_cast<const int32_t*>(host_ + at.src_info),
                                     reinterpret_cast<const int64_t*>(host_ + at.range)};
  return support::compare_ll_dispatch(it.shape, rank, it.inputs, expected, view);
}

/// What the experts answer, from the tables of a dispatch in the host's copy; rows of no token hold NaN.
std::string Exchanges::make_rows(const RandomCase& it, uint32_t rank, const Places& at) {
  const OpShape& shape = it.shape;
  auto* x = reinterpret_cast<uint16_t*>(host_ + at.rows);
  const uint64_t slots = uint64_t{shape.local_experts} * shape.slots_per_expert;
  std::fill_n(x, slots * shape.hidden, uint16_t{0x7fff});
  const auto* ranges = reinterpret_cast<const int64_t*>(host_ + at.range);
  const auto* tokens = reinterpret_cast<const int32_t*>(host_ + at.src_info);
  for (uint64_t i = 0; i < uint64_t{shape.local_experts} * shape.ranks; ++i) {
    const uint64_t expert = i / shape.ranks;
    const auto range = static_cast<uint64_t>(ranges[i]);
    for (uint64_t row = range >> 32; row < (range >> 32) + (range & 0xffffffffu); ++row) {
      const uint64_t slot = expert * shape.slots_per_expert + row;
      const auto made = expert_row(it, uint64_t{rank} * shape.local_experts + expert, i % shape.ranks,
                                   static_cast<uint64_t>(tokens[slot]));
      std::copy(made.begin(), made.end(), x + slot * shape.hidden);
    }
  }
  const std::string problem = copy(block_ + at.rows, host_ + at.rows, slots * shape.hidden * 2);
  return problem.empty() ? synchronize() : problem;
}

std::string Exchanges::check_combine(const RandomCase& it, uint32_t rank, const Places& at, const Issued& issued) {
  const support::OpEnd end = support::finish(issued.combined);
  std::string problem = failed("ll_combine", end.outcome);
  problem = problem.empty() ? copy(host_, block_, at.end) : problem;
  problem = problem.empty() ? synchronize() : problem;
  if (!problem.empty()) {
    return problem;
  }
  if (end.result.executor != executor()) {
    return "executor " + std::to_string(end.result.executor);
  }
  const auto lanes = lane_rows(it);
  const auto sums = support::reference_ll_combine(it.shape, it.inputs, lanes, support::LlSum::kOfRanks);
  const auto plain = support::reference_ll_combine(it.shape, it.inputs, lanes, support::LlSum::kOfLanes);
  const auto* out = reinterpret_cast<const uint16_t*>(host_ + at.combined);
  return support::compare_ll_combine(sums[rank], plain[rank], std::vector<uint16_t>(out, out + sums[rank].size()));
}

/// Round 0 waits for each operation; 1 issues two pairs without a wait of the host; 2 does so with EXPERTD_ASYNC, the
/// stream waiting for the events. The rows of the experts stay those of round 0: numbering is the same every time.
std::string Exchanges::run_round(const RandomCase& it, uint32_t rank, const Places& at, uint32_t round) {
  const uint32_t flags = round == 2 ? EXPERTD_ASYNC : 0;
  const auto follow = [&](expertd_event_t event) {
    return round == 2 ? failed("event_stream_wait", support::outcome_of(expertd_event_stream_wait(event, stream())))
                      : std::string();
  };
  Issued issued[2];
  if (round == 0) {
    std::string problem = dispatch(it, rank, at, 0, &issued[0]);
    problem = problem.empty() ? check_dispatch(it, rank, at, issued[0]) : problem;
    problem = problem.empty() ? make_rows(it, rank, at) : problem;
    problem = problem.empty() ? combine(it, rank, at, 0, &issued[0]) : problem;
    return problem.empty() ? check_combine(it, rank, at, issued[0]) : problem;
  }
  std::string problem;
  for (Issued& pair : issued) {
    problem = problem.empty() ? dispatch(it, rank, at, flags, &pair) : problem;
    problem = problem.empty() ? follow(pair.dispatched) : problem;
    problem = problem.empty() ? combine(it, rank, at, flags, &pair) : problem;
    problem = problem.empty() ? follow(pair.combined) : problem;
  }
  problem = problem.empty() ? failed("first ll_dispatch", support::finish(issued[0].dispatched).outcome) : problem;
  problem = problem.empty() ? failed("first ll_combine", support::finish(issued[0].combined).outcome) : problem;
  problem = problem.empty() ? failed("second ll_dispatch", support::finish(issued[1].dispatched).outcome) : problem;
  return problem.empty() ? check_combine(it, rank, at, issued[1]) : problem;
}

std::string Exchanges::run(uint64_t seed, uint32_t rank) {
  const support::Wish wish = wish_of(seed);
  const RandomCase it = support::make_case(OpKind::kLlDispatch, wish);
  const std::string name = "exchange-" + std::to_string(seed);
  const Places at(it.shape);
  if (at.end > kBlockBytes) {
    return "seed " + std::to_string(seed) + " needs " + std::to_string(at.end) + " bytes";
  }
  expertd_group_options_t options = support::small_group(name.c_str(), rank, kRanks);
  support::configure(it, &options);
  options.executor = over_nodes_ ? EXPERTD_GROUP_EXECUTOR_AUTO : EXPERTD_GROUP_EXECUTOR_COPY_ENGINE;
  options.op_timeout_ns = kOpNs;
  options.first_op_timeout_ns = kOpNs;
  std::string problem = failed("join", support::outcome_of(expertd_group_join(session_, &options, &group_)));
  for (uint32_t round = 0; round < 3 && problem.empty(); ++round) {
    // Only the first round finds poison in front of it: the later ones have the rows that the first one's tables made.
    problem = round == 0 ? upload(it, rank, at) : problem;
    problem = problem.empty() ? run_round(it, rank, at, round) : problem;
    problem = problem.empty() ? problem : "round " + std::to_string(round) + ": " + problem;
  }
  if (group_ != nullptr) {
    const std::string left = failed("leave", support::outcome_of(expertd_group_leave(group_)));
    group_ = nullptr;
    problem = problem.empty() ? left : problem;
  }
  return problem.empty() ? problem
                         : "seed " + std::to_string(seed) + " rank " + std::to_string(rank) + " (" +
                               support::repro_line(it) + "): " + problem;
}

}  // namespace expertd::device_test
