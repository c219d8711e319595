// SPDX-License-Identifier: Apache-2.0
// Which texts can be addresses and names of other daemons. Pure functions, any thread; used inside daemon/config.
// Whether a name resolves and an address is there is seen when it is used.
#pragma once

#include <string_view>

namespace expertd::config {

/// "ADDRESS:PORT" with an IPv4 literal or an IPv6 one in brackets; port 0 to 65535.
bool is_listen_endpoint(std::string_view text);
/// "HOST:PORT", "[IPV6]:PORT" or "dns:NAME:PORT"; port 1 to 65535.
bool is_peer_endpoint(std::string_view text);
/// "http://HOST:PORT" or "http://[IPV6]:PORT"; port 1 to 65535.
bool is_etcd_endpoint(std::string_view text);
/// A path of 2 to 200 letters, digits and "_./-" that begins with "/" and does not end with one.
bool is_key_prefix(std::string_view text);
/// A host name or an address without a port and without brackets, or empty.
bool is_host(std::string_view text);
/// At most 64 printable ASCII characters.
bool is_node_name(std::string_view text);
/// 1 to 64 letters, digits and ":_./^-".
bool is_word(std::string_view text);

}  // namespace expertd::config
