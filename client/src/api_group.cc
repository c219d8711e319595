// SPDX-License-Identifier: Apache-2.0
// The C interface: groups and operations. Callers' threads; one thread per group issues operations.
#include <algorithm>
#include <cstddef>
#include <cstring>

#include "client/src/api_check.h"
#include "client/src/capture.h"
#include "client/src/copy_engine.h"
#include "client/src/group.h"
#include "client/src/op_request.h"
#include "client/src/session.h"

namespace client = expertd::client;
using client::check_given;
using client::Group;
using client::OpRequest;
using client::publish;
using client::SessionUse;
using client::Status;
using client::unwrap;

namespace {

#define EXPERTD_SAME_PAYLOAD(name, bit, text) static_assert(int{EXPERTD_DISPATCH_##name} == int{bit});
EXPERTD_PAYLOADS(EXPERTD_SAME_PAYLOAD)
#undef EXPERTD_SAME_PAYLOAD

constexpr uint64_t kLeaveTimeoutNs = 10'000'000'000;

/// One call of an operation, as far as its refusal needs it.
struct Issue {
  uint32_t op = EXPERTD_OP_NONE;
  expertd_stream_t stream = nullptr;
  uint64_t timeout_ns = 0;
};

/// Those with a token_bound were one member shorter at first.
template <typename Args>
Status check_args(const Args* args) {
  return client::check_struct(args, "args", offsetof(Args, token_bound));
}

template <typename Args>
Issue issue_of(uint32_t op, const Args* args, expertd_stream_t stream) {
  return {op, stream, check_args(args).ok() ? args->timeout_ns : 0};
}

// The daemon knows a dynamic group by its threshold, and its format by a mode that has no other.
Status make_dynamic(const expertd_group_options_t& options, client::GroupConfig* config) {
  constexpr uint32_t kDefaultLlTokens = 512;
  const uint32_t format = options.output_format;
  if (format > EXPERTD_FORMAT_HT) {
    return client::range_error(EXPERTD_REASON_ARGUMENT_RANGE, "output_format", format, 0, EXPERTD_FORMAT_HT);
  }
  if (format == 0) {
    return options.dynamic_ll_tokens == 0
               ? Status()
               : client::range_error(EXPERTD_REASON_ARGUMENT_RANGE, "dynamic_ll_tokens without output_format",
                                     options.dynamic_ll_tokens, 0, 0);
  }
  const uint32_t mode = format == EXPERTD_FORMAT_LL ? EXPERTD_MODE_INFERENCE : EXPERTD_MODE_NORMAL;
  if (config->mode != EXPERTD_MODE_AUTO && config->mode != mode) {
    return client::error(EXPERTD_REASON_ARGUMENT_RANGE, "mode = %u, allowed 0, %u or %u with output_format = %u",
                         config->mode, EXPERTD_MODE_AUTO, mode, format);
  }
  config->mode = mode;
  config->dynamic_ll_tokens =
      options.dynamic_ll_tokens != 0 ? options.dynamic_ll_tokens : std::clamp(config->max_tokens, 1U, kDefaultLlTokens);
  return {};
}

Status take_pattern(const expertd_communication_pattern_t& pattern, client::GroupConfig* config) {
  for (const uint32_t use : {pattern.use_nvlink, pattern.use_rdma}) {
    if (use > EXPERTD_USE_NO) {
      return client::error(EXPERTD_REASON_ARGUMENT_RANGE,
                           "communication.use_nvlink = %u, communication.use_rdma = %u, allowed 0..%u",
                           pattern.use_nvlink, pattern.use_rdma, static_cast<uint32_t>(EXPERTD_USE_NO));
    }
  }
  config->communication = pattern;  // its numbers are the daemon's to judge
  return {};
}

Status config_of(const expertd_group_options_t* options, client::GroupConfig* config) {
  Status status = client::check_struct(options, "options", offsetof(expertd_group_options_t, dispatch_dtypes));
  if (status.ok()) {
    status = check_given(options->name, "options.name");
  }
  if (!status.ok()) {
    return status;
  }
  config->name = options->name;
  config->rank = options->rank;
  config->ranks = options->expert_parallel_size;
  config->num_experts = options->num_experts;
  config->hidden = options->hidden;
  config->top_k = options->top_k;
  config->max_tokens = options->max_tokens;
  config->mode = static_cast<uint32_t>(options->mode == 0 ? EXPERTD_MODE_AUTO : options->mode);
  config->on_rank_loss =
      static_cast<uint32_t>(options->on_rank_loss == 0 ? EXPERTD_RANK_LOSS_FAIL : options->on_rank_loss);
  config->op_timeout_ns = options->op_timeout_ns;
  config->first_op_timeout_ns = options->first_op_timeout_ns;
  config->join_timeout_ns = options->join_timeout_ns;
  // What came behind dispatch_dtypes came together; in front of it there was padding in its place.
  const size_t size = options->struct_size;
  config->dispatch_dtypes = size >= offsetof(expertd_group_options_t, output_format) ? options->dispatch_dtypes : 0;
  if (size < offsetof(expertd_group_options_t, communication)) {
    return {};
  }
  config->capture_lanes = options->capture_lanes;
  config->executor = options->executor;
  if (size >= sizeof(*options)) {
    status = take_pattern(options->communication, config);
    if (!status.ok()) {
      return status;
    }
  }
  return make_dynamic(*options, config);
}

template <typename Call>
expertd_status_t on_group(expertd_group_t* group, Status checked, const Call& call) {
  if (group == nullptr) {
    return publish(client::missing_argument("group"));
  }
  if (!checked.ok()) {
    return publish(checked);
  }
  Group* known = unwrap(group);
  const SessionUse use(known->session());
  Status status = use.ok() ? known->check_current() : use.status();
  return publish(status.ok() ? call(known) : status);
}

// Lets the daemon count an operation that was refused here, so that the other ranks hear of it instead of waiting for
// it. The caller hears of the refusal, unless there was no way to count it: then of that, so that it can tell.
Status refuse(Group* group, const Issue& issue, Status why) {
  client::Session* session = group->session();
  if (!session->connection()->ring()->takes_refusals()) {
    return why;
  }
  OpRequest refusal;
  client::build_refusal(*group, issue.op, issue.timeout_ns, why, &refusal);
  Status told = session->submit_refusal(&refusal);
  if (told.ok()) {
    group->count_issued();
    return why;
  }
  told.text += client::format("; what was issued would have been refused with %s: %s", client::reason_name(why.reason),
                              why.text.c_str());
  return told;
}

// Every operation of a group comes through here: what it returns decides whether the operation counts (expertd.h).
template <typename Call>
expertd_status_t on_operation(expertd_group_t* group, const Issue& issue, const Status& checked, const Call& call) {
  return on_group(group, {}, [&](Group* it) {
    OpRequest request;
    Status status = it->session()->device()->check_stream(issue.stream, &request.captured);
    if (status.ok() && request.captured) {
      status = client::check_capture(*it, issue.op);
    }
    if (status.reason == EXPERTD_REASON_UNSUPPORTED) {
      return status;
    }
    status = client::both(checked, std::move(status));
    if (status.ok()) {
      status = call(it, &request);
    }
    if (request.submitted) {
      it->count_issued();
      return status;
    }
    const bool no_way = client::is_end_of_lease(status.reason) || status.reason == EXPERTD_REASON_RING_OVERFLOW;
    return no_way ? status : refuse(it, issue, std::move(status));
  });
}

Status dispatch(Group* group, const expertd_dispatch_args_t& args, expertd_stream_t stream, OpRequest* request,
                expertd_handle_t* handle, expertd_event_t* event) {
  Status status = client::build_dispatch(*group, args, request);
  const bool cached = args.cached.generation != 0;
  expertd_handle_t taken = args.cached;
  if (status.ok()) {
    status = cached ? group->check_handle(args.cached) : group->session()->handles()->take(group->id(), &taken);
  }
  if (!status.ok()) {
    return status;
  }
  request->slot.handle_index = taken.index;
  request->slot.handle_generation = taken.generation;
  client::HtRequest ht;
  client::use_ht(group, request, &ht);
  status = group->session()->submit(request, stream, event);
  if (!status.ok() && !cached) {
    // It is this call's own, so that giving it back cannot fail.
    static_cast<void>(group->session()->handles()->give_back(group->id(), taken));
  }
  if (status.ok() && request->ht != nullptr && !cached) {
    group->session()->handles()->set_copies(taken);
  }
  if (status.ok() && handle != nullptr) {
    *handle = taken;
  }
  return status;
}

Status ll_dispatch(Group* group, const expertd_ll_dispatch_args_t& args, expertd_stream_t stream, OpRequest* request,
                   expertd_handle_t* handle, expertd_event_t* event) {
  if (!group->config().low_latency()) {
    return client::range_error(EXPERTD_REASON_MODE_MISMATCH, "mode of the group", group->config().mode,
                               EXPERTD_MODE_INFERENCE, EXPERTD_MODE_AUTO);
  }
  uint32_t set = 0;
  const expertd_handle_t next = group->next_ll_handle(&set);
  Status status = client::build_ll_dispatch(*group, args, set, request);
  if (!status.ok()) {
    return status;
  }
  request->slot.handle_index = next.index;
  request->slot.handle_generation = next.generation;
  client::ExchangeParams exchange;
  if (status = client::use_exchange(*group, group->next_ll_place(), request, &exchange); !status.ok()) {
    return status;
  }
  status = client::issue_low_latency(group, request, stream, event);
  if (status.ok()) {
    if (request->exchange != nullptr) {
      group->session()->handles()->set_copies(next);
    }
    group->commit_ll(next);
    *handle = next;
  }
  return status;
}

}  // namespace

