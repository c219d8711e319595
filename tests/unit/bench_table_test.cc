// SPDX-License-Identifier: Apache-2.0
// What of the performance table needs no GPU: statistics, the JSON and its merging, the cases, and the plans of the
// comparison with an all-to-all, which are played through on numbers in place of rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "tests/bench/table/exchange_plan.h"
#include "tests/bench/table/table_cases.h"
#include "tests/bench/table/table_options.h"
#include "tests/bench/table/table_row.h"

namespace expertd::bench {
namespace {

using ctl::BenchInput;
using ctl::BenchRouting;
using ctl::BenchRow;
using ctl::BenchShape;
using nlohmann::json;

TableRow row_of(const std::string& operation, uint32_t tokens, bool mps) {
  TableRow row;
  row.it = {operation, "fp8", false, {2, 256, 7168, 8, tokens}};
  row.mps = mps;
  row.times_us = {30, 10, 20, 40};
  row.executor = "sm";
  row.sms = 24;
  row.floor_copy_engine_us = {9, 8};
  row.floor_sm_us = {12, 12};
  row.link_bytes = 20e3;
  row.verified = true;
  return row;
}

json document_of(const std::vector<TableRow>& rows, bool mps) {
  json list = json::array();
  for (const TableRow& row : rows) {
    list.push_back(row_json(row));
  }
  return {{"mps", mps}, {"commit", mps ? "b" : "a"}, {"rows", list}};
}

TEST(TableStatistics, QuantilesAreOfTheNearestRank) {
  EXPECT_EQ(quantile_of({}, 0.5), 0);
  EXPECT_EQ(quantile_of({7}, 0.99), 7);
  EXPECT_EQ(quantile_of({40, 10, 30, 20}, 0.5), 20);
  EXPECT_EQ(quantile_of({40, 10, 30, 20}, 0.99), 40);
}

TEST(TableStatistics, TheSlowestRankCountsInEachIteration) {
  EXPECT_EQ(slowest_of({{1, 5, 3}, {2, 4}}), (Times{2, 5}));
  EXPECT_EQ(slowest_of({}), Times{});
}

TEST(TableRowJson, HasTheFiguresAndTheFasterCopyAsFloor) {
  const json row = row_json(row_of("dispatch", 4096, false));
  EXPECT_EQ(row.at("operation"), "dispatch");
  EXPECT_EQ(row.at("half"), "both");
  EXPECT_EQ(row.at("captured"), false);
  EXPECT_EQ(row.at("mode"), "ht");
  EXPECT_EQ(row.at("dtype"), "fp8");
  EXPECT_EQ(row.at("client"), "idle");
  EXPECT_EQ(row.at("executor"), "sm");
  EXPECT_EQ(row.at("sms"), 24);
  EXPECT_EQ(row.at("p50_us"), 20);
  EXPECT_EQ(row.at("p99_us"), 40);
  EXPECT_EQ(row.at("floor_us"), 8);
  EXPECT_EQ(row.at("floor_sm_us"), 12);
  EXPECT_EQ(row.at("ratio"), 2.5);
  EXPECT_EQ(row.at("link_gbps"), 1);
  EXPECT_TRUE(row.at("nccl_us").is_null());
  EXPECT_EQ(row.at("verified"), true);
  EXPECT_FALSE(row.contains("error"));
}

TEST(TableRowJson, NamesTheClockAndKeepsWhatItCostsApart) {
  TableRow row = row_of("dispatch", 4096, false);
  EXPECT_TRUE(row_json(row).at("clock").is_null());
  row.clock = "memory words";
  row.clock_offset_us = 3;
  row.switch_us = {300, 290, 280};
  json made = row_json(row);
  EXPECT_EQ(made.at("clock"), "memory words");
  EXPECT_EQ(made.at("p50_us"), 20);
  EXPECT_EQ(made.at("clock_offset_us"), 3);
  EXPECT_EQ(made.at("p50_switch_us"), 290);
  EXPECT_EQ(made.at("p99_switch_us"), 300);
  EXPECT_TRUE(made.at("local_wait_us").is_null());
  row.local_wait_us = {2, 1, 9};
  made = row_json(row);
  EXPECT_EQ(made.at("local_wait_us"), 2);
  EXPECT_EQ(made.at("local_wait_p99_us"), 9);
}

TEST(TableRowJson, SaysWhatFailedAndHasNoTimesThen) {
  TableRow failed = row_of("dispatch", 4096, false);
  failed.times_us.clear();
  failed.executor.clear();
  failed.verified = false;
  failed.error = "wrong output";
  const json row = row_json(failed);
  EXPECT_TRUE(row.at("p50_us").is_null());
  EXPECT_TRUE(row.at("executor").is_null());
  EXPECT_TRUE(row.at("sms").is_null());
  EXPECT_EQ(row.at("verified"), false);
  EXPECT_EQ(row.at("error"), "wrong output");
  EXPECT_FALSE(all_verified(document_of({row_of("combine", 1, false), failed}, false)));
  EXPECT_NE(table_text(document_of({failed}, false)).find("wrong output"), std::string::npos);
}

TEST(TableMerge, AddsRowsOfTheOtherStateAndReplacesThoseOfTheSame) {
  const json base = document_of({row_of("dispatch", 4096, false), row_of("dispatch", 512, false)}, false);
  TableRow again = row_of("dispatch", 512, false);
  again.times_us = {99};
  const json both = merged(base, document_of({row_of("dispatch", 4096, true), again}, true));
  ASSERT_EQ(both.at("rows").size(), 3u);
  EXPECT_EQ(both.at("rows")[1].at("p50_us"), 99);
  EXPECT_EQ(both.at("rows")[2].at("mps"), true);
  EXPECT_EQ(both.at("mps"), "both");
  EXPECT_EQ(both.at("commit"), "a");
  EXPECT_EQ(merged(both, document_of({row_of("dispatch", 512, true)}, true)).at("mps"), "both");
}

TEST(TableMerge, ARowOfOtherMultiprocessorsIsAnotherAndAFailedOneGivesWay) {
  TableRow failed = row_of("dispatch", 4096, false);
  failed.executor.clear();
  failed.sms = 0;
  TableRow wide = row_of("dispatch", 4096, false);
  wide.sms = 132;
  const json narrow = document_of({row_of("dispatch", 4096, false)}, false);
  EXPECT_EQ(merged(narrow, document_of({wide}, false)).at("rows").size(), 2u);
  EXPECT_EQ(merged(narrow, document_of({failed}, false)).at("rows").size(), 2u) << "figures stay";
  const json again = merged(document_of({failed}, false), document_of({wide}, false));
  ASSERT_EQ(again.at("rows").size(), 1u);
  EXPECT_EQ(again.at("rows")[0].at("sms"), 132);
  EXPECT_EQ(merged(document_of({failed}, false), document_of({failed}, false)).at("rows").size(), 1u);
}

TEST(TableResume, KeepsVerifiedRowsOfTheSameCommitAndDevice) {
  TableRow failed = row_of("combine", 4096, false);
  failed.verified = false;
  json document = document_of({row_of("dispatch", 4096, false), failed}, false);
  document["device"] = "GPU";
  const json kept = resumable(document, "a", "GPU");
  ASSERT_EQ(kept.at("rows").size(), 1u);
  EXPECT_EQ(kept.at("rows")[0].at("operation"), "dispatch");
  EXPECT_TRUE(resumable(document, "b", "GPU").is_null());
  EXPECT_TRUE(resumable(document, "a", "another GPU").is_null());
  EXPECT_TRUE(resumable(document_of({failed}, false), "a", "GPU").is_null());
  for (const json& other : {json(), json::array(), json{{"commit", "a"}, {"device", "GPU"}}}) {
    EXPECT_TRUE(resumable(other, "a", "GPU").is_null());
    EXPECT_FALSE(has_row(other, failed));
  }
}

TEST(TableResume, KnowsARowThatWasAskedForAlike) {
  const TableRow there = row_of("dispatch", 4096, false);
  const json kept = document_of({there}, false);
  TableRow planned;  // without results, of which no executor is known
  planned.it = there.it;
  EXPECT_TRUE(has_row(kept, planned));
  const auto but = [&](const auto& change) {
    TableRow other = planned;
    change(&other);
    return has_row(kept, other);
  };
  EXPECT_FALSE(but([](TableRow* row) { row->busy = true; }));
  EXPECT_FALSE(but([](TableRow* row) { row->mps = true; }));
  EXPECT_FALSE(but([](TableRow* row) { row->asked_executor = "copy_engine"; }));
  EXPECT_FALSE(but([](TableRow* row) { row->link_sms = 32; }));
  EXPECT_FALSE(but([](TableRow* row) { row->it.captured = true; }));
  EXPECT_FALSE(but([](TableRow* row) { row->it.half = "send"; }));
  EXPECT_FALSE(but([](TableRow* row) { row->it.shape.experts = 64; }));
  EXPECT_FALSE(but([](TableRow* row) { row->it.shape.tokens = 512; }));
}

TEST(TableMerge, RefusesWhatIsNoTable) {
  EXPECT_THROW(merged(json::array(), document_of({}, false)), std::runtime_error);
  EXPECT_THROW(merged({{"rows", 3}}, document_of({}, false)), std::runtime_error);
}

TEST(TableCases, EveryCaseHasAnOperationAndGroupsLieTogether) {
  const std::vector<TableCase> cases = table_cases({});
  for (size_t i = 0; i < cases.size(); ++i) {
    const bool needs_gpu = cases[i].operation == "layer" || cases[i].operation == "overlap";
    EXPECT_TRUE(needs_gpu || row_spec(cases[i]).make) << cases[i].name();
    for (size_t j = 0; j + 1 < i; ++j) {
      EXPECT_TRUE(!cases[j].shares_group(cases[i]) || cases[i - 1].shares_group(cases[i])) << cases[i].name();
    }
  }
  EXPECT_LT(table_cases({.quick = true}).size(), cases.size());
}

TEST(TableCases, ComeByImportance) {
  const std::vector<TableCase> cases = table_cases({.copies = true});
  const auto rank = [](const TableCase& it) {
    if (it.operation == "layer") {
      return 5;
    }
    if (!it.executor.empty() || it.operation == "overlap") {
      return 3;
    }
    if (it.captured || it.operation == "empty") {
      return 2;
    }
    return !it.has_main_shape() ? 4 : it.low_latency ? 1 : 0;
  };
  for (size_t i = 1; i < cases.size(); ++i) {
    EXPECT_LE(rank(cases[i - 1]), rank(cases[i])) << cases[i].name();
  }
  EXPECT_EQ(cases.front().name(), "dispatch ht fp8, 4096 tokens, hidden 7168, top 8");
}

TEST(TableCases, ThoseByCopyEnginesAreInGroupsOfTheirOwn) {
  std::vector<std::string> names;
  for (const TableCase& it : table_cases({.copies = true})) {
    if (!it.executor.empty()) {
      names.push_back(it.operation);
      EXPECT_NE(it.name().find(" by copy_engine, 128 tokens"), std::string::npos) << it.name();
    }
  }
  EXPECT_EQ(names, (std::vector<std::string>{"dispatch", "combine", "pair", "overlap"}));
  EXPECT_EQ(table_cases({.copies = true}).size(), table_cases({}).size() + 4);
  TableCase other = table_cases({}).front();
  other.executor = "copy_engine";
  EXPECT_FALSE(other.shares_group(table_cases({}).front()));
}

TEST(TableCases, HalvesAreOfBothLowLatencyOperationsOfTheMainShape) {
  std::map<std::string, int> halves;
  for (const TableCase& it : table_cases({.quick = true})) {
    EXPECT_EQ(it.is_whole(), it.half == "both" && it.operation != "overlap");
    halves[it.operation + " " + it.half] += it.half == "both" ? 0 : 1;
    EXPECT_TRUE(it.half == "both" || (it.low_latency && it.has_main_shape())) << it.name();
  }
  for (const char* name : {"dispatch send", "dispatch receive", "combine send", "combine receive"}) {
    EXPECT_EQ(halves[name], 1) << name;
  }
}

TEST(TableCases, CapturedAreLowLatencyOperationsPairsAndADecodeLayerInGroupsOfTheirOwn) {
  std::map<std::string, std::vector<uint32_t>> captured;
  const std::vector<TableCase> cases = table_cases({});
  for (size_t i = 0; i < cases.size(); ++i) {
    const TableCase& it = cases[i];
    EXPECT_EQ(it.captured, it.name().find(" captured,") != std::string::npos) << it.name();
    EXPECT_TRUE(i == 0 || it.captured == cases[i - 1].captured || !it.shares_group(cases[i - 1])) << it.name();
    if (it.captured) {
      captured[it.operation + " " + it.dtype].push_back(it.shape.tokens);
      EXPECT_TRUE(it.low_latency && it.is_whole()) << it.name();
    }
  }
  const std::vector<uint32_t> tokens = {128, 16, 512};
  const std::map<std::string, std::vector<uint32_t>> wanted = {
      {"dispatch fp8", tokens}, {"combine bf16", tokens}, {"pair fp8", tokens}, {"layer bf16", {128}}};
  EXPECT_EQ(captured, wanted);
}

TEST(TableCases, CapturedComeBeforeTheOtherSizes) {
  const std::vector<TableCase> cases = table_cases({});
  const auto other = std::find_if(cases.begin(), cases.end(), [](const TableCase& it) {
    return !it.captured && !it.has_main_shape() && it.operation != "empty";
  });
  EXPECT_TRUE(
      std::none_of(other, cases.end(), [](const TableCase& it) { return it.captured && it.operation != "layer"; }));
}

TEST(TableCases, SelectsCapturedOnesAloneAndAllOthersAlone) {
  const auto captured = table_cases({.quick = true, .eager = false});
  const auto eager = table_cases({.quick = true, .captured = false});
  EXPECT_EQ(captured.size(), 9u) << "and no layer, which was not asked for";
  EXPECT_EQ(captured.size() + eager.size(), table_cases({.quick = true}).size());
  EXPECT_TRUE(std::all_of(captured.begin(), captured.end(), [](const TableCase& it) { return it.captured; }));
  EXPECT_TRUE(std::none_of(eager.begin(), eager.end(), [](const TableCase& it) { return it.captured; }));
  const auto pairs = table_cases({.operations = {"pair"}, .tokens = {512}, .eager = false});
  ASSERT_EQ(pairs.size(), 1u);
  EXPECT_EQ(pairs.front().name(), "pair ll fp8 captured, 512 tokens, hidden 7168, top 8");
}

TEST(TableRowJson, OfACapturedRowHasTheTimePerReplayAndNoMultiprocessors) {
  TableRow row = row_of("pair", 128, true);
  row.it.low_latency = true;
  row.it.captured = true;
  row.replay_us = 12.5;
  const json made = row_json(row);
  EXPECT_EQ(made.at("captured"), true);
  EXPECT_EQ(made.at("executor"), "sm");
  EXPECT_TRUE(made.at("sms").is_null());
  EXPECT_EQ(made.at("replay_us"), 12.5);
  EXPECT_TRUE(made.at("queued_us").is_null());
  EXPECT_NE(table_text(document_of({row}, true)).find("pair ll fp8 captured"), std::string::npos);
  EXPECT_NE(table_text(document_of({row}, true)).find("12.5"), std::string::npos);
}

TEST(TableRowJson, OfADoubleBatchComparesItWithOneAndWithBothInTurn) {
  TableRow row = row_of("overlap", 128, true);
  row.single_us = 16;
  row.serial_us = 32;
  row.communication_us = 8;
  row.compute_us = 8.4;
  row.compute_sms = 66;
  const json overlap = row_json(row).at("overlap");
  EXPECT_EQ(overlap.at("ratio_to_one"), 1.25);
  EXPECT_EQ(overlap.at("serial_ratio"), 2);
  EXPECT_EQ(overlap.at("compute_to_communication"), 1.05);
  EXPECT_EQ(overlap.at("compute_sms"), 66);
  EXPECT_NE(table_text(document_of({row}, true)).find("x 1.25 of one (16.0 us"), std::string::npos);
  EXPECT_FALSE(row_json(row_of("pair", 128, true)).contains("overlap"));
}

TEST(TableMerge, WhatWasAskedForIsAnotherRowThanWhatAutoTook) {
  TableRow asked = row_of("overlap", 128, true);
  asked.asked_executor = "copy_engine";
  TableRow taken = asked;
  taken.asked_executor = "auto";
  const json both = merged(document_of({taken}, true), document_of({asked}, true));
  EXPECT_EQ(both.at("rows").size(), 2u);
  EXPECT_EQ(merged(both, document_of({asked}, true)).at("rows").size(), 2u);
}

TEST(TableMerge, HalvesAreRowsOfTheirOwn) {
  TableRow send = row_of("dispatch", 128, false);
  send.it.half = "send";
  const json base = document_of({row_of("dispatch", 128, false)}, false);
  EXPECT_EQ(merged(base, document_of({send}, false)).at("rows").size(), 2u);
  EXPECT_EQ(row_json(send).at("half"), "send");
}

TEST(TableMerge, CapturedRowsAreRowsOfTheirOwnAndReplaceThemselves) {
  TableRow captured = row_of("dispatch", 128, false);
  captured.it.captured = true;
  const json both = merged(document_of({row_of("dispatch", 128, false)}, false), document_of({captured}, false));
  EXPECT_EQ(both.at("rows").size(), 2u);
  EXPECT_EQ(merged(both, document_of({captured}, false)).at("rows").size(), 2u);
}

TEST(TableCases, SelectsByOperationAndTokens) {
  const auto cases = table_cases({.operations = {"combine"}, .tokens = {512, 4096}});
  ASSERT_FALSE(cases.empty());
  for (const TableCase& it : cases) {
    EXPECT_EQ(it.operation, "combine");
    EXPECT_TRUE(it.shape.tokens == 512 || it.shape.tokens == 4096);
  }
}

std::optional<TableOptions> parsed(std::string word) {
  std::string program = "op_table";
  std::vector<char*> argv = {program.data()};
  if (!word.empty()) {
    argv.push_back(word.data());
  }
  argv.push_back(nullptr);
  int exit_code = 0;
  return parse_table_options(static_cast<int>(argv.size()) - 1, argv.data(), &exit_code);
}

TEST(TableOptionsOfTheCommandLine, LinkMultiprocessorsAreThoseThatADaemonTakes) {
  EXPECT_EQ(parsed("").value().link_sms, 24u);
  EXPECT_EQ(parsed("--link-sms=132").value().link_sms, 132u);
  EXPECT_FALSE(parsed("--link-sms=0").has_value());
  EXPECT_FALSE(parsed("--link-sms=257").has_value());
}

TEST(TableOptionsOfTheCommandLine, CapturedIsYesNoOrBoth) {
  EXPECT_TRUE(parsed("").value().selection.captured && parsed("").value().selection.eager);
  EXPECT_FALSE(parsed("--captured=yes").value().selection.eager);
  EXPECT_FALSE(parsed("--captured=no").value().selection.captured);
  EXPECT_FALSE(parsed("--captured=maybe").has_value());
}

TEST(TableOptionsOfTheCommandLine, RowsHaveATimeAndRunsAFileToGoOnWith) {
  EXPECT_EQ(parsed("").value().row_seconds, 4);
  EXPECT_EQ(parsed("--row-seconds=0.5").value().row_seconds, 0.5);
  EXPECT_FALSE(parsed("--row-seconds=0").has_value());
  EXPECT_EQ(parsed("--resume=t.json").value().resume_file, "t.json");
}

/// A row stands for itself by its rank and its place in that rank's input.
using Key = std::pair<uint32_t, uint32_t>;

class ExchangePlanTest : public ::testing::Test {
 protected:
  using Make = ExchangePlan (*)(const BenchRouting&, uint32_t, uint32_t);

