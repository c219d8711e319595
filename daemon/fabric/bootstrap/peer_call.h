// SPDX-License-Identifier: Apache-2.0
// One call of RendezvousClient, of whatever kind: sent, and sent again, until it has an answer or its deadline passed.
// The client's thread owns it; gRPC's threads only say that it came back. Used inside daemon/fabric/bootstrap.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/support/status.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/fabric/bootstrap/peer_convert.h"
#include "daemon/fabric/bootstrap/peer_services.h"
#include "expertd/peer/v1/peer.grpc.pb.h"

namespace expertd::fabric {

/// Stubs of one connection.
struct PeerStubs {
  explicit PeerStubs(const std::shared_ptr<grpc::Channel>& channel)
      : peer(peer::v1::Peer::NewStub(channel)), rendezvous(peer::v1::Rendezvous::NewStub(channel)) {}

  std::unique_ptr<peer::v1::Peer::Stub> peer;
  std::unique_ptr<peer::v1::Rendezvous::Stub> rendezvous;
};

enum class CallKind { kHello, kJoin, kWithdraw, kFormed, kGone, kAwait };

class PeerCall {
 public:
  using Returned = std::function<void(const grpc::Status&)>;

  PeerCall(CallKind kind, uint64_t deadline_ns) : kind_(kind), deadline_ns_(deadline_ns) {}
  virtual ~PeerCall() = default;
  PeerCall(const PeerCall&) = delete;
  PeerCall& operator=(const PeerCall&) = delete;

  CallKind kind() const { return kind_; }
  uint64_t deadline_ns() const { return deadline_ns_; }
  bool in_flight() const { return context_ != nullptr; }
  /// The time that a call may take on top of its deadline, so that the rendezvous' own words arrive.
  static constexpr uint64_t kGraceNs = 500'000'000;

  /// `term` of the host that is meant; 0: it is not elected.
  void send(PeerStubs* stubs, const std::string& cluster_key, uint64_t term, uint64_t deadline_ns, Returned returned) {
    const uint64_t now = base::now_ns();
    const std::chrono::nanoseconds left(deadline_ns > now ? deadline_ns - now : 0);
    context_ = std::make_unique<grpc::ClientContext>();
    context_->set_deadline(std::chrono::system_clock::now() +
                           std::chrono::duration_cast<std::chrono::system_clock::duration>(left));
    if (!cluster_key.empty()) {
      context_->AddMetadata(kClusterKeyMetadata, cluster_key);
    }
    if (term != 0) {
      context_->AddMetadata(kTermMetadata, std::to_string(term));
    }
    start(stubs, context_.get(), std::move(returned));
  }
  void cancel() {
    if (context_ != nullptr) {
      context_->TryCancel();
    }
  }
  /// It came back; returns what the answer refuses, and forgets the sending.
  session::ErrorDetail take_back() {
    context_.reset();
    return refusal();
  }
  /// Ends it: ok means that the answer holds what was asked for.
  virtual void end(const session::ErrorDetail& error) = 0;

 private:
  virtual void start(PeerStubs* stubs, grpc::ClientContext* context, Returned returned) = 0;
  virtual session::ErrorDetail refusal() const = 0;

  const CallKind kind_;
  const uint64_t deadline_ns_;
  std::unique_ptr<grpc::ClientContext> context_;  // while in flight
};

/// The two versions in one sentence.
inline base::Status other_version(uint32_t version) {
  return base::Status(EXPERTD_REASON_PROTOCOL_VERSION,
                      "it speaks version " + std::to_string(version) + " of the peer protocol, this daemon version " +
                          std::to_string(kPeerProtocolVersion) + "; run releases that speak the same");
}

template <typename Request, typename Response>
class TypedCall final : public PeerCall {
 public:
  using Start =
      std::function<void(PeerStubs*, grpc::ClientContext*, const Request*, Response*, PeerCall::Returned returned)>;
  using Done = std::function<void(const session::ErrorDetail&, const Response&)>;

  TypedCall(CallKind kind, uint64_t deadline_ns, Request request, Start start, Done done)
      : PeerCall(kind, deadline_ns), request_(std::move(request)), start_(std::move(start)), done_(std::move(done)) {}

  const Request& request() const { return request_; }
  const Response& response() const { return response_; }
  void end(const session::ErrorDetail& error) override { done_(error, response_); }

 private:
  void start(PeerStubs* stubs, grpc::ClientContext* context, Returned returned) override {
    response_.Clear();
    start_(stubs, context, &request_, &response_, std::move(returned));
  }
  session::ErrorDetail refusal() const override {
    session::ErrorDetail error;
    if (response_.protocol_version() != kPeerProtocolVersion) {
      error.status = other_version(response_.protocol_version());
    } else if (response_.has_refusal()) {
      error = from_proto(response_.refusal());
    }
    return error;
  }

  const Request request_;
  Response response_;
  const Start start_;
  const Done done_;
};

}  // namespace expertd::fabric
