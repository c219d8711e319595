// SPDX-License-Identifier: Apache-2.0
// The launchers of the CUDA kernels: each enqueues one kernel of one part on a stream and returns. Called by
// device/cuda on the loop thread with the device's context current; none waits, allocates or synchronises. Kernels wait
// for other ranks only for a bounded time (exchange_steps.cuh).
// The order of a part is in device/cuda/chain.cc. Errors are CUDA runtime error numbers, 0 for success.
#pragma once

#include <cuda_runtime_api.h>

#include "daemon/kernels/cuda/arm_params.h"
#include "daemon/kernels/cuda/part_params.h"

namespace expertd::kernels::cuda {

enum class SignalStep : uint32_t { kRouted = 0, kMoved = 1 };
/// Where a kernel that needs an exchange stands in the chain: it waits for the flags itself, or it runs behind the
/// stream's wait for them and does what the first one left.
enum class Entry : uint32_t { kWaits = 0, kBehindWait = 1 };

/// The same of a kernel that needs both exchanges.
enum class LowLatencyEntry : uint32_t { kWaits = 0, kBehindRouted = 1, kBehindMoved = 2 };

/// First kernels of an uncached dispatch: rows per chunk and column; the prefix over chunks and the count row to every
/// active rank; after the signal, the numbers of this rank's rows.
cudaError_t launch_route_count(const PartParams& params, cudaStream_t stream);
cudaError_t launch_route_scan(const PartParams& params, cudaStream_t stream);
cudaError_t launch_route_number(const PartParams& params, cudaStream_t stream);
/// Behind a stream's wait for the doorbell of a capture lane: takes it back to 0 and writes `arm` << 32 | what it held
/// into `taken`, in pinned memory; kTakenCancel for the cancel value, 0 for what is no entry. Null: a null operation.
inline constexpr uint64_t kTakenCancel = 0xffffffffu;
cudaError_t launch_take_doorbell(uint64_t* doorbell, uint64_t* taken, uint64_t arm, cudaStream_t stream);
/// Waits until the doorbell is at least `value`, as a stream's wait does. The kernel behind it has to be one whose
/// launcher takes `after_doorbell`. Null: a null operation. Only under MPS: alone it would hold the GPU's time slice.
cudaError_t launch_await_doorbell(const uint64_t* word, uint64_t value, cudaStream_t stream);
/// The same for the flags of the ranks; the kernel behind it is one whose launcher takes `after_flags`.
cudaError_t launch_await_flags(const FlagWait& params, cudaStream_t stream);
/// Tells every active rank that this rank's step of the operation is done.
cudaError_t launch_signal(const PartParams& params, SignalStep step, cudaStream_t stream);
/// The whole of a barrier, but for what it leaves to finish.
cudaError_t launch_meet(const PartParams& params, cudaStream_t stream);
/// The link kernels, for GPUs that all reach each other and have bulk copies (sm_90): each is a whole operation.
cudaError_t launch_link_dispatch(const PartParams& params, Entry entry, cudaStream_t stream);
cudaError_t launch_link_combine(const PartParams& params, Entry entry, cudaStream_t stream);
/// Whether they serve this operation. The same on all ranks of a group.
bool serves_link(const PartParams& params);
/// The low latency kernels, for GPUs that all reach each other: each is the whole of its operation and stands in the
/// chain once per entry. Behind the last one's stream wait it writes `done`.
cudaError_t launch_link_ll_dispatch(const PartParams& params, Entry entry, cudaStream_t stream);
cudaError_t launch_link_ll_combine(const PartParams& params, LowLatencyEntry entry, cudaStream_t stream);
/// An arm of a capture lane: any captured low latency operation. Behind the doorbell's wait as kWaits, whose place in
/// the chain is the only one when the ranks are together; the other two on a stream that waits for the exchanges.
cudaError_t launch_link_ll_captured(const ArmParams& params, LowLatencyEntry place, cudaStream_t stream);
/// Waits for the doorbell of the arm and takes it; link_ll_captured with `after_wait` is behind it. Only under MPS.
cudaError_t launch_await_arm(const ArmParams& params, cudaStream_t stream);
/// One compare-and-swap; a null word is a null operation.
cudaError_t launch_swap_word(const SwapParams& params, cudaStream_t stream);
/// Bases, sizes and the decision whether anything moves, from the whole count matrix.
cudaError_t launch_plan(const PartParams& params, cudaStream_t stream);
cudaError_t launch_dispatch_move(const PartParams& params, cudaStream_t stream);
cudaError_t launch_combine_pull(const PartParams& params, cudaStream_t stream);
/// The way through the relay, for ranks whose GPUs do not reach each other: where the experts' rows lie packed
/// (combine); what this rank publishes, before its routed flag; the rows that others published for this rank
/// (dispatch).
cudaError_t launch_relay_plan(const PartParams& params, cudaStream_t stream);
cudaError_t launch_relay_publish(const PartParams& params, cudaStream_t stream);
cudaError_t launch_relay_move(const PartParams& params, cudaStream_t stream);
/// The two kernels of layout.
cudaError_t launch_layout_clear(const PartParams& params, cudaStream_t stream);
cudaError_t launch_layout_count(const PartParams& params, cudaStream_t stream);
/// Last kernel of every other part: tails, counts, the report, result and completion word, `done`.
cudaError_t launch_finish(const PartParams& params, cudaStream_t stream);

/// Blocks of the kernels that do the work of a part, as their launchers take them. Pure.
uint32_t link_dispatch_blocks(const PartParams& params);
uint32_t link_combine_blocks(const PartParams& params);
uint32_t link_ll_dispatch_blocks(const PartParams& params);
uint32_t link_ll_combine_blocks(const PartParams& params);
uint32_t dispatch_move_blocks(const PartParams& params);
uint32_t combine_pull_blocks(const PartParams& params);
uint32_t relay_publish_blocks(const PartParams& params);
uint32_t relay_move_blocks(const PartParams& params);
uint32_t layout_count_blocks(const PartParams& params);
uint32_t finish_blocks(const PartParams& params);

/// Launches every kernel once as a null operation, so that nothing is loaded later, and lets the kernels with bulk
/// copies have the shared memory they want in the current context.
cudaError_t launch_all_null(bool bulk_copies, cudaStream_t stream);

}  // namespace expertd::kernels::cuda
