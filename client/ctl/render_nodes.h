// SPDX-License-Identifier: Apache-2.0
// What the daemon tells of other nodes, as text for people and as JSON for programs. Pure functions, any thread.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "expertd/v1/control.pb.h"

namespace expertd::ctl {

/// The one line of `status`, without a newline.
std::string fabric_line(const v1::FabricStatus& fabric);
nlohmann::json fabric_json(const v1::FabricStatus& fabric);

std::string peers_text(const v1::ListPeersResponse& peers);
nlohmann::json peers_json(const v1::ListPeersResponse& peers);

}  // namespace expertd::ctl