expertd_status_t expertd_group_plan(expertd_session_t* session, const expertd_group_options_t* options,
                                    expertd_group_plan_t* plan) {
  client::GroupConfig config;
  Status status = client::both(check_given(session, "session"), config_of(options, &config));
  status = client::both(std::move(status), client::check_struct(plan, "plan", offsetof(expertd_group_plan_t, handles)));
  if (!status.ok()) {
    return publish(status);
  }
  const SessionUse use(unwrap(session));
  return publish(use.ok() ? Group::plan(unwrap(session), config, plan) : use.status());
}

expertd_status_t expertd_group_join(expertd_session_t* session, const expertd_group_options_t* options,
                                    expertd_group_t** group) {
  client::GroupConfig config;
  Status status = client::both(check_given(session, "session"), config_of(options, &config));
  status = client::both(std::move(status), check_given(group, "group"));
  if (!status.ok()) {
    return publish(status);
  }
  *group = nullptr;
  const SessionUse use(unwrap(session));
  if (!use.ok()) {
    return publish(use.status());
  }
  Group* joined = nullptr;
  status = Group::join(unwrap(session), std::move(config), &joined);
  *group = status.ok() ? client::wrap(joined) : nullptr;
  return publish(status);
}

expertd_status_t expertd_group_leave(expertd_group_t* group) {
  if (group == nullptr) {
    return publish(client::missing_argument("group"));
  }
  const SessionUse use(unwrap(group)->session(), true);
  return publish(use.ok() ? Group::leave(unwrap(group), kLeaveTimeoutNs) : use.status());
}

