// SPDX-License-Identifier: Apache-2.0
// two_ranks [kind] [threads]: two ranks exchange tokens, normal and low-latency, and check every value.
// kind is "host" (the default) or "cuda": rank r runs on "<kind>:r". Each rank is a process, or a thread with
// "threads". Every expert is the identity, so that a combine gives: normal, the token times the number of ranks it went
// to; low latency, the token times the sum of its weights. Values are small integers and powers of two: exact in bf16.
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "expertd.hpp"

namespace {

constexpr uint32_t kRanks = 2;
constexpr uint32_t kExperts = 8;
constexpr uint32_t kLocalExperts = kExperts / kRanks;
constexpr uint32_t kTopK = 2;
constexpr uint32_t kHidden = 256;
constexpr uint32_t kMaxTokens = 32;
constexpr uint32_t kWorstRows = kRanks * kMaxTokens;
constexpr uint64_t kRowBytes = 2 * kHidden;

uint16_t to_bf16(float value) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}
float from_bf16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// The first failure of a rank; later steps are skipped.
class Check {
 public:
  explicit Check(uint32_t rank) : rank_(rank) {}
  bool operator()(const char* what, const expertd::Error& error) {
    if (!error.ok() && !failed_) {
      failed_ = true;
      fprintf(stderr, "rank %u: %s: %s\n", rank_, what, error.text().c_str());
    }
    return !failed_;
  }
  template <typename T>
  bool operator()(const char* what, const expertd::Result<T>& result) {
    return (*this)(what, result.error());
  }
  bool wrong(const std::string& what) {
    failed_ = true;
    fprintf(stderr, "rank %u: WRONG: %s\n", rank_, what.c_str());
    return false;
  }
  bool failed() const { return failed_; }

 private:
  const uint32_t rank_;
  bool failed_ = false;
};

struct Tokens {
  uint32_t count = 0;
  std::vector<uint16_t> x;
  std::vector<int64_t> experts;
  std::vector<float> weights;
};

// Ranks have different numbers of tokens. Token t of rank r goes to expert (t + r) % 8, and to (3t + 1) % 8 or to none.
Tokens make_tokens(uint32_t rank) {
  Tokens tokens;
  tokens.count = kMaxTokens - 5 * rank;
  tokens.x.resize(tokens.count * kHidden);
  for (uint32_t i = 0; i < tokens.x.size(); ++i) {
    tokens.x[i] = to_bf16(static_cast<float>((i / kHidden + i % kHidden + rank) % 16));
  }
  for (uint32_t t = 0; t < tokens.count; ++t) {
    const int64_t first = (t + rank) % kExperts;
    const int64_t second = (3 * t + 1) % kExperts;
    tokens.experts.push_back(first);
    tokens.experts.push_back(second == first || t % 5 == 0 ? -1 : second);
    tokens.weights.push_back(0.5f);
    tokens.weights.push_back(0.25f);
  }
  return tokens;
}

float normal_factor(const Tokens& tokens, uint32_t t) {
  const int64_t first = tokens.experts[t * kTopK] / kLocalExperts;
  const int64_t second = tokens.experts[t * kTopK + 1];
  return second < 0 || second / kLocalExperts == first ? 1.0f : 2.0f;
}

float weighted_factor(const Tokens& tokens, uint32_t t) {
  return tokens.experts[t * kTopK + 1] < 0 ? 0.5f : 0.75f;
}

struct DeviceMemory {
  uint16_t* x;
  int64_t* idx;
  float* weights;
  uint16_t* recv_x;
  int64_t* recv_idx;
  float* recv_weights;
  uint16_t* out;
};

bool fill(expertd::Session& session, const Tokens& tokens, DeviceMemory* memory, Check& check) {
  auto x = session.alloc<uint16_t>(kMaxTokens * kHidden);
  auto idx = session.alloc<int64_t>(kMaxTokens * kTopK);
  auto weights = session.alloc<float>(kMaxTokens * kTopK);
  auto recv_x = session.alloc<uint16_t>(kWorstRows * kHidden);
  auto recv_idx = session.alloc<int64_t>(kWorstRows * kTopK);
  auto recv_weights = session.alloc<float>(kWorstRows * kTopK);
  auto out = session.alloc<uint16_t>(kMaxTokens * kHidden);
  if (!check("alloc", x) || !check("alloc", idx) || !check("alloc", weights) || !check("alloc", recv_x) ||
      !check("alloc", recv_idx) || !check("alloc", recv_weights) || !check("alloc", out)) {
    return false;
  }
  *memory = {x->data(),        idx->data(),          weights->data(), recv_x->data(),
             recv_idx->data(), recv_weights->data(), out->data()};
  return check("copy", session.copy(memory->x, tokens.x.data(), tokens.x.size() * 2)) &&
         check("copy", session.copy(memory->idx, tokens.experts.data(), tokens.experts.size() * 8)) &&
         check("copy", session.copy(memory->weights, tokens.weights.data(), tokens.weights.size() * 4));
}

// Reads the combined rows back and compares row t with factor(t) times token t.
template <typename Factor>
bool verify(expertd::Session& session, const Tokens& tokens, const DeviceMemory& memory, const char* what,
            const Factor& factor, Check& check) {
  std::vector<uint16_t> out(tokens.x.size());
  if (!check("copy", session.copy(out.data(), memory.out, out.size() * 2)) ||
      !check("synchronize", session.synchronize())) {
    return false;
  }
  for (uint32_t i = 0; i < out.size(); ++i) {
    const float expected = factor(tokens, i / kHidden) * from_bf16(tokens.x[i]);
    if (from_bf16(out[i]) != expected) {
      return check.wrong(std::string(what) + ": token " + std::to_string(i / kHidden) + " channel " +
                         std::to_string(i % kHidden) + " is " + std::to_string(from_bf16(out[i])) + ", expected " +
                         std::to_string(expected));
    }
  }
  return true;
}

