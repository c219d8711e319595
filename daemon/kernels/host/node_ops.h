// SPDX-License-Identifier: Apache-2.0
// What host devices do for a group whose ranks sit on several nodes: the bytes of messages, and pure functions that
// pack rows and pulls for another node, spread rows that came from one, and sum what another node pulls. Loop threads;
// nothing allocates or blocks. Whatever arrives is untrusted: nothing in it leads to a read or write outside what it
// may name.
// The bytes of messages: daemon/kernels/node_message.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "daemon/kernels/host/landing.h"
#include "daemon/kernels/node_message.h"
#include "daemon/kernels/op_params.h"

namespace expertd::kernels::host {

/// Who sits where, as engine::Placement has it.
struct NodeView {
  uint32_t own_node = 0;
  std::span<const uint32_t> node_of;                // per rank
  std::span<const uint32_t> index_of;               // per rank: its place on its node
  std::span<const std::vector<uint32_t>> ranks_of;  // per node

  uint32_t nodes() const { return static_cast<uint32_t>(ranks_of.size()); }
  bool is_local(uint32_t rank) const { return node_of[rank] == own_node; }
};

/// Entries of a message that arrived. `bytes` is what follows the head.
struct Entries {
  const std::byte* data = nullptr;
  uint64_t bytes = 0;
  uint32_t count = 0;
  const std::byte* at(const EntryLayout& layout, uint32_t index) const {
    return data + uint64_t{index} * layout.stride;
  }
  /// Whether the bytes are those of so many entries, each of a token that a rank may have.
  bool well_formed(const OpShape& shape, const EntryLayout& layout) const;
};

/// An entry's tables, in a message that is being written or was checked.
template <typename T, typename Byte>
T* entry_table(Byte* entry, uint32_t at) {
  return reinterpret_cast<T*>(entry + at);
}
inline uint32_t entry_token(const std::byte* entry) {
  return static_cast<uint32_t>(*entry_table<const int32_t>(entry, 0));
}

struct TokenRange {
  uint32_t begin = 0;
  uint32_t end = 0;
};

/// Takes rows for other nodes while a rank's tokens are moved.
class RowPacker {
 public:
  virtual ~RowPacker() = default;
  /// Whether the token stopped the last call, so that its rows are numbered.
  virtual bool resumes(uint32_t token) const = 0;
  /// Packs what of the row goes to other nodes; its routing is final. False: some of it has to be offered again.
  virtual bool pack(const LandingRow& row) = 0;
};

/// move_range of a dispatch. Returns the token at which it stopped: tokens.end, or the first that `packer` did not take
/// whole. `packer` is null where all ranks are on this node.
uint32_t dispatch_range(const OpParams& params, const PeerView* peers, const TokenRange& tokens, RowPacker* packer,
                        OpReport* report);

/// Sums of other nodes for the tokens of a combine, one message per node in the order of nodes; entries in ascending
/// order of their tokens, of which each is used once.
struct NodePartials {
  struct Message {
    Entries entries;
    uint32_t next = 0;
  };
  EntryLayout layout;
  std::span<Message> messages;
};

/// move_range of a combine. The rows of peers on other nodes (in_rows 0) are not pulled; what those nodes made of them
/// is in `partials`, null where all ranks are on this node.
void combine_range(const OpParams& params, const PeerView* peers, const TokenRange& tokens, NodePartials* partials,
                   OpReport* report);
void ll_combine_range(const OpParams& params, const PeerView* peers, const TokenRange& tokens, NodePartials* partials,
                      OpReport* report);

/// Nodes other than the own one with a rank that gets a row of the token: bit per node.
uint64_t row_nodes(const OpParams& params, const NodeView& nodes, uint32_t token);
/// Writes a rows entry for `node`; returns the places there that get the row, and counts what will land. capacities[r]:
/// capacity_rows of rank r.
uint64_t pack_row(const OpParams& params, const NodeView& nodes, uint32_t node, const EntryLayout& layout,
                  const LandingRow& row, std::byte* entry);
/// How many of the token's rows for other nodes are inside the capacities of their ranks, those that land.
uint64_t landing_rows(const OpParams& params, const NodeView& nodes, std::span<const uint32_t> capacities,
                      uint32_t token);

/// Lands the rows of an own rank that entries hold. `own` are its outputs, params.shape is its own. False: an entry is
/// none that an honest source sends; those before it have landed. `landed` counts row numbers for this rank.
bool spread_rows(const OpParams& params, const NodeView& nodes, const PeerView& own, const MessageHead& head,
                 const Entries& entries, uint64_t* landed);

/// Writes a pulls entry for `node` when the token has rows there; returns how many, 0: nothing was written.
uint32_t pack_pull(const OpParams& params, const NodeView& nodes, uint32_t node, std::span<const uint32_t> capacities,
                   uint32_t token, std::byte* entry);
/// Sums the rows on this node that a pulls entry names into a sums entry. `peers`: rows of ranks elsewhere are not
/// read. False: the entry is none that an honest source sends.
bool serve_pull(const OpShape& shape, const NodeView& nodes, const PeerView* peers, const MessageHead& head,
                const std::byte* pull, std::byte* sum);

}  // namespace expertd::kernels::host
