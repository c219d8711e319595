// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/mesh.h"

#include <sys/random.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/fabric/probe_plan.h"
#include "daemon/group/rendezvous.h"

namespace expertd::app {

namespace {

constexpr std::chrono::milliseconds kLook(20);
constexpr uint64_t kListNs = 2'000'000'000;
constexpr uint64_t kLeastNs = 50'000'000;
constexpr uint64_t kGraceNs = 500'000'000;  // on top of a deadline, so that the node's own words arrive
constexpr uint32_t kSmallBytes = 8;
constexpr uint32_t kSmallMessages = 256;
constexpr uint32_t kLargeBytes = 256 * 1024;  // as messages of groups are by default
constexpr uint32_t kLargeMessages = 256;
constexpr uint32_t kLargeWindow = 8;
constexpr uint64_t kRunNs = 100'000'000;  // in which a run begins messages

base::Status busy() {
  return base::Status(EXPERTD_REASON_BAD_STATE, "another measurement is on at this node; try again when it has ended");
}

session::ErrorDetail detail_of(base::Status status) {
  session::ErrorDetail error;
  error.status = std::move(status);
  return error;
}

uint64_t random_id() {
  uint64_t id = 0;
  while (id == 0 && ::getrandom(&id, sizeof(id), 0) == sizeof(id)) {
  }
  return id;  // 0, which the fabric refuses, when there is no randomness
}

std::vector<fabric::ProbeRun> runs(const std::vector<std::string>& latency,
                                   const std::vector<std::string>& throughput) {
  std::vector<fabric::ProbeRun> runs;
  for (const engine::FabricLane lane : {engine::FabricLane::kLatency, engine::FabricLane::kThroughput}) {
    const size_t rails = lane == engine::FabricLane::kLatency ? latency.size() : throughput.size();
    for (uint32_t rail = 0; rail < rails; ++rail) {
      const uint64_t run_ns = kRunNs / rails;  // a lane takes the same time however many devices it has
      runs.push_back({lane, kSmallBytes, 1, kSmallMessages, run_ns, rail});
      runs.push_back({lane, kLargeBytes, kLargeWindow, kLargeMessages, run_ns, rail});
    }
  }
  return runs;
}

// Two runs per rail of a lane: small messages, then large ones.
std::vector<fabric::LaneSpeed> speeds_of(const std::vector<fabric::ProbeFigures>& figures,
                                         const std::vector<std::string>& latency,
                                         const std::vector<std::string>& throughput) {
  std::vector<fabric::LaneSpeed> speeds;
  for (size_t i = 0; i + 1 < figures.size(); i += 2) {
    const fabric::ProbeFigures& small = figures[i];
    const fabric::ProbeFigures& large = figures[i + 1];
    const double seconds = static_cast<double>(std::max<uint64_t>(large.elapsed_ns, 1)) / 1e9;
    const std::vector<std::string>& devices = small.lane == engine::FabricLane::kLatency ? latency : throughput;
    speeds.push_back({static_cast<uint32_t>(fabric::lane_of(small.lane)), small.p50_ns / 2, small.p99_ns / 2,
                      static_cast<uint64_t>(static_cast<double>(uint64_t{large.bytes} * large.messages) / seconds),
                      small.rail < devices.size() ? devices[small.rail] : std::string()});
  }
  return speeds;
}

}  // namespace

Mesh::Mesh(MeshSurroundings surroundings)
    : surroundings_(std::move(surroundings)),
      operator_calls_(surroundings_.cluster_key),
      peer_calls_(surroundings_.cluster_key) {}

void Mesh::introduce(const group::NodeIdentity& own) {
  const std::lock_guard<std::mutex> lock(mutex_);
  own_ = own;
}

void Mesh::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  operator_calls_.cancel();
  peer_calls_.cancel();
  for_operators_.stop();
  for_peers_.stop();
}

group::NodeIdentity Mesh::own() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return own_;
}

std::string Mesh::node() const {
  return own().name;
}

base::Status Mesh::fetch_nodes(uint64_t deadline_ns) {
  std::string cause;
  const std::string rendezvous = surroundings_.rendezvous(&cause);
  if (rendezvous.empty()) {
    return base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE,
                        "no daemon of fabric.rendezvous answers, and it is the rendezvous that knows the nodes" +
                            (cause.empty() ? std::string() : ": " + cause));
  }
  base::Result<std::vector<group::NodeIdentity>> listed = operator_calls_.nodes(rendezvous, deadline_ns);
  if (!listed.is_ok()) {
    return listed.status();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  nodes_.clear();
  for (group::NodeIdentity& node : listed.value()) {
    if (nodes_.size() < group::kMaxNodes && group::check_identity(node).status.is_ok()) {
      nodes_[node.id] = std::move(node);
    }
  }
  return base::Status::ok();
}

