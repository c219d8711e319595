// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/probe_calls.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include <chrono>
#include <mutex>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/fabric/bootstrap/peer_call.h"
#include "daemon/fabric/bootstrap/peer_convert.h"
#include "expertd/peer/v1/peer.grpc.pb.h"

namespace expertd::fabric {

namespace {

constexpr int kAnswerBytesMax = 2 << 20;
constexpr uint32_t kLanesMax = 16;  // eight devices of each data lane

// A connection of its own each time: what an earlier one learned of a node that was away is not waited for.
std::shared_ptr<grpc::Channel> open_channel(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kAnswerBytesMax);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

base::Status of_answer(const std::string& who, const grpc::Status& status) {
  const base::Reason reason = status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED ? EXPERTD_REASON_TIMEOUT
                              : status.error_code() == grpc::StatusCode::UNIMPLEMENTED   ? EXPERTD_REASON_UNSUPPORTED
                              : status.error_code() == grpc::StatusCode::CANCELLED       ? EXPERTD_REASON_CANCELLED
                                                                                         : EXPERTD_REASON_UNAVAILABLE;
  const std::string what = reason == EXPERTD_REASON_TIMEOUT       ? "did not answer in time"
                           : reason == EXPERTD_REASON_UNSUPPORTED ? "runs a release that cannot measure"
                                                                  : "cannot be reached: " + status.error_message();
  return base::Status(reason, who + " " + what);
}

std::string words(const group::NodeIdentity& node) {
  return "node \"" + node.name + "\" at " + node.address;
}

}  // namespace

struct ProbeCalls::Parts {
  template <typename Request, typename Response, typename Call>
  base::Status call(const std::string& who, uint64_t deadline_ns, Request* request, Response* response,
                    const Call& call) {
    const uint64_t now = base::now_ns();
    const std::chrono::nanoseconds left(deadline_ns > now ? deadline_ns - now : 0);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::duration_cast<std::chrono::system_clock::duration>(left));
    if (!cluster_key.empty()) {
      context.AddMetadata(kClusterKeyMetadata, cluster_key);
    }
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (cancelled) {
        return base::Status(EXPERTD_REASON_CANCELLED, "this daemon stops");
      }
      waits = &context;
    }
    request->set_protocol_version(kPeerProtocolVersion);
    const grpc::Status status = call(&context);
    {
      const std::lock_guard<std::mutex> lock(mutex);
      waits = nullptr;
    }
    if (!status.ok()) {
      return of_answer(who, status);
    }
    if (response->protocol_version() != kPeerProtocolVersion) {
      return other_version(response->protocol_version()).with_context(who);
    }
    return response->has_refusal() ? from_proto(response->refusal()).status : base::Status::ok();
  }

  std::string cluster_key;
  std::mutex mutex;  // what follows
  grpc::ClientContext* waits = nullptr;
  bool cancelled = false;
};

ProbeCalls::ProbeCalls(std::string cluster_key) : parts_(std::make_unique<Parts>()) {
  parts_->cluster_key = std::move(cluster_key);
}

ProbeCalls::~ProbeCalls() = default;

base::Result<std::vector<group::NodeIdentity>> ProbeCalls::nodes(const std::string& rendezvous, uint64_t deadline_ns) {
  const auto stub = peer::v1::Rendezvous::NewStub(open_channel(rendezvous));
  peer::v1::ListNodesRequest request;
  peer::v1::ListNodesResponse response;
  EXPERTD_RETURN_IF_ERROR(
      parts_->call("the rendezvous at " + rendezvous, deadline_ns, &request, &response,
                   [&](grpc::ClientContext* context) { return stub->ListNodes(context, request, &response); }));
  std::vector<group::NodeIdentity> nodes;
  for (const peer::v1::NodeIdentity& node : response.nodes()) {
    nodes.push_back(from_proto(node));
  }
  return nodes;
}

base::Result<group::NodeIdentity> ProbeCalls::open(const group::NodeIdentity& at, const ProbeOpening& opening,
                                                   uint64_t deadline_ns) {
  const auto stub = peer::v1::Peer::NewStub(open_channel(at.address));
  peer::v1::OpenProbeRequest request;
  peer::v1::OpenProbeResponse response;
  to_proto(opening.asker, request.mutable_node());
  request.set_probe(opening.probe);
  request.set_bytes_max(opening.bytes_max);
  request.set_timeout_ns(opening.timeout_ns);
  EXPERTD_RETURN_IF_ERROR(parts_->call(words(at), deadline_ns, &request, &response, [&](grpc::ClientContext* context) {
    return stub->OpenProbe(context, request, &response);
  }));
  group::NodeIdentity node = from_proto(response.node());
  EXPERTD_RETURN_IF_ERROR(group::check_identity(node).status);
  return node;
}

base::Result<std::vector<LaneSpeed>> ProbeCalls::measure(const group::NodeIdentity& at, const group::NodeIdentity& to,
                                                         uint64_t timeout_ns, uint64_t deadline_ns) {
  const auto stub = peer::v1::Peer::NewStub(open_channel(at.address));
  peer::v1::MeasureRequest request;
  peer::v1::MeasureResponse response;
  to_proto(to, request.mutable_node());
  request.set_timeout_ns(timeout_ns);
  EXPERTD_RETURN_IF_ERROR(parts_->call(words(at), deadline_ns, &request, &response, [&](grpc::ClientContext* context) {
    return stub->Measure(context, request, &response);
  }));
  std::vector<LaneSpeed> lanes;
  for (const peer::v1::LaneSpeed& lane : response.lanes()) {
    if (lanes.size() < kLanesMax) {
      lanes.push_back({lane.lane(), lane.latency_p50_ns(), lane.latency_p99_ns(), lane.bytes_per_second(),
                       lane.device().substr(0, kDeviceBytesMax)});
    }
  }
  return lanes;
}

void ProbeCalls::cancel() {
  const std::lock_guard<std::mutex> lock(parts_->mutex);
  parts_->cancelled = true;
  if (parts_->waits != nullptr) {
    parts_->waits->TryCancel();
  }
}

}  // namespace expertd::fabric
