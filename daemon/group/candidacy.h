// SPDX-License-Identifier: Apache-2.0
// Which daemon hosts the rendezvous, when a store of the cluster says so: the one that made a key there, for as long as
// its lease lasts. The revision at which the key came to be is the term: it only grows, so who knows of a later one
// refuses what comes of an earlier. Candidacy decides and is pure; the thread around it is group::Election.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "daemon/base/status.h"

namespace expertd::group {

/// A daemon that may host.
struct Host {
  uint64_t id = 0;
  std::string name;
  std::string address;  // "host:port" of its peer services
  friend bool operator==(const Host&, const Host&) = default;
};

/// The value of the key; and back, CONFIG_BAD_VALUE for what no daemon wrote.
std::string to_text(const Host& host);
base::Result<Host> host_from(const std::string& text);

/// Who hosts, as far as this daemon knows.
struct Elected {
  uint64_t term = 0;  // 0: nobody is known
  Host host;
  bool here = false;      // it is this daemon
  uint64_t until_ns = 0;  // here: hosts no longer than to then, whatever happens
  std::string cause;      // why the store does not answer, or what it holds is of no use; empty: all is well
};

/// The store: etcd, or a fake. Calls block, each no longer than its own limit. Any status but ok says that nothing is
/// known: a change that was asked for may have been made or not.
class ElectionStore {
 public:
  struct Lease {
    int64_t id = 0;
    uint64_t ttl_ns = 0;  // 0: it is no more
  };
  struct Record {
    std::string value;
    uint64_t term = 0;
    int64_t lease = 0;
  };
  struct Look {
    std::optional<Record> record;  // none: nobody hosts
    int64_t revision = 0;
  };

  virtual ~ElectionStore() = default;
  virtual base::Result<Lease> grant(uint64_t ttl_ns) = 0;
  virtual base::Result<Lease> keep_alive(int64_t lease) = 0;
  virtual base::Status revoke(int64_t lease) = 0;
  virtual base::Result<Look> look() = 0;
  /// Makes the key where it is not there; what is there afterwards.
  virtual base::Result<Look> claim(const std::string& value, int64_t lease) = 0;
  /// Returns after a change of the key behind `revision`, or after `limit_ns`.
  virtual base::Status wait_change(int64_t revision, uint64_t limit_ns) = 0;
  /// Any thread: ends the call under way and all later ones but revoke(), with CANCELLED.
  virtual void interrupt() = 0;
};

struct CandidacyOptions {
  Host self;
  std::string where;  // names key and store in causes
  uint64_t lease_ns = 5'000'000'000;
  uint64_t backoff_min_ns = 100'000'000;  // after a failure, doubled up to the longest
  uint64_t backoff_max_ns = 1'000'000'000;
};

/// One thread.
class Candidacy {
 public:
  using Clock = std::function<uint64_t()>;

  Candidacy(CandidacyOptions options, ElectionStore* store, Clock clock);

  /// Renews the lease, looks who hosts, and takes the place that is free.
  const Elected& turn();
  const Elected& elected() const { return elected_; }
  /// How long nothing is to be done unless the key changes.
  uint64_t idle_ns() const;
  /// The store answered the last turn, so that it can be waited for a change; else only time helps.
  bool reachable() const { return failures_ == 0; }
  int64_t revision() const { return revision_; }
  /// Hosts no more; gives the lease back so that another takes over at once.
  void resign();

 private:
  base::Status renew();
  base::Status find_host();
  base::Status take(ElectionStore::Look* seen);
  void adopt(const ElectionStore::Look& seen);
  void adopt_record(const ElectionStore::Record& record);
  void lose_place();
  void give_lease_back();
  uint64_t until_of(uint64_t asked_ns, uint64_t ttl_ns) const;

  const CandidacyOptions options_;
  ElectionStore* const store_;
  const Clock clock_;
  Elected elected_;
  int64_t lease_ = 0;  // 0: none
  uint64_t until_ns_ = 0;
  uint64_t renew_at_ns_ = 0;
  int64_t revision_ = 0;
  uint32_t failures_ = 0;  // in a row
  bool again_ = false;     // the place was lost just now, and the rest of the turn waits until that is told
};

}  // namespace expertd::group
