// SPDX-License-Identifier: Apache-2.0
// Measurements of a data lane between two daemons, beside all groups: ProbeAsker sends and times, ProbeAnswerer answers
// what it was opened for. One of the two per lane at a time. Of the lane's thread; owned by Probes, which LaneCore
// turns. What UCX may still name after its end stays until it has drained.
#pragma once

#include <ucp/api/ucp.h>

#include <array>
#include <memory>
#include <vector>

#include "daemon/fabric/lane.h"
#include "daemon/fabric/lane_peer.h"
#include "daemon/fabric/options.h"
#include "daemon/fabric/probe_plan.h"
#include "daemon/fabric/wire.h"

namespace expertd::fabric {

/// Memory of a probe, taken by the control thread that begins it.
using ProbeMemory = std::vector<std::byte>;

/// What both sides have in common: the peer, and what is under way to it.
class ProbeSide {
 public:
  ProbeSide(uint64_t own_node, engine::FabricLane lane, LanePeer* peer, uint64_t probe, uint64_t deadline_ns);
  virtual ~ProbeSide() { --peer_->users; }
  ProbeSide(const ProbeSide&) = delete;
  ProbeSide& operator=(const ProbeSide&) = delete;

  const LanePeer* peer() const { return peer_; }
  uint64_t probe() const { return probe_; }
  uint64_t deadline_ns() const { return deadline_ns_; }
  bool ended() const { return ended_; }
  virtual bool drained() const = 0;

 protected:
  /// A message and the slot that UCX names until it has gone.
  struct Sending {
    bool under_way = false;
    uint32_t rail = 0;
    WireProbe header;
  };
  /// False: it cannot be sent.
  bool send(Sending* sending, const std::byte* payload);
  void fail_peer(const char* what, ucs_status_t status);

  const engine::FabricLane lane_;
  LanePeer* const peer_;
  bool ended_ = false;

 private:
  static void on_sent(void* request, ucs_status_t status, void* sending);

  const uint64_t own_node_;
  const uint64_t probe_;
  const uint64_t deadline_ns_;
};

class ProbeAsker final : public ProbeSide {
 public:
  /// Runs of `lane` alone, and then the end. `payload` has the bytes of the largest run.
  ProbeAsker(uint64_t own_node, engine::FabricLane lane, LanePeer* peer, const ProbePlan& plan, ProbeMemory payload,
             ProbeDone done);

  bool run_once(uint64_t now_ns);
  /// False: it answers what was not asked.
  bool answered(const WireProbe& header, uint64_t now_ns);
  /// Tells `done`, once.
  void end(const base::Status& status);
  bool drained() const override;

 private:
  struct Ask {
    Sending sending;
    bool waits = false;  // for its answer
    uint64_t sent_ns = 0;
  };

  const ProbeRun& run() const { return plan_.runs[run_]; }
  bool start_asks(uint64_t now_ns);
  bool ask(WireProbeSignal signal, uint32_t bytes);
  void finish_run();

  const ProbePlan plan_;
  const ProbeMemory payload_;
  const ProbeDone done_;
  std::array<Ask, kProbeWindow> asks_;
  size_t run_ = 0;         // the one that is on; past the last: the end is told
  uint32_t sequence_ = 0;  // of the last ask
  uint32_t begun_ = 0;     // messages of this run
  uint32_t waiting_ = 0;   // for answers
  uint64_t begin_ns_ = 0;  // of the run
  uint64_t first_ns_ = 0;  // its first answer
  uint64_t last_ns_ = 0;   // its last one
  std::vector<uint64_t> round_trips_ns_;
  std::vector<ProbeFigures> figures_;
};

class ProbeAnswerer final : public ProbeSide {
 public:
  /// `memory` has kProbeWindow times the largest size.
  ProbeAnswerer(uint64_t own_node, engine::FabricLane lane, LanePeer* peer, const ProbeOffer& offer,
                ProbeMemory memory);

  bool run_once();
  /// False: more, or larger, than was agreed; `kept`: the payload's descriptor is kept.
  bool asked(const WireProbe& header, const Incoming& message, bool* kept);
  void end();
  bool drained() const override;

 private:
  enum class Stage { kFree, kOffered, kReceiving, kReceived, kAnswering };
  struct Slot {
    ProbeAnswerer* of = nullptr;
    Stage stage = Stage::kFree;
    ucp_worker_h worker = nullptr;  // of the rail it came by
    void* descriptor = nullptr;     // of a payload that is not received yet
    ucs_status_t status = UCS_OK;
    Sending sending;
  };
  /// Answered ones may still be on their way when the next are there.
  static constexpr uint32_t kSlots = 2 * kProbeWindow;

  void receive(Slot* slot);
  void answer(Slot* slot);
  void let_go(Slot* slot);
  static void on_received(void* request, ucs_status_t status, size_t bytes, void* slot);

  const uint32_t bytes_max_;
  ProbeMemory memory_;
  bool end_asked_ = false;
  std::array<Slot, kSlots> slots_;
};

class Probes {
 public:
  /// One is open or begun and has not ended.
  bool busy() const { return asker_ != nullptr || answerer_ != nullptr || ending_.size() >= kEndingMax; }
  /// While not busy.
  void begin(std::unique_ptr<ProbeAsker> asker) { asker_ = std::move(asker); }
  void open(std::unique_ptr<ProbeAnswerer> answerer) { answerer_ = std::move(answerer); }

  bool run_once(uint64_t now_ns);
  /// A probe message of `from` whose size is right. False: dropped for `cause`, at the cost of the peer with a
  /// `detail`.
  bool incoming(const WireProbe& header, const Incoming& message, const LanePeer* from, bool* kept, DropCause* cause,
                const char** detail);
  void lose(const LanePeer* peer);
  /// Ends an offer, if it is that of this probe.
  void close(uint64_t probe);
  /// This daemon stops.
  void end_all();
  bool quiet() const { return asker_ == nullptr && answerer_ == nullptr && ending_.empty(); }
  /// When to turn at the latest.
  uint64_t next_ns() const;

 private:
  static constexpr size_t kEndingMax = 8;

  bool retire();

  std::unique_ptr<ProbeAsker> asker_;
  std::unique_ptr<ProbeAnswerer> answerer_;
  std::vector<std::unique_ptr<ProbeSide>> ending_;
};

}  // namespace expertd::fabric
