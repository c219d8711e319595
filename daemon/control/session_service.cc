// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/control/convert.h"
#include "daemon/control/services.h"
#include "daemon/control/unary_call.h"
#include "expertd/v1/session.grpc.pb.h"

namespace expertd::control {

namespace {

// JoinGroup ends this much before the call's deadline, so that its own error still reaches the client: a part of a long
// one, because gRPC rounds long timeouts up by as much as a hundredth on the wire, and a little time for the way.
constexpr uint64_t kJoinMarginDivisor = 64;
constexpr uint64_t kJoinMarginNs = 50'000'000;

session::ErrorDetail detail_of(const base::Status& status) {
  return session::ErrorDetail{status, -1, {}, {}, {}};
}

uint64_t join_timeout(uint64_t asked_ns, uint64_t deadline_ns) {
  const uint64_t now = base::now_ns();
  const uint64_t left = deadline_ns > now ? deadline_ns - now : 0;
  const uint64_t margin = std::max(left / kJoinMarginDivisor, std::min(left / 8, kJoinMarginNs));
  const uint64_t usable = std::max<uint64_t>(left - margin, 1);
  return asked_ns == 0 ? usable : std::min(asked_ns, usable);
}

class SessionService final : public v1::Session::CallbackService {
 public:
  explicit SessionService(const ServiceContext& services) : services_(services), api_(*services.session_api) {}

  grpc::ServerUnaryReactor* OpenSession(grpc::CallbackServerContext* context, const v1::OpenSessionRequest* request,
                                        v1::OpenSessionResponse* response) override {
    return run(context, *request, response, [this](const Caller& caller, const OpenRequest& open, auto* out) {
      out->set_session_id(caller.peer.session.value);
      out->set_daemon_version(services_.version);
      return api_.open_session(caller.peer.session, open.client_id, open.traceparent);
    });
  }

  grpc::ServerUnaryReactor* RegisterBuffer(grpc::CallbackServerContext* context,
                                           const v1::RegisterBufferRequest* request,
                                           v1::RegisterBufferResponse* response) override {
    return run(context, *request, response, [this](const Caller& caller, const RegisterRequest& buffer, auto* out) {
      const base::SessionId session = caller.peer.session;
      const base::Result<session::BufferGrant> grant =
          buffer.fd_token != 0
              ? api_.register_fd(session, buffer.fd_token, buffer.offset, buffer.size, buffer.allocation_size)
              : api_.register_ipc(session, buffer.ipc_handle, buffer.offset, buffer.size);
      if (grant.is_ok()) {
        out->set_buffer_id(grant.value().buffer_id);
      }
      return grant.status();
    });
  }

  grpc::ServerUnaryReactor* UnregisterBuffer(grpc::CallbackServerContext* context,
                                             const v1::UnregisterBufferRequest* request,
                                             v1::UnregisterBufferResponse* response) override {
    return run_as_is(context, *request, response, [this](const Caller& caller, const auto& message, auto*) {
      return api_.unregister(caller.peer.session, message.buffer_id(), caller.deadline_ns);
    });
  }

  grpc::ServerUnaryReactor* CreateWindow(grpc::CallbackServerContext* context, const v1::CreateWindowRequest* request,
                                         v1::CreateWindowResponse* response) override {
    return run_as_is(context, *request, response, [this](const Caller& caller, const auto& message, auto* out) {
      return answer(api_.create_window(caller.peer.session, message.size()), out);
    });
  }

  grpc::ServerUnaryReactor* JoinGroup(grpc::CallbackServerContext* context, const v1::JoinGroupRequest* request,
                                      v1::JoinGroupResponse* response) override {
    auto call = UnaryCall<v1::JoinGroupResponse>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    const Admission admission = admit_call(services_, *context, PeerKind::kSession);
    if (!admission.error.status.is_ok()) {
      call->finish(admission.error);
      return reactor;
    }
    Converted<session::JoinRequest> join = from_proto(*request);
    if (!join.error.status.is_ok()) {
      call->finish(join.error);
      return reactor;
    }
    join.value.timeout_ns = join_timeout(join.value.timeout_ns, admission.caller.deadline_ns);
    join.value.cancelled = UnaryCall<v1::JoinGroupResponse>::cancelled(call);
    // Waiting for the other ranks holds no thread: the answer comes from theirs.
    api_.join_group(admission.caller.peer.session, join.value,
                    [call](const session::ErrorDetail& error, const session::JoinGrant& grant) {
                      v1::JoinGroupResponse out;
                      to_proto(grant, &out);
                      call->finish(error, std::move(out));
                    });
    return reactor;
  }

