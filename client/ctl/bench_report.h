// SPDX-License-Identifier: Apache-2.0
// What a run found, as a table and as JSON. Pure functions, main thread.
#pragma once

#include <string>
#include <vector>

#include "client/ctl/bench_options.h"
#include "client/ctl/bench_runner.h"
#include "expertd.h"

namespace expertd::ctl {

std::string bench_table(const BenchResult& result);
/// Sorted keys, numbers in the units their names end with, ends in a newline.
std::string bench_json(const BenchOptions& options, const BenchResult& result);

struct BenchPlan {
  std::string mode;
  expertd_group_plan_t plan;
};
/// A failure in the form that the other verbs have.
std::string failure_json(const std::string& text, int exit_code);
std::string plan_table(const std::vector<BenchPlan>& plans);
std::string plan_json(const std::vector<BenchPlan>& plans);

}  // namespace expertd::ctl