base::Result<group::NodeIdentity> Mesh::known(uint64_t node_id, uint64_t deadline_ns) {
  for (const bool fetched : {false, true}) {
    if (fetched) {
      EXPERTD_RETURN_IF_ERROR(fetch_nodes(deadline_ns));
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto node = nodes_.find(node_id); node != nodes_.end()) {
      return node->second;
    }
  }
  return base::Status(EXPERTD_REASON_PEER_LOST, "the rendezvous knows no such node any more; list the nodes anew");
}

void Mesh::list_nodes(Listed done) {
  const bool taken = for_operators_.try_submit([this, done]() -> OneJob::Told {
    const base::Status fetched = fetch_nodes(base::now_ns() + kListNs);
    std::vector<session::NodePlace> places;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [id, node] : nodes_) {
      places.push_back({node.name, id, node.address});
    }
    std::sort(places.begin(), places.end(), [](const auto& left, const auto& right) { return left.name < right.name; });
    return [done, fetched, places] { done(fetched, places); };
  });
  if (!taken) {
    done(busy(), {});
  }
}

void Mesh::measure_pair(uint64_t source_id, uint64_t destination_id, uint64_t timeout_ns, MeshApi::Measured done) {
  if (timeout_ns < kLeastNs || timeout_ns > fabric::kProbeNsMax || source_id == destination_id) {
    done(base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "a measurement is between two nodes and takes 50 ms to 10 s"), {});
    return;
  }
  const bool taken = for_operators_.try_submit([=, this]() -> OneJob::Told {
    base::Result<std::vector<session::PairLaneSnapshot>> lanes = relay(source_id, destination_id, timeout_ns);
    return [done, status = lanes.status(),
            lanes = lanes.is_ok() ? lanes.value() : std::vector<session::PairLaneSnapshot>()] { done(status, lanes); };
  });
  if (!taken) {
    done(busy(), {});
  }
}

base::Result<std::vector<session::PairLaneSnapshot>> Mesh::relay(uint64_t source_id, uint64_t destination_id,
                                                                 uint64_t timeout_ns) {
  const uint64_t deadline_ns = base::now_ns() + timeout_ns;
  const base::Result<group::NodeIdentity> source = known(source_id, deadline_ns);
  if (!source.is_ok()) {
    return source.status();
  }
  const base::Result<group::NodeIdentity> destination = known(destination_id, deadline_ns);
  if (!destination.is_ok()) {
    return destination.status();
  }
  const Speeds speeds =
      operator_calls_.measure(source.value(), destination.value(), timeout_ns, deadline_ns + kGraceNs);
  if (!speeds.is_ok()) {
    return speeds.status();
  }
  std::vector<session::PairLaneSnapshot> lanes;
  for (const fabric::LaneSpeed& speed : speeds.value()) {
    if (speed.lane < fabric::kLanes) {
      lanes.push_back({fabric::kLaneNames[speed.lane], speed.device, speed.latency_p50_ns, speed.latency_p99_ns,
                       speed.bytes_per_second});
    }
  }
  return lanes;
}

void Mesh::open(const fabric::ProbeOpening& opening, Opened done) {
  const bool taken = for_peers_.try_submit([this, opening, done]() -> OneJob::Told {
    const session::ErrorDetail error = detail_of(let_ask(opening));
    return [done, error] { done(error); };
  });
  if (!taken) {
    done(detail_of(busy()));
  }
}

base::Status Mesh::let_ask(const fabric::ProbeOpening& opening) {
  if (opening.timeout_ns == 0 || opening.timeout_ns > fabric::kProbeNsMax) {
    return base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "a probe is open for 1 ns to 10 s");
  }
  const uint64_t deadline_ns = base::now_ns() + opening.timeout_ns;
  // Without waiting for its first sign of life, which comes when it has connected too.
  EXPERTD_RETURN_IF_ERROR(surroundings_.connect(opening.asker, 0));
  return surroundings_.fabric->open_probe({opening.asker.id, opening.probe, opening.bytes_max, deadline_ns});
}

void Mesh::measure(const group::NodeIdentity& to, uint64_t timeout_ns, fabric::ProbePort::Measured done) {
  if (timeout_ns < kLeastNs || timeout_ns > fabric::kProbeNsMax) {
    done(detail_of(base::Status(EXPERTD_REASON_ARGUMENT_RANGE, "a measurement takes 50 ms to 10 s")), {});
    return;
  }
  const bool taken = for_peers_.try_submit([this, to, timeout_ns, done]() -> OneJob::Told {
    Speeds speeds = ask(to, timeout_ns);
    return [done, error = detail_of(speeds.status()),
            lanes = speeds.is_ok() ? speeds.value() : std::vector<fabric::LaneSpeed>()] { done(error, lanes); };
  });
  if (!taken) {
    done(detail_of(busy()), {});
  }
}

