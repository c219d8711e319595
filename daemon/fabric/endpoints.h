// SPDX-License-Identifier: Apache-2.0
// Endpoints: those of one lane to one other daemon, one for each of the lane's rails. Of the lane's thread. They are
// closed, and that has ended, before they are destroyed; rails outlive them.
#pragma once

#include <ucp/api/ucp.h>

#include <string>
#include <vector>

#include "daemon/fabric/lane.h"
#include "daemon/fabric/options.h"

namespace expertd::fabric {

/// Who is told that a connection is of no use any more. May be called within progress(): notes it and acts later.
class ConnectionOwner {
 public:
  virtual ~ConnectionOwner() = default;
  virtual void fail(LossCause cause, std::string detail) = 0;
};

class Endpoints {
 public:
  Endpoints(LaneKind kind, const Rails& rails, ConnectionOwner* owner);
  ~Endpoints() = default;
  Endpoints(const Endpoints&) = delete;
  Endpoints& operator=(const Endpoints&) = delete;

  /// `addresses` are the other daemon's, by its rails. After an error those that did open are closed already.
  base::Status open(const std::vector<std::string>& addresses, const Rails& rails);
  ucp_ep_h at(uint32_t rail = 0) const { return endpoints_[rail].ep; }
  /// At once: what was under way on them ends with an error.
  void close();
  /// Whether nothing of UCX names them any more.
  bool closed();

 private:
  struct Endpoint {
    Endpoints* of = nullptr;
    ucp_ep_h ep = nullptr;
    void* closing = nullptr;  // request of its close
  };

  base::Status open(const std::string& address, const Lane& rail, Endpoint* endpoint);
  static void on_error(void* endpoint, ucp_ep_h ep, ucs_status_t status);

  const LaneKind kind_;
  ConnectionOwner* const owner_;
  std::vector<Endpoint> endpoints_;  // by own rail; they stay where they are
};

}  // namespace expertd::fabric