  /// What every rank's exchange tensor holds when rows were packed and sent.
  std::vector<std::vector<Key>> play(Make make) {
    plans_.clear();
    std::vector<std::vector<Key>> held;
    for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
      plans_.push_back(make(routing_, rank, 32));
      held.emplace_back(plans_[rank].exchange_rows, Key{99, 99});
      for (const RowCopy& copy : plans_[rank].pack) {
        held[rank][copy.to] = {rank, copy.from};
      }
    }
    for (uint32_t to = 0; to < shape_.ranks; ++to) {
      for (uint32_t from = 0; from < shape_.ranks; ++from) {
        const RowRange& send = plans_[from].send[to];
        const RowRange& receive = plans_[to].receive[from];
        EXPECT_EQ(send.count, receive.count);
        for (uint32_t i = 0; i < send.count; ++i) {
          held[to][receive.first + i] = held[from][send.first + i];
        }
      }
    }
    return held;
  }

  void expect_origins(const std::vector<std::vector<Key>>& held) const {
    for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
      const ExchangePlan& plan = plans_[rank];
      for (size_t i = 0; i < plan.terms.size(); ++i) {
        if (plan.terms[i] >= 0) {
          EXPECT_EQ(held[rank][static_cast<size_t>(plan.terms[i])], Key(plan.origins[i].from, plan.origins[i].to));
        }
      }
    }
  }

