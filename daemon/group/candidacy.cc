// SPDX-License-Identifier: Apache-2.0
#include "daemon/group/candidacy.h"

#include <algorithm>
#include <charconv>
#include <string_view>
#include <utility>

#include "daemon/group/rendezvous_port.h"

namespace expertd::group {

namespace {

constexpr std::string_view kFormat = "expertd-host-1";
constexpr uint32_t kRenewals = 3;  // in the time of a lease
constexpr uint64_t kMargin = 10;   // the lease's part by which a host stops before the store does
constexpr uint32_t kDoublingsMax = 16;

bool printable(std::string_view text, bool spaces) {
  return std::ranges::all_of(text, [spaces](char c) { return c >= (spaces ? ' ' : '!') && c <= '~'; });
}

}  // namespace

// The name comes last because it may have spaces.
std::string to_text(const Host& host) {
  return std::string(kFormat) + " " + std::to_string(host.id) + " " + host.address + " " + host.name;
}

base::Result<Host> host_from(const std::string& text) {
  const base::Status bad(EXPERTD_REASON_CONFIG_BAD_VALUE, "does not hold what a daemon writes there");
  const std::string_view all(text);
  const size_t id_at = kFormat.size() + 1;
  const size_t address_at = all.find(' ', id_at) + 1;
  const size_t name_at = address_at == 0 ? 0 : all.find(' ', address_at) + 1;
  if (!all.starts_with(std::string(kFormat) + " ") || name_at == 0) {
    return bad;
  }
  Host host;
  const char* const end = all.data() + address_at - 1;
  const auto [stop, error] = std::from_chars(all.data() + id_at, end, host.id);
  host.address = all.substr(address_at, name_at - 1 - address_at);
  host.name = all.substr(name_at);
  const bool sizes = !host.address.empty() && host.address.size() <= kMaxAddressBytes && !host.name.empty() &&
                     host.name.size() <= kMaxNameBytes;
  if (error != std::errc() || stop != end || host.id == 0 || !sizes || !printable(host.address, false) ||
      !printable(host.name, true)) {
    return bad;
  }
  return host;
}

Candidacy::Candidacy(CandidacyOptions options, ElectionStore* store, Clock clock)
    : options_(std::move(options)), store_(store), clock_(std::move(clock)) {}

uint64_t Candidacy::until_of(uint64_t asked_ns, uint64_t ttl_ns) const {
  // The store counts from when it heard of it, which is later.
  return asked_ns + ttl_ns - ttl_ns / kMargin;
}

// Not given back: that takes time, and it ends by itself.
void Candidacy::lose_place() {
  again_ = elected_.here;
  elected_.here = false;
  elected_.until_ns = 0;
  lease_ = 0;
  until_ns_ = 0;
}

void Candidacy::give_lease_back() {
  if (lease_ != 0) {
    static_cast<void>(store_->revoke(lease_).is_ok());
  }
  lease_ = 0;
  until_ns_ = 0;
}

base::Status Candidacy::renew() {
  const uint64_t asked_ns = clock_();
  const base::Result<ElectionStore::Lease> kept = store_->keep_alive(lease_);
  if (!kept.is_ok()) {
    return kept.status();
  }
  if (kept.value().ttl_ns == 0) {
    lose_place();
    return base::Status::ok();
  }
  until_ns_ = until_of(asked_ns, kept.value().ttl_ns);
  renew_at_ns_ = asked_ns + kept.value().ttl_ns / kRenewals;
  return base::Status::ok();
}

base::Status Candidacy::take(ElectionStore::Look* seen) {
  if (lease_ == 0) {
    const uint64_t asked_ns = clock_();
    const base::Result<ElectionStore::Lease> granted = store_->grant(options_.lease_ns);
    if (!granted.is_ok()) {
      return granted.status();
    }
    lease_ = granted.value().id;
    until_ns_ = until_of(asked_ns, granted.value().ttl_ns);
    renew_at_ns_ = asked_ns + granted.value().ttl_ns / kRenewals;
  }
  base::Result<ElectionStore::Look> claimed = store_->claim(to_text(options_.self), lease_);
  if (!claimed.is_ok()) {
    renew_at_ns_ = 0;  // the lease may be what is not there any more
    return claimed.status();
  }
  *seen = std::move(claimed).value();
  return base::Status::ok();
}

void Candidacy::adopt(const ElectionStore::Look& seen) {
  revision_ = seen.revision;
  elected_.cause.clear();
  if (seen.record.has_value()) {
    adopt_record(*seen.record);
  } else {
    elected_.cause = options_.where + " is not there: no daemon hosts yet";
  }
}

void Candidacy::adopt_record(const ElectionStore::Record& record) {
  const base::Result<Host> host = host_from(record.value);
  const bool known = host.is_ok() && record.term >= elected_.term;
  const bool ours = known && lease_ != 0 && record.lease == lease_ && host.value().id == options_.self.id;
  if (!ours && elected_.here) {
    lose_place();
  } else if (!ours) {
    give_lease_back();
  }
  if (!host.is_ok()) {
    elected_.cause =
        options_.where + " " + host.status().message() + "; delete the key, or choose another fabric.etcd_prefix";
  } else if (!known) {
    elected_.cause =
        options_.where + " has an older revision than before, as after a restore; restart the daemons of the cluster";
  } else {
    elected_ = {record.term, host.value(), ours, ours ? until_ns_ : 0, {}};
  }
}

base::Status Candidacy::find_host() {
  again_ = false;
  if (lease_ != 0 && clock_() >= renew_at_ns_) {
    EXPERTD_RETURN_IF_ERROR(renew());
  }
  if (again_) {
    return base::Status::ok();
  }
  base::Result<ElectionStore::Look> looked = store_->look();
  if (!looked.is_ok()) {
    return looked.status();
  }
  ElectionStore::Look seen = std::move(looked).value();
  if (!seen.record.has_value() && elected_.here) {
    // It went with the lease, or somebody removed it.
    lose_place();
    return base::Status::ok();
  }
  if (!seen.record.has_value()) {
    EXPERTD_RETURN_IF_ERROR(take(&seen));
  }
  adopt(seen);
  return base::Status::ok();
}

const Elected& Candidacy::turn() {
  const base::Status found = find_host();
  if (found.is_ok()) {
    failures_ = 0;
    return elected_;
  }
  failures_ = std::min(failures_ + 1, kDoublingsMax);
  elected_.cause = found.message();
  // Who hosts goes on until its lease is over, which may have been renewed before the failure.
  elected_.until_ns = elected_.here ? until_ns_ : 0;
  return elected_;
}

uint64_t Candidacy::idle_ns() const {
  if (again_) {
    return 0;
  }
  if (failures_ != 0) {
    return std::min(options_.backoff_max_ns, options_.backoff_min_ns << (failures_ - 1));
  }
  const uint64_t now = clock_();
  const uint64_t look_ns = options_.lease_ns / kRenewals;
  return lease_ == 0 ? look_ns : std::min(look_ns, renew_at_ns_ > now ? renew_at_ns_ - now : 0);
}

void Candidacy::resign() {
  elected_.here = false;
  elected_.until_ns = 0;
  give_lease_back();
}

}  // namespace expertd::group
