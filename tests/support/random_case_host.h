// SPDX-License-Identifier: Apache-2.0
// Runs the host kernels over a group's memory in one process, as the loop threads of host devices would: route on every
// active rank, then move, then finish. Tests only.
#pragma once

#include <algorithm>
#include <barrier>
#include <thread>
#include <vector>

#include "daemon/kernels/host/host_ops.h"
#include "tests/support/random_case_buffers.h"

namespace expertd::support {

enum class Drive {
  kWhole,    // one call per step, ranks in order
  kChunked,  // route and finish in ranges, move in token ranges, last range and last rank first
  kThreads,  // a thread per rank with barriers between the steps
};

inline void move_in_chunks(const kernels::OpParams& params, const std::vector<kernels::PeerView>& peers,
                           kernels::OpReport* report) {
  constexpr uint32_t kChunk = 3;
  if (kernels::host::check_matrix(params, peers.data(), report) != 0) {
    return;
  }
  for (uint32_t end = params.shape.tokens; end > 0;) {
    const uint32_t begin = end > kChunk ? end - kChunk : 0;
    kernels::host::move_range(params, peers.data(), begin, end, report);
    end = begin;
  }
}

inline void route_in_chunks(const kernels::OpParams& params) {
  constexpr uint32_t kChunk = 5;
  uint32_t begin = 0;
  do {
    kernels::host::route_range(params, begin, std::min(params.shape.tokens, begin + kChunk));
    begin += kChunk;
  } while (begin < params.shape.tokens);
}

inline void layout_in_chunks(const kernels::OpParams& params, kernels::OpReport* report) {
  constexpr uint32_t kChunk = 7;
  for (uint32_t begin = 0; begin < params.shape.tokens; begin += kChunk) {
    if (!kernels::host::layout_check(params, begin, begin + kChunk, report)) {
      return;
    }
  }
  uint32_t begin = 0;
  do {
    kernels::host::layout_count(params, begin, begin + kChunk);
    begin += kChunk;
  } while (begin < params.shape.tokens);
}

inline void finish_in_chunks(const kernels::OpParams& params, kernels::OpReport* report) {
  constexpr uint64_t kChunk = 3;
  kernels::host::finish_counts(params, report);
  const kernels::host::RowRange rows = kernels::host::rows_to_clear(params, *report);
  for (uint64_t end = rows.end; end > rows.begin;) {
    const uint64_t begin = std::max(rows.begin, end > kChunk ? end - kChunk : 0);
    kernels::host::finish_rows(params, *report, {begin, end});
    end = begin;
  }
}

inline void drive(Drive how, GroupMemory* memory) {
  std::vector<uint32_t> ranks;
  for (uint32_t rank = 0; rank < memory->params.size(); ++rank) {
    if (memory->params[rank].shape.active_ranks.contains(rank)) {
      ranks.push_back(rank);
    }
  }
  const auto route = [memory, how](uint32_t rank) {
    if (how == Drive::kChunked) {
      route_in_chunks(memory->params[rank]);
    } else {
      kernels::host::route(memory->params[rank]);
    }
  };
  const auto move = [memory, how](uint32_t rank) {
    if (how == Drive::kChunked) {
      move_in_chunks(memory->params[rank], memory->peers, &memory->reports[rank]);
    } else {
      kernels::host::move(memory->params[rank], memory->peers.data(), &memory->reports[rank]);
    }
  };
  const auto finish = [memory, how](uint32_t rank) {
    if (how == Drive::kChunked) {
      finish_in_chunks(memory->params[rank], &memory->reports[rank]);
      return;
    }
    kernels::host::finish(memory->params[rank], memory->peers.data(), &memory->reports[rank]);
  };
  if (how == Drive::kThreads) {
    std::barrier barrier(static_cast<std::ptrdiff_t>(ranks.size()));
    std::vector<std::thread> threads;
    for (const uint32_t rank : ranks) {
      threads.emplace_back([&, rank] {
        route(rank);
        barrier.arrive_and_wait();
        move(rank);
        barrier.arrive_and_wait();
        finish(rank);
      });
    }
    std::for_each(threads.begin(), threads.end(), [](std::thread& thread) { thread.join(); });
    return;
  }
  std::for_each(ranks.begin(), ranks.end(), route);
  std::for_each(ranks.rbegin(), ranks.rend(), move);
  std::for_each(ranks.begin(), ranks.end(), finish);
}

}  // namespace expertd::support
