// SPDX-License-Identifier: Apache-2.0
// Addresses of peers: "host:port" texts, what they resolve to, and whether that is this daemon. Value types; resolve()
// may take as long as the resolver's own timeouts, so only RendezvousClient's resolver thread calls it.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

#include "daemon/base/status.h"

namespace expertd::fabric {

/// An IPv4 or IPv6 address with a port.
class SocketAddress {
 public:
  SocketAddress() = default;
  SocketAddress(const sockaddr_storage& storage, socklen_t size) : storage_(storage), size_(size) {}

  int family() const { return storage_.ss_family; }
  const sockaddr* raw() const { return reinterpret_cast<const sockaddr*>(&storage_); }
  socklen_t size() const { return size_; }
  uint16_t port() const;
  /// "10.0.0.1:7000", "[fd00::1]:7000".
  std::string text() const;
  /// The same host, whatever the port.
  bool same_host(const SocketAddress& other) const;

 private:
  sockaddr_storage storage_{};
  socklen_t size_ = 0;
};

struct HostPort {
  std::string host;
  std::string port;
  bool all_of_name = false;  // "dns:NAME:PORT": every address of the name is a daemon of its own
};

/// "host:port", "[ipv6]:port" or "dns:name:port"; CONFIG_BAD_VALUE says what is wrong.
base::Result<HostPort> parse_host_port(const std::string& text);
/// An address whose host is a literal, not a name.
base::Result<SocketAddress> parse_literal(const std::string& text);

/// Addresses of a host in a fixed order, at most 64. RENDEZVOUS_UNAVAILABLE names a host that does not resolve.
base::Result<std::vector<SocketAddress>> resolve(const HostPort& place);
/// "0.0.0.0" or "[::]": every interface.
bool is_wildcard(const SocketAddress& address);
/// Whether the host is one of this machine's (and so, with the port, this daemon).
bool is_local(const SocketAddress& address);

}  // namespace expertd::fabric
