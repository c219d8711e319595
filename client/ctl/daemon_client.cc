// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/daemon_client.h"

#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>

#include <chrono>
#include <future>
#include <utility>

#include "client/ctl/exit_codes.h"
#include "client/ctl/format.h"
#include "expertd/v1/control.grpc.pb.h"
#include "expertd/v1/error.pb.h"
#include "google/protobuf/any.pb.h"
#include "google/protobuf/unknown_field_set.h"

namespace expertd::ctl {

namespace {

constexpr int kStatusDetailsField = 3;  // google.rpc.Status.details, repeated Any

/// The Reason in google.rpc.Status bytes; empty when there is none.
std::string reason_of(const std::string& details) {
  google::protobuf::UnknownFieldSet fields;
  if (!fields.ParseFromString(details)) {
    return {};
  }
  for (int i = 0; i < fields.field_count(); ++i) {
    const google::protobuf::UnknownField& field = fields.field(i);
    google::protobuf::Any any;
    v1::ErrorInfo info;
    if (field.number() == kStatusDetailsField &&
        field.type() == google::protobuf::UnknownField::TYPE_LENGTH_DELIMITED &&
        any.ParseFromString(field.length_delimited()) && any.UnpackTo(&info)) {
      return info.reason_name();
    }
  }
  return {};
}

int exit_code_of(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::INVALID_ARGUMENT:
      return kExitUsage;
    case grpc::StatusCode::PERMISSION_DENIED:
      return kExitPermission;
    case grpc::StatusCode::UNAVAILABLE:
      return kExitUnavailable;
    default:
      return kExitInternal;
  }
}

}  // namespace

struct DaemonClient::Parts {
  std::string socket;
  uint64_t timeout_ns = 0;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::Control::Stub> stub;

  void set_deadline(grpc::ClientContext* context) const {
    const std::chrono::nanoseconds timeout(timeout_ns);
    context->set_deadline(std::chrono::system_clock::now() +
                          std::chrono::duration_cast<std::chrono::system_clock::duration>(timeout));
  }

  CallError error_of(const grpc::Status& status) const {
    CallError error;
    error.reason = reason_of(status.error_details());
    if (!error.reason.empty()) {
      error.exit_code = exit_code_of(status.error_code());
      error.message = status.error_message() + " (" + error.reason + ")";
      return error;
    }
    const std::string problem = socket_problem(socket);
    const bool no_answer = status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED;
    if (!problem.empty() || no_answer || status.error_code() == grpc::StatusCode::UNAVAILABLE) {
      error.exit_code = kExitUnavailable;
      error.message = "the daemon is not available on " + socket + ": " +
                      (!problem.empty() ? problem
                       : no_answer      ? "no answer within " + duration_text(timeout_ns)
                                        : "it closed the connection; is this user allowed (control.allowed_uids)?") +
                      "\nLook at: systemctl status expertd, journalctl -u expertd, expertctl doctor";
      return error;
    }
    error.exit_code = kExitInternal;
    error.message = "unexpected answer: " + status.error_message();
    return error;
  }

  template <typename Request, typename Response>
  Reply<Response> call(grpc::Status (v1::Control::Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                       const Request& request) {
    Reply<Response> reply;
    grpc::ClientContext context;
    set_deadline(&context);
    const grpc::Status status = (stub.get()->*method)(&context, request, &reply.value);
    reply.ok = status.ok();
    if (!status.ok()) {
      reply.error = error_of(status);
    }
    return reply;
  }
};

DaemonClient::DaemonClient(std::string socket, uint64_t timeout_ns) : parts_(std::make_unique<Parts>()) {
  parts_->channel = grpc::CreateChannel("unix:" + socket, grpc::InsecureChannelCredentials());
  parts_->stub = v1::Control::NewStub(parts_->channel);
  parts_->socket = std::move(socket);
  parts_->timeout_ns = timeout_ns;
}

DaemonClient::~DaemonClient() = default;

Reply<v1::GetStatusResponse> DaemonClient::status() {
  return parts_->call(&v1::Control::Stub::GetStatus, v1::GetStatusRequest());
}

Reply<v1::ListSessionsResponse> DaemonClient::sessions() {
  return parts_->call(&v1::Control::Stub::ListSessions, v1::ListSessionsRequest());
}

Reply<v1::GetCountersResponse> DaemonClient::counters() {
  return parts_->call(&v1::Control::Stub::GetCounters, v1::GetCountersRequest());
}

Reply<v1::ListPeersResponse> DaemonClient::peers() {
  return parts_->call(&v1::Control::Stub::ListPeers, v1::ListPeersRequest());
}

Reply<v1::ListWaitsResponse> DaemonClient::waits(uint32_t last) {
  v1::ListWaitsRequest request;
  request.set_last(last);
  return parts_->call(&v1::Control::Stub::ListWaits, request);
}

Reply<v1::ListNodesResponse> DaemonClient::nodes() {
  return parts_->call(&v1::Control::Stub::ListNodes, v1::ListNodesRequest());
}

Reply<v1::MeasurePairResponse> DaemonClient::measure_pair(const v1::MeasurePairRequest& request) {
  return parts_->call(&v1::Control::Stub::MeasurePair, request);
}

Reply<v1::DrainResponse> DaemonClient::drain(uint64_t timeout_ns) {
  v1::DrainRequest request;
  request.set_timeout_ns(timeout_ns);
  return parts_->call(&v1::Control::Stub::Drain, request);
}

Reply<v1::SetLogLevelResponse> DaemonClient::set_log_level(const std::string& level) {
  v1::SetLogLevelRequest request;
  request.set_level(level);
  return parts_->call(&v1::Control::Stub::SetLogLevel, request);
}

Reply<bool> DaemonClient::serving(const std::string& service) {
  // HealthCheckRequest { string service = 1; }, HealthCheckResponse { status = 1; } with SERVING = 1, written and read
  // by hand: the .proto file is not packaged.
  google::protobuf::UnknownFieldSet request;
  if (!service.empty()) {
    request.AddLengthDelimited(1, service);
  }
  std::string bytes;
  request.SerializeToString(&bytes);
  const grpc::Slice slice(bytes);
  const grpc::ByteBuffer request_buffer(&slice, 1);
  grpc::ByteBuffer response_buffer;
  grpc::ClientContext context;
  parts_->set_deadline(&context);
  grpc::GenericStub stub(parts_->channel);
  std::promise<grpc::Status> done;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", {}, &request_buffer, &response_buffer,
                 [&done](const grpc::Status& result) { done.set_value(result); });
  const grpc::Status status = done.get_future().get();  // bounded by the call's deadline
  Reply<bool> reply;
  if (!status.ok()) {
    reply.error = parts_->error_of(status);
    return reply;
  }
  grpc::Slice body;
  google::protobuf::UnknownFieldSet response;
  reply.ok = response_buffer.DumpToSingleSlice(&body).ok() &&
             response.ParseFromArray(body.begin(), static_cast<int>(body.size()));
  if (!reply.ok) {
    reply.error = {kExitInternal, "the health answer cannot be read", {}};
  }
  reply.value = response.field_count() > 0 && response.field(0).varint() == 1;
  return reply;
}

}  // namespace expertd::ctl
