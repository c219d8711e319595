// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/peer_services.h"

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <charconv>
#include <chrono>
#include <string_view>
#include <utility>
#include <vector>

#include "daemon/base/clock.h"
#include "daemon/fabric/bootstrap/peer_convert.h"
#include "daemon/rpc/held_call.h"
#include "expertd/peer/v1/peer.grpc.pb.h"

namespace expertd::fabric {

namespace {

/// Between daemons an error is part of the response.
struct RefusalAnswer {
  template <typename Response>
  static grpc::Status give(const session::ErrorDetail& error, Response* response) {
    response->set_protocol_version(kPeerProtocolVersion);
    if (!error.status.is_ok()) {
      to_proto(error, response->mutable_refusal());
    }
    return grpc::Status::OK;
  }
};

template <typename Response>
using HeldCall = rpc::HeldCall<Response, RefusalAnswer>;

/// Takes as long for every key of the same length, so that time tells nothing of where two differ.
bool same_key(std::string_view given, std::string_view wanted) {
  unsigned difference = given.size() == wanted.size() ? 0 : 1;
  for (size_t i = 0; i < given.size(); ++i) {
    const char other = wanted.empty() ? '\0' : wanted[i % wanted.size()];
    difference |= static_cast<unsigned char>(given[i]) ^ static_cast<unsigned char>(other);
  }
  return difference == 0;
}

session::ErrorDetail admit(const PeerContext& peers, const grpc::CallbackServerContext& context, uint32_t version) {
  session::ErrorDetail error;
  if (context.deadline() == std::chrono::system_clock::time_point::max()) {
    error.status = base::Status(EXPERTD_REASON_DEADLINE_MISSING, "calls between daemons must carry a deadline");
    return error;
  }
  const auto key = context.client_metadata().find(kClusterKeyMetadata);
  const bool carried = key != context.client_metadata().end();
  const std::string_view given = carried ? std::string_view(key->second.data(), key->second.size()) : "";
  if (!same_key(given, peers.cluster_key)) {
    error.status =
        base::Status(EXPERTD_REASON_CLUSTER_KEY, "node \"" + peers.identity.name + "\" has " +
                                                     (peers.cluster_key.empty() ? "no cluster key and was given one"
                                                      : !carried                ? "a cluster key and was given none"
                                                                                : "another cluster key") +
                                                     "; give every node the same fabric.cluster_key");
    return error;
  }
  if (version != kPeerProtocolVersion) {
    error.status =
        base::Status(EXPERTD_REASON_PROTOCOL_VERSION,
                     "node \"" + peers.identity.name + "\" speaks version " + std::to_string(kPeerProtocolVersion) +
                         " of the peer protocol, the caller version " + std::to_string(version) +
                         "; run releases that speak the same");
  }
  return error;
}

uint64_t term_of(const grpc::CallbackServerContext& context) {
  const auto given = context.client_metadata().find(kTermMetadata);
  uint64_t term = 0;
  if (given != context.client_metadata().end()) {
    std::from_chars(given->second.data(), given->second.data() + given->second.size(), term);
  }
  return term;
}

session::ErrorDetail admit_host(const PeerContext& peers, const grpc::CallbackServerContext& context,
                                uint32_t version) {
  session::ErrorDetail error = admit(peers, context, version);
  if (!error.status.is_ok()) {
    return error;
  }
  const std::string who = "node \"" + peers.identity.name + "\"";
  if (!peers.hosting.load(std::memory_order_acquire)) {
    error.status = base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE, who + " does not host the rendezvous");
  } else if (!peers.hosts_at(base::now_ns())) {
    error.status = base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE,
                                who + " has no lease at etcd any more to host the rendezvous");
  } else if (const uint64_t term = peers.term.load(std::memory_order_acquire); term_of(context) != term) {
    error.status = base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE,
                                who + " hosts the rendezvous in term " + std::to_string(term) + ", the caller means " +
                                    std::to_string(term_of(context)) +
                                    "; it asks again where it finds the host by the same fabric.etcd");
  }
  return error;
}

class PeerService final : public peer::v1::Peer::CallbackService {
 public:
  explicit PeerService(PeerContext* peers) : peers_(*peers) {}

