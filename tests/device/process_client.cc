// SPDX-License-Identifier: Apache-2.0
#include "tests/device/process_client.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>

#include "tests/device/client_exchange.h"
#include "tests/device/client_exchange_ht.h"
#include "tests/device/client_graphs.h"
#include "tests/device/client_hooks.h"
#include "tests/device/client_layout.h"
#include "tests/device/client_rounds.h"
#include "tests/support/temp_dir.h"

namespace expertd::device_test {
namespace {

using support::OpEnd;
using support::Outcome;
using support::outcome_of;

constexpr uint64_t kNsPerMs = 1'000'000;
constexpr uint64_t kDefaultOpMs = 20'000;

std::string failed(const Outcome& outcome, int32_t rank, double ms, bool ran) {
  std::ostringstream text;
  text << "failed " << expertd_reason_name(outcome.status.reason) << " rank=" << rank << " ms=" << ms << " ran=" << ran
       << ": " << outcome.message;
  return text.str();
}

std::string said(const Outcome& outcome, const std::string& extra = "") {
  return outcome.ok() ? "ok" + extra : failed(outcome, -1, 0, false);
}

std::string said(const OpEnd& end) {
  return end.outcome.ok() ? "ok ms=" + std::to_string(end.wait_ms)
                          : failed(end.outcome, end.result.rank, end.wait_ms, end.result.execute_ns != 0);
}

std::string said(const std::string& problem, const std::string& extra) {
  return problem.empty() ? "ok" + extra : "failed SYSTEM rank=-1 ms=0 ran=0: " + problem;
}

bool line_waits() {
  pollfd entry{STDIN_FILENO, POLLIN, 0};
  return std::cin.rdbuf()->in_avail() > 0 || ::poll(&entry, 1, 0) > 0;
}

class Client {
 public:
  Client();
  std::string run(std::istringstream& words);

 private:
  std::string gpus();
  std::string free_bytes();
  std::string cuda(uint64_t ordinal);
  std::string count(const std::string& path);
  std::string attach(std::istringstream& words);
  std::string memory(std::istringstream& words);
  std::string join(std::istringstream& words);
  std::string layout(uint64_t cases);
  std::string hooks(std::istringstream& words);
  std::string become(uint64_t uid);
  std::string masked(std::istringstream& words);
  std::string mask(std::istringstream& words);
  template <typename Cases>
  std::string exchange(std::istringstream& words);
  std::string batches(uint64_t count, uint32_t depth, bool until_a_line);
  OpEnd barrier(uint64_t timeout_ns);
  std::string sync();
  std::string submit(uint64_t ms);
  std::string query();
  std::string block();
  void* stream() const { return on_gpu_ ? gpu_.stream() : nullptr; }

