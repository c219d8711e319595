// SPDX-License-Identifier: Apache-2.0
// What the composition root needs to introduce this daemon to others. Called once by `main`, before any thread.
#pragma once

#include <cstdint>
#include <string>

#include "daemon/base/status.h"

namespace expertd::fabric {

/// The text in fabric.cluster_key_file without the line end; empty for an empty path. CONFIG_UNREADABLE or
/// CONFIG_BAD_VALUE name the file; the text itself is in no message.
base::Result<std::string> read_cluster_key(const std::string& path);

/// "host:port" for NodeIdentity::address: `advertise` if given, else the address of `listen` ("ADDRESS:PORT", literal),
/// or the name of this host where that stands for every interface. `port` is the one that is served.
std::string advertised_address(const std::string& advertise, const std::string& listen, uint16_t port);

/// `node_name` if given, else the name of the host, at most 64 characters.
std::string node_name_or_host(const std::string& node_name);

}  // namespace expertd::fabric