  grpc::ServerUnaryReactor* Hello(grpc::CallbackServerContext* context, const peer::v1::HelloRequest* request,
                                  peer::v1::HelloResponse* response) override {
    auto call = HeldCall<peer::v1::HelloResponse>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    session::ErrorDetail error = admit(peers_, *context, request->protocol_version());
    const group::NodeIdentity node = from_proto(request->node());
    const bool hosting = peers_.hosts_at(base::now_ns());
    if (error.status.is_ok()) {
      // Who means another term is not present in this one, and sees by the answer that it looks in the wrong place.
      const bool present = hosting && term_of(*context) == peers_.term.load(std::memory_order_acquire);
      error = present ? peers_.rendezvous->seen(node, base::now_ns()) : group::check_identity(node);
    }
    peer::v1::HelloResponse out;
    if (error.status.is_ok()) {
      to_proto(peers_.identity, out.mutable_node());
      out.set_hosts_rendezvous(hosting);
      out.set_rendezvous_term(hosting ? peers_.term.load(std::memory_order_acquire) : 0);
    }
    call->finish(error, std::move(out));
    return reactor;
  }

  grpc::ServerUnaryReactor* OpenProbe(grpc::CallbackServerContext* context, const peer::v1::OpenProbeRequest* request,
                                      peer::v1::OpenProbeResponse* response) override {
    auto call = HeldCall<peer::v1::OpenProbeResponse>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    const ProbeOpening opening{from_proto(request->node()), request->probe(), request->bytes_max(),
                               request->timeout_ns()};
    const session::ErrorDetail error = admit_probe(*context, request->protocol_version(), opening.asker);
    if (!error.status.is_ok()) {
      call->finish(error);
      return reactor;
    }
    peers_.probes->open(opening, [this, call](const session::ErrorDetail& ended) {
      peer::v1::OpenProbeResponse out;
      if (ended.status.is_ok()) {
        to_proto(peers_.identity, out.mutable_node());
      }
      call->finish(ended, std::move(out));
    });
    return reactor;
  }

  grpc::ServerUnaryReactor* Measure(grpc::CallbackServerContext* context, const peer::v1::MeasureRequest* request,
                                    peer::v1::MeasureResponse* response) override {
    auto call = HeldCall<peer::v1::MeasureResponse>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    const group::NodeIdentity to = from_proto(request->node());
    const session::ErrorDetail error = admit_probe(*context, request->protocol_version(), to);
    if (!error.status.is_ok()) {
      call->finish(error);
      return reactor;
    }
    peers_.probes->measure(to, request->timeout_ns(),
                           [call](const session::ErrorDetail& ended, const std::vector<LaneSpeed>& lanes) {
                             peer::v1::MeasureResponse out;
                             for (const LaneSpeed& lane : lanes) {
                               peer::v1::LaneSpeed* const shown = out.add_lanes();
                               shown->set_lane(lane.lane);
                               shown->set_latency_p50_ns(lane.latency_p50_ns);
                               shown->set_latency_p99_ns(lane.latency_p99_ns);
                               shown->set_bytes_per_second(lane.bytes_per_second);
                               shown->set_device(lane.device);
                             }
                             call->finish(ended, std::move(out));
                           });
    return reactor;
  }

 private:
  session::ErrorDetail admit_probe(const grpc::CallbackServerContext& context, uint32_t version,
                                   const group::NodeIdentity& other) const {
    session::ErrorDetail error = admit(peers_, context, version);
    if (error.status.is_ok()) {
      error = group::check_identity(other);
    }
    if (error.status.is_ok() && peers_.probes == nullptr) {
      error.status =
          base::Status(EXPERTD_REASON_UNSUPPORTED, "node \"" + peers_.identity.name + "\" does not measure the fabric");
    }
    return error;
  }

  PeerContext& peers_;
};

class RendezvousService final : public peer::v1::Rendezvous::CallbackService {
 public:
  explicit RendezvousService(PeerContext* peers) : peers_(*peers) {}

  grpc::ServerUnaryReactor* JoinRank(grpc::CallbackServerContext* context, const peer::v1::JoinRankRequest* request,
                                     peer::v1::JoinRankResponse* response) override {
    auto call = HeldCall<peer::v1::JoinRankResponse>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    const session::ErrorDetail error = admit_host(peers_, *context, request->protocol_version());
    if (!error.status.is_ok()) {
      call->finish(error);
      return reactor;
    }
    const group::CallId id =
        peers_.rendezvous->join(from_proto(*request), from_proto(request->node()), base::now_ns(), answer_of(call));
    call->on_cancel([rendezvous = peers_.rendezvous, id] { rendezvous->dropped(id); });
    peers_.deadline_changed();
    return reactor;
  }

