// SPDX-License-Identifier: Apache-2.0
// The operations on host devices, in plain C++. Called by the loop thread of a host device, one rank's part per call;
// parts of different ranks may run at the same time, because a rank writes only its own tables, its own outputs and the
// rows of peers' outputs that its own routing owns. The caller provides the barriers between route, move and finish.
// Never allocates, blocks or throws. Formulas: daemon/kernels/README.md.
#pragma once

#include <cstdint>

#include "daemon/kernels/op_params.h"

namespace expertd::kernels::host {

/// The local operation: tokens per rank (out.rank_prefix), per expert (out.expert_counts), per node (out.layout_range,
/// int32 as the ABI says) and the token x rank mask, each where given. Writes nothing but the report when an id is out
/// of range. active_ranks is not read.
void layout(const OpParams& params, OpReport* report);

/// Numbers this rank's rows and fills row `rank` of params.counts. Does nothing for cached dispatches and for combines.
void route(const OpParams& params);

/// What every rank decides alike before anything moves: errors in the matrix, rows that do not fit. Returns the Reason,
/// also stored in the report with what it is about; 0 when the operation runs.
uint32_t check_matrix(const OpParams& params, const PeerView* peers, OpReport* report);

/// Moves tokens [token_begin, token_end) of this rank and makes their routing final; adds to the report's bytes. Each
/// token is to be moved exactly once, after check_matrix returned 0; false (and nothing moved) when the report carries
/// a Reason already.
bool move_range(const OpParams& params, const PeerView* peers, uint32_t token_begin, uint32_t token_end,
                OpReport* report);

/// check_matrix and, when the operation runs, move_range over all tokens.
void move(const OpParams& params, const PeerView* peers, OpReport* report);

/// Tails, counts, prefixes, layout_range, statistics, the report's counts and the handle's copy of the matrix. Does
/// nothing when the report carries a Reason.
void finish(const OpParams& params, const PeerView* peers, OpReport* report);

}  // namespace expertd::kernels::host
