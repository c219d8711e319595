// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/bootstrap/rendezvous_loop.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>
#include <pthread.h>

#include <algorithm>
#include <utility>

#include "daemon/base/log.h"

namespace expertd::fabric {

namespace {

constexpr int kAnswerBytesMax = 2 << 20;
constexpr int kKeepaliveMs = 2'000;
constexpr int kKeepaliveTimeoutMs = 2'000;
constexpr size_t kCauseBytesMax = 512;
constexpr uint64_t kRestOfJoinsNs = 100'000'000;  // the longest rest between searches that somebody's join waits for

std::shared_ptr<grpc::Channel> open_channel(const std::string& target) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kAnswerBytesMax);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A connection of its own each time, without what an earlier one of the process learned; and no detour by a proxy.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  const std::string scheme = target.starts_with('[') ? "ipv6:" : "ipv4:";
  return grpc::CreateCustomChannel(scheme + target, grpc::InsecureChannelCredentials(), arguments);
}

session::ErrorDetail ended(base::Reason reason, const std::string& message) {
  session::ErrorDetail error;
  error.status = base::Status(reason, message);
  return error;
}

}  // namespace

RendezvousLoop::RendezvousLoop(const RendezvousClientOptions& options, CandidateOptions candidates,
                               RendezvousClient::Hosting hosting)
    : options_(options),
      hosting_(std::move(hosting)),
      random_(static_cast<std::minstd_rand::result_type>(options.identity.id ^ options.identity.id >> 32)) {
  search_ = std::make_unique<CandidateSearch>(std::move(candidates), [this](Candidates found) {
    post([this, found = std::move(found)]() mutable { found_candidates(std::move(found)); });
  });
  thread_ = std::thread([this] { run(); });
  pthread_setname_np(thread_.native_handle(), "rendezvous-call");
}

RendezvousLoop::~RendezvousLoop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  thread_.join();
  search_.reset();
  // What was submitted while the thread ended.
  for (const std::function<void()>& event : events_) {
    event();
  }
  stop();
}

void RendezvousLoop::post(std::function<void()> event) {
  const std::lock_guard lock(mutex_);
  events_.push_back(std::move(event));
  changed_.notify_all();
}

void RendezvousLoop::submit(std::shared_ptr<PeerCall> call, const session::ErrorDetail& error) {
  session::ErrorDetail refused = error;
  const std::lock_guard lock(mutex_);
  if (++submitted_ > options_.calls_max && refused.status.is_ok()) {
    refused = ended(EXPERTD_REASON_GROUP_LIMIT,
                    std::to_string(options_.calls_max) + " calls to the rendezvous are outstanding");
  }
  events_.push_back([this, call = std::move(call), refused] { accept(call, refused); });
  changed_.notify_all();
}

RendezvousState RendezvousLoop::state() const {
  const std::lock_guard lock(mutex_);
  return state_;
}

void RendezvousLoop::publish() {
  const std::lock_guard lock(mutex_);
  const bool found = host_ == Host::kFound;
  state_.address = found ? candidates_.places[probing_].target : "";
  state_.cause = found ? "" : cause_;
  state_.node = found ? host_node_ : "";
  state_.term = found ? candidates_.term : 0;
}

void RendezvousLoop::run() {
  std::unique_lock lock(mutex_);
  bool stopped = false;
  while (!stopped || in_flight_ != 0) {
    std::deque<std::function<void()>> events;
    events.swap(events_);
    const bool stop_now = stopping_;
    lock.unlock();
    for (const std::function<void()>& event : events) {
      event();
    }
    if (stop_now) {
      stop();
      stopped = true;
    } else {
      turn(base::now_ns());
    }
    const uint64_t next = next_time_ns();
    lock.lock();
    const auto ready = [this, stopped] { return !events_.empty() || (stopping_ && !stopped); };
    if (stopped && in_flight_ == 0) {
      break;
    }
    if (stopped) {
      changed_.wait(lock, ready);
    } else {
      changed_.wait_until(lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(next)), ready);
    }
  }
}

// Also for calls that were submitted while the end was near.
void RendezvousLoop::stop() {
  host_ = Host::kResting;
  hosting_ = nullptr;
  if (hello_ != nullptr) {
    hello_->cancel();
    hello_.reset();
  }
  for (const std::shared_ptr<PeerCall>& call : calls_) {
    call->cancel();
  }
  end_all(ended(EXPERTD_REASON_CANCELLED, "this daemon is stopping"));
}

