// SPDX-License-Identifier: Apache-2.0
// The identity of a node without rails as one line of text, for processes of the fabric's tests that talk through
// pipes.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "daemon/fabric/options.h"

namespace expertd::fabric_test {

inline std::string identity_to_text(const fabric::NodeIdentity& identity) {
  std::ostringstream text;
  text << identity.node_id << ' ' << identity.name;
  for (const std::vector<std::string>& rails : identity.addresses) {
    text << ' ';
    for (const char byte : rails.front()) {
      char digits[3];
      std::snprintf(digits, sizeof(digits), "%02x", static_cast<unsigned>(static_cast<unsigned char>(byte)));
      text << digits;
    }
  }
  return text.str();
}

inline fabric::NodeIdentity identity_from_text(const std::string& line) {
  std::istringstream text(line);
  fabric::NodeIdentity identity;
  text >> identity.node_id >> identity.name;
  for (std::vector<std::string>& rails : identity.addresses) {
    std::string& address = rails.emplace_back();
    std::string digits;
    text >> digits;
    for (size_t i = 0; i + 1 < digits.size(); i += 2) {
      address.push_back(static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16)));
    }
  }
  return identity;
}

}  // namespace expertd::fabric_test
