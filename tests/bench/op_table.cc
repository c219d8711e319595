// SPDX-License-Identifier: Apache-2.0
// The performance table of a node: every operation as its caller's stream sees it, with an idle and a busy client,
// verified, beside the floor of the link and NCCL, which take turns with it. One run is one state of MPS. tests/bench/
// README.md says what is timed and how.
#include <cuda_runtime_api.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "expertd.h"
#include "tests/bench/bench_daemon.h"
#include "tests/bench/bench_figures.h"
#include "tests/bench/table/cublas.h"
#include "tests/bench/table/table_options.h"
#include "tests/bench/table/table_row.h"
#include "tests/bench/table/table_runner.h"

namespace expertd::bench {

namespace {

using nlohmann::json;

constexpr int kOk = 0;
constexpr int kFailed = 1;
constexpr int kUsage = 64;
constexpr int kUnavailable = 69;
constexpr size_t kGpusLeast = 2;

/// Of what makes the program's own measuring right; before CUDA starts.
void set_environment() {
  // With the default of 8 the parked stream of a rank could hold back another one of its process.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  // Everything here is point to point: NCCL needs no multicast over NVLink for it.
  setenv("NCCL_NVLS_ENABLE", "0", 1);
}

std::vector<int> chosen_gpus(const TableOptions& options, std::string* problem) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    *problem = std::string("no GPU can be used: ") + cudaGetErrorString(error);
    return {};
  }
  std::vector<int> gpus = options.gpus;
  for (int gpu = 0; options.gpus.empty() && gpu < count; ++gpu) {
    gpus.push_back(gpu);
  }
  if (gpus.size() < kGpusLeast) {
    *problem = std::to_string(gpus.size()) + " GPU here, two are needed";
  }
  for (const int gpu : gpus) {
    if (gpu >= count) {
      *problem = "--gpus names " + std::to_string(gpu) + ", there are " + std::to_string(count);
    }
  }
  return gpus;
}

std::vector<std::string> daemon_words(const TableOptions& options, const std::vector<int>& gpus) {
  std::string list;
  for (const int gpu : gpus) {
    list += (list.empty() ? "" : ",") + std::to_string(gpu);
  }
  std::vector<std::string> words = {"--device-gpus=" + list, "--device-hosts=0",
                                    "--device-link-sms=" + std::to_string(options.link_sms)};
  words.insert(words.end(), options.daemon_words.begin(), options.daemon_words.end());
  return words;
}

std::string driver_version() {
  int version = 0;
  if (std::ifstream file("/proc/driver/nvidia/version"); file) {
    std::string word;
    // "NVRM version: NVIDIA UNIX ... Kernel Module  580.159  ...": the first word that begins with a digit.
    while (file >> word) {
      if (word.find('.') != std::string::npos && word.find_first_not_of("0123456789.") == std::string::npos) {
        return word;
      }
    }
  }
  return cudaDriverGetVersion(&version) == cudaSuccess ? "CUDA " + std::to_string(version) : "unknown";
}

json document_of(const TableOptions& options, const TableRunner& runner, const std::string& daemon_version,
                 const std::vector<TableRow>& rows) {
  json list = json::array();
  for (const TableRow& row : rows) {
    list.push_back(row_json(row));
  }
  return {{"commit", EXPERTD_COMMIT},
          {"date", utc_now()},
          {"device", runner.device_name()},
          {"driver", driver_version()},
          {"mps", runner.mps()},
          {"ranks", runner.ranks()},
          {"daemon", daemon_version},
          {"client", expertd_version()},
          {"iterations", options.iterations},
          {"arm_us", options.arm.count()},
          {"gpu_timer_step_ns", runner.gpu_timer_step_ns()},
          {"l2", "flushed by writing " + std::to_string(StreamTimer::kFlushBytes >> 20) + " MiB before each iteration"},
          {"load", runner.load_kind()},
          {"nccl", runner.nccl()},
          {"rows", list}};
}

/// Whole or not at all, whenever the program ends.
void write_file(const std::string& path, const json& document) {
  const std::string fresh = path + ".new";
  std::ofstream file(fresh);
  file << document.dump(1) << "\n";
  file.close();
  if (!file || std::rename(fresh.c_str(), path.c_str()) != 0) {
    throw std::runtime_error(path + " cannot be written");
  }
}

/// Read before anything is measured, so that a wrong name costs no run.
json read_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    throw std::runtime_error(path + " cannot be read");
  }
  return merged(json::parse(file), {{"rows", json::array()}});
}

/// What --resume may keep; null where there is nothing, also where the file is no table.
json read_resumable(const std::string& path, const std::string& device) {
  std::ifstream file(path);
  if (path.empty() || !file) {
    return {};
  }
  const json kept = resumable(json::parse(file, nullptr, false), EXPERTD_COMMIT, device);
  std::cerr << "op_table: " + path + ": " + std::to_string(kept.is_null() ? 0 : kept["rows"].size()) +
                   " rows of commit " + EXPERTD_COMMIT + " and " + device + " are kept\n";
  return kept;
}

/// The row that runs is the last; what comes behind it says that it was not run.
void stop_on_signals() {
  struct sigaction action {};
  action.sa_handler = [](int) { table_stopped.store(true, std::memory_order_relaxed); };
  action.sa_flags = SA_RESTART;
  for (const int number : {SIGTERM, SIGINT, SIGHUP}) {
    sigaction(number, &action, nullptr);
  }
}

bool has_mps(int gpu) {
  int mps = 0;
  return cudaDeviceGetAttribute(&mps, cudaDevAttrMpsEnabled, gpu) == cudaSuccess && mps != 0;
}