  const BenchShape shape_{3, 12, 128, 4, 20};
  const BenchRouting routing_{shape_, BenchInput(7, 0)};
  std::vector<ExchangePlan> plans_;
};

TEST_F(ExchangePlanTest, DispatchArrivesInTheOrderOfItsOutput) {
  const auto held = play(plan_dispatch);
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    const std::vector<BenchRow> rows = routing_.plain_rows(rank);
    ASSERT_EQ(plans_[rank].output_rows, rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const Key wanted(static_cast<uint32_t>(rows[i].source), static_cast<uint32_t>(rows[i].token));
      EXPECT_EQ(held[rank][plans_[rank].receive.front().first + i], wanted);
      EXPECT_EQ(Key(plans_[rank].origins[i].from, plans_[rank].origins[i].to), wanted);
    }
  }
}

TEST_F(ExchangePlanTest, ExpertDispatchGivesEachExpertItsTokens) {
  const auto held = play(plan_expert_dispatch);
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    const std::vector<BenchRow> rows = routing_.expanded_rows(rank, 1);
    ASSERT_EQ(plans_[rank].unpack.size(), rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      EXPECT_EQ(plans_[rank].unpack[i].to, i);
      EXPECT_EQ(held[rank][plans_[rank].unpack[i].from],
                Key(static_cast<uint32_t>(rows[i].source), static_cast<uint32_t>(rows[i].token)));
    }
  }
}

