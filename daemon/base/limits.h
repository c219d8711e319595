// SPDX-License-Identifier: Apache-2.0
// Bounds of the daemon that are not config keys, with their reasons. daemon/README.md says under "Limits" where those
// stand that one file alone knows. A queue or table without a bound is a bug.
#pragma once

#include <cstdint>

namespace expertd::base {

inline constexpr uint32_t kMaxRanks = 512;         // ranks of a group over all nodes: 64 nodes of 8 GPUs (rank_set.h)
inline constexpr uint32_t kMaxNodes = 64;          // of a group; one bit each where nodes are a set
inline constexpr uint32_t kMaxLocalRanks = 64;     // ranks of a group on one node; one bit each in a 64-bit mask
inline constexpr uint32_t kMaxDevices = 64;        // devices of one daemon; ranks of a group sit on distinct ones
inline constexpr uint32_t kMaxGpuRanks = 16;       // GPUs of one node; their peer table travels as a kernel parameter
inline constexpr uint32_t kMaxTopK = 32;           // semantics: K <= 32
inline constexpr uint32_t kMaxExperts = 2048;      // semantics: E <= 2048
inline constexpr uint32_t kMaxLocalExperts = 256;  // semantics: L <= 256, the size of a completion's count table
inline constexpr uint32_t kMaxHidden = 16384;      // semantics: H <= 16384, a multiple of 128
inline constexpr uint32_t kMaxTokens = 65536;      // tokens per rank in HT
inline constexpr uint32_t kMaxLlTokens = 4096;     // tokens per rank in LL
inline constexpr uint32_t kMaxBuffersPerSession = 1024;
inline constexpr uint32_t kMaxVirtualLanes = 2;     // lanes between nodes that a group's messages go by
inline constexpr uint32_t kMaxBandwidthRatio = 64;  // weight of a group beside others
inline constexpr uint32_t kMaxGroupsPerSession = 16;
inline constexpr uint32_t kMaxPendingFds = 64;           // descriptors passed over the attach socket and not yet used
inline constexpr uint32_t kMaxAttachConnections = 2048;  // clients beyond it wait in the socket's backlog
// Descriptors of clients that wait to be closed; while so many do, the attach listener takes nothing from clients. What
// the daemon holds already comes on top: a packet's descriptors, pending ones of sessions that end, connections.
inline constexpr uint32_t kMaxClosingFds = 256;
inline constexpr uint32_t kMaxLoopTasks = 1024;  // control requests waiting for one device loop
inline constexpr uint32_t kMaxControlMessageBytes = 64 * 1024;
inline constexpr uint32_t kMaxCallsPerConnection = 16;      // gRPC streams at a time
inline constexpr uint32_t kMaxWaitingCallsPerSession = 16;  // control calls behind the one that runs; no more are open
inline constexpr uint32_t kMaxWaitingCalls = 16 * 1024;     // of all sessions (control.max_sessions is at most 1024)
inline constexpr uint32_t kMaxOperatorConnections = 64;     // on control.sock

}  // namespace expertd::base
