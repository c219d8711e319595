// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/ucx_floor_side.h"

#include <algorithm>
#include <cstring>

#include "daemon/base/clock.h"
#include "daemon/fabric/lane_options.h"
#include "daemon/fabric/ucx_status.h"

namespace expertd::bench {

namespace {

constexpr unsigned kData = 1;
constexpr unsigned kEnd = 2;
constexpr unsigned kDone = 3;
constexpr uint64_t kLimitNs = 60'000'000'000;

}  // namespace

FloorSide::FloorSide(const FloorOptions& options)
    : options_(options),
      source_(options.region_bytes, std::byte{0x5a}),
      target_(options.region_bytes, std::byte{0}),
      send_buffers_(options.buffers),
      receive_buffers_(options.buffers) {
  for (std::vector<Buffer>* buffers : {&send_buffers_, &receive_buffers_}) {
    for (Buffer& buffer : *buffers) {
      buffer.side = this;
      buffer.data.resize(options.message_bytes);
      (buffers == &send_buffers_ ? free_send_ : free_receive_).push_back(&buffer);
    }
  }
}

base::Result<std::unique_ptr<FloorSide>> FloorSide::create(const FloorOptions& options) {
  std::unique_ptr<FloorSide> side(new FloorSide(options));
  EXPERTD_RETURN_IF_ERROR(side->open());
  return side;
}

FloorSide::~FloorSide() {
  if (endpoint_ != nullptr) {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t closing = ucp_ep_close_nbx(endpoint_, &param);
    const uint64_t until_ns = base::now_ns() + 1'000'000'000;
    while (UCS_PTR_IS_PTR(closing) && ucp_request_check_status(closing) == UCS_INPROGRESS &&
           base::now_ns() < until_ns) {
      (void)ucp_worker_progress(worker_);
    }
    if (UCS_PTR_IS_PTR(closing)) {
      ucp_request_free(closing);
    }
  }
  if (worker_ != nullptr) {
    ucp_worker_destroy(worker_);
  }
  if (context_ != nullptr) {
    ucp_cleanup(context_);
  }
}

base::Status FloorSide::open() {
  fabric::LaneOptionList lane = {{"transports", options_.transports}};
  if (!options_.devices.empty()) {
    lane.emplace_back("devices", options_.devices);
  }
  const auto settings = fabric::lane_settings(fabric::LaneKind::kThroughput, lane);
  if (!settings.is_ok()) {
    return settings.status();
  }
  ucp_config_t* config = nullptr;
  EXPERTD_RETURN_IF_ERROR(fabric::ucx_status("ucp_config_read", ucp_config_read(nullptr, nullptr, &config)));
  for (const fabric::UcxSetting& setting : settings.value()) {
    (void)ucp_config_modify(config, setting.key.c_str(), setting.value.c_str());
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM;
  const ucs_status_t made = ucp_init(&params, config, &context_);
  ucp_config_release(config);
  EXPERTD_RETURN_IF_ERROR(fabric::ucx_status("ucp_init", made));
  return open_worker();
}

base::Status FloorSide::open_worker() {
  ucp_worker_params_t worker{};
  EXPERTD_RETURN_IF_ERROR(fabric::ucx_status("ucp_worker_create", ucp_worker_create(context_, &worker, &worker_)));
  const auto handle = [&](unsigned id, ucp_am_recv_callback_t callback, void* argument) {
    ucp_am_handler_param_t param{};
    param.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    param.id = id;
    param.cb = callback;
    param.arg = argument;
    return fabric::ucx_status("ucp_worker_set_am_recv_handler", ucp_worker_set_am_recv_handler(worker_, &param));
  };
  EXPERTD_RETURN_IF_ERROR(handle(kData, on_data, this));
  EXPERTD_RETURN_IF_ERROR(handle(kEnd, on_word, &end_after_));
  EXPERTD_RETURN_IF_ERROR(handle(kDone, on_word, &done_));
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  EXPERTD_RETURN_IF_ERROR(
      fabric::ucx_status("ucp_worker_get_address", ucp_worker_get_address(worker_, &address, &bytes)));
  address_.assign(reinterpret_cast<const char*>(address), bytes);
  ucp_worker_release_address(worker_, address);
  return base::Status::ok();
}

base::Status FloorSide::connect(const std::string& address) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  return fabric::ucx_status("ucp_ep_create", ucp_ep_create(worker_, &params, &endpoint_));
}

ucs_status_t FloorSide::on_data(void* side, const void* /*header*/, size_t /*header_bytes*/, void* data,
                                size_t /*bytes*/, const ucp_am_recv_param_t* param) {
  FloorSide& own = *static_cast<FloorSide*>(side);
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0) {
    own.failed_ = UCS_ERR_INVALID_PARAM;
    return UCS_OK;
  }
  own.waiting_.push_back(data);
  return UCS_INPROGRESS;
}

