// SPDX-License-Identifier: Apache-2.0
#include "client/src/local_kernels/exchange_expand.cuh"
#include "client/src/local_kernels/exchange_flow.cuh"
#include "client/src/local_kernels/exchange_pack.cuh"

namespace expertd::client::exchange {
namespace {

/// Pack, expand. What arrived is read by who has a unit only: when all have done theirs the operation has ended, and
/// the window may go.
class Dispatch {
 public:
  static constexpr uint32_t kSteps = 2;

  __device__ explicit Dispatch(const ExchangeParams& p) : p_(p) {}
  __device__ uint32_t units(uint32_t step) const {
    return step == 0 ? exchange_pack_units(p_) : exchange_expand_units(p_);
  }
  __device__ void do_unit(uint32_t step, uint32_t unit) {
    if (step == 0) {
      pack_unit(p_, unit);
      return;
    }
    if (!known_) {
      known_ = true;
      active_ = active_ranks(p_);
      rejected_ = rejecting_rank(p_, active_) >= 0;
    }
    if (unit == 0) {
      write_tables(p_, active_);
    } else if (!rejected_) {
      expand_rows(p_, active_, warps_of(unit - 1, exchange_expand_units(p_) - 1));
    }
  }
  __device__ void end_step(uint32_t step) const {
    if (step == 0) {
      ring_once(p_);
    } else {
      end_operation(p_);
    }
  }
  /// Clears the counts, unless somebody has begun to write them.
  __device__ void give_up(bool too_late) const {
    if ((p_.stages & kExchangeReceive) == 0) {
      return;
    }
    const bool first = threadIdx.x == 0 && (too_late ? blockIdx.x == 0 : is_first(p_, taken_of(1)));
    if (__syncthreads_or(first ? 1 : 0) != 0) {
      clear_tables(p_);
    }
  }

 private:
  const ExchangeParams& p_;
  uint64_t active_ = 0;
  bool known_ = false;
  bool rejected_ = false;
};

}  // namespace
}  // namespace expertd::client::exchange

// exchange_dispatch. Grid: at most kExchangeBlocks blocks of 1024 threads, each taking units (exchange_flow.cuh). Send:
// numbers rows and packs them into the out block, a warp per expert and per 1024 bytes of a token; the block that ends
// the last unit rings the doorbell. Receive: waits for arrived[0] of all ranks; then one unit writes counts, ranges,
// statistics and the report, the others expand rows, a warp per 1024 bytes of a (token, source); the block that ends
// the last one writes `ended` and the completion word. An operation that was over before gets its doorbell and cleared
// counts, for the window may be gone then. Bytes per token: 2H read, H + H/32 (FP8) or 2H written, the row read once
// more and written per slot. Bound: HBM writes, and for few tokens latency.
extern "C" __global__ void __launch_bounds__(expertd::client::kExchangeThreads, 1)
    expertd_exchange_dispatch(const __grid_constant__ expertd::client::ExchangeParams p) {
  using namespace expertd::client::exchange;
  run_steps<Dispatch>(p);
}
