// SPDX-License-Identifier: Apache-2.0
#include "tests/device/client_exchange_ht.h"

#include <algorithm>
#include <cstring>

#include "tests/integration/moe_case.h"

namespace expertd::device_test {
namespace {

using kernels::OpKind;
using kernels::OpShape;
using kernels::Payload;
using support::Random;
using support::RankInput;

constexpr uint64_t kBlockBytes = 256u << 20;
constexpr char kPoison = 0x5a;
constexpr uint64_t kStreamNs = 10'000'000'000;
constexpr uint64_t kOpNs = 20'000'000'000;

std::string failed(const std::string& what, const support::Outcome& outcome) {
  return outcome.ok() ? std::string() : what + ": " + support::describe(outcome);
}

/// Sizes from tiny to those of a prefill step; every payload and option that copy engines serve.
support::Wish wish_of(uint64_t seed) {
  Random random(seed);
  constexpr uint32_t kHidden[] = {128, 384, 512, 1024, 2048, 7168};
  constexpr uint32_t kTokens[] = {1, 2, 7, 64, 300, 1000};
  support::Wish wish;
  wish.seed = seed;
  wish.ranks = HtExchanges::kRanks;
  wish.local_experts = random.between(1, 16);
  wish.top_k = random.between(1, std::min(8u, wish.ranks * wish.local_experts));
  wish.hidden = kHidden[random.below(6)];
  wish.tokens = kTokens[random.below(6)];
  wish.payload = random.chance(40) ? Payload::kBytes : Payload::kBf16;
  wish.narrow_ids = random.chance(50);
  wish.weights = random.chance(70);
  wish.worst_tokens = random.chance(30);
  wish.keep_foreign_weights = random.chance(30);
  wish.mask = random.chance(20);
  wish.biases = random.chance(40);
  wish.last_lane = random.chance(30);
  wish.alignment = random.chance(30) ? 16 : 1;
  wish.empty_rank = random.chance(15) ? static_cast<int32_t>(random.below(2)) : random.chance(5) ? -2 : -1;
  return wish;
}

size_t side_row_bytes(const OpShape& shape) {
  return size_t{shape.side_elements} * shape.side_element_bytes;
}

template <typename T>
void put(char* to, const std::vector<T>& values) {
  if (!values.empty()) {
    std::memcpy(to, values.data(), values.size() * sizeof(T));
  }
}

}  // namespace

/// Offsets in the block, device and host alike.
struct HtExchanges::Places {
  uint64_t x = 0, side = 0, topk_idx = 0, weights = 0, mask = 0, bias0 = 0, bias1 = 0, rows = 0, row_weights = 0;
  uint64_t recv_x = 0, recv_side = 0, recv_idx = 0, recv_weights = 0, src_info = 0, counts = 0, prefix = 0;
  uint64_t combined = 0, combined_weights = 0, end = 0;

