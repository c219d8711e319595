// SPDX-License-Identifier: Apache-2.0
// This daemon's way to the rendezvous that one of the daemons of fabric.rendezvous hosts, this one included. Finds it,
// keeps this node present there, and repeats calls until their deadlines while it is away. Every public function only
// puts a word into a queue; one thread does the rest and calls back.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "daemon/group/candidacy.h"
#include "daemon/group/rendezvous_port.h"

namespace expertd::fabric {

struct RendezvousClientOptions {
  group::NodeIdentity identity;         // its address is compared with the entries below
  std::vector<std::string> rendezvous;  // "host:port" in the order of precedence, or one "dns:NAME:PORT"
  // Where an election says who hosts, any thread; `rendezvous` then names the etcds, for messages alone.
  std::function<group::Elected()> elected;
  std::string cluster_key;
  uint16_t own_port = 0;                 // of this daemon's PeerServer
  std::string own_listen;                // its "ADDRESS:PORT"; empty: every interface
  uint64_t presence_ns = 2'000'000'000;  // between hellos; the rendezvous takes several missed ones for a lost node
  uint64_t probe_timeout_ns = 2'000'000'000;
  uint64_t look_again_ns = 10'000'000'000;  // names are resolved anew after so long, also while all is well
  uint64_t backoff_min_ns = 50'000'000;  // between searches, doubled up to the longest, each by a random part of itself
  uint64_t backoff_max_ns = 2'000'000'000;
  uint64_t report_timeout_ns = 90'000'000'000;    // of report_formed: longer than the rendezvous gives a formation
  uint64_t gone_timeout_ns = 60'000'000'000;      // report_gone and withdraw are repeated for so long
  uint64_t await_timeout_ns = 3'600'000'000'000;  // of await_successor
  uint32_t calls_max = 4096;                      // outstanding at once; one more is refused with GROUP_LIMIT
};

/// Where the client stands, for status and logs.
struct RendezvousState {
  std::string address;     // of the host; empty: none is known
  std::string cause;       // why not, or empty
  std::string node;        // name of the host
  std::string source;      // how it is found: "list", "dns" or "etcd"
  uint64_t term = 0;       // of the host where it is elected
  std::string etcd_cause;  // why the etcd does not say who hosts; empty: it does, or there is none
};

/// "list" or "dns": what the entries of fabric.rendezvous are.
const char* source_of(const std::vector<std::string>& rendezvous);

class RendezvousClient final : public group::RendezvousPort {
 public:
  /// Called by the client's thread after each look at the list that succeeded: whether this daemon is the one that
  /// hosts. Not called where an election says so.
  using Hosting = std::function<void(bool hosting)>;

  /// CONFIG_BAD_VALUE names an entry of the list that cannot be one. Begins to search at once.
  static base::Result<std::unique_ptr<RendezvousClient>> create(const RendezvousClientOptions& options,
                                                                Hosting hosting);
  /// Ends what is outstanding with CANCELLED; waits for a name that is being resolved.
  ~RendezvousClient() override;
  RendezvousClient(const RendezvousClient&) = delete;
  RendezvousClient& operator=(const RendezvousClient&) = delete;

  void join_rank(const group::RankJoin& join, group::PlacedCallback done) override;
  void withdraw(const std::string& group, uint32_t rank, uint64_t attempt) override;
  void report_formed(const group::FormedReport& report, group::FormedCallback done) override;
  void await_successor(const group::KeptGroup& group, group::PlacedCallback done) override;
  void report_gone(uint64_t key, const std::vector<uint32_t>& ranks) override;

  /// The election names another host or the same in another term, or can be asked again after it could not: the search
  /// for the host begins at once. Any thread.
  void host_elected(uint64_t term);

  RendezvousState state() const;

 private:
  struct Parts;  // what needs gRPC's headers

  explicit RendezvousClient(std::unique_ptr<Parts> parts);

  std::unique_ptr<Parts> parts_;
};

}  // namespace expertd::fabric
