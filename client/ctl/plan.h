// SPDX-License-Identifier: Apache-2.0
// `expertctl plan`: what operations over many nodes would take, by the model of plan_model.h. Main thread.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "client/ctl/cli.h"
#include "client/ctl/plan_model.h"

namespace expertd::ctl {

Action add_plan(CLI::App& verb, const Context& context);

/// Both want plan_problem() empty. Every figure is modelled, which both say.
std::string plan_text(const PlanLink& link, const PlanShape& shape);
nlohmann::json plan_document(const PlanLink& link, const PlanShape& shape);

}  // namespace expertd::ctl
