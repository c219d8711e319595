// SPDX-License-Identifier: Apache-2.0
// Cases of a whole group, run through the client library and a real daemon and compared with the reference: wished-for
// shapes beside the random ones of tests/support/random_case.h. The ranks of a run are threads; tests only.
#pragma once

#include <cstdint>
#include <string>

#include "tests/support/random_case.h"
#include "tests/support/rank_threads.h"

namespace expertd::support {

/// What a test wants of a case; everything else follows from the seed.
struct Wish {
  uint64_t seed = 1;
  uint32_t ranks = 2;
  uint32_t local_experts = 2;
  uint32_t top_k = 2;
  uint32_t hidden = 128;
  uint32_t tokens = 16;
  uint32_t max_tokens = 0;   // of the group; 0: tokens
  uint32_t token_bound = 0;  // given with every operation
  kernels::Payload payload = kernels::Payload::kBf16;
  kernels::ScaleForm scale = kernels::ScaleForm::kFloat32;
  bool expanded = false;
  bool worst_tokens = false;
  bool keep_foreign_weights = false;
  bool narrow_ids = false;
  bool weights = true;
  bool mask = false;
  bool biases = false;
  bool last_lane = false;
  uint32_t alignment = 1;
  uint32_t side_layout = 0;
  int32_t empty_rank = -1;  // this rank has no tokens; -2: none has
};
RandomCase make_case(kernels::OpKind kind, const Wish& wish);

/// Where the tensors of a run lie.
enum class Place {
  kRegistered,  // in memory of expertd_alloc: no copies
  kStaged,      // on the heap: the client library copies
  kWindow,      // low latency outputs and the combine's input in the group's window
};

/// Sets group options to the case's shape.
void configure(const RandomCase& random_case, expertd_group_options_t* options);

/// dispatch, combine, cached dispatch, combine; empty when everything equals the reference, else what does not.
std::string run_high_throughput(RankGroup* group, const RandomCase& random_case, Place place);
/// ll_dispatch and ll_combine, `rounds` times so that both sets of the window are used.
std::string run_low_latency(RankGroup* group, const RandomCase& random_case, Place place, uint32_t rounds = 1);

/// A new group for the case, its run by kind, and its end.
std::string run_case(const std::vector<Seat>& seats, const RandomCase& random_case, Place place);
inline std::string run_case(const std::string& socket, const RandomCase& random_case, Place place) {
  return run_case(seats_on(socket, random_case.shape.ranks), random_case, place);
}

}  // namespace expertd::support
