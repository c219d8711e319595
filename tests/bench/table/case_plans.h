// SPDX-License-Identifier: Apache-2.0
// What the comparisons of a case move. Pure functions, any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/bench/table/exchange_plan.h"
#include "tests/bench/table/table_cases.h"

namespace expertd::bench {

/// What the all-to-all does for a case, one behind the other; empty: there is no such comparison.
std::vector<ExchangePlan> plans_of(const TableCase& it, const ctl::BenchRouting& routing, uint32_t rank);
/// Of a low latency operation that sends a token once per rank and gets one row per rank back; 0: there is no other
/// floor than that of its rows.
uint64_t least_link_bytes(const TableCase& it, const ctl::BenchRouting& routing, uint32_t own);

}  // namespace expertd::bench
