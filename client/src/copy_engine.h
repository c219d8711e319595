// SPDX-License-Identifier: Apache-2.0
// Operations by copy engines, on the caller's side: which kernels of the library with which parameters, and the words
// between them and the daemon's copies (Session::issue_exchange, issue_ht). Callers' threads, no state.
#pragma once

#include "client/src/op_request.h"

namespace expertd::client {

/// Prepares `params` and the descriptor of an operation of a group that copy engines execute; `place` is that of the
/// handle's tables. Nothing for other groups. What the kernels cannot be given is left to the daemon, which refuses it
/// by name and before anything moves: the descriptor then does not ask for copy engines.
Status use_exchange(const Group& group, uint32_t place, OpRequest* request, ExchangeParams* params);

/// The same for high throughput. Operations that copy engines do not serve (expanded rows, rows that are too long) are
/// those of the daemon's kernels, on all ranks alike.
void use_ht(Group* group, OpRequest* request, HtRequest* ht);

}  // namespace expertd::client
