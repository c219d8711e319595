// SPDX-License-Identifier: Apache-2.0
// The daemon's answers as text for people and as JSON for programs (snake_case keys, units last). Pure functions, any
// thread.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "expertd/v1/control.pb.h"

namespace expertd::ctl {

std::string status_text(const v1::GetStatusResponse& status);
nlohmann::json status_json(const v1::GetStatusResponse& status);

std::string sessions_text(const v1::ListSessionsResponse& sessions);
nlohmann::json sessions_json(const v1::ListSessionsResponse& sessions);

/// One line or more of JSON with a newline; bytes that are not UTF-8 are replaced.
std::string json_text(const nlohmann::json& value);

}  // namespace expertd::ctl
