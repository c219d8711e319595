// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/ucx_probe.h"

#include <ucp/api/ucp.h>

#include "daemon/base/clock.h"
#include "daemon/fabric/ucx_status.h"

namespace expertd::fabric {

namespace {

constexpr unsigned kMajorMin = 1;
constexpr unsigned kMinorMin = 18;
constexpr unsigned kProbeMessage = 1;
constexpr uint64_t kBytes = 64 * 1024;

std::string version_text() {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned release = 0;
  ucp_get_version(&major, &minor, &release);
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(release);
}

bool is_new_enough() {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned release = 0;
  ucp_get_version(&major, &minor, &release);
  return major > kMajorMin || (major == kMajorMin && minor >= kMinorMin);
}

}  // namespace

struct UcxProbe::State {
  explicit State(GpuMemory* of) : memory(of) {}

  base::Status open_workers();
  base::Status connect();
  base::Status wait(ucs_status_ptr_t request, const char* what);
  base::Status receive();
  static ucs_status_t on_message(void* state, const void* header, size_t header_bytes, void* data, size_t bytes,
                                 const ucp_am_recv_param_t* param);

  GpuMemory* memory;
  ucp_context_h context = nullptr;
  ucp_worker_h sender = nullptr;
  ucp_worker_h receiver = nullptr;
  ucp_ep_h endpoint = nullptr;
  ucp_mem_h registered = nullptr;
  void* source = nullptr;
  void* target = nullptr;
  void* descriptor = nullptr;  // of the message that arrived
  bool inline_data = false;    // it came without a rendezvous, which proves nothing
};

UcxProbe::UcxProbe(GpuMemory* memory) : state_(std::make_unique<State>(memory)) {}

UcxProbe::~UcxProbe() {
  State& state = *state_;
  if (state.endpoint != nullptr) {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    (void)state.wait(ucp_ep_close_nbx(state.endpoint, &param), "closing the probe's endpoint").is_ok();
  }
  for (const ucp_worker_h worker : {state.sender, state.receiver}) {
    if (worker != nullptr) {
      ucp_worker_destroy(worker);
    }
  }
  if (state.registered != nullptr) {
    (void)ucp_mem_unmap(state.context, state.registered);
  }
  if (state.context != nullptr) {
    ucp_cleanup(state.context);
  }
  for (void* data : {state.source, state.target}) {
    if (data != nullptr) {
      state.memory->free(data);
    }
  }
}

base::Status UcxProbe::check_library() {
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM;
  params.name = "probe";
  if (state_->context == nullptr) {
    EXPERTD_RETURN_IF_ERROR(ucx_status("opening UCX for the probe", ucp_init(&params, nullptr, &state_->context)));
  }
  ucp_context_attr_t attributes{};
  attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  EXPERTD_RETURN_IF_ERROR(
      ucx_status("asking UCX which kinds of memory it knows", ucp_context_query(state_->context, &attributes)));
  const bool knows_cuda = (attributes.memory_types & UCS_BIT(UCS_MEMORY_TYPE_CUDA)) != 0;
  if (!is_new_enough() || !knows_cuda) {
    return base::Status(EXPERTD_REASON_UNAVAILABLE, "this UCX is " + version_text() +
                                                        (knows_cuda ? "" : " and knows no memory of GPUs") +
                                                        ", and 1.18 or later with CUDA is needed");
  }
  return base::Status::ok();
}

base::Status UcxProbe::register_memory() {
  State& state = *state_;
  if (state.memory == nullptr) {
    return base::Status(EXPERTD_REASON_UNAVAILABLE, "this daemon serves no GPU");
  }
  for (void** data : {&state.source, &state.target}) {
    base::Result<void*> allocated = state.memory->allocate(kBytes);
    if (!allocated.is_ok()) {
      return allocated.status();
    }
    *data = allocated.value();
  }
  ucp_mem_map_params_t params{};
  params.field_mask =
      UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = state.source;
  params.length = kBytes;
  params.memory_type = UCS_MEMORY_TYPE_CUDA;
  return ucx_status("mapping it", ucp_mem_map(state.context, &params, &state.registered));
}

base::Result<bool> UcxProbe::is_gpu_memory() {
  ucp_mem_attr_t attributes{};
  attributes.field_mask = UCP_MEM_ATTR_FIELD_MEM_TYPE;
  EXPERTD_RETURN_IF_ERROR(ucx_status("querying it", ucp_mem_query(state_->registered, &attributes)));
  return attributes.mem_type == UCS_MEMORY_TYPE_CUDA;
}

base::Status UcxProbe::State::open_workers() {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  EXPERTD_RETURN_IF_ERROR(ucx_status("creating a worker", ucp_worker_create(context, &params, &sender)));
  EXPERTD_RETURN_IF_ERROR(ucx_status("creating a worker", ucp_worker_create(context, &params, &receiver)));
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kProbeMessage;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = on_message;
  handler.arg = this;
  return ucx_status("setting a receive handler", ucp_worker_set_am_recv_handler(receiver, &handler));
}

base::Status UcxProbe::State::connect() {
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  EXPERTD_RETURN_IF_ERROR(ucx_status("asking for an address", ucp_worker_get_address(receiver, &address, &bytes)));
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
  params.address = address;
  const ucs_status_t made = ucp_ep_create(sender, &params, &endpoint);
  ucp_worker_release_address(receiver, address);
  return ucx_status("connecting two workers", made);
}

ucs_status_t UcxProbe::State::on_message(void* state, const void* /*header*/, size_t /*header_bytes*/, void* data,
                                         size_t /*bytes*/, const ucp_am_recv_param_t* param) {
  State& of = *static_cast<State*>(state);
  of.inline_data = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  of.descriptor = of.inline_data ? nullptr : data;
  return of.inline_data ? UCS_OK : UCS_INPROGRESS;
}

base::Status UcxProbe::State::wait(ucs_status_ptr_t request, const char* what) {
  if (!UCS_PTR_IS_PTR(request)) {
    return ucx_status(what, UCS_PTR_RAW_STATUS(request));
  }
  const uint64_t deadline_ns = base::now_ns() + kStepNs;
  while (ucp_request_check_status(request) == UCS_INPROGRESS && base::now_ns() < deadline_ns) {
    (void)ucp_worker_progress(sender);
    (void)ucp_worker_progress(receiver);
  }
  const ucs_status_t status = ucp_request_check_status(request);
  ucp_request_free(request);
  return status == UCS_INPROGRESS ? base::Status(EXPERTD_REASON_TIMEOUT, std::string(what) + " did not end")
                                  : ucx_status(what, status);
}

base::Status UcxProbe::State::receive() {
  const uint64_t deadline_ns = base::now_ns() + kStepNs;
  while (descriptor == nullptr && !inline_data && base::now_ns() < deadline_ns) {
    (void)ucp_worker_progress(sender);
    (void)ucp_worker_progress(receiver);
  }
  if (descriptor == nullptr) {
    return base::Status(EXPERTD_REASON_UNAVAILABLE,
                        inline_data ? "it came through a buffer of the host" : "it did not arrive");
  }
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.memory_type = UCS_MEMORY_TYPE_CUDA;
  return wait(ucp_am_recv_data_nbx(receiver, descriptor, target, kBytes, &param), "receiving");
}

base::Result<std::vector<std::byte>> UcxProbe::round_trip(const std::vector<std::byte>& pattern) {
  State& state = *state_;
  if (pattern.size() != kBytes) {
    return base::Status(EXPERTD_REASON_INTERNAL, "the probe's pattern has another size than its memory");
  }
  EXPERTD_RETURN_IF_ERROR(state.open_workers());
  EXPERTD_RETURN_IF_ERROR(state.connect());
  EXPERTD_RETURN_IF_ERROR(state.memory->write(state.source, pattern));
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.flags = UCP_AM_SEND_FLAG_RNDV;
  param.memory_type = UCS_MEMORY_TYPE_CUDA;
  const ucs_status_ptr_t sent =
      ucp_am_send_nbx(state.endpoint, kProbeMessage, nullptr, 0, state.source, kBytes, &param);
  const base::Status received = UCS_PTR_IS_ERR(sent) ? base::Status::ok() : state.receive();
  EXPERTD_RETURN_IF_ERROR(state.wait(sent, "sending"));
  EXPERTD_RETURN_IF_ERROR(received);
  return state.memory->read(state.target, kBytes);
}

}  // namespace expertd::fabric