TEST_F(ExchangePlanTest, CombineAddsEachTokensRowOfEachRank) {
  expect_origins(play(plan_combine));
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    for (uint32_t token = 0; token < shape_.tokens; ++token) {
      for (uint32_t peer = 0; peer < shape_.ranks; ++peer) {
        const size_t at = token * shape_.ranks + peer;
        ASSERT_EQ(plans_[rank].terms[at] >= 0, routing_.delivered(rank, token, peer));
        if (plans_[rank].terms[at] >= 0) {
          const BenchRow row = routing_.plain_rows(peer)[plans_[rank].origins[at].to];
          EXPECT_EQ(Key(static_cast<uint32_t>(row.source), static_cast<uint32_t>(row.token)), Key(rank, token));
        }
      }
    }
  }
}

TEST_F(ExchangePlanTest, ExpertCombineAddsEachTokensRowOfEachLane) {
  expect_origins(play(plan_expert_combine));
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    for (uint32_t token = 0; token < shape_.tokens; ++token) {
      for (uint32_t lane = 0; lane < shape_.top_k; ++lane) {
        const size_t at = token * shape_.top_k + lane;
        ASSERT_EQ(plans_[rank].terms[at] >= 0, routing_.expert(rank, token, lane) >= 0);
        if (plans_[rank].terms[at] >= 0) {
          const RowCopy& origin = plans_[rank].origins[at];
          EXPECT_EQ(routing_.expanded_rows(origin.from, 1)[origin.to].expert, routing_.expert(rank, token, lane));
        }
      }
    }
  }
}

}  // namespace
}  // namespace expertd::bench
