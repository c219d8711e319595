// SPDX-License-Identifier: Apache-2.0
#include "daemon/session/executor_choice.h"

#include <algorithm>

#include "proto/abi/exchange_ht_v1.h"
#include "proto/abi/exchange_v1.h"
#include "proto/abi/expertd_reason.h"

namespace expertd::session {
namespace {

/// What a rank lacks to be executed by copy engines; null: nothing.
const char* lack_of(const ExecutorFacts& rank) {
  if (!rank.is_cuda) {
    return "is on a host device, which has no copy engines";
  }
  if (!rank.reaches_all) {
    return "is on a GPU that does not reach those of all other ranks";
  }
  if (!rank.has_kernels) {
    return "has a client library without kernels for its GPU";
  }
  return nullptr;
}

ErrorDetail unsupported(int32_t rank, const std::string& sentence) {
  ErrorDetail error;
  error.status = base::Status(EXPERTD_REASON_UNSUPPORTED, sentence);
  error.rank = rank;
  error.field = "executor";
  error.value = "copy_engine";
  return error;
}

/// Of the kinds of operations in a rank's exchange window; 0: the group has more of something than windows have.
struct WindowBytes {
  uint64_t low_latency = 0;
  uint64_t high_throughput = 0;
};

WindowBytes windows_of(const GroupConfig& config) {
  const expertd_exchange_shape shape{config.expert_parallel_size, config.num_experts, config.hidden, config.max_tokens,
                                     config.top_k};
  const expertd_exchange_ht_shape ht_shape{config.expert_parallel_size, config.num_experts, config.hidden,
                                           config.max_tokens, config.top_k};
  return {expertd_exchange_layout_of(&shape).total_bytes, expertd_exchange_ht_layout_of(&ht_shape).total_bytes};
}

/// What the ranks' clients and the group have in common with what is built.
uint32_t grantable(const GroupConfig& config, const std::vector<ExecutorFacts>& ranks, uint32_t built) {
  const WindowBytes windows = windows_of(config);
  uint32_t copies = built;
  if (config.mode == GroupMode::kNormal || windows.low_latency == 0) {
    copies &= EXPERTD_COPIES_HT;
  }
  if (config.mode == GroupMode::kInference || windows.high_throughput == 0) {
    copies &= EXPERTD_COPIES_LL;
  }
  for (const ExecutorFacts& rank : ranks) {
    copies &= rank.copies != 0 ? rank.copies : static_cast<uint32_t>(EXPERTD_COPIES_LL);
  }
  return copies;
}

/// Of split operations, those whose parts of the exchange window fit into what is taken for what may not come.
uint32_t split_copies(const GroupConfig& config, uint32_t copies) {
  const WindowBytes windows = windows_of(config);
  uint64_t left_bytes = kSplitWindowBytesMax;
  uint32_t granted = 0;
  if ((copies & EXPERTD_COPIES_LL_SPLIT) != 0 && windows.low_latency <= left_bytes) {
    granted |= EXPERTD_COPIES_LL_SPLIT;
    left_bytes -= windows.low_latency;
  }
  if ((copies & EXPERTD_COPIES_HT_SPLIT) != 0 && windows.high_throughput <= left_bytes) {
    granted |= EXPERTD_COPIES_HT_SPLIT;
  }
  return granted;
}

/// Where every rank can and nothing was asked for.
expertd_executor_rule automatic(const GroupConfig& config, const std::vector<ExecutorFacts>& ranks, uint32_t copies) {
  if (std::none_of(ranks.begin(), ranks.end(), [](const ExecutorFacts& rank) { return rank.mps; })) {
    return {copies, 0};
  }
  const bool has_old =
      std::any_of(ranks.begin(), ranks.end(), [](const ExecutorFacts& rank) { return rank.copies == 0; });
  if (has_old) {
    return {};
  }
  const uint64_t token_bytes = 2ULL * std::max(config.hidden, 1U);
  const uint32_t tokens = static_cast<uint32_t>((kHtSplitBytesMin + token_bytes - 1) / token_bytes);
  // Where none is large enough for the second, it takes no memory and leaves low latency its four buffers.
  const uint32_t large = tokens <= config.max_tokens ? static_cast<uint32_t>(EXPERTD_COPIES_HT_SPLIT) : 0u;
  return {split_copies(config, copies & (EXPERTD_COPIES_LL_SPLIT | large)), tokens};
}

Executor low_latency_executor(const expertd_executor_rule& rule) {
  const uint32_t copies = rule.copies & EXPERTD_COPIES_LL;
  return copies == 0 ? Executor::kSm : copies == EXPERTD_COPIES_LL ? Executor::kCopyEngine : Executor::kAuto;
}

std::string kind_text(const char* kind, bool together, bool split) {
  const auto name = [](bool copies) { return std::string(copies ? "copy_engine" : "sm"); };
  return kind + (" " + name(together)) + (split == together ? "" : ", split " + name(split));
}

}  // namespace

ExecutorChoice choose_executor(const GroupConfig& config, const std::vector<ExecutorFacts>& ranks, uint32_t built) {
  ExecutorChoice choice;
  const uint32_t copies = grantable(config, ranks, built);
  if (config.executor == Executor::kAuto) {
    const bool fits = std::all_of(ranks.begin(), ranks.end(), [](const ExecutorFacts& rank) {
      return lack_of(rank) == nullptr && rank.link_kernels;
    });
    choice.rule = fits ? automatic(config, ranks, copies) : expertd_executor_rule{};
  } else if (config.executor == Executor::kCopyEngine) {
    choice.rule = {copies, 0};
    if (copies == 0) {
      choice.error = unsupported(-1, "executor = copy_engine: the group has no operations for it");
    }
    for (size_t r = 0; r < ranks.size() && choice.error.status.is_ok(); ++r) {
      if (const char* lack = lack_of(ranks[r]); lack != nullptr) {
        choice.error =
            unsupported(static_cast<int32_t>(r), "executor = copy_engine: rank " + std::to_string(r) + " " + lack);
      }
    }
  }
  choice.executor = low_latency_executor(choice.rule);
  return choice;
}

std::string rule_text(GroupMode mode, const expertd_executor_rule& rule) {
  const auto has = [&](uint32_t copies) { return (rule.copies & copies) != 0; };
  std::string text;
  if (mode != GroupMode::kNormal) {
    text = kind_text("ll", has(EXPERTD_COPIES_LL_TOGETHER), has(EXPERTD_COPIES_LL_SPLIT));
  }
  if (mode != GroupMode::kInference) {
    text += (text.empty() ? "" : "; ") + kind_text("ht", has(EXPERTD_COPIES_HT_TOGETHER), has(EXPERTD_COPIES_HT_SPLIT));
    if (has(EXPERTD_COPIES_HT_SPLIT) && rule.ht_split_tokens > 1) {
      text += " from " + std::to_string(rule.ht_split_tokens) + " tokens";
    }
  }
  return text;
}

}  // namespace expertd::session
