// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/address.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>

namespace expertd::fabric {

namespace {

constexpr size_t kMaxAddresses = 64;
constexpr size_t kMaxHostBytes = 253;

/// The bytes of the address alone, in network order; IPv4 inside of IPv6 counts as IPv4.
std::string host_bytes(const sockaddr_storage& storage) {
  if (storage.ss_family == AF_INET) {
    sockaddr_in in{};
    std::memcpy(&in, &storage, sizeof(in));
    return {reinterpret_cast<const char*>(&in.sin_addr), sizeof(in.sin_addr)};
  }
  sockaddr_in6 in{};
  std::memcpy(&in, &storage, sizeof(in));
  const auto* const bytes = reinterpret_cast<const char*>(&in.sin6_addr);
  return IN6_IS_ADDR_V4MAPPED(&in.sin6_addr) ? std::string(bytes + 12, 4) : std::string(bytes, sizeof(in.sin6_addr));
}

base::Status bad_address(const std::string& text, const char* why) {
  return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, "\"" + text + "\": " + why);
}

}  // namespace

uint16_t SocketAddress::port() const {
  if (storage_.ss_family == AF_INET) {
    sockaddr_in in{};
    std::memcpy(&in, &storage_, sizeof(in));
    return ntohs(in.sin_port);
  }
  sockaddr_in6 in{};
  std::memcpy(&in, &storage_, sizeof(in));
  return ntohs(in.sin6_port);
}

std::string SocketAddress::text() const {
  std::array<char, INET6_ADDRSTRLEN> host{};
  const std::string bytes = host_bytes(storage_);
  const bool v4 = bytes.size() == sizeof(in_addr);
  (void)inet_ntop(v4 ? AF_INET : AF_INET6, bytes.data(), host.data(), host.size());
  const std::string name(host.data());
  return (v4 ? name : "[" + name + "]") + ":" + std::to_string(port());
}

bool SocketAddress::same_host(const SocketAddress& other) const {
  return host_bytes(storage_) == host_bytes(other.storage_);
}

base::Result<HostPort> parse_host_port(const std::string& text) {
  constexpr std::string_view kAllOfName = "dns:";
  HostPort out;
  out.all_of_name = text.starts_with(kAllOfName);
  const std::string place = out.all_of_name ? text.substr(kAllOfName.size()) : text;
  const size_t colon = place.rfind(':');
  if (colon == std::string::npos || colon == 0) {
    return bad_address(text, "write \"host:port\", \"[ipv6]:port\" or \"dns:name:port\"");
  }
  out.host = place.substr(0, colon);
  out.port = place.substr(colon + 1);
  if (out.host.starts_with('[') && out.host.ends_with(']')) {
    out.host = out.host.substr(1, out.host.size() - 2);
  } else if (out.host.find(':') != std::string::npos) {
    return bad_address(text, "an IPv6 address stands in brackets, \"[fd00::1]:7000\"");
  }
  uint16_t port = 0;
  const auto [end, error] = std::from_chars(out.port.data(), out.port.data() + out.port.size(), port);
  if (error != std::errc() || end != out.port.data() + out.port.size()) {
    return bad_address(text, "the port must be a number from 0 to 65535");
  }
  if (out.host.empty() || out.host.size() > kMaxHostBytes ||
      std::ranges::any_of(out.host, [](char c) { return c <= ' ' || c > '~'; })) {
    return bad_address(text, "the host must have 1 to 253 printable characters");
  }
  return out;
}

base::Result<SocketAddress> parse_literal(const std::string& text) {
  const base::Result<HostPort> place = parse_host_port(text);
  if (!place.is_ok()) {
    return place.status();
  }
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (place.value().all_of_name ||
      getaddrinfo(place.value().host.c_str(), place.value().port.c_str(), &hints, &found) != 0) {
    return bad_address(text, "the host must be an IPv4 or IPv6 address; \"0.0.0.0\" stands for every interface");
  }
  sockaddr_storage storage{};
  std::memcpy(&storage, found->ai_addr, found->ai_addrlen);
  const SocketAddress address(storage, found->ai_addrlen);
  freeaddrinfo(found);
  return address;
}

base::Result<std::vector<SocketAddress>> resolve(const HostPort& place) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(place.host.c_str(), place.port.c_str(), &hints, &found); error != 0) {
    return base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE,
                        "the name \"" + place.host + "\" does not resolve: " + gai_strerror(error));
  }
  std::vector<SocketAddress> addresses;
  for (const addrinfo* entry = found; entry != nullptr && addresses.size() < kMaxAddresses; entry = entry->ai_next) {
    sockaddr_storage storage{};
    std::memcpy(&storage, entry->ai_addr, entry->ai_addrlen);
    addresses.emplace_back(storage, entry->ai_addrlen);
  }
  freeaddrinfo(found);
  if (place.all_of_name) {
    // Every daemon must see the same first one, and name servers rotate their answers.
    std::ranges::sort(addresses, {}, [](const SocketAddress& address) { return address.text(); });
  }
  return addresses;
}

bool is_wildcard(const SocketAddress& address) {
  return address.text().starts_with("0.0.0.0:") || address.text().starts_with("[::]:");
}

bool is_local(const SocketAddress& address) {
  ifaddrs* interfaces = nullptr;
  if (getifaddrs(&interfaces) != 0) {
    return false;
  }
  bool found = false;
  for (const ifaddrs* entry = interfaces; entry != nullptr && !found; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr ||
        (entry->ifa_addr->sa_family != AF_INET && entry->ifa_addr->sa_family != AF_INET6)) {
      continue;
    }
    sockaddr_storage storage{};
    const socklen_t size = entry->ifa_addr->sa_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    std::memcpy(&storage, entry->ifa_addr, size);
    found = SocketAddress(storage, size).same_host(address);
  }
  freeifaddrs(interfaces);
  // Any address of the loopback network is this machine, though the interface has one of them only.
  return found || address.text().starts_with("127.");
}

}  // namespace expertd::fabric