  explicit Places(const OpShape& shape) {
    const auto place = [this](uint64_t bytes) {
      const uint64_t begin = end;
      end = (end + bytes + 511) / 256 * 256;
      return begin;
    };
    const uint64_t lanes = uint64_t{shape.max_tokens} * shape.top_k;
    const uint64_t most = uint64_t{shape.ranks} * shape.max_tokens + 8;
    x = place(uint64_t{shape.max_tokens} * shape.row_bytes);
    side = place(shape.max_tokens * side_row_bytes(shape));
    topk_idx = place(lanes * shape.topk_idx_bytes);
    weights = place(lanes * 4);
    mask = place(uint64_t{shape.max_tokens} * shape.ranks);
    bias0 = place(uint64_t{shape.max_tokens} * shape.hidden * 2);
    bias1 = place(uint64_t{shape.max_tokens} * shape.hidden * 2);
    rows = place(most * shape.hidden * 2);
    row_weights = place(most * shape.top_k * 4);
    recv_x = place(most * shape.out_row_bytes);
    recv_side = place(most * side_row_bytes(shape));
    recv_idx = place(most * shape.top_k * shape.topk_idx_bytes);
    recv_weights = place(most * shape.top_k * 4);
    src_info = place(most * 4);
    counts = place(shape.local_experts * 4);
    prefix = place(uint64_t{shape.ranks} * shape.ranks * 4);
    combined = place(uint64_t{shape.max_tokens} * shape.hidden * 2);
    combined_weights = place(lanes * 4);
  }
};

std::string HtExchanges::open(expertd_session_t* session, ClientGpu* gpu) {
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

std::string HtExchanges::copy(void* destination, const void* source, uint64_t bytes) {
  return failed("copy", support::outcome_of(expertd_copy(session_, destination, source, bytes, stream())));
}

std::string HtExchanges::synchronize() {
  return failed("synchronize", support::outcome_of(expertd_stream_synchronize(session_, stream(), kStreamNs)));
}

std::string HtExchanges::fetch(const Places& at) {
  const std::string problem = copy(host_, block_, at.end);
  return problem.empty() ? synchronize() : problem;
}

void HtExchanges::expect(Case* made) {
  support::RandomCase& it = made->it;
  made->dispatched = support::reference_dispatch(it.shape, it.inputs);
  OpShape shape = it.shape;
  shape.kind = OpKind::kCombine;
  shape.order_last_lane = it.order_last_lane ? 1 : 0;
  made->combined = support::reference_combine(shape, it.inputs, made->dispatched, made->rows, it.capacities);
}

HtExchanges::Case HtExchanges::make(uint64_t seed) const {
  Case made;
  support::Wish wish = wish_of(seed);
  wish.biases = wish.biases && !over_nodes_;  // the own node's rows come first, which the first bias would tell
  made.it = support::make_case(OpKind::kDispatch, wish);
  Random random(seed + 1);
  made.rows.resize(kRanks);
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    const size_t rows = made.it.capacities[rank];
    made.rows[rank].x = support::random_rows(&random, rows * made.it.shape.hidden);
    for (size_t i = 0; made.it.combine_weights && i < rows * made.it.shape.top_k; ++i) {
      made.rows[rank].weights.push_back(static_cast<float>(random.unit()));
    }
  }
  expect(&made);
  return made;
}

/// Inputs, and poison wherever an output may be.
std::string HtExchanges::upload(const Case& made, const Places& at) {
  const RankInput& input = made.it.inputs[rank_];
  std::memset(host_, kPoison, at.end);
  put(host_ + at.x, input.x);
  put(host_ + at.side, input.side);
  for (size_t i = 0; i < input.topk_idx.size(); ++i) {
    std::memcpy(host_ + at.topk_idx + i * made.it.shape.topk_idx_bytes, &input.topk_idx[i],
                made.it.shape.topk_idx_bytes);
  }
  put(host_ + at.weights, input.topk_weights);
  put(host_ + at.mask, input.token_rank_mask);
  put(host_ + at.bias0, input.bias0);
  put(host_ + at.bias1, input.bias1);
  put(host_ + at.rows, made.rows[rank_].x);
  put(host_ + at.row_weights, made.rows[rank_].weights);
  const std::string problem = copy(block_, host_, at.end);
  return problem.empty() ? synchronize() : problem;
}

std::string HtExchanges::dispatch(const Case& made, const Places& at, bool cached, uint32_t flags, Issued* issued) {
  const OpShape& shape = made.it.shape;
  const RankInput& input = made.it.inputs[rank_];
  expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
  args.x = block_ + at.x;
  args.dtype = shape.payload == Payload::kBytes ? EXPERTD_BYTES : EXPERTD_BF16;
  args.row_bytes = shape.row_bytes;
  args.side = side_row_bytes(shape) != 0 ? block_ + at.side : nullptr;
  args.side_elements = shape.side_elements;
  args.side_element_bytes = shape.side_element_bytes;
  args.idx_type = shape.topk_idx_bytes == 4 ? EXPERTD_I32 : EXPERTD_I64;
  args.tokens = input.tokens;
  args.expert_alignment = shape.expert_alignment;
  args.capacity_rows = made.it.capacities[rank_];
  args.recv_x = block_ + at.recv_x;
  args.recv_side = side_row_bytes(shape) != 0 ? block_ + at.recv_side : nullptr;
  args.flags = flags | (shape.worst_tokens != 0 ? EXPERTD_WORST_TOKENS : 0) |
               (shape.zero_foreign_weights == 0 ? EXPERTD_KEEP_FOREIGN_WEIGHTS : 0);
  if (cached) {
    args.cached = issued->handle;
  } else {
    args.topk_idx = block_ + at.topk_idx;
    args.topk_weights = made.it.combine_weights ? reinterpret_cast<const float*>(block_ + at.weights) : nullptr;
    args.token_rank_mask = input.token_rank_mask.empty() ? nullptr : reinterpret_cast<const uint8_t*>(block_ + at.mask);
    args.recv_topk_idx = block_ + at.recv_idx;
    args.recv_topk_weights = made.it.combine_weights ? reinterpret_cast<float*>(block_ + at.recv_weights) : nullptr;
    args.recv_src_info = reinterpret_cast<int32_t*>(block_ + at.src_info);
  }
  args.expert_counts = reinterpret_cast<int32_t*>(block_ + at.counts);
  args.rank_prefix = reinterpret_cast<int32_t*>(block_ + at.prefix);
  return failed("dispatch", support::outcome_of(expertd_dispatch(
                                group_, &args, stream(), cached ? nullptr : &issued->handle, &issued->dispatched)));
}

std::string HtExchanges::combine(const Case& made, const Places& at, uint32_t flags, Issued* issued) {
  const RankInput& input = made.it.inputs[rank_];
  const bool weights = made.it.combine_weights;
  expertd_combine_args_t args = EXPERTD_INIT(expertd_combine_args_t);
  args.x = block_ + at.rows;
  args.rows = made.it.capacities[rank_];
  args.topk_weights = weights ? reinterpret_cast<const float*>(block_ + at.row_weights) : nullptr;
  args.bias0 = input.bias0.empty() ? nullptr : block_ + at.bias0;
  args.bias1 = input.bias1.empty() ? nullptr : block_ + at.bias1;
  args.handle = issued->handle;
  args.tokens = input.tokens;
  args.combined_x = block_ + at.combined;
  args.combined_topk_weights = weights ? reinterpret_cast<float*>(block_ + at.combined_weights) : nullptr;
  args.flags = flags | (made.it.order_last_lane ? EXPERTD_ORDER_LAST_LANE : 0);
  return failed("combine", support::outcome_of(expertd_combine(group_, &args, stream(), &issued->combined)));
}

std::string HtExchanges::check_rows(const Case& made, const Places& at, bool cached) {
  const OpShape& shape = made.it.shape;
  const support::DispatchResult& wanted = made.dispatched[rank_];
  const size_t side = side_row_bytes(shape);
  const auto* tokens = reinterpret_cast<const int32_t*>(host_ + at.src_info);
  for (size_t row = 0; row < wanted.rows.size(); ++row) {
    const bool right =
        std::memcmp(host_ + at.recv_x + row * shape.row_bytes, wanted.x.data() + row * shape.row_bytes,
                    shape.row_bytes) == 0 &&
        (side == 0 || std::memcmp(host_ + at.recv_side + row * side, wanted.side.data() + row * side, side) == 0) &&
        (cached || tokens[row] == wanted.rows[row].token);
    if (!right) {
      return "row " + std::to_string(row) + " of " + std::to_string(wanted.rows.size()) + " differs";
    }
  }
  const char* behind = host_ + at.recv_x + wanted.rows.size() * shape.row_bytes;
  return std::all_of(behind, static_cast<const char*>(host_ + at.recv_side), [](char byte) { return byte == kPoison; })
             ? std::string()
             : "bytes behind the last row were written";
}

std::string HtExchanges::check_routing(const Case& made, const Places& at) {
  const OpShape& shape = made.it.shape;
  const support::DispatchResult& wanted = made.dispatched[rank_];
  const size_t rows = shape.worst_tokens != 0 ? made.it.capacities[rank_] : wanted.rows.size();
  for (size_t i = 0; i < rows * shape.top_k; ++i) {
    int64_t wide = 0;
    int32_t narrow = 0;
    std::memcpy(&wide, host_ + at.recv_idx + i * shape.topk_idx_bytes, shape.topk_idx_bytes);
    std::memcpy(&narrow, host_ + at.recv_idx + i * shape.topk_idx_bytes, sizeof(narrow));
    if ((shape.topk_idx_bytes == 4 ? narrow : wide) != (i < wanted.topk_idx.size() ? wanted.topk_idx[i] : -1)) {
      return "topk_idx of row " + std::to_string(i / shape.top_k) + " differs";
    }
    const float weight = i < wanted.topk_weights.size() ? wanted.topk_weights[i] : 0.0f;
    if (made.it.combine_weights && std::memcmp(host_ + at.recv_weights + i * 4, &weight, 4) != 0) {
      return "weight of row " + std::to_string(i / shape.top_k) + " differs";
    }
  }
  return {};
}

std::string HtExchanges::check_dispatch(const Case& made, const Places& at, bool cached, const Issued& issued) {
  const support::OpEnd end = support::finish(issued.dispatched);
  std::string problem = failed("dispatch", end.outcome);
  problem = problem.empty() ? fetch(at) : problem;
  if (!problem.empty()) {
    return problem;
  }
  const support::DispatchResult& wanted = made.dispatched[rank_];
  const expertd_op_result_t& result = end.result;
  if (result.executor != executor() || (result.sms != 0) != over_nodes_) {
    return "executor " + std::to_string(result.executor) + " with " + std::to_string(result.sms) + " SMs";
  }
  if (result.recv_rows != wanted.rows.size() || result.local_bytes != wanted.local_bytes ||
      result.remote_bytes != wanted.remote_bytes ||
      !std::equal(wanted.report_counts.begin(), wanted.report_counts.end(), result.expert_counts,
                  result.expert_counts + result.expert_count_entries)) {
    return "result of dispatch: " + std::to_string(result.recv_rows) + " rows, " + std::to_string(result.local_bytes) +
           " and " + std::to_string(result.remote_bytes) + " bytes, expected " + std::to_string(wanted.rows.size()) +
           ", " + std::to_string(wanted.local_bytes) + " and " + std::to_string(wanted.remote_bytes);
  }
  const auto* counts = reinterpret_cast<const int32_t*>(host_ + at.counts);
  const auto* prefix = reinterpret_cast<const int32_t*>(host_ + at.prefix);
  if (!std::equal(wanted.expert_counts.begin(), wanted.expert_counts.end(), counts) ||
      !std::equal(wanted.rank_prefix.begin(), wanted.rank_prefix.end(), prefix)) {
    return "counts or prefix differ";
  }
  problem = check_rows(made, at, cached);
  return problem.empty() && !cached ? check_routing(made, at) : problem;
}

std::string HtExchanges::check_combine(const Case& made, const Places& at, const Issued& issued) {
  const support::OpEnd end = support::finish(issued.combined);
  std::string problem = failed("combine", end.outcome);
  problem = problem.empty() ? fetch(at) : problem;
  if (!problem.empty()) {
    return problem;
  }
  const support::CombineResult& wanted = made.combined[rank_];
  if (end.result.executor != executor() || end.result.local_bytes != wanted.local_bytes ||
      end.result.remote_bytes != wanted.remote_bytes) {
    return "result of combine: executor " + std::to_string(end.result.executor) + ", " +
           std::to_string(end.result.local_bytes) + " and " + std::to_string(end.result.remote_bytes) + " bytes";
  }
  const auto* out = reinterpret_cast<const uint16_t*>(host_ + at.combined);
  for (size_t i = 0; i < wanted.x.size(); ++i) {
    if (out[i] != wanted.x[i]) {
      return "channel " + std::to_string(i % made.it.shape.hidden) + " of token " +
             std::to_string(i / made.it.shape.hidden) + " differs";
    }
  }
  const size_t bytes = made.it.combine_weights ? wanted.weights.size() * sizeof(float) : 0;
  return bytes == 0 || std::memcmp(host_ + at.combined_weights, wanted.weights.data(), bytes) == 0
             ? std::string()
             : "combined weights differ";
}

/// Dispatch and combine, each waited for.
std::string HtExchanges::pair(const Case& made, const Places& at, bool cached, Issued* issued) {
  std::string problem = upload(made, at);
  problem = problem.empty() ? dispatch(made, at, cached, 0, issued) : problem;
  problem = problem.empty() ? check_dispatch(made, at, cached, *issued) : problem;
  problem = problem.empty() ? combine(made, at, 0, issued) : problem;
  return problem.empty() ? check_combine(made, at, *issued) : problem;
}

/// Three pairs without a wait of the host; with EXPERTD_ASYNC the stream waits for the events.
std::string HtExchanges::in_flight(const Case& made, const Places& at, uint32_t flags) {
  const auto follow = [&](expertd_event_t event) {
    return flags != 0 ? failed("event_stream_wait", support::outcome_of(expertd_event_stream_wait(event, stream())))
                      : std::string();
  };
  Issued issued[3];
  std::string problem = upload(made, at);
  for (Issued& it : issued) {
    problem = problem.empty() ? dispatch(made, at, false, flags, &it) : problem;
    problem = problem.empty() ? follow(it.dispatched) : problem;
    problem = problem.empty() ? combine(made, at, flags, &it) : problem;
    problem = problem.empty() ? follow(it.combined) : problem;
  }
  for (Issued& it : issued) {
    problem = problem.empty() ? failed("dispatch", support::finish(it.dispatched).outcome) : problem;
    problem = problem.empty() ? failed("combine", support::finish(it.combined).outcome) : problem;
  }
  problem = problem.empty() ? check_dispatch(made, at, false, issued[2]) : problem;
  problem = problem.empty() ? check_combine(made, at, issued[2]) : problem;
  for (const Issued& it : issued) {
    problem =
        problem.empty() ? failed("handle_free", support::outcome_of(expertd_handle_free(group_, it.handle))) : problem;
  }
  return problem;
}

/// A dispatch that must end with these Reasons, and must leave no row an expert.
std::string HtExchanges::refused(const Case& made, const Places& at, uint32_t own, uint32_t other) {
  Issued issued;
  std::string problem = upload(made, at);
  problem = problem.empty() ? dispatch(made, at, false, 0, &issued) : problem;
  if (!problem.empty()) {
    return problem;
  }
  const support::OpEnd end = support::finish(issued.dispatched);
  const uint32_t wanted = rank_ == 0 ? own : other;
  if (static_cast<uint32_t>(end.outcome.status.reason) != wanted) {
    return "expected " + std::to_string(wanted) + ", got " + support::describe(end.outcome);
  }
  problem = fetch(at);
  const uint64_t bytes = uint64_t{made.it.capacities[rank_]} * made.it.shape.top_k * made.it.shape.topk_idx_bytes;
  const char* idx = host_ + at.recv_idx;
  const bool cleared = std::all_of(idx, idx + bytes, [](char byte) { return byte == '\xff'; });
  problem = problem.empty() && !cleared ? "indices of a dispatch that failed" : problem;
  return problem.empty() ? failed("handle_free", support::outcome_of(expertd_handle_free(group_, issued.handle)))
                         : problem;
}

std::string HtExchanges::rounds(Case* made, const Places& at) {
  const auto named = [](const char* name, const std::string& problem) {
    return problem.empty() ? problem : std::string(name) + ": " + problem;
  };
  Issued issued;
  std::string problem = named("first", pair(*made, at, false, &issued));
  if (problem.empty()) {
    support::refill_payload(made->it.seed, &made->it);
    expect(made);
    problem = named("cached", pair(*made, at, true, &issued));
  }
  problem = problem.empty() ? named("in flight", in_flight(*made, at, 0)) : problem;
  problem = problem.empty() ? named("async", in_flight(*made, at, EXPERTD_ASYNC)) : problem;
  if (problem.empty() && !made->it.inputs[0].topk_idx.empty()) {
    Case bad = *made;
    bad.it.inputs[0].topk_idx.back() = bad.it.shape.experts;
    problem = named("bad id", refused(bad, at, EXPERTD_REASON_EXPERT_OUT_OF_RANGE, EXPERTD_REASON_PEER_REJECTED));
  }
  if (problem.empty() && !made->dispatched[1].rows.empty()) {
    Case small = *made;
    small.it.capacities[1] = static_cast<uint32_t>(made->dispatched[1].rows.size()) - 1;
    problem = named("capacity", refused(small, at, EXPERTD_REASON_CAPACITY_EXCEEDED, EXPERTD_REASON_CAPACITY_EXCEEDED));
  }
  return problem.empty() ? named("last", pair(*made, at, true, &issued)) : problem;
}

std::string HtExchanges::run(uint64_t seed, uint32_t rank) {
  rank_ = rank;
  Case made = make(seed);
  const Places at(made.it.shape);
  if (at.end > kBlockBytes) {
    return "seed " + std::to_string(seed) + " needs " + std::to_string(at.end) + " bytes";
  }
  const std::string name = "exchange-ht-" + std::to_string(seed);
  expertd_group_options_t options = support::small_group(name.c_str(), rank, kRanks);
  support::configure(made.it, &options);
  options.executor = over_nodes_ ? EXPERTD_GROUP_EXECUTOR_AUTO : EXPERTD_GROUP_EXECUTOR_COPY_ENGINE;
  options.op_timeout_ns = kOpNs;
  options.first_op_timeout_ns = kOpNs;
  std::string problem = failed("join", support::outcome_of(expertd_group_join(session_, &options, &group_)));
  problem = problem.empty() ? rounds(&made, at) : problem;
  if (group_ != nullptr) {
    const std::string left = failed("leave", support::outcome_of(expertd_group_leave(group_)));
    group_ = nullptr;
    problem = problem.empty() ? left : problem;
  }
  return problem.empty() ? problem
                         : "seed " + std::to_string(seed) + " rank " + std::to_string(rank) + " (" +
                               support::repro_line(made.it) + "): " + problem;
}

}  // namespace expertd::device_test