  grpc::ServerUnaryReactor* LeaveGroup(grpc::CallbackServerContext* context, const v1::LeaveGroupRequest* request,
                                       v1::LeaveGroupResponse* response) override {
    return run_as_is(context, *request, response, [this](const Caller& caller, const auto& message, auto*) {
      return api_.leave_group(caller.peer.session, base::GroupId{message.group_id()}, caller.deadline_ns);
    });
  }

  grpc::ServerUnaryReactor* GroupMask(grpc::CallbackServerContext* context, const v1::GroupMaskRequest* request,
                                      v1::GroupMaskResponse* response) override {
    return run(context, *request, response, [this](const Caller& caller, const MaskRequest& mask, auto* out) {
      return answer(api_.group_mask(caller.peer.session, mask.group, mask.exclude, mask.readmit), out);
    });
  }

  grpc::ServerUnaryReactor* PlanGroup(grpc::CallbackServerContext* context, const v1::PlanGroupRequest* request,
                                      v1::PlanGroupResponse* response) override {
    return run(context, *request, response,
               [this](const Caller& caller, const session::GroupConfig& config, auto* out) {
                 return answer(api_.plan_group(caller.peer.session, config), out);
               });
  }

 private:
  template <typename Value, typename Response>
  static base::Status answer(const base::Result<Value>& result, Response* out) {
    if (result.is_ok()) {
      to_proto(result.value(), out);
    }
    return result.status();
  }

  /// Converts the request, then calls the API on the session's turn in the pool.
  template <typename Request, typename Response, typename Work>
  grpc::ServerUnaryReactor* run(grpc::CallbackServerContext* context, const Request& request, Response* response,
                                Work work) {
    auto converted = from_proto(request);
    return start(context, std::move(converted.value), converted.error, response, std::move(work));
  }

  /// The same for requests of a few plain numbers.
  template <typename Request, typename Response, typename Work>
  grpc::ServerUnaryReactor* run_as_is(grpc::CallbackServerContext* context, const Request& request, Response* response,
                                      Work work) {
    return start(context, Request(request), session::ErrorDetail{}, response, std::move(work));
  }

  template <typename Input, typename Response, typename Work>
  grpc::ServerUnaryReactor* start(grpc::CallbackServerContext* context, Input input,
                                  const session::ErrorDetail& input_error, Response* response, Work work) {
    auto call = UnaryCall<Response>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    const Admission admission = admit_call(services_, *context, PeerKind::kSession);
    if (!admission.error.status.is_ok() || !input_error.status.is_ok()) {
      call->finish(admission.error.status.is_ok() ? input_error : admission.error);
      return reactor;
    }
    const Caller caller = admission.caller;
    auto job = [call, caller, input = std::move(input), work = std::move(work)] {
      if (call->ended()) {
        return;  // cancelled while it waited: nothing was done
      }
      Response out;
      const session::ErrorDetail error = detail_of(work(caller, input, &out));
      call->finish(error, std::move(out));
    };
    const base::Status queued = services_.session_calls->submit(
        {caller.peer.session.value, caller.peer.uid}, [call] { return call->ended(); }, std::move(job));
    if (!queued.is_ok()) {
      call->finish(detail_of(queued));
    }
    return reactor;
  }

  const ServiceContext services_;
  session::SessionApi& api_;
};

}  // namespace

std::unique_ptr<grpc::Service> make_session_service(const ServiceContext& services) {
  return std::make_unique<SessionService>(services);
}

}  // namespace expertd::control
