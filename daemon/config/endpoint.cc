// SPDX-License-Identifier: Apache-2.0
#include "daemon/config/endpoint.h"

#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <string>

namespace expertd::config {

namespace {

constexpr size_t kMaxHostBytes = 253;
constexpr size_t kMaxNameBytes = 64;
constexpr size_t kMaxPrefixBytes = 200;

struct Endpoint {
  std::string_view host;  // without brackets
  bool bracketed = false;
  uint16_t port = 0;
};

bool is_address(int family, std::string_view host) {
  std::array<unsigned char, sizeof(in6_addr)> parsed{};
  return inet_pton(family, std::string(host).c_str(), parsed.data()) == 1;
}

bool is_host_name(std::string_view host) {
  return !host.empty() && host.size() <= kMaxHostBytes && std::ranges::all_of(host, [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '.' || c == '-' ||
           c == '_';
  });
}

std::optional<Endpoint> split(std::string_view text) {
  const size_t colon = text.rfind(':');
  if (colon == text.npos) {
    return std::nullopt;
  }
  Endpoint out;
  const std::string_view digits = text.substr(colon + 1);
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), out.port);
  if (error != std::errc() || end != digits.data() + digits.size()) {
    return std::nullopt;
  }
  out.host = text.substr(0, colon);
  out.bracketed = out.host.starts_with('[') && out.host.ends_with(']');
  if (out.bracketed) {
    out.host = out.host.substr(1, out.host.size() - 2);
  }
  return out;
}

}  // namespace

bool is_listen_endpoint(std::string_view text) {
  const std::optional<Endpoint> endpoint = split(text);
  return endpoint.has_value() && is_address(endpoint->bracketed ? AF_INET6 : AF_INET, endpoint->host);
}

bool is_peer_endpoint(std::string_view text) {
  constexpr std::string_view kAllOfName = "dns:";
  const bool all_of_name = text.starts_with(kAllOfName);
  const std::optional<Endpoint> endpoint = split(all_of_name ? text.substr(kAllOfName.size()) : text);
  if (!endpoint.has_value() || endpoint->port == 0) {
    return false;
  }
  return endpoint->bracketed ? !all_of_name && is_address(AF_INET6, endpoint->host) : is_host_name(endpoint->host);
}

bool is_etcd_endpoint(std::string_view text) {
  constexpr std::string_view kScheme = "http://";
  const std::string_view place = text.starts_with(kScheme) ? text.substr(kScheme.size()) : "";
  return !place.starts_with("dns:") && is_peer_endpoint(place);
}

bool is_key_prefix(std::string_view text) {
  return text.size() > 1 && text.size() <= kMaxPrefixBytes && text.starts_with('/') && !text.ends_with('/') &&
         std::ranges::all_of(text, [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                  std::string_view("_./-").find(c) != std::string_view::npos;
         });
}

bool is_host(std::string_view text) {
  return text.empty() || is_host_name(text) || is_address(AF_INET6, text);
}

bool is_node_name(std::string_view text) {
  return text.size() <= kMaxNameBytes && std::ranges::all_of(text, [](char c) { return c >= ' ' && c <= '~'; });
}

bool is_word(std::string_view text) {
  return !text.empty() && text.size() <= kMaxNameBytes && std::ranges::all_of(text, [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           std::string_view(":_./^-").find(c) != std::string_view::npos;
  });
}

}  // namespace expertd::config
