// SPDX-License-Identifier: Apache-2.0
// The ElectionStore that is one key in an etcd (v3, plain HTTP), over gRPC. Every call goes to one of the endpoints and
// has a deadline; after a failure the next one goes to the next endpoint over a connection of its own. One thread, but
// for interrupt().
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "daemon/group/candidacy.h"

namespace expertd::group {

struct EtcdStoreOptions {
  std::vector<std::string> endpoints;  // "http://HOST:PORT", at least one
  std::string key;
  uint64_t call_ns = 1'000'000'000;  // longest call
};

class EtcdStore final : public ElectionStore {
 public:
  /// CONFIG_BAD_VALUE names an endpoint that is none. Does not connect yet.
  static base::Result<std::unique_ptr<EtcdStore>> create(const EtcdStoreOptions& options);
  ~EtcdStore() override;
  EtcdStore(const EtcdStore&) = delete;
  EtcdStore& operator=(const EtcdStore&) = delete;

  base::Result<Lease> grant(uint64_t ttl_ns) override;
  base::Result<Lease> keep_alive(int64_t lease) override;
  base::Status revoke(int64_t lease) override;
  base::Result<Look> look() override;
  base::Result<Look> claim(const std::string& value, int64_t lease) override;
  base::Status wait_change(int64_t revision, uint64_t limit_ns) override;
  void interrupt() override;

 private:
  struct Parts;  // what needs gRPC's headers

  explicit EtcdStore(std::unique_ptr<Parts> parts);

  std::unique_ptr<Parts> parts_;
};

}  // namespace expertd::group