uint64_t RendezvousLoop::next_time_ns() const {
  uint64_t next = next_search_ns_;
  if (host_ == Host::kFound) {
    next = hello_ == nullptr ? std::min(next, next_hello_ns_) : next;
  } else if (host_ != Host::kResting) {
    next = base::now_ns() + options_.backoff_max_ns;  // events end these states
  }
  for (const std::shared_ptr<PeerCall>& call : calls_) {
    next = call->in_flight() ? next : std::min(next, call->deadline_ns());
  }
  return next;
}

void RendezvousLoop::turn(uint64_t now_ns) {
  expire(now_ns);
  if ((host_ == Host::kResting || host_ == Host::kFound) && now_ns >= next_search_ns_) {
    host_ = host_ == Host::kResting ? Host::kResolving : host_;
    next_search_ns_ = now_ns + options_.look_again_ns;
    search_anew_ = false;
    search_->begin();
  }
  if (host_ == Host::kFound && hello_ == nullptr && now_ns >= next_hello_ns_) {
    send_hello();
  }
}

void RendezvousLoop::accept(std::shared_ptr<PeerCall> call, const session::ErrorDetail& error) {
  calls_.push_back(call);
  if (!error.status.is_ok()) {
    finish(call, error);
    return;
  }
  if (call->kind() == CallKind::kWithdraw) {
    end_withdrawn(*call);
  }
  if (host_ == Host::kResting && call->kind() == CallKind::kJoin) {
    // The rest may have grown to seconds while nobody asked, and the host be back since.
    next_search_ns_ = std::min(next_search_ns_, resting_since_ns_ + kRestOfJoinsNs);
  }
  if (host_ == Host::kFound) {
    send(call);
  }
}

// Its waiter need not wait for the rendezvous; the withdrawal is for a group that is being formed with it already.
void RendezvousLoop::end_withdrawn(const PeerCall& withdrawal) {
  using WithdrawCall = TypedCall<peer::v1::WithdrawRequest, peer::v1::WithdrawResponse>;
  using JoinCall = TypedCall<peer::v1::JoinRankRequest, peer::v1::JoinRankResponse>;
  const peer::v1::WithdrawRequest& taken = static_cast<const WithdrawCall&>(withdrawal).request();
  const auto found = std::ranges::find_if(calls_, [&taken](const std::shared_ptr<PeerCall>& call) {
    if (call->kind() != CallKind::kJoin) {
      return false;
    }
    const peer::v1::JoinRankRequest& join = static_cast<const JoinCall&>(*call).request();
    return join.attempt() == taken.attempt() && join.rank() == taken.rank() && join.group() == taken.group();
  });
  if (found != calls_.end()) {
    const std::shared_ptr<PeerCall> join = *found;
    join->cancel();
    finish(join, ended(EXPERTD_REASON_CANCELLED, "the join was withdrawn"));
  }
}

void RendezvousLoop::finish(const std::shared_ptr<PeerCall>& call, const session::ErrorDetail& error) {
  std::erase(calls_, call);
  {
    const std::lock_guard lock(mutex_);
    --submitted_;
  }
  call->end(error);
}

void RendezvousLoop::end_all(const session::ErrorDetail& error) {
  const std::vector<std::shared_ptr<PeerCall>> calls = calls_;
  for (const std::shared_ptr<PeerCall>& call : calls) {
    finish(call, error);
  }
}

void RendezvousLoop::send(const std::shared_ptr<PeerCall>& call) {
  ++in_flight_;
  call->send(stubs_.get(), options_.cluster_key, candidates_.term, call->deadline_ns() + PeerCall::kGraceNs,
             [this, call, connection = connection_, term = candidates_.term](const grpc::Status& status) {
               post([this, call, connection, term, status] { returned(call, connection, term, status); });
             });
}

void RendezvousLoop::send_waiting() {
  for (const std::shared_ptr<PeerCall>& call : calls_) {
    if (!call->in_flight()) {
      send(call);
    }
  }
}

