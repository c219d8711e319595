// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/endpoints.h"

#include "daemon/fabric/ucx_status.h"

namespace expertd::fabric {

Endpoints::Endpoints(LaneKind kind, const Rails& rails, ConnectionOwner* owner)
    : kind_(kind), owner_(owner), endpoints_(rails.size()) {
  for (Endpoint& endpoint : endpoints_) {
    endpoint.of = this;
  }
}

base::Status Endpoints::open(const std::vector<std::string>& addresses, const Rails& rails) {
  for (size_t rail = 0; rail < endpoints_.size(); ++rail) {
    // Rail to rail where both sides have the same number of them, as nodes of one kind do.
    const base::Status opened = open(addresses[rail % addresses.size()], *rails[rail], &endpoints_[rail]);
    if (!opened.is_ok()) {
      // Those that did open close by themselves; nothing was sent on them that names this object.
      close();
      for (Endpoint& endpoint : endpoints_) {
        if (endpoint.closing != nullptr) {
          ucp_request_free(endpoint.closing);
          endpoint.closing = nullptr;
        }
      }
      return opened;
    }
  }
  return base::Status::ok();
}

base::Status Endpoints::open(const std::string& address, const Lane& rail, Endpoint* endpoint) {
  ucp_ep_params_t params{};
  params.field_mask =
      UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = on_error;
  params.err_handler.arg = endpoint;
  return ucx_status(std::string("opening its ") + kLaneNames[static_cast<uint32_t>(kind_)] + " lane" +
                        (rail.devices().empty() ? "" : " by " + rail.devices()) +
                        " (both sides need a transport in common that notices a dead peer)",
                    ucp_ep_create(rail.worker(), &params, &endpoint->ep));
}

void Endpoints::on_error(void* endpoint, ucp_ep_h /*ep*/, ucs_status_t status) {
  const Endpoints& of = *static_cast<Endpoint*>(endpoint)->of;
  of.owner_->fail(LossCause::kTransport, std::string("its ") + kLaneNames[static_cast<uint32_t>(of.kind_)] +
                                             " lane broke: " + ucs_status_string(status));
}

void Endpoints::close() {
  for (Endpoint& endpoint : endpoints_) {
    if (endpoint.ep == nullptr) {
      continue;
    }
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    const ucs_status_ptr_t closing = ucp_ep_close_nbx(endpoint.ep, &param);
    endpoint.closing = UCS_PTR_IS_PTR(closing) ? closing : nullptr;
    endpoint.ep = nullptr;
  }
}

bool Endpoints::closed() {
  bool all = true;
  for (Endpoint& endpoint : endpoints_) {
    if (endpoint.closing != nullptr && ucp_request_check_status(endpoint.closing) != UCS_INPROGRESS) {
      ucp_request_free(endpoint.closing);
      endpoint.closing = nullptr;
    }
    all = all && endpoint.ep == nullptr && endpoint.closing == nullptr;
  }
  return all;
}

}  // namespace expertd::fabric
