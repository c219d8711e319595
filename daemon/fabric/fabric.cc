// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/fabric.h"

#include <sys/mman.h>
#include <sys/random.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/fabric/core.h"
#include "daemon/fabric/group_channel.h"
#include "daemon/fabric/lane_core.h"
#include "daemon/fabric/progress_thread.h"

namespace expertd::fabric {

namespace {

/// Pages of the process, there at once so that nothing faults on the hot path.
class AnonymousMemory final : public MemoryPort {
 public:
  base::Result<std::byte*> allocate(uint64_t bytes) override {
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (data == MAP_FAILED) {
      return base::errno_status("mapping " + std::to_string(bytes) + " bytes for a group on the fabric");
    }
    return static_cast<std::byte*>(data);
  }
  void free(std::byte* data, uint64_t bytes) override { (void)::munmap(data, bytes); }
};

base::Result<uint64_t> random_id() {
  uint64_t id = 0;
  while (id == 0) {
    if (::getrandom(&id, sizeof(id), 0) != sizeof(id)) {
      return base::errno_status("drawing a node id");
    }
  }
  return id;
}

}  // namespace

struct Fabric::State {
  /// A data lane and its thread.
  struct DataLane {
    DataLane(const LaneCore::Setting& setting, const ProgressOptions& progress) : core(setting), thread(progress) {}
    LaneCore core;
    ProgressThread thread;  // ends before what it turns
  };

  State(const FabricOptions& given, engine::WakePort* wake_port, uint64_t node_id, FabricObserver* observer)
      : options(given),
        wake(wake_port),
        core({.node_id = node_id,
              .heartbeat = given.heartbeat,
              .observer = observer,
              .crossing = &crossing,
              .stop_flush_ns = given.stop_limit_ns / 2}),
        thread(progress("expertd-fabric")) {
    constexpr std::array<const char*, engine::kFabricLanes> kNames = {"expertd-fab-lat", "expertd-fab-thr"};
    crossing.control_waker = &thread.waker();
    for (uint32_t i = 0; i < engine::kFabricLanes; ++i) {
      const LaneCore::Setting setting{.lane = static_cast<engine::FabricLane>(i),
                                      .node_id = node_id,
                                      .route = given.route,
                                      .rail_idle_ns = given.rail_idle_ns,
                                      .window_bytes = std::max<uint64_t>(given.window_bytes, 1),
                                      .observer = observer,
                                      .crossing = &crossing,
                                      .stop_flush_ns = given.stop_limit_ns / 2};
      lanes[i] = std::make_unique<DataLane>(setting, progress(kNames[i]));
      crossing.lane_wakers[i] = &lanes[i]->thread.waker();
    }
  }

  ProgressOptions progress(const char* name) const {
    return {.name = name,
            .spin_ns = options.spin_ns,
            .task_limit_ns = options.task_limit_ns,
            .stop_limit_ns = options.stop_limit_ns};
  }
  base::Status start();
  void measure_lanes(uint32_t lane, const ProbePlan& plan, const std::vector<ProbeFigures>& figures,
                     const ProbeDone& done);

  const FabricOptions options;
  AnonymousMemory anonymous;
  engine::WakePort* wake;
  NodeIdentity identity;
  Crossing crossing;
  std::array<std::unique_ptr<DataLane>, engine::kFabricLanes> lanes;
  Core core;
  ProgressThread thread;  // of the control lane; ends before what it turns
  std::mutex connecting;  // one connect() at a time
  ConnectionId last_connection = 0;
  std::mutex mutex;  // everything below
  std::vector<std::weak_ptr<GroupChannel>> channels;
};

base::Status Fabric::State::start() {
  EXPERTD_RETURN_IF_ERROR(core.open_lane(options.lanes[static_cast<uint32_t>(LaneKind::kControl)]));
  const auto take_rails = [this](LaneKind kind, const Rails& rails) {
    std::vector<int> event_fds;
    for (const std::unique_ptr<Lane>& rail : rails) {
      identity.addresses[static_cast<uint32_t>(kind)].push_back(rail->address());
      event_fds.push_back(rail->event_fd());
    }
    return event_fds;
  };
  for (uint32_t i = 0; i < engine::kFabricLanes; ++i) {
    const LaneKind kind = lane_of(static_cast<engine::FabricLane>(i));
    EXPERTD_RETURN_IF_ERROR(lanes[i]->core.open_rails(options.lanes[static_cast<uint32_t>(kind)]));
    EXPERTD_RETURN_IF_ERROR(lanes[i]->thread.start(&lanes[i]->core, take_rails(kind, lanes[i]->core.rails())));
  }
  return thread.start(&core, take_rails(LaneKind::kControl, core.rails()));
}

/// What a group's loops hold. The channel behind it stays with the core until it is drained.
class Fabric::Port final : public engine::FabricPort {
 public:
  Port(State* state, std::shared_ptr<GroupChannel> channel) : state_(state), channel_(std::move(channel)) {}
  ~Port() override { close(*state_, channel_.get()); }