void RendezvousLoop::returned(const std::shared_ptr<PeerCall>& call, uint64_t connection, uint64_t term,
                              const grpc::Status& status) {
  --in_flight_;
  const session::ErrorDetail error = call->take_back();
  if (std::ranges::find(calls_, call) == calls_.end()) {
    return;  // it ended meanwhile
  }
  // A place from the host of an earlier term is none: the join is the next one's to answer. That all nodes reported a
  // group formed is a fact, whoever tells it.
  if (call->kind() == CallKind::kAwait && status.error_code() == grpc::StatusCode::UNIMPLEMENTED) {
    finish(call, ended(EXPERTD_REASON_UNSUPPORTED, "the rendezvous is of a release that takes no ranks back"));
    return;
  }
  const bool stale = call->kind() == CallKind::kJoin && term < term_;
  const bool moved = status.ok() && (stale || error.status.reason() == EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE);
  if (status.ok() && !moved) {
    finish(call, error);
    return;
  }
  if (base::now_ns() >= call->deadline_ns()) {
    return;  // the turn that follows ends it
  }
  if (host_ == Host::kFound && connection != connection_) {
    send(call);
  } else if (host_ == Host::kFound) {
    lose_host(status.ok() ? error.status.message() : place_text() + ": " + status.error_message());
  }
}

void RendezvousLoop::expire(uint64_t now_ns) {
  std::vector<std::shared_ptr<PeerCall>> late;
  for (const std::shared_ptr<PeerCall>& call : calls_) {
    if (!call->in_flight() && call->deadline_ns() <= now_ns) {
      late.push_back(call);
    }
  }
  for (const std::shared_ptr<PeerCall>& call : late) {
    const char* const asked = host_ == Host::kFound ? "this call" : host_ == Host::kProbing ? "the greeting" : nullptr;
    const std::string before = cause_.empty() ? "it is still being looked for" : cause_;
    const std::string why =
        asked == nullptr ? before
                         : place_text() + ": " + silent_text(asked) + (cause_.empty() ? "" : "; before: " + cause_);
    finish(call, ended(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE, "rendezvous " + who() + " does not answer: " + why));
  }
}

std::string RendezvousLoop::who() const {
  std::string out;
  for (const std::string& entry : options_.rendezvous) {
    out += (out.empty() ? "" : ", ") + entry;
  }
  return out;
}

// A connection that is open on one side only, or whose answers get lost, looks like this.
std::string RendezvousLoop::silent_text(const char* call) {
  return std::string("the connection was accepted or is still being made, but no answer to ") + call +
         " came in time; look whether expertd runs there and serves its peers at this address (fabric.listen), and "
         "whether its answers reach this node (firewall, route, proxy)";
}

std::string RendezvousLoop::place_text() const {
  const Candidate& place = candidates_.places[probing_];
  return place.entry == place.target ? place.entry : place.entry + " (" + place.target + ")";
}

uint64_t RendezvousLoop::jittered(uint64_t longest_ns) {
  return longest_ns / 2 + random_() % (longest_ns / 2 + 1);
}

void RendezvousLoop::host_elected(uint64_t term) {
  post([this, term] { follow(term); });
}

void RendezvousLoop::follow(uint64_t term) {
  term_ = std::max(term_, term);
  if (host_ == Host::kFound && candidates_.term < term_) {
    lose_host("term " + std::to_string(candidates_.term) + " of " + place_text() + " is over");
  }
  if (host_ == Host::kResting) {
    next_search_ns_ = 0;
    backoff_ns_ = 0;
  } else if (host_ != Host::kFound) {
    search_anew_ = true;
  }
}

void RendezvousLoop::found_candidates(Candidates found) {
  if (hosting_ && !options_.elected && (found.hosts_here || found.cause.empty())) {
    hosting_(found.hosts_here);
  }
  if (host_ != Host::kResolving) {
    return;  // only looked whether it is still this daemon that hosts
  }
  candidates_ = std::move(found);
  cause_ = candidates_.cause;
  refusal_ = {};
  probing_ = 0;
  probe_next();
}

void RendezvousLoop::probe_next() {
  if (probing_ >= candidates_.places.size()) {
    search_failed();
    return;
  }
  host_ = Host::kProbing;
  ++connection_;
  stubs_ = std::make_unique<PeerStubs>(open_channel(candidates_.places[probing_].target));
  send_hello();
}