/// The last lines of an own daemon's log that are more than information.
void tell_warnings(const std::string& log_file) {
  constexpr size_t kMost = 20;
  std::deque<std::string> lines;
  std::ifstream file(log_file);
  for (std::string line; std::getline(file, line);) {
    if (line.find("level=info") == std::string::npos) {
      lines.push_back(line);
    }
    if (lines.size() > kMost) {
      lines.pop_front();
    }
  }
  for (const std::string& line : lines) {
    std::cerr << "daemon: " + line + "\n";
  }
}

/// Where the time went, so that it can be seen what more rows would take.
void tell_seconds(const std::vector<TableRow>& rows, double all_s) {
  double set_up_s = 0;
  double verify_s = 0;
  double measure_s[2] = {};  // [busy]
  for (const TableRow& row : rows) {
    set_up_s += row.set_up_s;
    verify_s += row.verify_s;
    measure_s[row.busy] += row.measure_s - row.verify_s;
  }
  const double known_s = set_up_s + verify_s + measure_s[0] + measure_s[1];
  std::cerr << "figure seconds of the table: " + fixed(all_s, 1) + " in all for " + std::to_string(rows.size()) +
                   " rows: set up " + fixed(set_up_s, 1) + ", verified " + fixed(verify_s, 1) + ", measured idle " +
                   fixed(measure_s[0], 1) + ", busy " + fixed(measure_s[1], 1) + ", joining and else " +
                   fixed(all_s - known_s, 1) + "\n";
}

/// Where there is no cuBLAS, which is no failure.
void leave_out_layers(std::vector<TableCase>* cases) {
  const auto is_layer = [](const TableCase& it) { return it.operation == "layer"; };
  if (std::any_of(cases->begin(), cases->end(), is_layer) && Cublas::open() == nullptr) {
    std::cerr << "op_table: no layers: cuBLAS cannot be loaded\n";
    std::erase_if(*cases, is_layer);
  }
}

int run(const TableOptions& options) {
  std::string problem;
  const std::vector<int> gpus = chosen_gpus(options, &problem);
  if (!problem.empty()) {
    std::cerr << "op_table: " + problem + "\n";
    return kUnavailable;
  }
  TableSelection selection = options.selection;
  selection.ranks = static_cast<uint32_t>(gpus.size());
  // Without MPS `auto` is by copy engines anyway.
  selection.copies = options.executor == "auto" && has_mps(gpus.front());
  if (selection.experts == 0 || selection.experts % selection.ranks != 0) {
    std::cerr << "op_table: --experts " << selection.experts << " is no multiple of " << gpus.size() << " GPUs\n";
    return kUsage;
  }
  std::vector<TableCase> cases = table_cases(selection);
  const json before = options.append_file.empty() ? json() : read_file(options.append_file);
  std::unique_ptr<BenchDaemon> daemon;
  const auto start_daemon = [&]() -> DaemonPlace {
    if (daemon != nullptr) {
      tell_warnings(daemon->log_file());
    }
    daemon.reset();
    daemon = std::make_unique<BenchDaemon>(options.runtime_directory, daemon_words(options, gpus));
    return {daemon->attach_socket(), daemon->pid()};
  };
  const DaemonPlace place = start_daemon();
  const std::string version = daemon->version();
  TableRunner runner(options, gpus, place,
                     options.runtime_directory.empty() ? TableRunner::Renew(start_daemon) : TableRunner::Renew());
  leave_out_layers(&cases);
  const json kept = read_resumable(options.resume_file, runner.device_name());
  const auto whole = [&](const std::vector<TableRow>& rows) {
    const json document = document_of(options, runner, version, rows);
    return kept.is_null() ? document : merged(kept, document);
  };
  // After each row, so that a run that is stopped leaves what it had.
  const auto keep = [&](const std::vector<TableRow>& rows) {
    const json document = document_of(options, runner, version, rows);
    if (!options.resume_file.empty()) {
      write_file(options.resume_file, whole(rows));
    }
    if (!options.json_file.empty()) {
      write_file(options.json_file, document);
    }
    if (!options.append_file.empty()) {
      write_file(options.append_file, merged(before, document));
    }
  };
  const uint64_t begin_ns = now_ns();
  const std::vector<TableRow> rows = runner.run(
      cases, [&](const TableRow& row) { return has_row(kept, row); }, keep);
  tell_seconds(rows, static_cast<double>(now_ns() - begin_ns) * 1e-9);
  keep(rows);
  if (options.runtime_directory.empty() && daemon != nullptr) {
    tell_warnings(daemon->log_file());
  }
  const json document = whole(rows);
  const json& all = document.at("rows");
  const auto right =
      std::count_if(all.begin(), all.end(), [](const json& row) { return row.value("verified", false); });
  std::cout << (options.json ? document.dump(1) + "\n"
                             : table_text(document) + "verified " + std::to_string(right) + " of " +
                                   std::to_string(all.size()) + " rows\n");
  return !all.empty() && all_verified(document) ? kOk : kFailed;
}

}  // namespace

}  // namespace expertd::bench

int main(int argc, char** argv) {
  using namespace expertd::bench;
  int exit_code = 0;
  const std::optional<TableOptions> options = parse_table_options(argc, argv, &exit_code);
  if (!options.has_value()) {
    return exit_code;
  }
  if (options->list) {
    for (const TableCase& it : table_cases(options->selection)) {
      std::cout << it.name() << "\n";
    }
    return kOk;
  }
  try {
    set_environment();
    stop_on_signals();
    return run(*options);
  } catch (const std::exception& error) {
    std::cerr << "op_table: " << error.what() << "\n";
    return kUnavailable;
  }
}
