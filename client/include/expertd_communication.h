/* SPDX-License-Identifier: Apache-2.0 */
/* How a group communicates: a part of expertd_group_options_t. C11; included by expertd.h. */
#ifndef EXPERTD_COMMUNICATION_H_
#define EXPERTD_COMMUNICATION_H_

#include <stdint.h>

/* Whether something is used that is used by default. */
typedef enum expertd_use { EXPERTD_USE_DEFAULT = 0, EXPERTD_USE_YES = 1, EXPERTD_USE_NO = 2 } expertd_use_t;

/* What a group uses of the links inside of a node and between nodes, the same on every rank (CONFIG_MISMATCH names the
 * member and both values). All zero: everything, in the default way. */
typedef struct expertd_communication_pattern {
  /* expertd_use_t. NO: GPUs of one node exchange through memory of the host, whatever links they have, which takes it
   * (pinned_bytes of the plan); ARGUMENT_RANGE with executor COPY_ENGINE or capture_lanes. Host devices: no difference.
   */
  uint32_t use_nvlink;
  /* expertd_use_t. NO: all ranks must be on one node; where they are on several, every join ends with UNSUPPORTED. */
  uint32_t use_rdma;
  /* Lanes between nodes: 2 (as 0): what low latency waits for goes ahead of rows that are many, by a lane of its own.
   * 1: everything by the throughput lane; takes half the buffers and gets in nobody's way on the other. */
  uint32_t virtual_lanes;
  /* 1..64 (0: 1): weight on the throughput lane between two nodes. Groups of 3 and 1 that both have rows to move get
   * three quarters and one quarter of the bytes; one that is alone gets all. */
  uint32_t bandwidth_ratio;
} expertd_communication_pattern_t;

#endif /* EXPERTD_COMMUNICATION_H_ */
