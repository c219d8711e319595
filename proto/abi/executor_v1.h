/* SPDX-License-Identifier: Apache-2.0 */
/* Which operations of a group are executed by copy engines: a rule that the daemon grants at the join, the same on all
 * ranks, and that daemon and client evaluate alike for every dispatch. A combine, and a dispatch with the routing of a
 * handle, go the way of the dispatch that left the handle, because its routing is only there. Everything that decides
 * is the same on all ranks, or their operations do not agree. Pure; compiles as C11 and C++20, any thread. */
#ifndef EXPERTD_EXECUTOR_V1_H_
#define EXPERTD_EXECUTOR_V1_H_

#include <stdint.h>

#include "ring_v1.h"

/* Kinds of operations, as a set of bits. Split: given with EXPERTD_ASYNC, so that the caller computes meanwhile. */
enum expertd_copies {
  EXPERTD_COPIES_LL_TOGETHER = 1u,
  EXPERTD_COPIES_LL_SPLIT = 2u,
  EXPERTD_COPIES_HT_TOGETHER = 4u,
  EXPERTD_COPIES_HT_SPLIT = 8u,
  EXPERTD_COPIES_LL = 3u,
  EXPERTD_COPIES_HT = 12u,
  EXPERTD_COPIES_ALL = 15u
};

/* What client and daemon of this build can execute by copy engines; a client tells it at the join, and the daemon
 * grants nothing beyond it. Of high throughput that is not every operation (expertd_exchange_ht_serves). */
#define EXPERTD_COPIES_BUILT EXPERTD_COPIES_ALL

struct expertd_executor_rule {
  uint32_t copies;          /* set of expertd_copies */
  uint32_t ht_split_tokens; /* HT_SPLIT holds for operations of at least this bound of tokens */
};

/* The bound that counts: the operation's own, or the most that its group allows. */
static inline uint32_t expertd_executor_bound(uint32_t token_bound, uint32_t max_tokens) {
  return token_bound != 0u ? token_bound : max_tokens;
}

/* 1: combine, or a dispatch with EXPERTD_SLOT_CACHED. The rule says nothing about those. */
static inline int expertd_executor_follows(uint32_t op, uint32_t slot_flags) {
  return op == EXPERTD_OP_COMBINE || op == EXPERTD_OP_LL_COMBINE ||
         (op == EXPERTD_OP_DISPATCH && (slot_flags & EXPERTD_SLOT_CACHED) != 0u);
}

/* EXPERTD_COMPLETION_EXECUTOR_SM or _COPY_ENGINE. Captured operations are kernels of the daemon in any group. */
static inline uint32_t expertd_executor_of(const struct expertd_executor_rule* rule, uint32_t op, int captured,
                                           int split, uint32_t bound) {
  uint32_t kind = 0;
  if (op == EXPERTD_OP_LL_DISPATCH || op == EXPERTD_OP_LL_COMBINE) {
    kind = split ? EXPERTD_COPIES_LL_SPLIT : EXPERTD_COPIES_LL_TOGETHER;
  } else if (op == EXPERTD_OP_DISPATCH || op == EXPERTD_OP_COMBINE) {
    kind = split ? EXPERTD_COPIES_HT_SPLIT : EXPERTD_COPIES_HT_TOGETHER;
  }
  if (captured || (rule->copies & kind) == 0u || (kind == EXPERTD_COPIES_HT_SPLIT && bound < rule->ht_split_tokens)) {
    return EXPERTD_COMPLETION_EXECUTOR_SM;
  }
  return EXPERTD_COMPLETION_EXECUTOR_COPY_ENGINE;
}

#endif /* EXPERTD_EXECUTOR_V1_H_ */
