// SPDX-License-Identifier: Apache-2.0
// The thread behind RendezvousClient: searches the daemon that hosts the rendezvous, says hello to it, sends calls
// there and sends them again elsewhere. Events come through one queue: submitted calls, calls that came back, a
// finished search of candidates. Everything not marked otherwise is of that thread alone.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "daemon/fabric/bootstrap/candidates.h"
#include "daemon/fabric/bootstrap/peer_call.h"
#include "daemon/fabric/bootstrap/rendezvous_client.h"

namespace expertd::fabric {

class RendezvousLoop {
 public:
  RendezvousLoop(const RendezvousClientOptions& options, CandidateOptions candidates,
                 RendezvousClient::Hosting hosting);
  ~RendezvousLoop();
  RendezvousLoop(const RendezvousLoop&) = delete;
  RendezvousLoop& operator=(const RendezvousLoop&) = delete;

  /// Any thread. With an error the call only ends with it, on the loop's thread.
  void submit(std::shared_ptr<PeerCall> call, const session::ErrorDetail& error);
  /// Any thread: what comes of an earlier term counts no longer.
  void host_elected(uint64_t term);
  /// Any thread; source and etcd_cause are the caller's.
  RendezvousState state() const;

 private:
  using HelloCall = TypedCall<peer::v1::HelloRequest, peer::v1::HelloResponse>;
  enum class Host { kResting, kResolving, kProbing, kFound };

  void run();
  void post(std::function<void()> event);
  uint64_t next_time_ns() const;
  void turn(uint64_t now_ns);

  void accept(std::shared_ptr<PeerCall> call, const session::ErrorDetail& error);
  void end_withdrawn(const PeerCall& withdrawal);
  void send(const std::shared_ptr<PeerCall>& call);
  void send_waiting();
  void returned(const std::shared_ptr<PeerCall>& call, uint64_t connection, uint64_t term, const grpc::Status& status);
  void finish(const std::shared_ptr<PeerCall>& call, const session::ErrorDetail& error);
  void stop();
  void expire(uint64_t now_ns);
  void end_all(const session::ErrorDetail& error);

  void found_candidates(Candidates found);
  void follow(uint64_t term);
  void probe_next();
  void send_hello();
  void probed(const std::shared_ptr<HelloCall>& hello, const grpc::Status& status);
  void host_found(const peer::v1::HelloResponse& answer);
  void search_failed();
  void lose_host(const std::string& cause);
  std::string place_text() const;
  static std::string silent_text(const char* call);
  std::string who() const;
  uint64_t jittered(uint64_t longest_ns);
  void publish();

  const RendezvousClientOptions options_;
  RendezvousClient::Hosting hosting_;  // null: stopping
  std::minstd_rand random_;
  std::vector<std::shared_ptr<PeerCall>> calls_;
  uint32_t in_flight_ = 0;  // calls and hellos that gRPC has not given back
  Host host_ = Host::kResting;
  Candidates candidates_;
  uint64_t term_ = 0;         // the latest that was heard of; 0: there is no election
  bool search_anew_ = false;  // who hosts changed while it was being looked for
  size_t probing_ = 0;        // index into candidates_
  uint64_t connection_ = 0;   // counts connections; what an earlier one says is ignored
  std::unique_ptr<PeerStubs> stubs_;
  std::shared_ptr<HelloCall> hello_;  // in flight
  std::string host_node_;             // name of the found host
  std::string cause_;                 // why there is no host
  session::ErrorDetail refusal_;      // of a candidate in this search
  uint64_t next_hello_ns_ = 0;
  uint64_t next_search_ns_ = 0;
  uint64_t resting_since_ns_ = 0;
  uint64_t backoff_ns_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable changed_;           // with mutex_: the rest
  std::deque<std::function<void()>> events_;  // bounded by calls_max: each submitted call comes and returns once
  uint32_t submitted_ = 0;                    // calls that have not ended
  bool stopping_ = false;
  RendezvousState state_;

  std::unique_ptr<CandidateSearch> search_;  // calls post()
  std::thread thread_;
};

}  // namespace expertd::fabric