  std::map<std::string, std::function<std::string(std::istringstream&)>> verbs_;
  ClientGpu gpu_;
  bool on_gpu_ = false;
  support::ClientSession session_;
  Rounds rounds_;
  Layouts layouts_;
  Graphs graphs_{&rounds_};
  Hooks hooks_;
  bool hooks_open_ = false;
  OpCounts own_counts_;
  OpCounts* counts_ = &own_counts_;
  expertd_event_t event_{};
};

uint64_t number(std::istringstream& words, uint64_t otherwise) {
  uint64_t value = 0;
  return words >> value ? value : otherwise;
}

Client::Client() {
  verbs_ = {
      {"gpus", [this](auto&) { return gpus(); }},
      {"free", [this](auto&) { return free_bytes(); }},
      {"cuda", [this](auto& words) { return cuda(number(words, 0)); }},
      {"attach", [this](auto& words) { return attach(words); }},
      {"memory", [this](auto& words) { return memory(words); }},
      {"release", [this](auto&) { return said(rounds_.release()); }},
      {"join", [this](auto& words) { return join(words); }},
      {"leave", [this](auto&) { return said(rounds_.leave()); }},
      {"detach", [this](auto&) { return said(session_.detach()); }},
      {"state", [this](auto&) { return said(outcome_of(expertd_session_state(session_.get()))); }},
      {"reattach",
       [this](auto& words) {
         return said(outcome_of(expertd_reattach(session_.get(), number(words, 5000) * kNsPerMs)));
       }},
      {"barrier", [this](auto& words) { return said(barrier(number(words, 0) * kNsPerMs)); }},
      {"sync", [this](auto&) { return sync(); }},
      {"submit", [this](auto& words) { return submit(number(words, 0)); }},
      {"wait", [this](auto& words) { return said(support::finish(event_, number(words, 0) * kNsPerMs)); }},
      {"query", [this](auto&) { return query(); }},
      {"hold", [this](auto&) { return said(gpu_.close_gate(), ""); }},
      {"open",
       [this](auto&) {
         gpu_.open_gate();
         return std::string("ok");
       }},
      {"block", [this](auto&) { return block(); }},
      {"illegal", [this](auto&) { return "ok error=" + gpu_.store_to_nowhere(); }},
      {"rounds",
       [this](auto& words) {
         const uint64_t count = number(words, 1);
         return batches(count, static_cast<uint32_t>(number(words, 1)), false);
       }},
      {"loop", [this](auto& words) { return batches(UINT64_MAX, static_cast<uint32_t>(number(words, 1)), true); }},
  };
  verbs_["capture"] = [this](auto&) { return said(graphs_.capture(), ""); };
  verbs_["replay"] = [this](auto& words) {
    const uint64_t seed = number(words, 1);
    const uint64_t count = number(words, 1);
    return said(graphs_.replay(seed, count, number(words, 0)), " replays=" + std::to_string(count));
  };
  verbs_["masked"] = [this](auto& words) { return masked(words); };
  verbs_["mask"] = [this](auto& words) { return mask(words); };
  verbs_["replay-time"] = [this](auto&) {
    double pair_us = 0;
    const std::string problem = graphs_.time(&pair_us);
    return said(problem, " pair_us=" + std::to_string(pair_us));
  };
  verbs_["issue"] = [this](auto&) { return said(rounds_.issue(counts_)); };
  verbs_["replay-alone"] = [this](auto&) { return said(graphs_.replay_alone(), ""); };
  verbs_["layout"] = [this](auto& words) { return layout(number(words, 10)); };
  verbs_["hooks"] = [this](auto& words) { return hooks(words); };
  verbs_["become"] = [this](auto& words) { return become(number(words, 0)); };
  verbs_["exchange"] = [this](auto& words) { return exchange<Exchanges>(words); };
  verbs_["exchange-ht"] = [this](auto& words) { return exchange<HtExchanges>(words); };
  verbs_["count"] = [this](auto& words) {
    std::string path;
    words >> path;
    return count(path);
  };
}

/// Random cases of one kind: the first seed, how many, this rank, and "nodes" if the ranks are on two.
template <typename Cases>
std::string Client::exchange(std::istringstream& words) {
  const uint64_t seed = number(words, 1);
  const uint64_t count = number(words, 10);
  const auto rank = static_cast<uint32_t>(number(words, 0));
  Cases cases;
  std::string where;
  words >> where;
  if (where == "nodes") {
    cases.set_over_nodes();
  }
  std::string problem = cases.open(session_.get(), on_gpu_ ? &gpu_ : nullptr);
  for (uint64_t i = 0; i < count && problem.empty(); ++i) {
    problem = cases.run(seed + i, rank);
  }
  return said(problem, " cases=" + std::to_string(count));
}

std::string Client::gpus() {
  std::string problem;
  const std::string text = list_gpus(&problem);
  return said(problem, text);
}

std::string Client::free_bytes() {
  std::string problem;
  const std::string text = free_memory(&problem);
  return said(problem, text);
}

std::string Client::cuda(uint64_t ordinal) {
  return said(gpu_.is_open() ? std::string() : gpu_.open(static_cast<int>(ordinal)), "");
}

std::string Client::count(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  void* shared = ::mmap(nullptr, sizeof(OpCounts), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (fd < 0 || shared == MAP_FAILED) {
    return said("mapping " + path, "");
  }
  counts_ = static_cast<OpCounts*>(shared);
  return "ok";
}

std::string Client::attach(std::istringstream& words) {
  std::string socket;
  std::string device;
  std::string name;
  words >> socket >> device >> name;
  on_gpu_ = device.rfind("cuda:", 0) == 0;
  const int ordinal = on_gpu_ ? std::atoi(device.c_str() + 5) : 0;
  if (on_gpu_ && !gpu_.is_open()) {
    const std::string problem = gpu_.open(ordinal);
    if (!problem.empty()) {
      return said(problem, "");
    }
  }
  if (on_gpu_ && gpu_.ordinal() != ordinal) {
    return said("the stream is on another GPU than the session", "");
  }
  session_ = support::ClientSession(socket, device, name);
  if (!session_.ok()) {
    return said(session_.attached());
  }
  const expertd_session_info_t info = session_.info();
  std::ostringstream text;
  text << "ok session=" << info.session_id << " generation=" << info.generation << " mps=" << info.mps_active
       << " uuid=" << info.device << " pid=" << ::getpid();
  return text.str();
}

std::string Client::memory(std::istringstream& words) {
  std::string kind;
  words >> kind;
  return said(rounds_.place(session_.get(), on_gpu_ ? &gpu_ : nullptr, kind));
}

std::string Client::join(std::istringstream& words) {
  std::string name;
  std::string mode;
  uint32_t rank = 0;
  uint32_t ranks = 0;
  words >> name >> rank >> ranks >> mode;
  return said(rounds_.join(name, rank, ranks, mode, number(words, kDefaultOpMs) * kNsPerMs));
}

std::string Client::layout(uint64_t cases) {
  double many_us = 0;
  double alone_us = 0;
  std::string problem = layouts_.open(session_.get(), on_gpu_ ? &gpu_ : nullptr);
  problem = problem.empty() ? layouts_.run(cases) : problem;
  if (on_gpu_) {
    problem = problem.empty() ? layouts_.time_out() : problem;
    problem = problem.empty() ? layouts_.time(&many_us, &alone_us) : problem;
  }
  return said(problem, " cases=" + std::to_string(cases) + " local=" + std::to_string(Layouts::local_operations()) +
                           " many_us=" + std::to_string(many_us) + " alone_us=" + std::to_string(alone_us));
}

std::string Client::hooks(std::istringstream& words) {
  const auto seed = static_cast<uint32_t>(number(words, 0));
  const auto rounds = static_cast<uint32_t>(number(words, 1));
  std::string problem = hooks_open_ ? std::string() : hooks_.open(session_.get(), on_gpu_ ? &gpu_ : nullptr);
  hooks_open_ = problem.empty();
  problem = problem.empty() ? hooks_.run(rounds_.group(), rounds_.rank(), rounds_.ranks(), seed, rounds) : problem;
  return said(problem, " double_batches=" + std::to_string(rounds));
}

/// Before the first call into CUDA, which remembers whose process it is in.
std::string Client::become(uint64_t uid) {
  const auto id = static_cast<uid_t>(uid);
  if (::setresgid(id, id, id) != 0 || ::setresuid(id, id, id) != 0) {
    return said("this process may not become another user's", "");
  }
  // The change took it away, and with it the process's own /proc.
  static_cast<void>(::prctl(PR_SET_DUMPABLE, 1));
  return said("", " uid=" + std::to_string(::getuid()));
}

std::string Client::masked(std::istringstream& words) {
  const uint64_t count = number(words, 20);
  std::string text;
  std::string wrong = rounds_.masked(1, 0, &text);
  if (wrong.empty()) {
    std::cout << "ok looping" << std::endl;
    wrong = rounds_.masked(count, number(words, 0), &text);
  }
  return said(wrong, text);
}

std::string Client::mask(std::istringstream& words) {
  const uint64_t exclude = number(words, 0);
  const uint64_t readmit = number(words, 0);
  uint64_t lost = 0;
  uint64_t excluded = 0;
  uint64_t epoch = 0;
  const Outcome outcome = outcome_of(expertd_group_mask(rounds_.group(), exclude, readmit, &lost, &excluded, &epoch));
  return said(outcome, " lost=" + std::to_string(lost) + " excluded=" + std::to_string(excluded) +
                           " epoch=" + std::to_string(epoch));
}

std::string Client::batches(uint64_t count, uint32_t depth, bool until_a_line) {
  std::vector<double> times;
  uint64_t done = 0;
  for (; done < count && !(until_a_line && done != 0 && line_waits()); ++done) {
    const uint64_t begin = support::monotonic_ns();
    const BatchEnd batch = rounds_.batch(depth, counts_);
    if (!batch.end.outcome.ok()) {
      return failed(batch.end.outcome, batch.end.result.rank, batch.end.wait_ms, batch.ran) +
             " after batches=" + std::to_string(done);
    }
    if (!batch.wrong.empty()) {
      return "failed " + batch.wrong + " in batch " + std::to_string(done);
    }
    if (times.size() < 100'000) {
      times.push_back(support::elapsed_ms(begin) * 1e3);
    }
    if (until_a_line && done == 0) {
      std::cout << "ok looping" << std::endl;
    }
  }
  if (until_a_line && times.size() > 1) {
    times.pop_back();  // it may have waited for a peer that was stopped before this one
  }
  std::sort(times.begin(), times.end());
  std::ostringstream text;
  text << "ok batches=" << done << " depth=" << depth << " p50_us=" << (times.empty() ? 0 : times[times.size() / 2])
       << " p99_us=" << (times.empty() ? 0 : times[(times.size() * 99 + 99) / 100 - 1])
       << " max_us=" << (times.empty() ? 0 : times.back());
  return text.str();
}

OpEnd Client::barrier(uint64_t timeout_ns) {
  OpEnd end;
  end.outcome = outcome_of(expertd_barrier(rounds_.group(), stream(), 0, timeout_ns, &event_));
  return end.outcome.ok() ? support::finish(event_) : end;
}

// After a failure the ranks may stand at different operations: those that are behind see the failures of the ones they
// missed, until a barrier has everybody.
std::string Client::sync() {
  constexpr uint64_t kTryNs = 500'000'000;
  OpEnd end;
  for (int tries = 1; tries <= 20; ++tries) {
    end = barrier(kTryNs);
    if (end.outcome.ok()) {
      return "ok tries=" + std::to_string(tries);
    }
  }
  return said(end);
}

std::string Client::submit(uint64_t ms) {
  // Not EXPERTD_ASYNC: the stream is what waits.
  return said(outcome_of(expertd_barrier(rounds_.group(), stream(), 0, ms * kNsPerMs, &event_)));
}

std::string Client::query() {
  int done = 0;
  const Outcome outcome = outcome_of(expertd_event_query(event_, &done));
  return said(outcome, " done=" + std::to_string(done));
}

std::string Client::block() {
  std::cout << "ok blocking" << std::endl;
  if (!on_gpu_) {
    const OpEnd end = support::finish(event_);
    return "ok at=" + std::to_string(support::monotonic_ns()) +
           " error=" + expertd_reason_name(end.outcome.status.reason);
  }
  const std::string error = gpu_.synchronize();
  return "ok at=" + std::to_string(support::monotonic_ns()) + " error=" + error;
}

std::string Client::run(std::istringstream& words) {
  std::string verb;
  words >> verb;
  const auto found = verbs_.find(verb);
  return found == verbs_.end() ? said("unknown verb " + verb, "") : found->second(words);
}

}  // namespace

int run_process_client() {
  // Kernels that are loaded when they are first launched hang beside a stream that waits.
  ::setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  Client client;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::cout << client.run(words) << std::endl;
  }
  // Without destructors: they would wait for streams that are held back.
  std::fflush(stdout);
  ::_exit(0);
}

}  // namespace expertd::device_test