expertd_status_t expertd_group_mask(expertd_group_t* group, uint64_t exclude, uint64_t readmit, uint64_t* lost,
                                    uint64_t* excluded, uint64_t* epoch) {
  return on_group(group, {}, [=](Group* it) {
    expertd_rank_masks_t masks{};
    masks.exclude[0] = exclude;
    masks.readmit[0] = readmit;
    Status status = it->masks(&masks);
    if (!status.ok()) {
      return status;
    }
    const struct {
      uint64_t value;
      uint64_t* to;
    } told[] = {{masks.lost[0], lost}, {masks.excluded[0], excluded}, {masks.epoch, epoch}};
    for (const auto& each : told) {
      if (each.to != nullptr) {
        *each.to = each.value;
      }
    }
    return status;
  });
}

expertd_status_t expertd_group_masks(expertd_group_t* group, expertd_rank_masks_t* masks) {
  return on_group(group, client::check_struct(masks, "masks"), [=](Group* it) { return it->masks(masks); });
}

expertd_status_t expertd_barrier(expertd_group_t* group, expertd_stream_t stream, uint32_t flags, uint64_t timeout_ns,
                                 expertd_event_t* event) {
  const Issue issue = {EXPERTD_OP_BARRIER, stream, timeout_ns};
  return on_operation(group, issue, check_given(event, "event"), [=](Group* it, OpRequest* request) {
    Status status = client::build_barrier(*it, flags, timeout_ns, request);
    return status.ok() ? it->session()->submit(request, stream, event) : status;
  });
}