void RendezvousLoop::send_hello() {
  peer::v1::HelloRequest request;
  request.set_protocol_version(kPeerProtocolVersion);
  to_proto(options_.identity, request.mutable_node());
  const uint64_t deadline_ns = base::now_ns() + options_.probe_timeout_ns;
  hello_ = std::make_shared<HelloCall>(
      CallKind::kHello, deadline_ns, std::move(request),
      [](PeerStubs* stubs, grpc::ClientContext* context, const auto* message, auto* response, auto returned) {
        stubs->peer->async()->Hello(context, message, response, std::move(returned));
      },
      [](const session::ErrorDetail&, const auto&) {});
  ++in_flight_;
  hello_->send(
      stubs_.get(), options_.cluster_key, candidates_.term, deadline_ns,
      [this, hello = hello_](const grpc::Status& status) { post([this, hello, status] { probed(hello, status); }); });
}

void RendezvousLoop::probed(const std::shared_ptr<HelloCall>& hello, const grpc::Status& status) {
  --in_flight_;
  const session::ErrorDetail error = hello->take_back();
  if (hello != hello_) {
    return;  // of a connection that was given up
  }
  hello_.reset();
  std::string cause;
  if (!status.ok()) {
    cause = status.error_code() == grpc::StatusCode::UNIMPLEMENTED       ? "what listens there is no expertd"
            : status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED ? silent_text("the greeting")
            : status.error_message().empty()                             ? "no answer"
                                             : status.error_message().substr(0, kCauseBytesMax);
  } else if (!error.status.is_ok()) {
    cause = error.status.message();
    if (error.status.reason() != EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE) {
      refusal_ = error;
      refusal_.status = error.status.with_context("rendezvous " + place_text());
    }
  } else if (!hello->response().hosts_rendezvous()) {
    cause = "node \"" + from_proto(hello->response().node()).name + "\" does not host the rendezvous";
  } else if (const uint64_t term = hello->response().rendezvous_term(); term != candidates_.term || term < term_) {
    cause = "node \"" + from_proto(hello->response().node()).name + "\" hosts the rendezvous in term " +
            std::to_string(term) + ", not " + std::to_string(std::max(term_, candidates_.term)) +
            " (0: it is not elected; give every node the same fabric.etcd or the same fabric.rendezvous)";
  } else {
    host_found(hello->response());
    return;
  }
  cause = place_text() + ": " + cause;
  if (host_ == Host::kFound) {
    lose_host(cause);
    return;
  }
  const bool first = cause_.empty() || (probing_ == 0 && !options_.elected);
  cause_ = first ? cause : cause_ + "; " + cause;
  cause_.resize(std::min(cause_.size(), kCauseBytesMax));
  ++probing_;
  probe_next();
}

void RendezvousLoop::host_found(const peer::v1::HelloResponse& answer) {
  const uint64_t now = base::now_ns();
  next_hello_ns_ = now + options_.presence_ns;
  if (host_ == Host::kFound) {
    backoff_ns_ = 0;  // it lasted
    return;
  }
  host_ = Host::kFound;
  host_node_ = from_proto(answer.node()).name;
  next_search_ns_ = now + options_.look_again_ns;
  cause_.clear();
  search_anew_ = false;
  publish();
  base::log_info("rendezvous found", {{"address", place_text()}, {"node", host_node_}});
  send_waiting();
}

void RendezvousLoop::search_failed() {
  host_ = Host::kResting;
  resting_since_ns_ = base::now_ns();
  stubs_.reset();
  backoff_ns_ = std::clamp(backoff_ns_ * 2, options_.backoff_min_ns, options_.backoff_max_ns);
  next_search_ns_ = search_anew_ ? 0 : base::now_ns() + jittered(backoff_ns_);
  search_anew_ = false;
  publish();
  if (!refusal_.status.is_ok()) {
    end_all(refusal_);  // waiting would change nothing
  }
}

void RendezvousLoop::lose_host(const std::string& cause) {
  host_ = Host::kResting;
  resting_since_ns_ = base::now_ns();
  cause_ = cause;
  cause_.resize(std::min(cause_.size(), kCauseBytesMax));
  backoff_ns_ = std::clamp(backoff_ns_ * 2, options_.backoff_min_ns, options_.backoff_max_ns);
  next_search_ns_ = base::now_ns() + jittered(backoff_ns_);
  ++connection_;
  stubs_.reset();
  if (hello_ != nullptr) {
    hello_->cancel();
    hello_.reset();
  }
  for (const std::shared_ptr<PeerCall>& call : calls_) {
    call->cancel();  // it comes back, and waits
  }
  publish();
  base::log_warn("rendezvous lost; joins wait for it", {{"cause", cause_}});
}

}  // namespace expertd::fabric
