// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/table_options.h"

#include <CLI/CLI.hpp>
#include <algorithm>

namespace expertd::bench {

namespace {

constexpr uint32_t kQuickIterations = 60;
const char* const kFooter =
    "Times are of the slowest rank, on the caller's stream, which waits for the host until every rank has enqueued, "
    "so\n"
    "no launch of the host is in them. Under MPS they are between two kernels of one thread that read the GPU's "
    "timer;\n"
    "without it from the host's store that lets the streams go until it sees what a stream writes behind the "
    "operation,\n"
    "less what that takes for nothing (SWITCH: between two events, as a client sees it that computes before and "
    "after).\n"
    "Before each iteration L2 is flushed by writing 128 MiB. Operations, copies of the same bytes over the link (the\n"
    "floor) and NCCL take turns in blocks. Halves are EXPERTD_ASYNC (send) and expertd_event_stream_wait (receive);\n"
    "captured rows are CUDA graphs of an operation, a pair or a decode layer that are replayed (QUEUED: per graph of\n"
    "100 launched back to back).\n"
    "Exit codes: 0 every output was right, 1 some case failed, 64 wrong arguments, 69 no two GPUs or no daemon.";

/// As typed.
struct Typed {
  std::string clients = "both";
  std::string captured = "both";
  std::optional<uint32_t> iterations;
  uint32_t arm_us = 100;
  uint32_t seconds = 500;
  bool no_nccl = false;
};

void add_selection(CLI::App* app, Typed* typed, TableOptions* options) {
  app->add_flag("--quick", options->selection.quick, "The main shape only (hidden 7168, top 8), 60 iterations");
  app->add_option("--only", options->selection.operations, "Operations, separated by commas")
      ->delimiter(',')
      ->check(CLI::IsMember(table_operations()))
      ->type_name("LIST");
  app->add_option("--tokens", options->selection.tokens, "Tokens per rank, separated by commas")
      ->delimiter(',')
      ->type_name("LIST");
  app->add_option("--clients", typed->clients, "Whether the client's GPUs compute besides")
      ->check(CLI::IsMember({"idle", "busy", "both"}))
      ->capture_default_str();
  app->add_option("--captured", typed->captured, "Operations in CUDA graphs alone, all others alone, or both")
      ->check(CLI::IsMember({"yes", "no", "both"}))
      ->capture_default_str();
  app->add_option("--experts", options->selection.experts, "A multiple of the GPUs")->capture_default_str();
  app->add_flag("--list", options->list, "Print the cases, and end");
}

void add_running(CLI::App* app, Typed* typed, TableOptions* options) {
  app->add_option("--runtime-directory", options->runtime_directory, "Of a running daemon; else one is started")
      ->type_name("DIR");
  app->add_option("--gpus", options->gpus, "Ordinals, separated by commas; default all")
      ->delimiter(',')
      ->check(CLI::NonNegativeNumber)
      ->type_name("LIST");
  app->add_option("--link-sms", options->link_sms, "device.link_sms of the own daemon")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app->add_option("--executor", options->executor, "Of the operations; captured ones are by sm in any case")
      ->check(CLI::IsMember({"auto", "sm", "copy_engine"}))
      ->capture_default_str();
  app->add_option("--daemon-arg", options->daemon_words, "Argument of the own daemon, as --daemon-arg=--name=value")
      ->type_name("WORD");
  app->add_option("--iterations", typed->iterations, "Timed; default 200, quick 60")->check(CLI::Range(2, 100000));
  app->add_option("--warmup", options->warmup, "Iterations before")->check(CLI::Range(1, 1000))->capture_default_str();
  app->add_option("--arm-us", typed->arm_us, "Time that the daemon gets to enqueue before the streams go on")
      ->check(CLI::Range(0, 100000))
      ->capture_default_str();
  app->add_option("--seconds", typed->seconds, "For everything; cases that would come later are not run and say so")
      ->check(CLI::Range(1, 86400))
      ->capture_default_str();
  app->add_option("--row-seconds", options->row_seconds,
                  "Of measuring per row; a row has at least 100 iterations, 30 beside GEMMs or with a layer's")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();
  app->add_option("--seed", options->seed, "Of all inputs")->capture_default_str();
  app->add_flag("--no-nccl", typed->no_nccl, "Leave out the comparison with NCCL");
  app->add_option("--json-file", options->json_file, "Write the JSON there")->type_name("FILE");
  app->add_option("--append", options->append_file, "Merge the rows into what lies there, as after a run without MPS")
      ->type_name("FILE");
  app->add_option("--resume", options->resume_file,
                  "Keep the verified rows of this commit and device that lie there, run the others, write all there")
      ->type_name("FILE");
  app->add_flag("--json", options->json, "Print JSON in place of the table");
}

}  // namespace

std::optional<TableOptions> parse_table_options(int argc, char** argv, int* exit_code) {
  constexpr int kUsage = 64;
  CLI::App app("The performance table of a node: every operation as its caller's stream sees it, beside its floor.",
               "op_table");
  TableOptions options;
  Typed typed;
  add_selection(&app, &typed, &options);
  add_running(&app, &typed, &options);
  app.footer(kFooter);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    *exit_code = app.exit(error) == 0 ? 0 : kUsage;
    return std::nullopt;
  }
  options.iterations = typed.iterations.value_or(options.selection.quick ? kQuickIterations : options.iterations);
  options.idle = typed.clients != "busy";
  options.busy = typed.clients != "idle";
  options.selection.captured = typed.captured != "no";
  options.selection.eager = typed.captured != "yes";
  options.nccl = !typed.no_nccl;
  options.arm = std::chrono::microseconds(typed.arm_us);
  options.time_max = std::chrono::seconds(typed.seconds);
  return options;
}

}  // namespace expertd::bench