  /// On every thread that has it.
  static void close(State& state, GroupChannel* channel) {
    channel->set_closing();
    base::Status closed = state.thread.run([&] { state.core.close(channel); });
    for (const std::unique_ptr<State::DataLane>& lane : state.lanes) {
      const base::Status status = lane->thread.run([&] { lane->core.close(channel); });
      closed = closed.is_ok() ? status : closed;
    }
    if (!closed.is_ok()) {
      base::log_error("a group stays open on the fabric", {{"error", closed.message()}});
    }
  }

  uint64_t message_bytes() const override { return channel_->link().message_bytes; }
  bool has_gpu_memory() const override { return channel_->link().gpu_memory; }
  engine::SendBuffer take(uint32_t rank, engine::FabricLane lane) override { return channel_->take(rank, lane); }
  void send(uint32_t rank, const engine::SendBuffer& buffer, const engine::MessageHeader& header,
            uint64_t bytes) override {
    channel_->send(rank, buffer, header, bytes);
  }
  void drop(uint32_t rank, const engine::SendBuffer& buffer) override { channel_->drop(rank, buffer); }
  bool receive(uint32_t rank, engine::Arrival* arrival) override { return channel_->receive(rank, arrival); }
  void release(uint32_t rank, const engine::Arrival& arrival) override { channel_->release(rank, arrival); }
  void tell_gone(uint32_t rank, uint64_t through) override {
    const base::Status told = state_->thread.run([&] { channel_->control().tell_gone(rank, through); });
    if (!told.is_ok()) {
      base::log_error("other nodes are not told of a rank that is gone", {{"error", told.message()}});
    }
  }
  void forget(uint32_t rank) override {
    for (uint32_t i = 0; i < engine::kFabricLanes; ++i) {
      const auto lane = static_cast<engine::FabricLane>(i);
      if (!channel_->uses(lane)) {
        continue;
      }
      const base::Status done = state_->lanes[i]->thread.run([&] { channel_->lane(lane).forget(rank); });
      if (!done.is_ok()) {
        base::log_error("messages for a rank that is gone keep their buffers", {{"error", done.message()}});
      }
    }
  }
  void tell_view(uint32_t node, const engine::ViewMessage& message) override {
    const base::Status told = state_->thread.run([&] { channel_->control().tell_view(node, message); });
    if (!told.is_ok()) {
      base::log_error("another node is not told about a view", {{"error", told.message()}});
    }
  }