Mesh::Speeds Mesh::ask(const group::NodeIdentity& to, uint64_t timeout_ns) {
  const uint64_t deadline_ns = base::now_ns() + timeout_ns;
  const fabric::ProbeOpening opening{own(), random_id(), kLargeBytes, timeout_ns};
  if (opening.asker.id == 0) {
    return base::Status(EXPERTD_REASON_UNAVAILABLE, "the daemon is still being started");
  }
  const base::Result<group::NodeIdentity> other = peer_calls_.open(to, opening, deadline_ns);
  if (!other.is_ok()) {
    return other.status();
  }
  if (other.value().id != to.id) {
    return base::Status(EXPERTD_REASON_PEER_LOST,
                        "node \"" + to.name + "\" was restarted, or another one is at " + to.address + " now");
  }
  group::NodeIdentity known = other.value();
  known.address = to.address;
  EXPERTD_RETURN_IF_ERROR(surroundings_.connect(known, deadline_ns));
  const base::Result<Devices> devices = rails();
  if (!devices.is_ok()) {
    return devices.status();
  }
  const auto& [latency, throughput] = devices.value();
  base::Result<std::vector<fabric::ProbeFigures>> figures =
      run_probe({known.id, opening.probe, runs(latency, throughput), deadline_ns});
  if (!figures.is_ok()) {
    return figures.status();
  }
  std::vector<fabric::LaneSpeed> speeds = speeds_of(figures.value(), latency, throughput);
  keep(to.name, speeds);
  return speeds;
}

// A lane with one rail has no device to tell apart; of equal names the second has its number.
base::Result<Mesh::Devices> Mesh::rails() const {
  base::Result<fabric::FabricSnapshot> snapshot = surroundings_.fabric->snapshot();
  if (!snapshot.is_ok()) {
    return snapshot.status();
  }
  Devices devices;
  for (const fabric::RailSnapshot& rail : snapshot.value().rails) {
    std::vector<std::string>& names = rail.lane == fabric::LaneKind::kLatency ? devices.first : devices.second;
    const bool known = std::find(names.begin(), names.end(), rail.device) != names.end();
    names.push_back((known || rail.device.empty() ? rail.device + "#" + std::to_string(names.size()) : rail.device)
                        .substr(0, fabric::kDeviceBytesMax));
  }
  for (std::vector<std::string>* names : {&devices.first, &devices.second}) {
    if (names->size() <= 1) {
      *names = {""};
    }
  }
  return devices;
}

void Mesh::keep(const std::string& node, const std::vector<fabric::LaneSpeed>& speeds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (measured_.size() >= group::kMaxNodes && !measured_.contains(node)) {
    measured_.clear();  // of nodes that went; those that are there are measured again with the next mesh
  }
  measured_[node] = speeds;
}

std::map<std::string, std::vector<fabric::LaneSpeed>> Mesh::measured() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return measured_;
}

base::Result<std::vector<fabric::ProbeFigures>> Mesh::run_probe(const fabric::ProbePlan& plan) const {
  struct Outcome {
    std::mutex mutex;
    std::condition_variable ended;
    bool done = false;
    base::Status status;
    std::vector<fabric::ProbeFigures> figures;
  };
  const auto outcome = std::make_shared<Outcome>();  // the fabric may be later than this waits
  EXPERTD_RETURN_IF_ERROR(surroundings_.fabric->begin_probe(
      plan, [outcome](const base::Status& status, const std::vector<fabric::ProbeFigures>& figures) {
        const std::lock_guard<std::mutex> lock(outcome->mutex);
        outcome->status = status;
        outcome->figures = figures;
        outcome->done = true;
        outcome->ended.notify_all();
      }));
  std::unique_lock<std::mutex> lock(outcome->mutex);
  while (!outcome->done) {
    if (stopping_.load(std::memory_order_relaxed)) {
      return base::Status(EXPERTD_REASON_CANCELLED, "this daemon stops");
    }
    if (base::now_ns() > plan.deadline_ns + kGraceNs) {
      return base::Status(EXPERTD_REASON_TIMEOUT, "the fabric thread did not end the measurement in time");
    }
    outcome->ended.wait_for(lock, kLook);
  }
  if (!outcome->status.is_ok()) {
    return outcome->status;
  }
  return outcome->figures;
}

}  // namespace expertd::app
