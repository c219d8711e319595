// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/rendezvous_client.h"

#include <pthread.h>

#include <exception>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/fabric/bootstrap/rendezvous_loop.h"

namespace expertd::fabric {

namespace {

using JoinCall = TypedCall<peer::v1::JoinRankRequest, peer::v1::JoinRankResponse>;
using WithdrawCall = TypedCall<peer::v1::WithdrawRequest, peer::v1::WithdrawResponse>;
using FormedCall = TypedCall<peer::v1::ReportFormedRequest, peer::v1::ReportFormedResponse>;
using GoneCall = TypedCall<peer::v1::ReportGoneRequest, peer::v1::ReportGoneResponse>;

using AwaitCall = TypedCall<peer::v1::AwaitSuccessorRequest, peer::v1::JoinRankResponse>;

constexpr size_t kMessageBytesMax = 1024;

auto placed_or_error(group::PlacedCallback done) {
  return [done = std::move(done)](session::ErrorDetail error, const peer::v1::JoinRankResponse& response) {
    std::shared_ptr<const group::Placed> placed;
    if (error.status.is_ok()) {
      base::Result<std::shared_ptr<const group::Placed>> converted = from_proto(response);
      error.status = converted.status();
      placed = converted.is_ok() ? converted.value() : nullptr;
    }
    done(error, placed);
  };
}

std::shared_ptr<PeerCall> await_call(const RendezvousClientOptions& options, const group::KeptGroup& group,
                                     group::PlacedCallback done) {
  peer::v1::AwaitSuccessorRequest request;
  to_proto(group, options.identity, &request);
  return std::make_shared<AwaitCall>(
      CallKind::kAwait, base::now_ns() + options.await_timeout_ns, std::move(request),
      [](PeerStubs* stubs, grpc::ClientContext* context, const auto* message, auto* response, auto returned) {
        stubs->rendezvous->async()->AwaitSuccessor(context, message, response, std::move(returned));
      },
      placed_or_error(std::move(done)));
}

std::shared_ptr<PeerCall> join_call(const RendezvousClientOptions& options, const group::RankJoin& join,
                                    group::PlacedCallback done) {
  peer::v1::JoinRankRequest request;
  to_proto(join, options.identity, &request);
  return std::make_shared<JoinCall>(
      CallKind::kJoin, base::now_ns() + join.timeout_ns, std::move(request),
      [](PeerStubs* stubs, grpc::ClientContext* context, const auto* message, auto* response, auto returned) {
        stubs->rendezvous->async()->JoinRank(context, message, response, std::move(returned));
      },
      placed_or_error(std::move(done)));
}

std::shared_ptr<PeerCall> withdraw_call(const RendezvousClientOptions& options, const std::string& group, uint32_t rank,
                                        uint64_t attempt) {
  peer::v1::WithdrawRequest request;
  request.set_protocol_version(kPeerProtocolVersion);
  request.set_group(group);
  request.set_rank(rank);
  request.set_node_id(options.identity.id);
  request.set_attempt(attempt);
  return std::make_shared<WithdrawCall>(
      CallKind::kWithdraw, base::now_ns() + options.gone_timeout_ns, std::move(request),
      [](PeerStubs* stubs, grpc::ClientContext* context, const auto* message, auto* response, auto returned) {
        stubs->rendezvous->async()->Withdraw(context, message, response, std::move(returned));
      },
      [](const session::ErrorDetail&, const auto&) {});
}

std::shared_ptr<PeerCall> formed_call(const RendezvousClientOptions& options, const group::FormedReport& report,
                                      group::FormedCallback done) {
  peer::v1::ReportFormedRequest request;
  request.set_protocol_version(kPeerProtocolVersion);
  request.set_group_key(report.key);
  request.set_node_id(options.identity.id);
  request.set_rank(report.rank);
  if (!report.status.is_ok()) {
    session::ErrorDetail error;
    error.status = report.status;
    peer::v1::Refusal shown;
    to_proto(error, &shown);
    request.set_reason(shown.info().reason());
    request.set_message(shown.message().substr(0, kMessageBytesMax));
  }
  return std::make_shared<FormedCall>(
      CallKind::kFormed, base::now_ns() + options.report_timeout_ns, std::move(request),
      [](PeerStubs* stubs, grpc::ClientContext* context, const auto* message, auto* response, auto returned) {
        stubs->rendezvous->async()->ReportFormed(context, message, response, std::move(returned));
      },
      [done = std::move(done)](const session::ErrorDetail& error, const auto&) { done(error); });
}

std::shared_ptr<PeerCall> gone_call(const RendezvousClientOptions& options, uint64_t key,
                                    const std::vector<uint32_t>& ranks) {
  peer::v1::ReportGoneRequest request;
  request.set_protocol_version(kPeerProtocolVersion);
  request.set_group_key(key);
  request.set_node_id(options.identity.id);
  for (const uint32_t rank : ranks) {
    request.add_ranks(rank);
  }
  return std::make_shared<GoneCall>(
      CallKind::kGone, base::now_ns() + options.gone_timeout_ns, std::move(request),
      [](PeerStubs* stubs, grpc::ClientContext* context, const auto* message, auto* response, auto returned) {
        stubs->rendezvous->async()->ReportGone(context, message, response, std::move(returned));
      },
      [](const session::ErrorDetail&, const auto&) {});
}

}  // namespace

struct RendezvousClient::Parts {
  Parts(const RendezvousClientOptions& given, CandidateOptions candidates, Hosting hosting)
      : options(given), loop(given, std::move(candidates), std::move(hosting)) {}

