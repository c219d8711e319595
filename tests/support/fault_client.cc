// SPDX-License-Identifier: Apache-2.0
// The fault client's program: one session and one group, driven by lines (see fault_client.h). Its rounds dispatch rows
// that every expert returns as they came, so that the combined row is the sent one times the number of ranks that took
// part, exactly in bf16.
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <iostream>
#include <sstream>

#include "tests/support/fault_client.h"
#include "tests/support/rank_threads.h"
#include "tests/support/temp_dir.h"

namespace expertd::support {
namespace {

constexpr uint32_t kTokens = 16;
constexpr uint32_t kHidden = 128;
constexpr uint32_t kTopK = 2;

uint16_t bf16_of(float value) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}
float float_of(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

std::string failed(const Outcome& outcome, int32_t rank, double ms) {
  std::ostringstream text;
  text << "failed " << expertd_reason_name(outcome.status.reason) << " rank=" << rank << " ms=" << ms << ": "
       << outcome.message;
  return text.str();
}

std::string said(const Outcome& outcome, const std::string& extra = "") {
  return outcome.ok() ? "ok" + extra : failed(outcome, -1, 0);
}

std::string said(const OpEnd& end) {
  std::ostringstream text;
  text << "ok ms=" << end.wait_ms << " degraded=" << end.result.degraded << " mask=" << end.result.rank_mask;
  return end.outcome.ok() ? text.str() : failed(end.outcome, end.result.rank, end.wait_ms);
}

bool line_waits() {
  pollfd entry{STDIN_FILENO, POLLIN, 0};
  return std::cin.rdbuf()->in_avail() > 0 || ::poll(&entry, 1, 0) > 0;
}

class Client {
 public:
  std::string run(const std::string& verb, std::istringstream& words);

 private:
  std::string run_simple(const std::string& verb, uint64_t number);
  std::string attach(std::istringstream& words);
  std::string join(std::istringstream& words);
  std::string rounds(uint64_t count, bool until_a_line);
  std::string masked(uint64_t count, uint64_t mask = 0);
  OpEnd round(std::string* wrong);
  OpEnd dispatch(uint64_t number);
  OpEnd combine(uint32_t rows);
  std::string check(uint64_t number, uint64_t mask) const;
  std::string sync();
  std::string fork_child();
  std::string cycles(std::istringstream& words);
  bool allocate();

  ClientSession session_;
  expertd_group_t* group_ = nullptr;
  uint32_t rank_ = 0;
  uint32_t ranks_ = 0;
  uint64_t round_ = 0;
  uint64_t degraded_ = 0;
  uint16_t* x_ = nullptr;         // [T,H]
  int64_t* topk_idx_ = nullptr;   // [T,K]
  uint16_t* recv_x_ = nullptr;    // [R*T,H]
  int64_t* recv_idx_ = nullptr;   // [R*T,K]
  uint16_t* combined_ = nullptr;  // [T,H]
  expertd_handle_t handle_{};
  expertd_event_t event_{};
  void* memory_ = nullptr;
  expertd_buffer_t* window_ = nullptr;
};

std::string Client::attach(std::istringstream& words) {
  std::string socket;
  std::string device;
  words >> socket >> device;
  session_ = ClientSession(socket, device, "fault");
  if (!session_.ok()) {
    return said(session_.attached());
  }
  std::ostringstream text;
  text << "ok session=" << session_.info().session_id << " generation=" << session_.info().generation;
  return text.str();
}

bool Client::allocate() {
  if (x_ == nullptr) {
    x_ = session_.alloc<uint16_t>(kTokens * kHidden);
    topk_idx_ = session_.alloc<int64_t>(kTokens * kTopK);
    recv_x_ = session_.alloc<uint16_t>(size_t{64} * kTokens * kHidden);
    recv_idx_ = session_.alloc<int64_t>(size_t{64} * kTokens * kTopK);
    combined_ = session_.alloc<uint16_t>(kTokens * kHidden);
  }
  return combined_ != nullptr;
}

std::string Client::join(std::istringstream& words) {
  std::string name;
  std::string loss;
  words >> name >> rank_ >> ranks_ >> loss;
  if (!allocate()) {
    return "failed to allocate";
  }
  expertd_group_options_t options = small_group(name.c_str(), rank_, ranks_);
  options.on_rank_loss = loss == "mask" ? EXPERTD_RANK_LOSS_MASK : EXPERTD_RANK_LOSS_FAIL;
  round_ = 0;
  return said(outcome_of(expertd_group_join(session_.get(), &options, &group_)));
}

// Token t of rank r goes to the ranks r + t and r + t + 1, to an expert of each.
OpEnd Client::dispatch(uint64_t number) {
  for (uint32_t token = 0; token < kTokens; ++token) {
    for (uint32_t lane = 0; lane < kTopK; ++lane) {
      topk_idx_[token * kTopK + lane] = int64_t{(rank_ + token + lane) % ranks_} * 2 + token % 2;
    }
    for (uint32_t i = 0; i < kHidden; ++i) {
      x_[token * kHidden + i] = bf16_of(static_cast<float>((number + rank_ * 5 + token * 3 + i) % 64));
    }
  }
  expertd_dispatch_args_t args = EXPERTD_INIT(expertd_dispatch_args_t);
  args.x = x_;
  args.dtype = EXPERTD_BF16;
  args.topk_idx = topk_idx_;
  args.idx_type = EXPERTD_I64;
  args.tokens = kTokens;
  args.capacity_rows = ranks_ * kTokens;
  args.recv_x = recv_x_;
  args.recv_topk_idx = recv_idx_;
  OpEnd end;
  end.outcome = outcome_of(expertd_dispatch(group_, &args, nullptr, &handle_, &event_));
  return end.outcome.ok() ? finish(event_) : end;
}

OpEnd Client::combine(uint32_t rows) {
  expertd_combine_args_t args = EXPERTD_INIT(expertd_combine_args_t);
  args.x = recv_x_;
  args.rows = rows;
  args.handle = handle_;
  args.tokens = kTokens;
  args.combined_x = combined_;
  OpEnd end;
  end.outcome = outcome_of(expertd_combine(group_, &args, nullptr, &event_));
  return end.outcome.ok() ? finish(event_) : end;
}

std::string Client::check(uint64_t number, uint64_t mask) const {
  for (uint32_t token = 0; token < kTokens; ++token) {
    uint64_t targets = 0;
    for (uint32_t lane = 0; lane < kTopK; ++lane) {
      targets |= uint64_t{1} << (rank_ + token + lane) % ranks_;
    }
    const auto copies = static_cast<float>(std::popcount(targets & mask));
    for (uint32_t i = 0; i < kHidden; ++i) {
      const auto sent = static_cast<float>((number + rank_ * 5 + token * 3 + i) % 64);
      if (float_of(combined_[token * kHidden + i]) != copies * sent) {
        std::ostringstream text;
        text << "failed WRONG_RESULT token " << token << " channel " << i << " mask " << mask << ": "
             << float_of(combined_[token * kHidden + i]) << ", not " << copies * sent;
        return text.str();
      }
    }
  }
  return {};
}

OpEnd Client::round(std::string* wrong) {
  const uint64_t number = round_++;
  OpEnd sent = dispatch(number);
  if (!sent.outcome.ok()) {
    return sent;
  }
  OpEnd back = combine(sent.result.recv_rows);
  if (back.outcome.ok()) {
    *wrong = check(number, sent.result.rank_mask & back.result.rank_mask);
    degraded_ += back.result.degraded != 0 ? 1 : 0;
    static_cast<void>(expertd_handle_free(group_, handle_));
  }
  return back;
}

std::string Client::rounds(uint64_t count, bool until_a_line) {
  uint64_t done = 0;
  degraded_ = 0;
  for (; done < count && !(until_a_line && line_waits()); ++done) {
    std::string wrong;
    const OpEnd end = round(&wrong);
    if (!end.outcome.ok()) {
      return failed(end.outcome, end.result.rank, end.wait_ms) + " after rounds=" + std::to_string(done);
    }
    if (!wrong.empty()) {
      return wrong + " in round " + std::to_string(done);
    }
    if (until_a_line && done == 0) {
      std::cout << "ok looping" << std::endl;
    }
  }
  return "ok rounds=" + std::to_string(done) + " degraded=" + std::to_string(degraded_);
}

// Every round is two operations, whatever becomes of the first, so that ranks that a loss ends at different operations
// stay in step. With a mask only rounds in a row that both had it count.
std::string Client::masked(uint64_t count, uint64_t mask) {
  struct Span {
    uint64_t first, last, mask;
  };
  std::vector<Span> spans;
  uint64_t failures = 0;
  double gap_ms = 0;
  uint64_t good_ns = monotonic_ns();
  const auto note = [&](uint64_t op, const OpEnd& end) {
    if (!end.outcome.ok()) {
      ++failures;
      return;
    }
    gap_ms = std::max(gap_ms, elapsed_ms(good_ns));
    good_ns = monotonic_ns();
    if (spans.empty() || spans.back().mask != end.result.rank_mask) {
      spans.push_back({op, op, end.result.rank_mask});
    }
    spans.back().last = op;
  };
  std::string wrong;
  const uint64_t first = round_;
  for (uint64_t done = 0; wrong.empty() && done != count; ++round_) {
    const OpEnd sent = dispatch(round_);
    note(2 * round_ + 1, sent);
    const OpEnd back = sent.outcome.ok() ? combine(sent.result.recv_rows) : barrier(group_);
    note(2 * round_ + 2, back);
    if (sent.outcome.ok()) {
      wrong = back.outcome.ok() ? check(round_, sent.result.rank_mask & back.result.rank_mask) : "";
      static_cast<void>(expertd_handle_free(group_, handle_));
    }
    const bool counts =
        sent.outcome.ok() && back.outcome.ok() && sent.result.rank_mask == mask && back.result.rank_mask == mask;
    done = mask == 0 || counts ? done + 1 : 0;
    if (round_ == first) {
      std::cout << "ok looping" << std::endl;
    }
  }
  if (!wrong.empty()) {
    return wrong + " in round " + std::to_string(round_);
  }
  std::ostringstream text;
  text << "ok failed=" << failures << " gap=" << gap_ms << " masks=";
  for (const Span& span : spans) {
    text << span.first << "-" << span.last << ":" << span.mask << ",";
  }
  return text.str();
}

// After a failure the ranks may stand at different operations: those that are behind see the failures of the ones they
// missed, until a barrier has everybody.
std::string Client::sync() {
  constexpr uint64_t kTryNs = 500'000'000;
  for (int tries = 1; tries <= 10; ++tries) {
    if (barrier(group_, kTryNs).outcome.ok()) {
      return "ok tries=" + std::to_string(tries);
    }
  }
  return std::string("failed to synchronise: ") + expertd_last_message();
}

std::string Client::fork_child() {
  const pid_t child = ::fork();
  if (child == 0) {
    expertd_event_t event{};
    const int32_t reason = expertd_barrier(group_, nullptr, 0, 0, &event).reason;
    const int32_t detached = expertd_detach(session_.get()).reason;
    ::_exit(reason == detached ? reason : 99);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return std::string("ok child=") + (WIFEXITED(status) ? expertd_reason_name(WEXITSTATUS(status)) : "crashed");
}

std::string Client::cycles(std::istringstream& words) {
  std::string socket;
  std::string device;
  int count = 0;
  words >> socket >> device >> count;
  for (int i = 0; i < count; ++i) {
    ClientSession session(socket, device, "cycle");
    if (!session.ok() || session.alloc_bytes(65536) == nullptr) {
      return "failed in cycle " + std::to_string(i) + ": " + describe(session.attached());
    }
  }
  return "ok";
}

std::string Client::run(const std::string& verb, std::istringstream& words) {
  if (verb == "attach") {
    return attach(words);
  }
  if (verb == "join") {
    return join(words);
  }
  if (verb == "cycles") {
    return cycles(words);
  }
  if (verb == "fork") {
    return fork_child();
  }
  if (verb == "sync") {
    return sync();
  }
  if (verb == "round" || verb == "loop") {
    return rounds(verb == "loop" ? UINT64_MAX : 1, verb == "loop");
  }
  uint64_t number = 0;
  words >> number;
  if (verb == "masked" || verb == "until") {
    uint64_t mask = 0;
    words >> mask;
    return masked(number, mask);
  }
  return verb == "rounds" ? rounds(number, false) : run_simple(verb, number);
}

std::string Client::run_simple(const std::string& verb, uint64_t number) {
  if (verb == "alloc") {
    memory_ = session_.alloc_bytes(number);
    if (memory_ != nullptr) {
      std::fill_n(static_cast<char*>(memory_), number, '\x7f');
    }
    return memory_ == nullptr ? std::string("failed: ") + expertd_last_message() : "ok";
  }
  if (verb == "window") {
    return said(outcome_of(expertd_window_create(session_.get(), number, &window_)));
  }
  if (verb == "release") {
    const Outcome freed = outcome_of(expertd_free(session_.get(), memory_));
    return said(freed);
  }
  if (verb == "barrier") {
    return said(barrier(group_, number * 1'000'000));
  }
  if (verb == "submit") {
    return said(outcome_of(expertd_barrier(group_, nullptr, EXPERTD_ASYNC, 0, &event_)));
  }
  if (verb == "wait") {
    return said(finish(event_, number * 1'000'000));
  }
  if (verb == "leave") {
    return said(outcome_of(expertd_group_leave(group_)));
  }
  if (verb == "detach") {
    x_ = nullptr;
    combined_ = nullptr;
    return said(session_.detach());
  }
  if (verb == "reattach") {
    return said(outcome_of(expertd_reattach(session_.get(), number * 1'000'000)));
  }
  return verb == "state" ? said(outcome_of(expertd_session_state(session_.get()))) : "failed: unknown verb " + verb;
}

}  // namespace
}  // namespace expertd::support

int main() {
  expertd::support::Client client;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string verb;
    words >> verb;
    std::cout << client.run(verb, words) << std::endl;
  }
  return 0;
}
