// SPDX-License-Identifier: Apache-2.0
#include "tests/support/rank_threads.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "tests/support/temp_dir.h"

namespace expertd::support {

Outcome outcome_of(expertd_status_t status) {
  return {status, status.reason == EXPERTD_REASON_NONE ? std::string() : std::string(expertd_last_message())};
}

std::string describe(const Outcome& outcome) {
  return std::string(expertd_reason_name(outcome.status.reason)) + ": " + outcome.message;
}

ClientSession::ClientSession(const std::string& socket, const std::string& device, const std::string& name) {
  expertd_attach_options_t options = EXPERTD_INIT(expertd_attach_options_t);
  options.socket_path = socket.c_str();
  options.device = device.c_str();
  options.name = name.c_str();
  options.timeout_ns = 10'000'000'000;
  attached_ = outcome_of(expertd_attach(&options, &session_));
}

ClientSession::~ClientSession() {
  detach();
}

ClientSession::ClientSession(ClientSession&& other) noexcept
    : session_(std::exchange(other.session_, nullptr)), attached_(std::move(other.attached_)) {}

ClientSession& ClientSession::operator=(ClientSession&& other) noexcept {
  detach();
  session_ = std::exchange(other.session_, nullptr);
  attached_ = std::move(other.attached_);
  return *this;
}

Outcome ClientSession::detach() {
  expertd_session_t* session = std::exchange(session_, nullptr);
  return session == nullptr ? Outcome() : outcome_of(expertd_detach(session));
}

expertd_session_info_t ClientSession::info() const {
  expertd_session_info_t info = EXPERTD_INIT(expertd_session_info_t);
  static_cast<void>(expertd_session_info(session_, &info));
  return info;
}

void* ClientSession::alloc_bytes(size_t bytes) {
  void* data = nullptr;
  const Outcome outcome = outcome_of(expertd_alloc(session_, std::max<size_t>(bytes, 16), &data));
  return outcome.ok() ? data : nullptr;
}

expertd_group_options_t small_group(const char* name, uint32_t rank, uint32_t ranks) {
  expertd_group_options_t options = EXPERTD_INIT(expertd_group_options_t);
  options.name = name;
  options.rank = rank;
  options.expert_parallel_size = ranks;
  options.num_experts = 2 * ranks;
  options.hidden = 128;
  options.top_k = 2;
  options.max_tokens = 16;
  options.join_timeout_ns = 10'000'000'000;
  return options;
}

void on_threads(uint32_t count, const std::function<void(uint32_t)>& body) {
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < count; ++i) {
    threads.emplace_back(body, i);
  }
  std::for_each(threads.begin(), threads.end(), [](std::thread& thread) { thread.join(); });
}

OpEnd finish(expertd_event_t event, uint64_t timeout_ns) {
  OpEnd end;
  end.result.struct_size = sizeof(end.result);
  const uint64_t begin = monotonic_ns();
  end.outcome = outcome_of(expertd_event_wait(event, timeout_ns, &end.result));
  end.wait_ms = elapsed_ms(begin);
  return end;
}

OpEnd barrier(expertd_group_t* group, uint64_t timeout_ns) {
  expertd_event_t event{};
  OpEnd end;
  end.outcome = outcome_of(expertd_barrier(group, nullptr, 0, timeout_ns, &event));
  return end.outcome.ok() ? finish(event) : end;
}

std::vector<Seat> seats_on(const std::string& socket, uint32_t ranks) {
  std::vector<Seat> seats;
  for (uint32_t rank = 0; rank < ranks; ++rank) {
    seats.push_back({socket, "host:" + std::to_string(rank)});
  }
  return seats;
}

RankGroup::RankGroup(const std::vector<Seat>& seats, const std::string& name, const Configure& configure) {
  const auto ranks = static_cast<uint32_t>(seats.size());
  for (uint32_t index = 0; index < ranks; ++index) {
    ranks_.push_back(std::make_unique<Rank>());
    ranks_[index]->rank = index;
    const auto same = std::find_if(seats.begin(), seats.begin() + index,
                                   [&](const Seat& seat) { return seat.socket == seats[index].socket; });
    const bool known = same != seats.begin() + index;
    node_of_.push_back(known ? node_of_[static_cast<size_t>(same - seats.begin())] : nodes_++);
  }
  run([&](Rank& rank) {
    const Seat& seat = seats[rank.rank];
    rank.session = ClientSession(seat.socket, seat.device, name + "-" + std::to_string(rank.rank));
    if (!rank.session.ok()) {
      rank.joined = rank.session.attached();
      return;
    }
    expertd_group_options_t options = small_group(name.c_str(), rank.rank, ranks);
    if (configure) {
      configure(&options);
    }
    rank.joined = outcome_of(expertd_group_join(rank.session.get(), &options, &rank.group));
  });
}

// All at once: a rank that leaves early ends what the others still do.
RankGroup::~RankGroup() {
  run([](Rank& rank) { static_cast<void>(rank.session.detach()); });
}

bool RankGroup::ok() const {
  return std::all_of(ranks_.begin(), ranks_.end(), [](const auto& rank) { return rank->joined.ok(); });
}

std::string RankGroup::failure() const {
  for (const auto& rank : ranks_) {
    if (!rank->joined.ok()) {
      return "rank " + std::to_string(rank->rank) + ": " + describe(rank->joined);
    }
  }
  return {};
}

void RankGroup::run(const std::function<void(Rank&)>& body) {
  on_threads(ranks(), [&](uint32_t index) { body(*ranks_[index]); });
}

}  // namespace expertd::support
