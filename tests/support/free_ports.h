// SPDX-License-Identifier: Apache-2.0
// Ports for processes that have to know each other's before they start. Any thread; tests only.
#pragma once

#include <cstdint>
#include <vector>

namespace expertd::support {

/// So many different loopback ports that nobody has at the moment of the call: all are held until each is known.
std::vector<uint16_t> free_ports(uint32_t count);

}  // namespace expertd::support
