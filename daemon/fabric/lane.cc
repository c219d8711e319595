// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/lane.h"

#include <stdlib.h>

#include <cstring>
#include <utility>

#include "daemon/base/log.h"
#include "daemon/fabric/lane_options.h"
#include "daemon/fabric/ucx_status.h"

namespace expertd::fabric {

bool read_prefix(const Incoming& message, WirePrefix* prefix, DropCause* cause) {
  *cause = DropCause::kMalformed;
  if (message.header_bytes < sizeof(*prefix)) {
    return false;
  }
  std::memcpy(prefix, message.header, sizeof(*prefix));
  if (prefix->magic != kWireMagic) {
    return false;
  }
  if (prefix->version != kWireVersion) {
    *cause = DropCause::kVersion;
    return false;
  }
  return prefix->type == message.type;
}

base::Result<std::unique_ptr<Lane>> Lane::create(LaneKind kind, const LaneOptionList& options) {
  std::unique_ptr<Lane> lane(new Lane(kind));
  const base::Status opened = lane->open(options);
  if (!opened.is_ok()) {
    return opened.with_context(std::string("opening the fabric's lane ") + kLaneNames[static_cast<uint32_t>(kind)]);
  }
  return lane;
}

Lane::~Lane() {
  if (worker_ != nullptr) {
    ucp_worker_destroy(worker_);
  }
  if (context_ != nullptr) {
    ucp_cleanup(context_);
  }
}

base::Status Lane::open(const LaneOptionList& options) {
  base::Result<std::vector<UcxSetting>> settings = lane_settings(kind_, options);
  if (!settings.is_ok()) {
    return settings.status();
  }
  for (const auto& [name, value] : options) {
    devices_ = name == "devices" ? value : devices_;
  }
  ucp_config_t* config = nullptr;
  EXPERTD_RETURN_IF_ERROR(ucx_status("reading UCX's configuration", ucp_config_read(nullptr, nullptr, &config)));
  for (const UcxSetting& setting : settings.value()) {
    if (::getenv(setting.variable.c_str()) != nullptr) {
      base::log_info("an option of the fabric is left as the environment has it",
                     {{"lane", kLaneNames[static_cast<uint32_t>(kind_)]}, {"variable", setting.variable}});
      continue;
    }
    const ucs_status_t set = ucp_config_modify(config, setting.key.c_str(), setting.value.c_str());
    if (set != UCS_OK) {
      ucp_config_release(config);
      return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, "this UCX does not take " + setting.variable + "=" +
                                                               setting.value + ": " + ucs_status_string(set));
    }
  }
  std::string effective;
  for (const UcxSetting& setting : settings.value()) {
    const char* const given = ::getenv(setting.variable.c_str());
    effective += (effective.empty() ? "" : " ") + setting.variable + "=" + (given != nullptr ? given : setting.value);
  }
  base::log_info("a lane of the fabric opens",
                 {{"lane", kLaneNames[static_cast<uint32_t>(kind_)]}, {"settings", effective}});
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.name = kLaneNames[static_cast<uint32_t>(kind_)];
  params.estimated_num_eps = kMaxNodes;
  const ucs_status_t made = ucp_init(&params, config, &context_);
  ucp_config_release(config);
  EXPERTD_RETURN_IF_ERROR(
      ucx_status("UCX finds none of the transports or devices asked for (see ucx_info -d for those there are)", made));
  return open_worker();
}

base::Status Lane::open_worker() {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;  // whoever runs it; control threads hand it over before and after
  EXPERTD_RETURN_IF_ERROR(ucx_status("creating a UCX worker", ucp_worker_create(context_, &params, &worker_)));
  EXPERTD_RETURN_IF_ERROR(
      ucx_status("asking for the event descriptor of a UCX worker", ucp_worker_get_efd(worker_, &event_fd_)));
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  EXPERTD_RETURN_IF_ERROR(
      ucx_status("asking for the address of a UCX worker", ucp_worker_get_address(worker_, &address, &bytes)));
  address_.assign(reinterpret_cast<const char*>(address), bytes);
  ucp_worker_release_address(worker_, address);
  if (bytes > kMaxAddressBytes) {
    return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, "the address of the lane has " + std::to_string(bytes) +
                                                             " bytes, more than " + std::to_string(kMaxAddressBytes) +
                                                             ": name fewer devices");
  }
  return base::Status::ok();
}

base::Status Lane::receive_into(IncomingSink* sink) {
  sink_ = sink;
  for (uint16_t i = 0; i < kWireTypes; ++i) {
    handlers_[i] = {this, static_cast<uint16_t>(i + 1)};
    ucp_am_handler_param_t param{};
    param.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    param.id = handlers_[i].type;
    param.flags = UCP_AM_FLAG_WHOLE_MSG;
    param.cb = on_message;
    param.arg = &handlers_[i];
    EXPERTD_RETURN_IF_ERROR(
        ucx_status("setting a UCX receive handler", ucp_worker_set_am_recv_handler(worker_, &param)));
  }
  return base::Status::ok();
}

base::Result<Rails> open_rails(LaneKind kind, const LaneOptionList& options, IncomingSink* sink) {
  base::Result<std::vector<LaneOptionList>> lists = rails_of(kind, options);
  if (!lists.is_ok()) {
    return lists.status().with_context(std::string("opening the fabric's lane ") +
                                       kLaneNames[static_cast<uint32_t>(kind)]);
  }
  Rails rails;
  for (const LaneOptionList& list : lists.value()) {
    base::Result<std::unique_ptr<Lane>> rail = Lane::create(kind, list);
    if (!rail.is_ok()) {
      return rail.status();
    }
    EXPERTD_RETURN_IF_ERROR(rail.value()->receive_into(sink));
    rails.push_back(std::move(rail).value());
  }
  return rails;
}

ucs_status_t Lane::on_message(void* handler, const void* header, size_t header_bytes, void* data, size_t bytes,
                              const ucp_am_recv_param_t* param) {
  const Handler& of = *static_cast<Handler*>(handler);
  const bool rendezvous = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  const bool kept = of.lane->sink_->incoming({.lane = of.lane->kind_,
                                              .worker = of.lane->worker_,
                                              .type = of.type,
                                              .header = header,
                                              .header_bytes = header_bytes,
                                              .data = data,
                                              .bytes = bytes,
                                              .rendezvous = rendezvous});
  // UCS_OK for a rendezvous nobody keeps ends it, on the sender's side too, without its bytes.
  return kept ? UCS_INPROGRESS : UCS_OK;
}

}  // namespace expertd::fabric