ucs_status_t FloorSide::on_word(void* word, const void* header, size_t header_bytes, void* /*data*/, size_t /*bytes*/,
                                const ucp_am_recv_param_t* /*param*/) {
  std::memcpy(word, header, std::min(header_bytes, sizeof(uint64_t)));
  return UCS_OK;
}

void FloorSide::on_sent(void* request, ucs_status_t status, void* buffer) {
  Buffer* of = static_cast<Buffer*>(buffer);
  of->side->failed_ = status == UCS_OK ? of->side->failed_ : status;
  of->side->free_send_.push_back(of);
  ucp_request_free(request);
}

void FloorSide::on_received(void* request, ucs_status_t status, size_t /*bytes*/, void* buffer) {
  Buffer* of = static_cast<Buffer*>(buffer);
  of->side->failed_ = status == UCS_OK ? of->side->failed_ : status;
  of->side->arrived_.push_back(of);
  ucp_request_free(request);
}

void FloorSide::copy_in(std::byte* data) {
  std::memcpy(data, source_.data() + source_at_, options_.message_bytes);
  source_at_ += options_.message_bytes;
  source_at_ = source_at_ + options_.message_bytes > source_.size() ? 0 : source_at_;
}

void FloorSide::copy_out(const std::byte* data) {
  std::memcpy(target_.data() + target_at_, data, options_.message_bytes);
  target_at_ += options_.message_bytes;
  target_at_ = target_at_ + options_.message_bytes > target_.size() ? 0 : target_at_;
}

base::Status FloorSide::send_data() {
  Buffer* buffer = free_send_.back();
  free_send_.pop_back();
  copy_in(buffer->data.data());
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_RNDV;
  param.cb.send = on_sent;
  param.user_data = buffer;
  const ucs_status_ptr_t sent = ucp_am_send_nbx(endpoint_, kData, &buffer->header, sizeof(buffer->header),
                                                buffer->data.data(), buffer->data.size(), &param);
  if (!UCS_PTR_IS_PTR(sent)) {
    free_send_.push_back(buffer);
    return fabric::ucx_status("ucp_am_send_nbx", UCS_PTR_RAW_STATUS(sent));
  }
  return base::Status::ok();
}

base::Status FloorSide::tell(unsigned id, uint64_t value) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  const ucs_status_ptr_t sent = ucp_am_send_nbx(endpoint_, id, &value, sizeof(value), nullptr, 0, &param);
  const uint64_t until_ns = base::now_ns() + kLimitNs;
  while (UCS_PTR_IS_PTR(sent) && ucp_request_check_status(sent) == UCS_INPROGRESS && base::now_ns() < until_ns) {
    progress();
  }
  if (UCS_PTR_IS_PTR(sent)) {
    ucp_request_free(sent);
    return base::Status::ok();
  }
  return fabric::ucx_status("ucp_am_send_nbx", UCS_PTR_RAW_STATUS(sent));
}

