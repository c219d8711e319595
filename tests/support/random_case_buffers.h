// SPDX-License-Identifier: Apache-2.0
// Memory for running a random case through the kernels: exact input vectors, outputs full of poison between guards, and
// the params and peer views that name them. Owned by the test, one thread builds it; tests only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "daemon/kernels/op_params.h"
#include "tests/support/random_case.h"

namespace expertd::support {

/// Bytes that start as 0xAB, between guards of 0xAB, aligned to 64. Movable; the data stays where it is.
class PoisonedBuffer {
 public:
  PoisonedBuffer() = default;
  explicit PoisonedBuffer(size_t bytes);
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(storage_.data() + begin_);
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(storage_.data() + begin_);
  }
  size_t bytes() const { return bytes_; }
  bool guards_intact() const;
  /// True when bytes [begin, end) still hold the poison.
  bool poisoned(size_t begin, size_t end) const;
  bool untouched() const { return poisoned(0, bytes_) && guards_intact(); }

 private:
  std::vector<uint8_t> storage_;
  size_t begin_ = 0;
  size_t bytes_ = 0;
};

/// The tables of one rank's handle.
struct HandleTables {
  std::vector<int32_t> token_rank;
  std::vector<int32_t> token_expert;
  std::vector<int32_t> topk;
  std::vector<int32_t> counts;
};
std::vector<HandleTables> make_handles(const RandomCase& random_case);

/// One rank's memory of one operation. Buffers that were not asked for have no bytes and a null pointer in the params.
struct RankMemory {
  std::vector<uint8_t> topk_idx;  // at its width
  std::vector<uint8_t> side;      // at its strides
  PoisonedBuffer x;
  PoisonedBuffer out_side;
  PoisonedBuffer out_topk_idx;
  PoisonedBuffer out_topk_weights;
  PoisonedBuffer expert_counts;
  PoisonedBuffer rank_prefix;
  PoisonedBuffer src_info;
  PoisonedBuffer layout_range;
  PoisonedBuffer stats;
  PoisonedBuffer token_rank_mask;
};

struct GroupMemory {
  std::vector<RankMemory> ranks;
  std::vector<int32_t> matrix;             // shared by all ranks, as on the host
  std::vector<kernels::OpParams> params;   // [R]
  std::vector<kernels::PeerView> peers;    // [R], null for inactive ranks
  std::vector<kernels::OpReport> reports;  // [R]
};

/// Everything for a dispatch of the case, whose inputs must outlive it; shape.cached is respected.
GroupMemory make_dispatch(const RandomCase& random_case, std::vector<HandleTables>* handles);
/// The combine that follows: `rows` are each rank's x and weights, `in_rows` what the peers claim to have.
GroupMemory make_combine(const RandomCase& random_case, std::vector<HandleTables>* handles,
                         const std::vector<CombineInput>& rows, const std::vector<uint32_t>& in_rows);
/// The layout operation of rank 0's ids.
GroupMemory make_layout(const RandomCase& random_case);

/// True when no output of any rank was written outside its buffer.
bool guards_intact(const GroupMemory& memory);
/// True when nothing at all was written to a rank's outputs.
bool outputs_untouched(const RankMemory& memory);

}  // namespace expertd::support