  grpc::ServerUnaryReactor* AwaitSuccessor(grpc::CallbackServerContext* context,
                                           const peer::v1::AwaitSuccessorRequest* request,
                                           peer::v1::JoinRankResponse* response) override {
    auto call = HeldCall<peer::v1::JoinRankResponse>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    session::ErrorDetail error = admit_host(peers_, *context, request->protocol_version());
    const base::Result<group::KeptGroup> kept = from_proto(*request);
    error.status = error.status.is_ok() ? kept.status() : error.status;
    if (!error.status.is_ok()) {
      call->finish(error);
      return reactor;
    }
    const group::CallId id =
        peers_.rendezvous->await_successor(kept.value(), from_proto(request->node()), base::now_ns(), answer_of(call));
    call->on_cancel([rendezvous = peers_.rendezvous, id] { rendezvous->dropped(id); });
    peers_.deadline_changed();
    return reactor;
  }

  grpc::ServerUnaryReactor* Withdraw(grpc::CallbackServerContext* context, const peer::v1::WithdrawRequest* request,
                                     peer::v1::WithdrawResponse* response) override {
    return answer(context, *request, response, [this](const peer::v1::WithdrawRequest& message) {
      peers_.rendezvous->withdraw(message.group(), message.rank(), message.node_id(), message.attempt());
    });
  }

  grpc::ServerUnaryReactor* ReportFormed(grpc::CallbackServerContext* context,
                                         const peer::v1::ReportFormedRequest* request,
                                         peer::v1::ReportFormedResponse* response) override {
    auto call = HeldCall<peer::v1::ReportFormedResponse>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    const session::ErrorDetail error = admit_host(peers_, *context, request->protocol_version());
    if (!error.status.is_ok()) {
      call->finish(error);
      return reactor;
    }
    group::FormedReport report{request->group_key(), base::Status::ok(), request->rank()};
    if (const auto number = static_cast<int>(request->reason()); number != 0) {
      report.status = base::Status(
          base::reason_known(number) ? static_cast<base::Reason>(number) : EXPERTD_REASON_INTERNAL, request->message());
    }
    peers_.rendezvous->report_formed(report, request->node_id(), base::now_ns(),
                                     [call](const session::ErrorDetail& ended) { call->finish(ended); });
    peers_.deadline_changed();
    return reactor;
  }

  grpc::ServerUnaryReactor* ReportGone(grpc::CallbackServerContext* context, const peer::v1::ReportGoneRequest* request,
                                       peer::v1::ReportGoneResponse* response) override {
    return answer(context, *request, response, [this](const peer::v1::ReportGoneRequest& message) {
      std::vector<uint32_t> ranks(message.ranks().begin(), message.ranks().end());
      ranks.resize(std::min<size_t>(ranks.size(), group::kMaxGroupRanks));
      peers_.rendezvous->report_gone(message.group_key(), message.node_id(), ranks, base::now_ns());
    });
  }

  grpc::ServerUnaryReactor* ListNodes(grpc::CallbackServerContext* context, const peer::v1::ListNodesRequest* request,
                                      peer::v1::ListNodesResponse* response) override {
    auto call = HeldCall<peer::v1::ListNodesResponse>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    const session::ErrorDetail error = admit_host(peers_, *context, request->protocol_version());
    peer::v1::ListNodesResponse out;
    if (error.status.is_ok()) {
      for (const group::Rendezvous::NodeSnapshot& node : peers_.rendezvous->nodes()) {
        to_proto(group::NodeIdentity{node.id, node.name, node.address, {}}, out.add_nodes());
      }
    }
    call->finish(error, std::move(out));
    return reactor;
  }

 private:
  static group::PlacedCallback answer_of(const std::shared_ptr<HeldCall<peer::v1::JoinRankResponse>>& call) {
    return [call](const session::ErrorDetail& ended, const std::shared_ptr<const group::Placed>& placed) {
      peer::v1::JoinRankResponse out;
      if (placed != nullptr) {
        to_proto(*placed, &out);
      }
      call->finish(ended, std::move(out));
    };
  }

  template <typename Request, typename Response, typename Work>
  grpc::ServerUnaryReactor* answer(grpc::CallbackServerContext* context, const Request& request, Response* response,
                                   const Work& work) {
    auto call = HeldCall<Response>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    const session::ErrorDetail error = admit_host(peers_, *context, request.protocol_version());
    if (error.status.is_ok()) {
      work(request);
      peers_.deadline_changed();
    }
    call->finish(error);
    return reactor;
  }

  PeerContext& peers_;
};

}  // namespace

std::unique_ptr<grpc::Service> make_peer_service(PeerContext* context) {
  return std::make_unique<PeerService>(context);
}

std::unique_ptr<grpc::Service> make_rendezvous_service(PeerContext* context) {
  return std::make_unique<RendezvousService>(context);
}

}  // namespace expertd::fabric
