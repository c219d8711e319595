// SPDX-License-Identifier: Apache-2.0
// When the phases of a link kernel came, block by block: for measuring only. Kernels write stamps when the build has
// EXPERTD_KERNEL_TIMELINE; else they have no code for it and there is nothing to read. Host side, called by the thread
// that has the device current; owns nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "daemon/kernels/cuda/part_params.h"

namespace expertd::kernels::cuda {

/// What a block had come to; not every kernel has every phase. Where several warps end one, the last of them counts.
enum class Stamp : uint32_t {
  kStarted,       // the first instruction
  kIdsCounted,    // HT dispatch: the block knows the ranks of its tokens. LL dispatch: the first ids are there
  kClusterMet,    // HT dispatch: and those of the other blocks of the cluster
  kHandedOver,    // `routed` announced by the warp that does it
  kRouted,        // rows are numbered
  kPrefetching,   // HT dispatch: the first rows are on their way into shared memory
  kPassedRouted,  // the first exchange is over
  kFirstRow,      // HT: the first warp's first row has been sent, or summed
  kLastIssued,    // HT: no further copy is to be started
  kRowsDone,      // HT: rows stored. LL dispatch: rows sent. LL combine: sums for the others sent
  kBooksKept,     // HT dispatch: the clerk is through
  kFenced,        // behind the fence of what the block wrote
  kCountedIn,     // the block has counted itself
  kAnnounced,     // `moved` announced, by one thread of all
  kOwnSums,       // LL combine: the sums of the own tokens
  kPassedMoved,   // the second exchange is over
  kFinished,      // LL: what comes behind it is written
  kReleased,      // the caller's words are written, by one thread of all
  kCount,
};

/// %globaltimer of every block and phase, 0 where the block did not come to it.
struct Timeline {
  uint64_t ns[kMostLinkSms][static_cast<uint32_t>(Stamp::kCount)];
};

/// Of the last runs of these kernels on the current device; taking sets it back to 0. For when no kernel runs.
cudaError_t take_link_dispatch_timeline(Timeline* timeline);
cudaError_t take_link_combine_timeline(Timeline* timeline);
cudaError_t take_link_ll_dispatch_timeline(Timeline* timeline);
cudaError_t take_link_ll_combine_timeline(Timeline* timeline);

}  // namespace expertd::kernels::cuda
