// SPDX-License-Identifier: Apache-2.0
// What daemons say to each other over the fabric, byte for byte: the headers of active messages. Layout and rules are
// in proto/abi/peer_v1.md; tests/fabric holds one against the other. Little-endian, fixed-width, naturally aligned, no
// pointers. A receiver copies a header before it looks at it, since UCX promises no alignment.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "daemon/engine/fabric_port.h"
#include "daemon/engine/view_message.h"

namespace expertd::fabric {

static_assert(std::endian::native == std::endian::little, "the headers are little-endian as they lie in memory");

inline constexpr uint32_t kWireMagic = 0x46505845;  // "EXPF"
inline constexpr uint16_t kWireVersion = 2;

/// Ids of the active messages, one per struct below.
enum WireType : uint16_t {
  kWireMessage = 1,
  kWireCredit = 2,
  kWireHeartbeat = 3,
  kWireGone = 4,
  kWireView = 5,
  kWireProbe = 6,
};
inline constexpr uint16_t kWireTypes = 6;

struct WirePrefix {
  uint32_t magic = kWireMagic;
  uint16_t version = kWireVersion;
  uint16_t type = 0;
  uint64_t source_node = 0;  // node id of the sending daemon
};

/// A message of a group; its bytes are the payload.
struct WireMessage {
  WirePrefix prefix{.type = kWireMessage};
  uint64_t group_key = 0;
  uint32_t epoch = 0;
  uint32_t kind = 0;  // engine::MessageKind
  uint64_t op = 0;
  uint64_t targets = 0;
  uint32_t source_rank = 0;
  uint32_t entries = 0;
  uint32_t sequence = 0;
  uint32_t lane = 0;        // engine::FabricLane
  uint32_t bytes = 0;       // of the payload; a rendezvous of 0 bytes carries one byte that means nothing
  uint32_t credited = 0;    // 1: sent at once on a credit, 0: by rendezvous
  uint32_t view = 0;        // epoch of the view that the operation belongs to
  uint32_t head_bytes = 0;  // of the message's head behind this header, where `bytes` are entries alone; or 0
};
/// With its head.
struct WireHeadedMessage : WireMessage {
  std::array<std::byte, engine::kMessageHeadBytes> head{};
};
static_assert(sizeof(WireHeadedMessage) == sizeof(WireMessage) + engine::kMessageHeadBytes);

/// Gives back eager credits of a lane of a group.
struct WireCredit {
  WirePrefix prefix{.type = kWireCredit};
  uint64_t group_key = 0;
  uint32_t epoch = 0;
  uint32_t lane = 0;
  uint32_t credits = 0;
  uint32_t reserved = 0;
};

enum WireSignal : uint32_t { kSignalPing = 1, kSignalPong = 2, kSignalBye = 3 };

/// On the control lane only, per pair of daemons.
struct WireHeartbeat {
  WirePrefix prefix{.type = kWireHeartbeat};
  uint64_t destination_node = 0;  // so that nobody takes a sign of life of another incarnation for his peer's
  uint32_t signal = 0;            // WireSignal
  uint32_t reserved = 0;
  uint64_t sent_ns = 0;  // of the ping's sender's clock; a pong returns it
};

/// On the control lane: a rank of the sender takes no part in operations behind `through`.
struct WireGone {
  WirePrefix prefix{.type = kWireGone};
  uint64_t group_key = 0;
  uint32_t epoch = 0;
  uint32_t rank = 0;
  uint64_t through = 0;  // all messages of it and of the operations before have been submitted
};

inline constexpr uint32_t kWireRankWords = 8;  // 512 ranks: rank r is bit r % 64 of word r / 64

/// On the control lane: nodes agree on a view of the group (engine::ViewMessage).
struct WireView {
  WirePrefix prefix{.type = kWireView};
  uint64_t group_key = 0;
  uint32_t epoch = 0;
  uint32_t kind = 0;  // engine::ViewKind
  uint64_t view = 0;  // its epoch
  uint64_t ballot = 0;
  uint64_t accepted = 0;
  uint64_t made = 0;
  uint64_t from = 0;
  uint64_t last = 0;
  uint64_t lost_nodes = 0;
  uint64_t lost[kWireRankWords] = {};  // ranks, here and below
  uint64_t excluded[kWireRankWords] = {};
  uint64_t gone[kWireRankWords] = {};
  uint64_t exclude[kWireRankWords] = {};
  uint64_t readmit[kWireRankWords] = {};
};

/// Its fields; the kind has not been looked at.
engine::ViewMessage view_message_of(const WireView& header);

enum WireProbeSignal : uint32_t { kProbeAsk = 1, kProbeAnswer = 2, kProbeEnd = 3 };

/// A measurement between two daemons, of no group.
struct WireProbe {
  WirePrefix prefix{.type = kWireProbe};
  uint64_t destination_node = 0;
  uint64_t probe = 0;
  uint32_t signal = 0;  // WireProbeSignal
  uint32_t lane = 0;    // engine::FabricLane
  uint32_t sequence = 0;
  uint32_t bytes = 0;  // of an ask's payload
};
inline constexpr uint32_t kProbeEagerBytes = 1024;  // larger asks are rendezvous
inline constexpr uint32_t kProbeWindow = 8;         // asks without an answer

static_assert(sizeof(WirePrefix) == 16 && offsetof(WirePrefix, source_node) == 8);
static_assert(sizeof(WireMessage) == 80, "a change of size or meaning is a new kWireVersion");
static_assert(offsetof(WireMessage, group_key) == 16 && offsetof(WireMessage, epoch) == 24);
static_assert(offsetof(WireMessage, kind) == 28 && offsetof(WireMessage, op) == 32);
static_assert(offsetof(WireMessage, targets) == 40 && offsetof(WireMessage, source_rank) == 48);
static_assert(offsetof(WireMessage, entries) == 52 && offsetof(WireMessage, sequence) == 56);
static_assert(offsetof(WireMessage, lane) == 60 && offsetof(WireMessage, bytes) == 64);
static_assert(offsetof(WireMessage, credited) == 68 && offsetof(WireMessage, view) == 72);
static_assert(sizeof(WireCredit) == 40, "a change of size or meaning is a new kWireVersion");
static_assert(offsetof(WireCredit, group_key) == 16 && offsetof(WireCredit, epoch) == 24);
static_assert(offsetof(WireCredit, lane) == 28 && offsetof(WireCredit, credits) == 32);
static_assert(sizeof(WireHeartbeat) == 40, "a change of size or meaning is a new kWireVersion");
static_assert(offsetof(WireHeartbeat, destination_node) == 16 && offsetof(WireHeartbeat, signal) == 24);
static_assert(offsetof(WireHeartbeat, sent_ns) == 32);
static_assert(sizeof(WireGone) == 40, "a change of size or meaning is a new kWireVersion");
static_assert(offsetof(WireGone, group_key) == 16 && offsetof(WireGone, epoch) == 24);
static_assert(offsetof(WireGone, rank) == 28 && offsetof(WireGone, through) == 32);
static_assert(sizeof(WireView) == 408, "a change of size or meaning is a new kWireVersion");
static_assert(offsetof(WireView, group_key) == 16 && offsetof(WireView, epoch) == 24);
static_assert(offsetof(WireView, kind) == 28 && offsetof(WireView, view) == 32);
static_assert(offsetof(WireView, made) == 56 && offsetof(WireView, last) == 72);
static_assert(offsetof(WireView, lost) == 88 && offsetof(WireView, readmit) == 344);

static_assert(sizeof(WireProbe) == 48, "a change of size or meaning is a new kWireVersion");
static_assert(offsetof(WireProbe, destination_node) == 16 && offsetof(WireProbe, probe) == 24);
static_assert(offsetof(WireProbe, signal) == 32 && offsetof(WireProbe, lane) == 36);
static_assert(offsetof(WireProbe, sequence) == 40 && offsetof(WireProbe, bytes) == 44);

}  // namespace expertd::fabric