bool run_normal(expertd::Session& session, expertd::Group& group, const Tokens& tokens, const DeviceMemory& memory,
                Check& check) {
  auto dispatch = expertd::make<expertd_dispatch_args_t>();
  dispatch.x = memory.x;
  dispatch.dtype = EXPERTD_BF16;
  dispatch.topk_idx = memory.idx;
  dispatch.idx_type = EXPERTD_I64;
  dispatch.topk_weights = memory.weights;
  dispatch.tokens = tokens.count;
  dispatch.capacity_rows = kWorstRows;
  dispatch.recv_x = memory.recv_x;
  dispatch.recv_topk_idx = memory.recv_idx;
  dispatch.recv_topk_weights = memory.recv_weights;
  auto dispatched = group.dispatch(dispatch);
  if (!check("dispatch", dispatched)) {
    return false;
  }
  auto arrived = dispatched->event.wait();
  if (!check("dispatch", arrived)) {
    return false;
  }
  auto combine = expertd::make<expertd_combine_args_t>();
  combine.x = memory.recv_x;
  combine.rows = arrived->recv_rows;
  combine.handle = dispatched->handle;
  combine.tokens = tokens.count;
  combine.combined_x = memory.out;
  auto combined = group.combine(combine);
  if (!check("combine", combined) || !check("combine", combined->wait())) {
    return false;
  }
  printf("  normal: %u tokens out, %u rows in\n", tokens.count, arrived->recv_rows);
  return verify(session, tokens, memory, "combine", normal_factor, check) &&
         check("free handle", group.free_handle(dispatched->handle));
}

// The identity expert of the low-latency path: the rows that came move to where the combine reads.
bool run_low_latency(expertd::Session& session, expertd::Group& group, const Tokens& tokens, const DeviceMemory& memory,
                     Check& check) {
  auto dispatch = expertd::make<expertd_ll_dispatch_args_t>();
  dispatch.x = memory.x;
  dispatch.dtype = EXPERTD_BF16;
  dispatch.topk_idx = memory.idx;
  dispatch.idx_type = EXPERTD_I64;
  dispatch.tokens = tokens.count;
  auto dispatched = group.ll_dispatch(dispatch);
  if (!check("ll_dispatch", dispatched) || !check("ll_dispatch", dispatched->event.wait())) {
    return false;
  }
  auto outputs = group.ll_outputs(dispatched->handle);
  if (!check("ll_outputs", outputs) ||
      !check("copy", session.copy(outputs->combine_x, outputs->recv_x, kLocalExperts * kWorstRows * kRowBytes))) {
    return false;
  }
  auto combine = expertd::make<expertd_ll_combine_args_t>();
  combine.topk_idx = memory.idx;
  combine.idx_type = EXPERTD_I64;
  combine.topk_weights = memory.weights;
  combine.handle = dispatched->handle;
  combine.tokens = tokens.count;
  combine.combined_x = memory.out;
  auto combined = group.ll_combine(combine);
  if (!check("ll_combine", combined) || !check("ll_combine", combined->wait())) {
    return false;
  }
  return verify(session, tokens, memory, "ll_combine", weighted_factor, check);
}

int run_rank(uint32_t rank, const std::string& kind, const std::string& group_name) {
  Check check(rank);
  const std::string device = kind + ":" + std::to_string(rank);
  auto session = expertd::Session::attach(device.c_str(), "two_ranks");
  if (!check("attach", session)) {
    return 1;
  }
  auto options = expertd::make<expertd_group_options_t>();
  options.name = group_name.c_str();
  options.rank = rank;
  options.expert_parallel_size = kRanks;
  options.num_experts = kExperts;
  options.hidden = kHidden;
  options.top_k = kTopK;
  options.max_tokens = kMaxTokens;
  auto group = session->join(options);
  if (!check("join", group)) {
    return 1;
  }
  const Tokens tokens = make_tokens(rank);
  DeviceMemory memory{};
  const bool ok = fill(*session, tokens, &memory, check) && run_normal(*session, *group, tokens, memory, check) &&
                  run_low_latency(*session, *group, tokens, memory, check);
  printf("rank %u on %s: %s\n", rank, device.c_str(), ok ? "ok" : "FAILED");
  return ok ? 0 : 1;
}

int run_threads(const std::string& kind, const std::string& name) {
  std::array<int, kRanks> results{};
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([rank, &results, &kind, &name] { results[rank] = run_rank(rank, kind, name); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return results[0] + results[1];
}

// Forks before anything is attached: an attached session does not survive into a child.
int run_processes(const std::string& kind, const std::string& name) {
  std::array<pid_t, kRanks> children{};
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    children[rank] = fork();
    if (children[rank] == 0) {
      const int result = run_rank(rank, kind, name);
      fflush(stdout);
      _exit(result);
    }
  }
  int failed = 0;
  for (const pid_t child : children) {
    int status = 0;
    const bool waited = child > 0 && waitpid(child, &status, 0) == child;
    failed += !waited || !WIFEXITED(status) || WEXITSTATUS(status) != 0 ? 1 : 0;
  }
  return failed;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string kind = argc > 1 ? argv[1] : "host";
  const std::string name = "two-ranks-" + std::to_string(getpid());
  const bool threads = argc > 2 && strcmp(argv[2], "threads") == 0;
  const int failed = threads ? run_threads(kind, name) : run_processes(kind, name);
  printf("%s\n", failed == 0 ? "ok: every token came back as expected" : "FAILED");
  return failed == 0 ? 0 : 1;
}
