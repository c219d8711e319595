// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/fabric.h"

#include <sys/mman.h>
#include <sys/random.h>

#include <algorithm>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/fabric/core.h"
#include "daemon/fabric/group_channel.h"
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
  State(const FabricOptions& given, engine::WakePort* wake_port, const Core::Setting& setting)
      : options(given),
        wake(wake_port),
        core(setting),
        thread({.spin_ns = given.spin_ns, .task_limit_ns = given.task_limit_ns, .stop_limit_ns = given.stop_limit_ns}) {
  }

  const FabricOptions options;
  AnonymousMemory anonymous;
  engine::WakePort* wake;
  NodeIdentity identity;
  Core core;
  ProgressThread thread;  // ends before what it turns
};

/// What a group's loops hold. The channel behind it stays with the core until it is drained.
class Fabric::Port final : public engine::FabricPort {
 public:
  Port(State* state, GroupChannel* channel) : state_(state), channel_(channel) {}
  ~Port() override {
    const base::Status closed = state_->thread.run([this] { state_->core.close(channel_); });
    if (!closed.is_ok()) {
      base::log_error("a group stays open on the fabric", {{"error", closed.message()}});
    }
  }

  uint64_t message_bytes() const override { return channel_->message_bytes(); }
  engine::SendBuffer take(uint32_t rank, engine::FabricLane lane) override { return channel_->take(rank, lane); }
  void send(uint32_t rank, const engine::SendBuffer& buffer, const engine::MessageHeader& header,
            uint64_t bytes) override {
    channel_->send(rank, buffer, header, bytes);
  }
  void drop(uint32_t rank, const engine::SendBuffer& buffer) override { channel_->drop(rank, buffer); }
  bool receive(uint32_t rank, engine::Arrival* arrival) override { return channel_->receive(rank, arrival); }
  void release(uint32_t rank, const engine::Arrival& arrival) override { channel_->release(rank, arrival); }
  void tell_gone(uint32_t rank, uint64_t through) override {
    const base::Status told = state_->thread.run([&] { state_->core.tell_gone(channel_, rank, through); });
    if (!told.is_ok()) {
      base::log_error("other nodes are not told of a rank that is gone", {{"error", told.message()}});
    }
  }
  void forget(uint32_t rank) override {
    const base::Status done = state_->thread.run([&] { state_->core.forget(channel_, rank); });
    if (!done.is_ok()) {
      base::log_error("messages for a rank that is gone keep their buffers", {{"error", done.message()}});
    }
  }
  void tell_view(uint32_t node, const engine::ViewMessage& message) override {
    const base::Status told = state_->thread.run([&] { state_->core.tell_view(channel_, node, message); });
    if (!told.is_ok()) {
      base::log_error("another node is not told about a view", {{"error", told.message()}});
    }
  }

 private:
  State* state_;
  GroupChannel* channel_;
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
  const Core::Setting setting{.node_id = node_id.value(),
                              .heartbeat = options.heartbeat,
                              .route = options.route,
                              .window_bytes = std::max<uint64_t>(options.window_bytes, 1),
                              .observer = observer,
                              .stop_flush_ns = options.stop_limit_ns / 2};
  auto state = std::make_unique<State>(options, wake, setting);
  EXPERTD_RETURN_IF_ERROR(state->core.open_lanes(options.lanes));
  state->identity.node_id = node_id.value();
  state->identity.name = options.name;
  std::vector<int> event_fds;
  for (uint32_t i = 0; i < kLanes; ++i) {
    for (const std::unique_ptr<Lane>& lane : state->core.lanes()[i]) {
      state->identity.addresses[i].push_back(lane->address());
      event_fds.push_back(lane->event_fd());
    }
  }
  EXPERTD_RETURN_IF_ERROR(state->thread.start(&state->core, event_fds));
  return std::unique_ptr<Fabric>(new Fabric(std::move(state)));
}

const NodeIdentity& Fabric::identity() const {
  return state_->identity;
}

base::Status Fabric::connect(const NodeIdentity& identity) {
  base::Status connected;
  EXPERTD_RETURN_IF_ERROR(state_->thread.run([&] { connected = state_->core.connect(identity); }));
  return connected;
}

base::Status Fabric::disconnect(uint64_t node_id) {
  base::Status disconnected;
  EXPERTD_RETURN_IF_ERROR(state_->thread.run([&] { disconnected = state_->core.disconnect(node_id); }));
  return disconnected;
}

base::Result<std::unique_ptr<engine::FabricPort>> Fabric::open_group(const GroupLink& link) {
  MemoryPort* memory = state_->options.memory != nullptr ? state_->options.memory : &state_->anonymous;
  base::Result<std::unique_ptr<GroupChannel>> channel =
      GroupChannel::create(link, {.own_node_id = state_->identity.node_id,
                                  .loads = state_->core.loads(),
                                  .memory = memory,
                                  .wake = state_->wake,
                                  .waker = &state_->thread.waker()});
  if (!channel.is_ok()) {
    return channel.status();
  }
  GroupChannel* opened = channel.value().get();
  base::Status status;
  EXPERTD_RETURN_IF_ERROR(state_->thread.run([&] { status = state_->core.open(&channel.value()); }));
  EXPERTD_RETURN_IF_ERROR(status);
  return std::unique_ptr<engine::FabricPort>(new Port(state_.get(), opened));
}

base::Status Fabric::open_probe(const ProbeOffer& offer) {
  if (offer.probe == 0 || offer.bytes_max > kProbeBytesMax || offer.deadline_ns > base::now_ns() + kProbeNsMax) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "a probe without an id, of messages above " +
                                                           std::to_string(kProbeBytesMax) + " bytes, or of more than " +
                                                           std::to_string(kProbeNsMax / 1'000'000'000) + " s");
  }
  ProbeMemory memory(size_t{kProbeWindow} * offer.bytes_max);
  base::Status opened;
  EXPERTD_RETURN_IF_ERROR(state_->thread.run([&] { opened = state_->core.open_probe(offer, std::move(memory)); }));
  return opened;
}

base::Status Fabric::begin_probe(const ProbePlan& plan, ProbeDone done) {
  uint32_t bytes_max = 0;
  bool fits = plan.probe != 0 && !plan.runs.empty() && plan.runs.size() <= kProbeRunsMax &&
              plan.deadline_ns <= base::now_ns() + kProbeNsMax;
  for (const ProbeRun& run : plan.runs) {
    bytes_max = std::max(bytes_max, run.bytes);
    fits = fits && run.bytes <= kProbeBytesMax && run.window >= 1 && run.window <= kProbeWindow && run.messages >= 2 &&
           run.messages <= kProbeMessagesMax && run.limit_ns <= kProbeRunNsMax;
  }
  if (!fits) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "a probe with too many or too large runs; see probe_plan.h");
  }
  ProbeMemory payload(std::max(bytes_max, 1U));
  base::Status begun;
  EXPERTD_RETURN_IF_ERROR(
      state_->thread.run([&] { begun = state_->core.begin_probe(plan, std::move(payload), std::move(done)); }));
  return begun;
}

base::Result<FabricSnapshot> Fabric::snapshot() {
  FabricSnapshot snapshot;
  EXPERTD_RETURN_IF_ERROR(state_->thread.run([&] { snapshot = state_->core.snapshot(); }));
  return snapshot;
}

void Fabric::stop() {
  state_->thread.stop();
}

}  // namespace expertd::fabric
