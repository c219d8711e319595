// SPDX-License-Identifier: Apache-2.0
// Which daemons may host the rendezvous: resolves the list of fabric.rendezvous, or the address of the daemon that was
// elected, on a thread of its own, because a name server may take its time and deadlines of joins must not wait for it.
// Used by RendezvousClient.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "daemon/fabric/bootstrap/address.h"
#include "daemon/group/candidacy.h"

namespace expertd::fabric {

struct Candidate {
  std::string target;  // "10.0.0.1:7000"
  std::string entry;   // as configured
};

struct Candidates {
  std::vector<Candidate> places;  // in the order in which they are asked
  bool hosts_here = false;        // the first of the list is this daemon
  std::string cause;              // of an entry that does not resolve, or of an election without a host
  uint64_t term = 0;              // of the elected one; 0: the list says who hosts
};

struct CandidateOptions {
  std::vector<HostPort> entries;
  std::vector<std::string> texts;           // of the entries, as configured
  std::string own_address;                  // an entry with this text is this daemon
  uint16_t own_port = 0;                    // and so is the address it listens on, with this port
  std::string own_listen;                   // "ADDRESS:PORT", literal; empty: every interface
  std::function<group::Elected()> elected;  // in place of the entries; null: there is no election
};

class CandidateSearch {
 public:
  /// `found` is called by the search's thread.
  CandidateSearch(CandidateOptions options, std::function<void(Candidates)> found);
  /// Waits for a search in progress, whose answer is still given.
  ~CandidateSearch();
  CandidateSearch(const CandidateSearch&) = delete;
  CandidateSearch& operator=(const CandidateSearch&) = delete;

  /// One search, and another one after it when asked again meanwhile.
  void begin();

 private:
  void run();
  Candidates search() const;
  Candidates search_elected() const;
  bool is_own(const SocketAddress& address) const;
  std::string own_target() const;

  const CandidateOptions options_;
  const std::function<void(Candidates)> found_;
  std::mutex mutex_;
  std::condition_variable changed_;  // with mutex_
  bool asked_ = false;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace expertd::fabric
