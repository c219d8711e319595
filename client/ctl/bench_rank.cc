// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/bench_rank.h"

#include <utility>

#include "client/ctl/exit_codes.h"

namespace expertd::ctl {

namespace {

constexpr uint64_t kSmallestAllocation = 16;

/// The message usually begins with the name of the reason.
Failure failure_of(expertd_status_t status, const std::string& what) {
  const int code = status.code == EXPERTD_CODE_UNAVAILABLE ? kExitUnavailable : kExitInternal;
  const std::string reason = expertd_reason_name(status.reason);
  const std::string message = expertd_last_message();
  return Failure(code, what + ": " + (message.rfind(reason, 0) == 0 ? "" : reason + ": ") + message);
}

}  // namespace

BenchRank::BenchRank(const BenchOptions& options, uint32_t index) : options_(options), index_(index) {
  auto attach = EXPERTD_INIT(expertd_attach_options_t);
  const std::string& socket = options.socket_of(index);
  attach.socket_path = socket.empty() ? nullptr : socket.c_str();
  attach.device = options.devices[index].c_str();
  attach.name = "expertctl bench";
  attach.timeout_ns = options.timeout_ns;
  check(expertd_attach(&attach, &session_), "attach to " + options.devices[index]);
  auto info = EXPERTD_INIT(expertd_session_info_t);
  const expertd_status_t status = expertd_session_info(session_, &info);
  if (status.reason != EXPERTD_REASON_NONE) {
    Failure failure = failure_of(status, "session information");
    static_cast<void>(expertd_detach(session_));
    throw failure;
  }
  device_ = info.device;
  on_gpu_ = info.device_type == EXPERTD_CUDA;
}

BenchRank::~BenchRank() {
  // What is left of group and memory goes with the session; at this point nothing could be done about a failure.
  static_cast<void>(expertd_detach(session_));
}

void BenchRank::check(expertd_status_t status, const std::string& what) const {
  if (status.reason != EXPERTD_REASON_NONE) {
    throw failure_of(status, "rank " + std::to_string(index_) + ": " + what);
  }
}

expertd_op_result_t BenchRank::wait(expertd_event_t event, const std::string& what) const {
  auto result = EXPERTD_INIT(expertd_op_result_t);
  check(expertd_event_wait(event, 0, &result), what);
  return result;
}

expertd_group_options_t BenchRank::group_options(const std::string& name, const BenchShape& shape,
                                                 bool low_latency) const {
  auto group = EXPERTD_INIT(expertd_group_options_t);
  group.name = name.c_str();
  group.rank = index_;
  group.expert_parallel_size = shape.ranks;
  group.num_experts = shape.experts;
  group.hidden = shape.hidden;
  group.top_k = shape.top_k;
  group.max_tokens = shape.tokens;
  group.mode = low_latency ? EXPERTD_MODE_INFERENCE : EXPERTD_MODE_NORMAL;
  group.executor = options_.executor;
  group.capture_lanes = low_latency ? options_.capture_lanes : 0;
  group.op_timeout_ns = options_.timeout_ns;
  group.first_op_timeout_ns = options_.timeout_ns;
  group.join_timeout_ns = options_.timeout_ns;
  return group;
}

expertd_group_plan_t BenchRank::plan(const BenchShape& shape, bool low_latency) {
  const std::string name = "bench-plan";
  const expertd_group_options_t group = group_options(name, shape, low_latency);
  auto plan = EXPERTD_INIT(expertd_group_plan_t);
  check(expertd_group_plan(session_, &group, &plan), "plan of the group");
  return plan;
}

void BenchRank::join(const std::string& name, const BenchShape& shape, bool low_latency) {
  const expertd_group_options_t group = group_options(name, shape, low_latency);
  check(expertd_group_join(session_, &group, &group_), "join of group " + name);
}

void BenchRank::leave() {
  check(expertd_group_leave(std::exchange(group_, nullptr)), "leave of the group");
}

void BenchRank::write(void* destination, const void* source, uint64_t bytes) {
  if (bytes != 0) {
    check(expertd_copy(session_, destination, source, bytes, nullptr), "copy to the device");
    check(expertd_stream_synchronize(session_, nullptr, timeout_ns()), "copy to the device");
  }
}

void BenchRank::read(const void* source, void* destination, uint64_t bytes) {
  if (bytes != 0) {
    check(expertd_copy(session_, destination, source, bytes, nullptr), "copy from the device");
    check(expertd_stream_synchronize(session_, nullptr, timeout_ns()), "copy from the device");
  }
}

BenchTensor::BenchTensor(BenchRank* rank, uint64_t rows, uint64_t row_bytes)
    : rank_(rank), rows_(rows), row_bytes_(row_bytes), owned_(true) {
  const uint64_t bytes = std::max(kSmallestAllocation, rows * row_bytes);
  rank->check(expertd_alloc(rank->session(), bytes, &data_), "allocation of " + std::to_string(bytes) + " bytes");
}

BenchTensor::~BenchTensor() {
  if (owned_ && data_ != nullptr) {
    // Only the end of the session makes this fail, and that frees the memory.
    static_cast<void>(expertd_free(rank_->session(), data_));
  }
}

BenchTensor BenchTensor::view(BenchRank* rank, void* data, uint64_t rows, uint64_t row_bytes) {
  BenchTensor tensor;
  tensor.rank_ = rank;
  tensor.data_ = data;
  tensor.rows_ = rows;
  tensor.row_bytes_ = row_bytes;
  return tensor;
}

void BenchTensor::fill_rows(uint64_t first, uint64_t count, uint8_t value) {
  if (rank_->filler()) {
    return rank_->filler()(row(first), value, count * row_bytes_);
  }
  const std::vector<uint8_t> chunk(std::min(chunk_rows(), count) * row_bytes_, value);
  for (uint64_t done = 0; done < count; done += chunk_rows()) {
    rank_->write(row(first + done), chunk.data(), std::min(chunk_rows(), count - done) * row_bytes_);
  }
}

void BenchTensor::swap(BenchTensor* other) noexcept {
  std::swap(rank_, other->rank_);
  std::swap(data_, other->data_);
  std::swap(rows_, other->rows_);
  std::swap(row_bytes_, other->row_bytes_);
  std::swap(owned_, other->owned_);
}

}  // namespace expertd::ctl
