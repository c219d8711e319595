// SPDX-License-Identifier: Apache-2.0
#include "daemon/base/limits.h"
#include "daemon/group/directory.h"
#include "proto/abi/ring_v1.h"

namespace expertd::group {

namespace {

struct Range {
  const char* field;
  uint64_t value;
  uint64_t minimum;
  uint64_t maximum;
};

session::ErrorDetail out_of_range(const char* field, const std::string& value, const std::string& allowed) {
  session::ErrorDetail error;
  error.status =
      base::Status(EXPERTD_REASON_ARGUMENT_RANGE, std::string(field) + " = " + value + ", allowed " + allowed);
  error.field = field;
  error.value = value;
  error.other_value = allowed;
  return error;
}

}  // namespace

session::ErrorDetail check_config(const session::GroupConfig& config, uint32_t rank) {
  using session::GroupMode;
  const bool inference = config.mode != GroupMode::kNormal;
  const Range ranges[] = {
      {"expert_parallel_size", config.expert_parallel_size, 1, base::kMaxRanks},
      {"rank", rank, 0, config.expert_parallel_size == 0 ? 0 : config.expert_parallel_size - 1},
      {"num_experts", config.num_experts, config.expert_parallel_size, base::kMaxExperts},
      {"hidden", config.hidden, 128, base::kMaxHidden},
      {"top_k", config.top_k, 1, base::kMaxTopK},
      {"max_tokens", config.max_tokens, 1, inference ? base::kMaxLlTokens : base::kMaxTokens},
      {"mode", static_cast<uint64_t>(config.mode), 1, 3},
      {"on_rank_loss", static_cast<uint64_t>(config.on_rank_loss), 1, 2},
      {"dispatch_dtypes", config.dispatch_dtypes, 0, EXPERTD_PAYLOADS_ALL},
      {"dynamic_ll_tokens", config.dynamic_ll_tokens, 0, config.max_tokens},
      {"capture_lanes", config.capture_lanes, 0, inference ? engine::kMostCaptureLanes : 0},
      {"executor", static_cast<uint64_t>(config.executor), 0, static_cast<uint64_t>(session::Executor::kCopyEngine)},
      {"communication.virtual_lanes", config.communication.virtual_lanes, 1, base::kMaxVirtualLanes},
      {"communication.bandwidth_ratio", config.communication.bandwidth_ratio, 1, base::kMaxBandwidthRatio},
  };
  for (const Range& range : ranges) {
    if (range.value < range.minimum || range.value > range.maximum) {
      return out_of_range(range.field, std::to_string(range.value),
                          std::to_string(range.minimum) + ".." + std::to_string(range.maximum));
    }
  }
  if (config.num_experts % config.expert_parallel_size != 0) {
    return out_of_range("num_experts", std::to_string(config.num_experts),
                        "multiples of expert_parallel_size = " + std::to_string(config.expert_parallel_size));
  }
  if (config.num_experts / config.expert_parallel_size > base::kMaxLocalExperts) {
    return out_of_range("num_experts", std::to_string(config.num_experts),
                        "at most " + std::to_string(base::kMaxLocalExperts) + " experts per rank");
  }
  if (config.hidden % 128 != 0) {
    return out_of_range("hidden", std::to_string(config.hidden), "multiples of 128");
  }
  if (!inference && config.dispatch_dtypes == EXPERTD_PAYLOAD_FP8) {
    // Only ll_dispatch quantises: such a group could never dispatch anything.
    return out_of_range("dispatch_dtypes", std::to_string(config.dispatch_dtypes),
                        "sets with bf16 (" + std::to_string(EXPERTD_PAYLOAD_BF16) + ") or bytes (" +
                            std::to_string(EXPERTD_PAYLOAD_BYTES) + ") in mode normal, or 0");
  }
  if (!config.communication.use_nvlink &&
      (config.executor == session::Executor::kCopyEngine || config.capture_lanes != 0)) {
    // Both are made of copies and stores between GPUs that reach each other.
    return out_of_range("communication.use_nvlink", "false", "true with executor = copy_engine or capture_lanes");
  }
  if (config.dynamic_ll_tokens != 0 && config.mode == GroupMode::kAuto) {
    return out_of_range("mode", std::to_string(static_cast<uint64_t>(config.mode)),
                        "1 (output format HT) or 2 (output format LL) with dynamic_ll_tokens");
  }
  return {};
}

session::ErrorDetail compare_configs(const session::GroupConfig& first, const session::GroupConfig& other) {
  const struct {
    const char* field;
    uint64_t first;
    uint64_t other;
  } rows[] = {
      {"expert_parallel_size", first.expert_parallel_size, other.expert_parallel_size},
      {"num_experts", first.num_experts, other.num_experts},
      {"hidden", first.hidden, other.hidden},
      {"top_k", first.top_k, other.top_k},
      {"max_tokens", first.max_tokens, other.max_tokens},
      {"mode", static_cast<uint64_t>(first.mode), static_cast<uint64_t>(other.mode)},
      {"on_rank_loss", static_cast<uint64_t>(first.on_rank_loss), static_cast<uint64_t>(other.on_rank_loss)},
      {"op_timeout_ns", first.op_timeout_ns, other.op_timeout_ns},
      {"first_op_timeout_ns", first.first_op_timeout_ns, other.first_op_timeout_ns},
      {"dispatch_dtypes", first.dispatch_dtypes, other.dispatch_dtypes},
      {"dynamic_ll_tokens", first.dynamic_ll_tokens, other.dynamic_ll_tokens},
      {"capture_lanes", first.capture_lanes, other.capture_lanes},
      {"executor", static_cast<uint64_t>(first.executor), static_cast<uint64_t>(other.executor)},
      {"communication.use_nvlink", first.communication.use_nvlink, other.communication.use_nvlink},
      {"communication.use_rdma", first.communication.use_rdma, other.communication.use_rdma},
      {"communication.virtual_lanes", first.communication.virtual_lanes, other.communication.virtual_lanes},
      {"communication.bandwidth_ratio", first.communication.bandwidth_ratio, other.communication.bandwidth_ratio},
  };
  session::ErrorDetail error;
  for (const auto& row : rows) {
    if (row.first != row.other) {
      error.field = row.field;
      error.value = std::to_string(row.other);
      error.other_value = std::to_string(row.first);
      error.status =
          base::Status(EXPERTD_REASON_CONFIG_MISMATCH,
                       error.field + " = " + error.value + ", but the group's first rank gave " + error.other_value);
      return error;
    }
  }
  return error;
}

}  // namespace expertd::group
