// SPDX-License-Identifier: Apache-2.0
#include "tests/fabric/raw_sender.h"

#include <chrono>

namespace expertd::fabric_test {

RawSender::RawSender(const std::string& address) {
  ucp_config_t* config = nullptr;
  if (ucp_config_read(nullptr, nullptr, &config) != UCS_OK) {
    return;
  }
  (void)ucp_config_modify(config, "TLS", "tcp");
  (void)ucp_config_modify(config, "NET_DEVICES", "lo");
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM;
  const ucs_status_t made = ucp_init(&params, config, &context_);
  ucp_config_release(config);
  ucp_worker_params_t worker{};
  if (made != UCS_OK || ucp_worker_create(context_, &worker, &worker_) != UCS_OK) {
    return;
  }
  ucp_ep_params_t endpoint{};
  endpoint.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
  endpoint.address = reinterpret_cast<const ucp_address_t*>(address.data());
  endpoint.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  (void)ucp_ep_create(worker_, &endpoint, &endpoint_);
}

RawSender::~RawSender() {
  if (endpoint_ != nullptr) {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    (void)wait(ucp_ep_close_nbx(endpoint_, &param));
  }
  if (worker_ != nullptr) {
    ucp_worker_destroy(worker_);
  }
  if (context_ != nullptr) {
    ucp_cleanup(context_);
  }
}

bool RawSender::send(unsigned id, const void* header, size_t header_bytes, const void* data, size_t bytes,
                     uint32_t flags) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = flags;
  if (!wait(ucp_am_send_nbx(endpoint_, id, header, header_bytes, data, bytes, &param))) {
    return false;
  }
  ucp_request_param_t flush{};
  return wait(ucp_ep_flush_nbx(endpoint_, &flush));
}

bool RawSender::wait(ucs_status_ptr_t request) {
  if (!UCS_PTR_IS_PTR(request)) {
    return UCS_PTR_RAW_STATUS(request) == UCS_OK;
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (ucp_request_check_status(request) == UCS_INPROGRESS && std::chrono::steady_clock::now() < deadline) {
    (void)ucp_worker_progress(worker_);
  }
  const ucs_status_t status = ucp_request_check_status(request);
  ucp_request_free(request);
  return status == UCS_OK;
}

}  // namespace expertd::fabric_test
