// SPDX-License-Identifier: Apache-2.0
// The forms of a chain of copies that link_chain measures, as lists of steps. Values; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace expertd::bench {

inline constexpr uint32_t kEighth = 8;

enum class ChainStepKind : uint32_t {
  kRows,       // eighths [first, last) of the bytes
  kSmall,      // all small copies
  kSmallOnce,  // as many bytes in one copy
  kBatch,      // rows of eighths [first, last) and all small copies, in one call
  kTell,       // word `first` of the peer
  kTellBoth,   // and of this GPU, in one submission
  kTellCopy,   // word `first` of the peer by a copy of 8 bytes
  kMark,       // local word `first`
  kAwait,      // the same
  kRecord,     // event `first`
  kAwaitEvent  // the same
};

struct ChainStep {
  uint32_t stream = 0;
  ChainStepKind kind = ChainStepKind::kRows;
  uint32_t first = 0;
  uint32_t last = 0;
};

struct ChainForm {
  std::string name;
  std::vector<ChainStep> steps;
  bool small = false;
};

/// `batches`: the driver has calls of several copies.
std::vector<ChainForm> all_chain_forms(bool batches);

}  // namespace expertd::bench
