// SPDX-License-Identifier: Apache-2.0
// CUDA graphs of a client process: pairs of ll_dispatch and ll_combine of several token counts, captured once, and one
// graph with two pairs whose halves overlap; replayed in random order with new inputs each time, eager pairs between
// them, every output checked. The seed is the same on all ranks, so they replay the same. Of the client program, one
// thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/device/client_rounds.h"

namespace expertd::device_test {

class Graphs {
 public:
  explicit Graphs(Rounds* rounds) : rounds_(rounds) {}

  /// Captures, on the stream of the rounds' group, which has two capture lanes. What failed, empty for nothing.
  std::string capture();
  /// `count` replays. `idle_us`: the host does nothing for that long after each launch, before it waits.
  std::string replay(uint64_t seed, uint64_t count, uint64_t idle_us);
  /// Microseconds per replay of the pair of all tokens, of a hundred launched back to back.
  std::string time(double* pair_us);
  /// Replays one graph whose other ranks do not come; what its result says.
  std::string replay_alone();

 private:
  struct Captured {
    uint32_t tokens = 0;
    bool doubled = false;
    void* executable = nullptr;  // cudaGraphExec_t
  };

  std::string capture_one(uint32_t tokens, bool doubled);
  std::string issue(uint32_t tokens);
  std::string issue_doubled(uint32_t tokens);

  Rounds* const rounds_;
  std::vector<Captured> graphs_;
};

}  // namespace expertd::device_test