expertd_status_t expertd_layout(expertd_session_t* session, const expertd_layout_args_t* args, expertd_stream_t stream,
                                expertd_event_t* event) {
  Status status = client::both(check_given(session, "session"), client::check_struct(args, "args"));
  status = client::both(std::move(status), check_given(event, "event"));
  if (!status.ok()) {
    return publish(status);
  }
  const SessionUse use(unwrap(session));
  if (!use.ok()) {
    return publish(use.status());
  }
  OpRequest request;
  status = unwrap(session)->device()->check_stream(stream, &request.captured);
  if (status.ok() && request.captured) {
    status = client::error(EXPERTD_REASON_UNSUPPORTED, "layout is not captured; call it before the capture begins");
  }
  if (status.ok()) {
    status = client::build_layout(*args, unwrap(session)->default_timeout_ns(), &request);
  }
  return publish(status.ok() ? unwrap(session)->submit_layout(&request, stream, event) : status);
}

expertd_status_t expertd_dispatch(expertd_group_t* group, const expertd_dispatch_args_t* args, expertd_stream_t stream,
                                  expertd_handle_t* handle, expertd_event_t* event) {
  Status status = client::both(check_args(args), check_given(event, "event"));
  if (status.ok() && args->cached.generation == 0) {
    status = check_given(handle, "handle");
  }
  return on_operation(group, issue_of(EXPERTD_OP_DISPATCH, args, stream), status, [=](Group* it, OpRequest* request) {
    return dispatch(it, *args, stream, request, handle, event);
  });
}

expertd_status_t expertd_combine(expertd_group_t* group, const expertd_combine_args_t* args, expertd_stream_t stream,
                                 expertd_event_t* event) {
  Status status = client::both(check_args(args), check_given(event, "event"));
  return on_operation(group, issue_of(EXPERTD_OP_COMBINE, args, stream), status, [=](Group* it, OpRequest* request) {
    Status built = it->check_handle(args->handle);
    if (built.ok()) {
      built = client::build_combine(*it, *args, request);
    }
    client::HtRequest ht;
    if (built.ok()) {
      client::use_ht(it, request, &ht);
    }
    return built.ok() ? it->session()->submit(request, stream, event) : built;
  });
}

expertd_status_t expertd_ll_dispatch(expertd_group_t* group, const expertd_ll_dispatch_args_t* args,
                                     expertd_stream_t stream, expertd_handle_t* handle, expertd_event_t* event) {
  Status status = client::both(check_args(args), check_given(event, "event"));
  status = client::both(std::move(status), check_given(handle, "handle"));
  return on_operation(
      group, issue_of(EXPERTD_OP_LL_DISPATCH, args, stream), status,
      [=](Group* it, OpRequest* request) { return ll_dispatch(it, *args, stream, request, handle, event); });
}

expertd_status_t expertd_ll_combine(expertd_group_t* group, const expertd_ll_combine_args_t* args,
                                    expertd_stream_t stream, expertd_event_t* event) {
  Status status = client::both(check_args(args), check_given(event, "event"));
  return on_operation(group, issue_of(EXPERTD_OP_LL_COMBINE, args, stream), status, [=](Group* it, OpRequest* request) {
    Status built = it->check_handle(args->handle);
    if (built.ok()) {
      built = client::build_ll_combine(*it, *args, request);
    }
    client::ExchangeParams exchange;
    if (built.ok()) {
      built = client::use_exchange(*it, it->ll_place_of(args->handle), request, &exchange);
    }
    return built.ok() ? client::issue_low_latency(it, request, stream, event) : built;
  });
}

expertd_status_t expertd_ll_handle_outputs(expertd_group_t* group, expertd_handle_t handle,
                                           expertd_ll_outputs_t* outputs) {
  return on_group(group, client::check_struct(outputs, "outputs"), [=](Group* it) {
    uint32_t set = 0;
    Status status = it->ll_set_of(handle, &set);
    return status.ok() ? client::ll_outputs(*it, set, outputs) : status;
  });
}

expertd_status_t expertd_handle_free(expertd_group_t* group, expertd_handle_t handle) {
  return on_group(group, {}, [=](Group* it) {
    // The rotation keeps its places for the life of the group.
    return it->is_ll_handle(handle) ? it->check_handle(handle) : it->session()->handles()->give_back(it->id(), handle);
  });
}
