// SPDX-License-Identifier: Apache-2.0
// hello_dispatch [device]: attaches, joins a group of one rank, dispatches four tokens, combines them and checks.
// device is "host:0" (the default) or "cuda:0"; the socket is $EXPERTD_SOCKET or /run/expertd/attach.sock.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "expertd.hpp"

namespace {

constexpr uint32_t kTokens = 4;
constexpr uint32_t kHidden = 128;
constexpr uint32_t kTopK = 2;
constexpr uint32_t kExperts = 8;

int fail(const char* what, const expertd::Error& error) {
  fprintf(stderr, "%s: %s\n", what, error.text().c_str());
  return 1;
}

// Small integers are exact in bf16: the upper half of the float.
uint16_t to_bf16(float value) {
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

struct Tensors {
  std::span<uint16_t> x;
  std::span<int64_t> idx;
  std::span<uint16_t> recv;
  std::span<int64_t> recv_idx;
  std::span<uint16_t> out;
};

int prepare(expertd::Session& session, const std::vector<uint16_t>& rows, Tensors* tensors) {
  // Memory that the daemon reaches without a copy, on whichever device the session has.
  auto x = session.alloc<uint16_t>(kTokens * kHidden);
  auto idx = session.alloc<int64_t>(kTokens * kTopK);
  auto recv = session.alloc<uint16_t>(kTokens * kHidden);
  auto recv_idx = session.alloc<int64_t>(kTokens * kTopK);
  auto out = session.alloc<uint16_t>(kTokens * kHidden);
  if (!x || !idx || !recv || !recv_idx || !out) {
    return fail("alloc", !x ? x.error() : out.error());
  }
  *tensors = {*x, *idx, *recv, *recv_idx, *out};
  const std::vector<int64_t> experts = {0, 1, 2, 3, 4, 5, 6, 7};
  expertd::Error copied = session.copy(x->data(), rows.data(), rows.size() * 2);
  if (copied.ok()) {
    copied = session.copy(idx->data(), experts.data(), experts.size() * 8);
  }
  return copied.ok() ? 0 : fail("copy", copied);
}

int run(expertd::Session& session, expertd::Group& group) {
  std::vector<uint16_t> rows(kTokens * kHidden);
  for (uint32_t i = 0; i < rows.size(); ++i) {
    rows[i] = to_bf16(static_cast<float>(i / kHidden + i % 4));
  }
  Tensors tensors;
  if (prepare(session, rows, &tensors) != 0) {
    return 1;
  }

  auto dispatch = expertd::make<expertd_dispatch_args_t>();
  dispatch.x = tensors.x.data();
  dispatch.dtype = EXPERTD_BF16;
  dispatch.topk_idx = tensors.idx.data();
  dispatch.idx_type = EXPERTD_I64;
  dispatch.tokens = kTokens;
  dispatch.capacity_rows = kTokens;
  dispatch.recv_x = tensors.recv.data();
  dispatch.recv_topk_idx = tensors.recv_idx.data();
  auto dispatched = group.dispatch(dispatch);
  if (!dispatched) {
    return fail("dispatch", dispatched.error());
  }
  auto arrived = dispatched->event.wait();
  if (!arrived) {
    return fail("dispatch", arrived.error());
  }
  printf("dispatch: %u rows arrived in %.1f us\n", arrived->recv_rows, static_cast<double>(arrived->total_ns) / 1e3);

  // An expert would compute here; this one gives back what it got.
  auto combine = expertd::make<expertd_combine_args_t>();
  combine.x = tensors.recv.data();
  combine.rows = kTokens;
  combine.handle = dispatched->handle;
  combine.tokens = kTokens;
  combine.combined_x = tensors.out.data();
  auto combined = group.combine(combine);
  if (!combined) {
    return fail("combine", combined.error());
  }
  auto finished = combined->wait();
  if (!finished) {
    return fail("combine", finished.error());
  }
  std::vector<uint16_t> result(rows.size());
  expertd::Error copied = session.copy(result.data(), tensors.out.data(), result.size() * 2);
  if (copied.ok()) {
    copied = session.synchronize();
  }
  if (!copied.ok()) {
    return fail("copy", copied);
  }
  printf("combine: done in %.1f us\n", static_cast<double>(finished->total_ns) / 1e3);
  const bool same = result == rows;
  printf("%s\n", same ? "ok: every token came back" : "WRONG: the tokens differ");
  return same ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  auto session = expertd::Session::attach(argc > 1 ? argv[1] : "host:0", "hello_dispatch");
  if (!session) {
    return fail("attach", session.error());
  }
  // The name is this run's own, so that two runs do not meet.
  const std::string name = "hello-" + std::to_string(getpid());
  auto options = expertd::make<expertd_group_options_t>();
  options.name = name.c_str();
  options.expert_parallel_size = 1;
  options.num_experts = kExperts;
  options.hidden = kHidden;
  options.top_k = kTopK;
  options.max_tokens = kTokens;
  auto group = session->join(options);
  if (!group) {
    return fail("join", group.error());
  }
  return run(*session, *group);
}
