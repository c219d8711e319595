/* SPDX-License-Identifier: Apache-2.0 */
/* Who takes part in a group's operations: a part of expertd.h, which includes it. */
#ifndef EXPERTD_MASKS_H_
#define EXPERTD_MASKS_H_

#include "expertd.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Of ranks 0..63, bit per rank: lost and excluded ones, and the epoch; any may be NULL. Excludes ranks and takes them
 * back, with EXPERTD_RANK_LOSS_MASK alone; 0 = query only. ARGUMENT_RANGE names ranks that the group does not have. */
EXPERTD_API expertd_status_t expertd_group_mask(expertd_group_t* group, uint64_t exclude, uint64_t readmit,
                                                uint64_t* lost, uint64_t* excluded, uint64_t* epoch);

#define EXPERTD_MASK_WORDS 8

/* Sets of ranks of groups of any size: rank r is bit r % 64 of word r / 64. Set struct_size. */
typedef struct expertd_rank_masks {
  size_t struct_size;
  uint64_t exclude[EXPERTD_MASK_WORDS]; /* given, as are readmit: all 0 = query only */
  uint64_t readmit[EXPERTD_MASK_WORDS];
  uint64_t lost[EXPERTD_MASK_WORDS]; /* told, as are the rest */
  uint64_t excluded[EXPERTD_MASK_WORDS];
  uint64_t epoch;
} expertd_rank_masks_t;

/* The same for all ranks. */
EXPERTD_API expertd_status_t expertd_group_masks(expertd_group_t* group, expertd_rank_masks_t* masks);

#ifdef __cplusplus
}
#endif

#endif /* EXPERTD_MASKS_H_ */
