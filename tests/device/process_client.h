// SPDX-License-Identifier: Apache-2.0
// The client side of the process tests: a mode of their own program that reads a command a line and answers each with
// one line, as a FaultClient expects. One session, one group; one thread.
#pragma once

namespace expertd::device_test {

/// The argument that chooses this mode.
inline constexpr const char* kClientMode = "--client";

/// Commands, each with its answer ("ok ..." or "failed REASON rank=N ms=T ran=B: message"); memory kinds are those of
/// Rounds::place.
///   gpus                       count=N mps=B uuid0=...       free                      free0=BYTES total0=BYTES ...
///   cuda ORDINAL               a context and a stream        attach SOCKET DEVICE NAME
///   memory KIND                tensors for rounds            release                   gives them back
///   join NAME RANK RANKS normal|ll|sm|copy|captured|mixed-sm|mixed-copy [MS]           leave detach (the modes are
///   those of Rounds)                          exchange SEED N RANK      N random low latency cases by copy engines in
///   groups of their own of two ranks, against the reference rounds N [DEPTH]           batches=N p50_us= p99_us=
///   max_us=                           state reattach MS loop [DEPTH]               batches until one fails or a line
///   comes; answers "ok looping" after the first, then the
///                              end
///   count FILE                 counts operations in a shared file (OpCounts)
///   capture                    graphs (Graphs)               replay SEED N [IDLE_US]    replays=N, each checked
///   masked N [BEFORE]          a round of a group with a mask-... mode, "ok looping", then N rounds, on through
///                              failures, or so many from the first mask on that is not BEFORE (Rounds::masked):
///                              failed= reason= gap=MS masks=FIRST-LAST:MASK,...
///   mask EXCLUDE READMIT       bits of ranks; lost= excluded= epoch=
///   replay-time                pair_us=                      replay-alone               without the other ranks
///   layout N                   N random layouts against the reference; local= by the library's kernels, many_us=
///                              alone_us=
///   hooks SEED N               N double batches in halves (client_hooks.h)
///   become UID                 the process is that user's from now on; before anything that needs a GPU
///   barrier [MS]               sync                          barriers until one succeeds
///   submit [MS]                a barrier that the stream waits for, not this thread
///   wait [MS]                  for that one                  query                         done=B
///   hold                       the stream waits              open                          until now
///   block                      "ok blocking", then waits for the stream: "ok at=NS error=NAME"
///   illegal                    a kernel stores to an address that nobody has: error=NAME
int run_process_client();

}  // namespace expertd::device_test
