// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <iostream>
#include <limits>
#include <optional>
#include <string>

#include "client/ctl/bench_options.h"
#include "client/ctl/bench_report.h"
#include "client/ctl/bench_runner.h"
#include "client/ctl/exit_codes.h"
#include "client/ctl/format.h"

namespace expertd::ctl {

namespace {

const char* const kFooter =
    "Times are of the slowest rank, from submission to completion as the host sees it. Logical GB/s counts all rows\n"
    "delivered, link GB/s those of other ranks, per rank. The first and the last iteration of each row are verified.\n"
    "Exit codes: 0 every output was right, 1 an output was wrong, 64 wrong arguments,\n"
    "69 the daemon does not answer or the device is not available, 70 any other failure.";
constexpr uint32_t kHostIterations = 30;  // copies of main memory take long and vary little
constexpr uint32_t kQuickIterations = 20;
constexpr uint32_t kQuickWarmup = 3;
constexpr uint32_t kMost = std::numeric_limits<int32_t>::max();

/// As typed; what is not given takes a default that depends on the rest.
struct Typed {
  std::string devices = "host:0,host:1";
  std::string mode = "both";
  std::string timeout = "60s";
  bool quick = false;
  std::optional<uint32_t> expert_groups, groups_per_token;
  std::optional<uint32_t> tokens, hidden, experts, top_k, low_latency_tokens, iterations, warmup;
};

void add_options(CLI::App* app, Typed* typed, BenchOptions* options) {
  app->add_option("--socket", options->socket,
                  "The daemon's attach socket; default $EXPERTD_SOCKET or the installed one")
      ->type_name("PATH");
  app->add_option("--devices", typed->devices,
                  "One rank each: host:N, gpu:N or UUIDs, separated by commas; NAME@SOCKET is one of another daemon")
      ->capture_default_str()
      ->type_name("LIST");
  app->add_option("--mode", typed->mode, "normal (dispatch, combine), inference (low latency) or both")
      ->capture_default_str()
      ->check(CLI::IsMember({"normal", "inference", "both"}));
  app->add_flag("--quick", typed->quick, "Small shapes and few iterations");
  const auto number = [app](const char* name, std::optional<uint32_t>* value, uint32_t least, const char* sentence) {
    app->add_option(name, *value, sentence)->check(CLI::Range(least, kMost))->type_name("N");
  };
  number("--tokens", &typed->tokens, 1, "Tokens per rank in normal mode; default 4096, quick 256");
  number("--ll-tokens", &typed->low_latency_tokens, 1, "Tokens per rank in inference mode; default 128, quick 32");
  number("--hidden", &typed->hidden, 128, "Channels, a multiple of 128; default 7168, quick 1024");
  number("--experts", &typed->experts, 1, "Experts, a multiple of the ranks; default 256, quick 32");
  number("--top-k", &typed->top_k, 1, "Experts of a token; default 8, quick 4");
  number("--expert-groups", &typed->expert_groups, 1,
         "Group-limited routing: groups of experts, at most 64; default 1");
  number("--groups-per-token", &typed->groups_per_token, 1, "Of these a token uses as many; default all");
  number("--iterations", &typed->iterations, 2, "Timed iterations; default 200, on host devices 30, quick 20");
  number("--warmup", &typed->warmup, 0, "Iterations before; default 10, quick 3");
  app->add_option("--only", options->only,
                  "Run this row alone, as the table names it: \"combine bf16\"; may be repeated")
      ->type_name("ROW");
  app->add_option("--seed", options->seed, "Of all inputs")->capture_default_str()->type_name("N");
  app->add_option("--timeout", typed->timeout, "Of attaching, joining and each operation")
      ->capture_default_str()
      ->type_name("DURATION");
  app->add_flag("--plan", options->plan,
                "Print the memory that a rank of the groups would take on the first device, and end");
  app->add_flag("--json", options->json, "Print JSON in place of the table");
  app->add_option("--json-file", options->json_file, "Write the JSON to a file as well")->type_name("FILE");
  app->footer(kFooter);
}

void take_devices(const std::string& text, BenchOptions* options) {
  constexpr std::string_view kGpu = "gpu:";
  for (std::string name : CLI::detail::split(text, ',')) {
    CLI::detail::trim(name);
    if (name.empty()) {
      throw Failure(kExitUsage, "--devices \"" + text + "\" has an empty name");
    }
    const size_t at = name.find('@');
    options->sockets.push_back(at == std::string::npos ? "" : name.substr(at + 1));
    name.resize(std::min(at, name.size()));
    options->devices.push_back(name.rfind(kGpu, 0) == 0 ? "cuda:" + name.substr(kGpu.size()) : name);
  }
}

void require(bool holds, const std::string& text) {
  if (!holds) {
    throw Failure(kExitUsage, text);
  }
}

void settle(const Typed& typed, BenchOptions* options) {
  take_devices(typed.devices, options);
  const bool host = options->devices.front().rfind("host:", 0) == 0;
  options->normal = typed.mode != "inference";
  options->inference = typed.mode != "normal";
  options->tokens = typed.tokens.value_or(typed.quick ? 256 : options->tokens);
  options->low_latency_tokens = typed.low_latency_tokens.value_or(typed.quick ? 32 : options->low_latency_tokens);
  options->hidden = typed.hidden.value_or(typed.quick ? 1024 : options->hidden);
  options->experts = typed.experts.value_or(typed.quick ? 32 : options->experts);
  options->top_k = typed.top_k.value_or(typed.quick ? 4 : options->top_k);
  const uint32_t iterations = host ? kHostIterations : options->iterations;
  options->iterations = typed.iterations.value_or(typed.quick ? kQuickIterations : iterations);
  options->warmup = typed.warmup.value_or(typed.quick ? kQuickWarmup : options->warmup);
  options->timeout_ns = parse_duration_ns(typed.timeout).value_or(0);
  require(options->timeout_ns > 0, "--timeout \"" + typed.timeout + "\" is no duration such as 500ms or 60s");
  const size_t ranks = options->devices.size();
  require(options->experts % ranks == 0, "--experts " + std::to_string(options->experts) + " is no multiple of the " +
                                             std::to_string(ranks) + " devices");
  require(options->top_k <= options->experts, "--top-k " + std::to_string(options->top_k) + " is more than the " +
                                                  std::to_string(options->experts) + " experts");
  require(options->hidden % 128 == 0, "--hidden " + std::to_string(options->hidden) + " is no multiple of 128");
}

/// Group-limited routing, and that something is left to run.
void settle_rows(const Typed& typed, BenchOptions* options) {
  BenchExpertGroups& groups = options->expert_groups;
  groups.count = typed.expert_groups.value_or(1);
  groups.per_token = typed.groups_per_token.value_or(groups.count);
  require(groups.count <= 64 && options->experts % groups.count == 0,
          "--expert-groups " + std::to_string(groups.count) + " is more than 64 or does not divide the " +
              std::to_string(options->experts) + " experts");
  require(groups.per_token <= groups.count && options->top_k <= options->experts / groups.count * groups.per_token,
          "--groups-per-token " + std::to_string(groups.per_token) +
              " is more than the groups, or leaves fewer experts than --top-k " + std::to_string(options->top_k));
  std::string known;
  for (const bool low_latency : {false, true}) {
    BenchOptions all = *options;
    all.only.clear();
    for (const BenchRowSpec& row : rows_of_mode(all, low_latency)) {
      known += "\n  " + row.operation + " " + row.flags;
    }
  }
  for (const std::string& row : options->only) {
    require((known + "\n").find("\n  " + row + "\n") != std::string::npos,
            "--only \"" + row + "\" is no row of the modes asked for; these are:" + known);
  }
}

void print_plan(const BenchOptions& options) {
  std::vector<BenchPlan> plans;
  BenchRank rank(options, 0);
  for (const bool low_latency : {false, true}) {
    if (low_latency ? options.inference : options.normal) {
      plans.push_back({low_latency ? "inference" : "normal", rank.plan(options.shape(low_latency), low_latency)});
    }
  }
  std::cout << (options.json ? plan_json(plans) : plan_table(plans));
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::trunc);
  file << text;
  file.close();
  if (!file) {
    throw Failure(kExitInternal, "cannot write " + path);
  }
}

void run(const BenchOptions& options) {
  const BenchResult result = run_rows(options);
  const std::string document = bench_json(options, result);
  if (!options.json_file.empty()) {
    write_file(options.json_file, document);
  }
  std::cout << (options.json ? document : bench_table(result));
  if (result.verified == 0) {
    throw Failure(kExitInternal, "no output was checked");
  }
  // JSON stays JSON; it has the number itself.
  (options.json ? std::cerr : std::cout) << "verified " << result.verified << " outputs" << std::endl;
}

}  // namespace

int run_bench(int argc, char** argv) {
  Typed typed;
  BenchOptions options;
  CLI::App app("Runs every operation through the daemon, times it and verifies its outputs.", "expertctl bench");
  try {
    add_options(&app, &typed, &options);
    app.parse(argc, argv);
    settle(typed, &options);
    settle_rows(typed, &options);
    options.plan ? print_plan(options) : run(options);
    return kExitOk;
  } catch (const CLI::Success& asked) {  // --help
    app.exit(asked, std::cout, std::cerr);
    return kExitOk;
  } catch (const CLI::ParseError& wrong) {
    std::cerr << "expertctl bench: " << wrong.what() << "\nSee: expertctl bench --help\n";
    return kExitUsage;
  } catch (const Failure& failure) {
    if (options.json) {
      std::cout << failure_json(failure.what(), failure.exit_code());
    } else {
      std::cerr << "expertctl bench: " << failure.what() << "\n";
    }
    return failure.exit_code();
  } catch (const std::exception& error) {
    std::cerr << "expertctl bench: internal error: " << error.what() << "\n";
    return kExitInternal;
  }
}

}  // namespace expertd::ctl
