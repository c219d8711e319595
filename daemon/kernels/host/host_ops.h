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
/// The same in two passes over ranges of tokens, each pass in order from token 0: all ids are checked (false: the
/// report names the first bad one and the second pass is left out), then counted.
bool layout_check(const OpParams& params, uint32_t token_begin, uint32_t token_end, OpReport* report);
void layout_count(const OpParams& params, uint32_t token_begin, uint32_t token_end);

/// Numbers this rank's rows and fills row `rank` of params.counts. Does nothing for cached dispatches and for combines.
void route(const OpParams& params);
/// The same over ranges of tokens, in order from token 0; once even without tokens.
void route_range(const OpParams& params, uint32_t token_begin, uint32_t token_end);

/// Instead of route, where nothing is routed: puts a Reason (0 = none) and what it is about into row `rank` of
/// params.counts, for check_announced() of all ranks.
void announce(const OpParams& params, uint32_t reason, int64_t value);
/// Before check_matrix where the ranks announced instead of routing: the first Reason, as all ranks decide alike.
uint32_t check_announced(const OpParams& params, OpReport* report);

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
/// Rows [begin, end) of this rank's outputs.
struct RowRange {
  uint64_t begin = 0;
  uint64_t end = 0;
};
/// finish in parts: all but the rows without a token, then those, in any ranges that make up rows_to_clear().
void finish_counts(const OpParams& params, OpReport* report);
RowRange rows_to_clear(const OpParams& params, const OpReport& report);
void finish_rows(const OpParams& params, const OpReport& report, const RowRange& window);

}  // namespace expertd::kernels::host