  const RendezvousClientOptions options;
  RendezvousLoop loop;
};

base::Result<std::unique_ptr<RendezvousClient>> RendezvousClient::create(const RendezvousClientOptions& options,
                                                                         Hosting hosting) {
  CandidateOptions candidates{
      {}, options.rendezvous, options.identity.address, options.own_port, options.own_listen, options.elected};
  for (const std::string& entry : options.elected ? std::vector<std::string>() : options.rendezvous) {
    base::Result<HostPort> place = parse_host_port(entry);
    if (!place.is_ok()) {
      return place.status().with_context("fabric.rendezvous");
    }
    candidates.entries.push_back(std::move(place).value());
  }
  if (options.rendezvous.empty()) {
    return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, "fabric.rendezvous: names no daemon");
  }
  try {
    return std::unique_ptr<RendezvousClient>(
        new RendezvousClient(std::make_unique<Parts>(options, std::move(candidates), std::move(hosting))));
  } catch (const std::exception& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting the rendezvous client: ") + error.what());
  }
}

RendezvousClient::RendezvousClient(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

RendezvousClient::~RendezvousClient() = default;

void RendezvousClient::join_rank(const group::RankJoin& join, group::PlacedCallback done) {
  session::ErrorDetail error = group::check_join(join);
  parts_->loop.submit(join_call(parts_->options, join, std::move(done)), error);
}

void RendezvousClient::withdraw(const std::string& group, uint32_t rank, uint64_t attempt) {
  parts_->loop.submit(withdraw_call(parts_->options, group, rank, attempt), {});
}

void RendezvousClient::report_formed(const group::FormedReport& report, group::FormedCallback done) {
  parts_->loop.submit(formed_call(parts_->options, report, std::move(done)), {});
}

void RendezvousClient::await_successor(const group::KeptGroup& group, group::PlacedCallback done) {
  parts_->loop.submit(await_call(parts_->options, group, std::move(done)), {});
}

void RendezvousClient::report_gone(uint64_t key, const std::vector<uint32_t>& ranks) {
  parts_->loop.submit(gone_call(parts_->options, key, ranks), {});
}

void RendezvousClient::host_elected(uint64_t term) {
  parts_->loop.host_elected(term);
}

RendezvousState RendezvousClient::state() const {
  RendezvousState state = parts_->loop.state();
  state.source = parts_->options.elected ? "etcd" : source_of(parts_->options.rendezvous);
  state.etcd_cause = parts_->options.elected ? parts_->options.elected().cause : "";
  return state;
}

const char* source_of(const std::vector<std::string>& rendezvous) {
  return !rendezvous.empty() && rendezvous.front().starts_with("dns:") ? "dns" : "list";
}

}  // namespace expertd::fabric
