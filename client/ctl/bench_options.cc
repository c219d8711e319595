// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench_options.h"

#include <algorithm>

namespace expertd::ctl {

std::vector<uint32_t> BenchOptions::node_of() const {
  std::vector<std::string> found;
  std::vector<uint32_t> nodes;
  for (uint32_t rank = 0; rank < devices.size(); ++rank) {
    auto at = std::find(found.begin(), found.end(), socket_of(rank));
    if (at == found.end()) {
      at = found.insert(found.end(), socket_of(rank));
    }
    nodes.push_back(static_cast<uint32_t>(at - found.begin()));
  }
  return nodes;
}

}  // namespace expertd::ctl
