/* SPDX-License-Identifier: Apache-2.0 */
/* Messages on the attach socket (AF_UNIX, SOCK_SEQPACKET): one struct per packet, descriptors by SCM_RIGHTS.
 * Client -> daemon: HELLO once, then PUT_FD / GET_FD at any time. Daemon -> client: WELCOME or REFUSED once, then one
 * FD_REPLY per request, in order. End of file on this socket is the end of the session, in both directions. */
#ifndef EXPERTD_ATTACH_V1_H_
#define EXPERTD_ATTACH_V1_H_

#include <stdint.h>

#include "proto/abi/ring_v1.h"

#define EXPERTD_ATTACH_MAGIC 0x3148434154544158ULL /* "XATTACH1" */
#define EXPERTD_ATTACH_NAME_BYTES 64u
#define EXPERTD_ATTACH_MESSAGE_BYTES 512u

enum expertd_attach_type {
  EXPERTD_ATTACH_HELLO = 1,
  EXPERTD_ATTACH_WELCOME = 2, /* fds: gRPC connection, ring memfd, wake eventfd [, flag page of a GPU session] */
  EXPERTD_ATTACH_REFUSED = 3,
  EXPERTD_ATTACH_PUT_FD = 4, /* one fd: memory to register; the reply carries its token */
  EXPERTD_ATTACH_GET_FD = 5, /* token of a window; the reply carries one fd */
  EXPERTD_ATTACH_FD_REPLY = 6
};

enum expertd_device_kind { EXPERTD_DEVICE_HOST = 1, EXPERTD_DEVICE_CUDA = 2 };

struct expertd_attach_hello {
  uint64_t magic;
  uint32_t type;
  uint16_t abi_major;
  uint16_t abi_minor;
  int32_t local_pid; /* getpid() in the sender's namespace: equal pids cannot exchange legacy IPC handles */
  uint32_t feature_bits;
  char device[EXPERTD_ATTACH_NAME_BYTES]; /* "host:N", or the GPU's UUID "GPU-xxxxxxxx-..." */
  char name[EXPERTD_ATTACH_NAME_BYTES];   /* for people: shown by expertctl sessions */
  uint8_t reserved[104];
};

struct expertd_attach_welcome {
  uint64_t magic;
  uint32_t type; /* WELCOME or REFUSED */
  uint16_t abi_major;
  uint16_t abi_minor;
  uint32_t reason; /* expertd_reason, REFUSED only */
  int32_t local_pid;
  uint32_t device_kind;
  uint32_t device_index; /* the daemon's own numbering */
  uint32_t fd_count;
  uint32_t mps_active; /* 1: signal and wait by small kernels, not by stream memory operations */
  uint64_t session_id;
  uint64_t generation;
  uint64_t ring_bytes;
  uint64_t flag_page_bytes;
  uint32_t handles_per_session;
  uint32_t reserved0;
  uint64_t op_timeout_ns;
  uint8_t reserved[40];
  char message[EXPERTD_ATTACH_MESSAGE_BYTES];
};

struct expertd_attach_fd {
  uint64_t magic;
  uint32_t type;   /* PUT_FD, GET_FD or FD_REPLY */
  uint32_t reason; /* FD_REPLY only */
  uint64_t token;
  uint64_t bytes; /* FD_REPLY to GET_FD: size of the mapping */
};

EXPERTD_ABI_ASSERT(sizeof(struct expertd_attach_hello) == 256, "hello: bump the major version");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_attach_welcome) == 640, "welcome: bump the major version");
EXPERTD_ABI_ASSERT(sizeof(struct expertd_attach_fd) == 32, "fd: bump the major version");

#endif /* EXPERTD_ATTACH_V1_H_ */