 private:
  State* state_;
  std::shared_ptr<GroupChannel> channel_;
};

Fabric::Fabric(std::unique_ptr<State> state) : state_(std::move(state)) {}

Fabric::~Fabric() {
  stop();
}

base::Result<std::unique_ptr<Fabric>> Fabric::create(const FabricOptions& options, engine::WakePort* wake,
                                                     FabricObserver* observer) {
  base::Result<uint64_t> node_id = random_id();
  if (!node_id.is_ok()) {
    return node_id.status();
  }
  auto state = std::make_unique<State>(options, wake, node_id.value(), observer);
  state->identity.node_id = node_id.value();
  state->identity.name = options.name;
  std::unique_ptr<Fabric> fabric(new Fabric(std::move(state)));
  EXPERTD_RETURN_IF_ERROR(fabric->state_->start());
  return fabric;
}

const NodeIdentity& Fabric::identity() const {
  return state_->identity;
}

// The data lanes first, so that a peer that is up has its endpoints here.
base::Status Fabric::connect(const NodeIdentity& identity) {
  const std::lock_guard<std::mutex> lock(state_->connecting);
  bool known = false;
  base::Status status;
  EXPERTD_RETURN_IF_ERROR(state_->thread.run([&] { status = state_->core.check_new(identity, &known); }));
  if (!status.is_ok() || known) {
    return status;
  }
  const ConnectionId connection = ++state_->last_connection;
  for (const std::unique_ptr<State::DataLane>& lane : state_->lanes) {
    const base::Status ran = lane->thread.run([&] { status = lane->core.connect(identity, connection); });
    if (!ran.is_ok() || !status.is_ok()) {
      state_->crossing.let_go(connection);
      return ran.is_ok() ? status : ran;
    }
  }
  const base::Status ran = state_->thread.run([&] { status = state_->core.connect(identity, connection); });
  if (!ran.is_ok() || !status.is_ok()) {
    state_->crossing.let_go(connection);
    return ran.is_ok() ? status : ran;
  }
  for (const std::unique_ptr<State::DataLane>& lane : state_->lanes) {
    EXPERTD_RETURN_IF_ERROR(lane->thread.run([&] { lane->core.tell_again(connection); }));
  }
  return base::Status::ok();
}

base::Status Fabric::disconnect(uint64_t node_id) {
  base::Status disconnected;
  EXPERTD_RETURN_IF_ERROR(state_->thread.run([&] { disconnected = state_->core.disconnect(node_id); }));
  return disconnected;
}

base::Result<std::unique_ptr<engine::FabricPort>> Fabric::open_group(const GroupLink& link) {
  MemoryPort* memory = state_->options.memory != nullptr ? state_->options.memory : &state_->anonymous;
  ChannelSurroundings surroundings{.lanes = {}, .memory = memory, .gpu_memory = state_->options.gpu_memory};
  for (uint32_t i = 0; i < engine::kFabricLanes; ++i) {
    surroundings.lanes[i] = {.own_node_id = state_->identity.node_id,
                             .loads = state_->lanes[i]->core.loads(),
                             .wake = state_->wake,
                             .waker = &state_->lanes[i]->thread.waker()};
  }
  base::Result<std::shared_ptr<GroupChannel>> created = GroupChannel::create(link, surroundings);
  if (!created.is_ok()) {
    return created.status();
  }
  const std::shared_ptr<GroupChannel>& channel = created.value();
  base::Status status;
  EXPERTD_RETURN_IF_ERROR(state_->thread.run([&] { status = state_->core.open(channel); }));
  for (uint32_t i = 0; i < engine::kFabricLanes && status.is_ok(); ++i) {
    if (channel->uses(static_cast<engine::FabricLane>(i))) {
      State::DataLane& lane = *state_->lanes[i];
      base::Status opened;
      status = lane.thread.run([&] { opened = lane.core.open(channel); });
      status = status.is_ok() ? opened : status;
    }
  }
  if (!status.is_ok()) {
    Port::close(*state_, channel.get());
    return status;
  }
  const std::lock_guard<std::mutex> lock(state_->mutex);
  std::erase_if(state_->channels, [](const std::weak_ptr<GroupChannel>& each) { return each.expired(); });
  state_->channels.push_back(channel);
  return std::unique_ptr<engine::FabricPort>(new Port(state_.get(), channel));
}

base::Status Fabric::open_probe(const ProbeOffer& offer) {
  if (offer.probe == 0 || offer.bytes_max > kProbeBytesMax || offer.deadline_ns > base::now_ns() + kProbeNsMax) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "a probe without an id, of messages above " +
                                                           std::to_string(kProbeBytesMax) + " bytes, or of more than " +
                                                           std::to_string(kProbeNsMax / 1'000'000'000) + " s");
  }
  for (uint32_t i = 0; i < engine::kFabricLanes; ++i) {
    State::DataLane& lane = *state_->lanes[i];
    ProbeMemory memory(size_t{kProbeWindow} * offer.bytes_max);
    base::Status opened;
    const base::Status ran = lane.thread.run([&] { opened = lane.core.open_probe(offer, std::move(memory)); });
    if (!ran.is_ok() || !opened.is_ok()) {
      if (i != 0) {
        State::DataLane& before = *state_->lanes[0];
        (void)before.thread.run([&] { before.core.close_probe(offer.probe); });
      }
      return ran.is_ok() ? opened : ran;
    }
  }
  return base::Status::ok();
}

namespace {

/// The runs of one lane.
ProbePlan plan_of(const ProbePlan& plan, engine::FabricLane lane) {
  ProbePlan part = plan;
  std::erase_if(part.runs, [&](const ProbeRun& run) { return run.lane != lane; });
  return part;
}

ProbeMemory payload_of(const ProbePlan& plan) {
  uint32_t bytes_max = 1;
  for (const ProbeRun& run : plan.runs) {
    bytes_max = std::max(bytes_max, run.bytes);
  }
  return ProbeMemory(bytes_max);
}

/// In the order of the plan.
std::vector<ProbeFigures> in_order(const ProbePlan& plan, const std::vector<ProbeFigures>& by_lane) {
  std::vector<ProbeFigures> figures;
  std::array<size_t, engine::kFabricLanes> next{};
  for (const ProbeRun& run : plan.runs) {
    size_t skip = next[static_cast<uint32_t>(run.lane)]++;
    for (const ProbeFigures& each : by_lane) {
      if (each.lane == run.lane && skip-- == 0) {
        figures.push_back(each);
        break;
      }
    }
  }
  return figures;
}

}  // namespace

// One lane after the other, and each of them to its end, since the other side answers on all until it is told.
void Fabric::State::measure_lanes(uint32_t lane, const ProbePlan& plan, const std::vector<ProbeFigures>& figures,
                                  const ProbeDone& done) {
  if (lane == engine::kFabricLanes) {
    done(base::Status::ok(), in_order(plan, figures));
    return;
  }
  const ProbePlan part = plan_of(plan, static_cast<engine::FabricLane>(lane));
  const auto next = [this, lane, plan, figures, done](const base::Status& status,
                                                      const std::vector<ProbeFigures>& more) {
    std::vector<ProbeFigures> all = figures;
    all.insert(all.end(), more.begin(), more.end());
    if (!status.is_ok()) {
      done(status, in_order(plan, all));
      return;
    }
    measure_lanes(lane + 1, plan, all, done);
  };
  const auto payload = std::make_shared<ProbeMemory>(payload_of(part));
  const bool posted = lanes[lane]->thread.post([this, lane, part, payload, next] {
    const base::Status begun = lanes[lane]->core.begin_probe(part, std::move(*payload), next);
    if (!begun.is_ok()) {
      next(begun, {});
    }
  });
  if (!posted) {
    done(base::Status(EXPERTD_REASON_CANCELLED, "this daemon stops"), in_order(plan, figures));
  }
}

base::Status Fabric::begin_probe(const ProbePlan& plan, ProbeDone done) {
  bool fits = plan.probe != 0 && !plan.runs.empty() && plan.runs.size() <= kProbeRunsMax &&
              plan.deadline_ns <= base::now_ns() + kProbeNsMax;
  for (const ProbeRun& run : plan.runs) {
    fits = fits && run.bytes <= kProbeBytesMax && run.window >= 1 && run.window <= kProbeWindow && run.messages >= 2 &&
           run.messages <= kProbeMessagesMax && run.limit_ns <= kProbeRunNsMax;
  }
  if (!fits) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "a probe with too many or too large runs; see probe_plan.h");
  }
  const auto first = engine::FabricLane::kLatency;
  State* const state = state_.get();
  State::DataLane& lane = *state->lanes[static_cast<uint32_t>(first)];
  const ProbePlan part = plan_of(plan, first);
  ProbeMemory payload = payload_of(part);
  const auto next = [state, plan, done = std::move(done)](const base::Status& status,
                                                          const std::vector<ProbeFigures>& figures) {
    if (!status.is_ok()) {
      done(status, in_order(plan, figures));
      return;
    }
    state->measure_lanes(static_cast<uint32_t>(first) + 1, plan, figures, done);
  };
  base::Status begun;
  EXPERTD_RETURN_IF_ERROR(lane.thread.run([&] { begun = lane.core.begin_probe(part, std::move(payload), next); }));
  return begun;
}