void FloorSide::progress() {
  (void)ucp_worker_progress(worker_);
  while (!arrived_.empty()) {
    copy_out(arrived_.back()->data.data());
    free_receive_.push_back(arrived_.back());
    arrived_.pop_back();
    ++received_;
  }
  while (!waiting_.empty() && !free_receive_.empty()) {
    Buffer* buffer = free_receive_.back();
    free_receive_.pop_back();
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.cb.recv_am = on_received;
    param.user_data = buffer;
    const ucs_status_ptr_t received =
        ucp_am_recv_data_nbx(worker_, waiting_.front(), buffer->data.data(), buffer->data.size(), &param);
    waiting_.erase(waiting_.begin());
    if (!UCS_PTR_IS_PTR(received)) {
      failed_ = UCS_PTR_RAW_STATUS(received) == UCS_OK ? failed_ : UCS_PTR_RAW_STATUS(received);
      arrived_.push_back(buffer);
    }
  }
}

base::Result<double> FloorSide::stream(bool sends, bool receives) {
  received_ = end_after_ = done_ = 0;
  const uint64_t start_ns = base::now_ns();
  const uint64_t end_ns = start_ns + static_cast<uint64_t>(options_.seconds * 1e9);
  uint64_t sent = 0;
  uint64_t finished_ns = start_ns;
  bool ended = !sends;
  bool told = !receives;
  while (!told || (sends && done_ == 0)) {
    const uint64_t now_ns = base::now_ns();
    while (!ended && !free_send_.empty()) {
      EXPERTD_RETURN_IF_ERROR(send_data());
      ++sent;
      ended = base::now_ns() >= end_ns;
      if (ended) {
        EXPERTD_RETURN_IF_ERROR(tell(kEnd, sent));
      }
    }
    progress();
    if (!told && end_after_ != 0 && received_ == end_after_) {
      told = true;
      EXPERTD_RETURN_IF_ERROR(tell(kDone, received_));
    }
    finished_ns = sends && done_ == 0 ? base::now_ns() : finished_ns;
    if (failed_ != UCS_OK || now_ns > end_ns + kLimitNs) {
      return fabric::ucx_status("streaming", failed_ != UCS_OK ? failed_ : UCS_ERR_TIMED_OUT);
    }
  }
  const double seconds = static_cast<double>(finished_ns - start_ns) / 1e9;
  return sends ? static_cast<double>(sent * options_.message_bytes) / seconds / 1e9 : 0.0;
}

base::Result<std::vector<double>> FloorSide::ping() {
  std::vector<double> half_us;
  received_ = 0;
  for (uint32_t i = 0; i < options_.round_trips; ++i) {
    const uint64_t start_ns = base::now_ns();
    EXPERTD_RETURN_IF_ERROR(send_data());
    while (received_ <= i) {
      progress();
      if (failed_ != UCS_OK || base::now_ns() > start_ns + kLimitNs) {
        return fabric::ucx_status("a round trip", failed_ != UCS_OK ? failed_ : UCS_ERR_TIMED_OUT);
      }
    }
    half_us.push_back(static_cast<double>(base::now_ns() - start_ns) / 2e3);
  }
  std::sort(half_us.begin(), half_us.end());
  return half_us;
}

base::Status FloorSide::answer() {
  received_ = 0;
  uint64_t answered = 0;
  const uint64_t until_ns = base::now_ns() + kLimitNs;
  while (answered < options_.round_trips || free_send_.size() < send_buffers_.size()) {
    progress();
    if (answered < received_ && !free_send_.empty()) {
      EXPERTD_RETURN_IF_ERROR(send_data());
      ++answered;
    }
    if (failed_ != UCS_OK || base::now_ns() > until_ns) {
      return fabric::ucx_status("answering", failed_ != UCS_OK ? failed_ : UCS_ERR_TIMED_OUT);
    }
  }
  return base::Status::ok();
}

}  // namespace expertd::bench
