// SPDX-License-Identifier: Apache-2.0
// Operations by copy engines, on the caller's side: which kernels of the library with which parameters, and the words
// between them and the daemon's copies (Session::issue_exchange, issue_ht). Callers' threads, no state.
#pragma once

#include "client/src/op_request.h"

namespace expertd::client {

/// Whether an operation goes by copy engines: a dispatch by the group's rule, which says the same on all ranks; what
/// uses the routing of a handle the way of the dispatch that left it. The daemon comes to the same answer.
bool takes_copies(const Group& group, const OpRequest& request);

/// Prepares `params` and the descriptor of an operation that copy engines execute; `place` is that of the handle's
/// tables. Nothing for other operations. What the kernels cannot be given is left to the daemon, which refuses it
/// by name and before anything moves: the descriptor then does not ask for copy engines.
Status use_exchange(const Group& group, uint32_t place, OpRequest* request, ExchangeParams* params);

/// The same for high throughput. Forms that copy engines do not serve (expertd_exchange_ht_serves) are operations of
/// the daemon's kernels, on all ranks alike.
void use_ht(Group* group, OpRequest* request, HtRequest* ht);

}  // namespace expertd::client