base::Result<FabricSnapshot> Fabric::snapshot() {
  ControlSnapshot control;
  EXPERTD_RETURN_IF_ERROR(state_->thread.run([&] { control = state_->core.snapshot(); }));
  FabricSnapshot snapshot{
      .peers = {}, .rails = {}, .dropped = control.dropped, .lost = control.lost, .rtt = control.rtt};
  snapshot.turns = control.turns;
  for (uint32_t i = 0; i < engine::kFabricLanes; ++i) {
    State::DataLane& lane = *state_->lanes[i];
    LaneSnapshot part;
    EXPERTD_RETURN_IF_ERROR(lane.thread.run([&] { part = lane.core.snapshot(); }));
    snapshot.turns += part.turns;
    snapshot.traffic[i] = part.traffic;
    for (uint32_t cause = 0; cause < kDropCauses; ++cause) {
      snapshot.dropped[cause] += part.dropped[cause];
    }
    snapshot.rails.insert(snapshot.rails.end(), part.rails.begin(), part.rails.end());
    for (const LaneSnapshot::Traffic& traffic : part.peers) {
      for (auto& [connection, peer] : control.peers) {
        if (connection == traffic.connection) {
          peer.lanes[i] = traffic.traffic;
          peer.sends_failed += traffic.sends_failed;
        }
      }
    }
  }
  for (auto& [connection, peer] : control.peers) {
    snapshot.peers.push_back(std::move(peer));
  }
  const std::lock_guard<std::mutex> lock(state_->mutex);
  for (const std::weak_ptr<GroupChannel>& each : state_->channels) {
    if (const std::shared_ptr<GroupChannel> channel = each.lock()) {
      ++(channel->closing() ? snapshot.groups_closing : snapshot.groups);
      snapshot.memory_bytes += channel->memory_bytes();
    }
  }
  return snapshot;
}

// All at once, since the control lane's last word waits for what the others still send, and they for that word.
void Fabric::stop() {
  for (const std::unique_ptr<State::DataLane>& lane : state_->lanes) {
    lane->thread.begin_stop();
  }
  state_->thread.stop();
  for (const std::unique_ptr<State::DataLane>& lane : state_->lanes) {
    lane->thread.stop();
  }
}

}  // namespace expertd::fabric
