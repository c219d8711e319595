// SPDX-License-Identifier: Apache-2.0
#include "daemon/app/nodes.h"

#include <algorithm>
#include <chrono>
#include <system_error>
#include <utility>

#include "daemon/app/fabric_setup.h"
#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/device/nodes/node_messages.h"
#include "daemon/fabric/bootstrap/address.h"
#include "daemon/fabric/bootstrap/node_facts.h"
#include "daemon/fabric/ucx_probe.h"
#include "daemon/group/etcd/etcd_store.h"

namespace expertd::app {

namespace {

constexpr uint64_t kServerShutdownNs = 1'000'000'000;
constexpr std::chrono::milliseconds kLook(20);
constexpr size_t kViewsWaiting = 1024;  // more are dropped: whoever waits for an answer asks again
constexpr size_t kAddresses = size_t{4} * fabric::kMaxNodes;
// A call to etcd is given up early enough to try another one before the lease is over.
constexpr uint64_t kEtcdCallsPerLease = 4;
constexpr uint64_t kEtcdCallMaxNs = 2'000'000'000;

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) {
    text += (text.empty() ? "" : ",") + word;
  }
  return text;
}

std::vector<group::LaneAddress> lanes_of(const fabric::NodeIdentity& identity) {
  std::vector<group::LaneAddress> lanes;
  for (uint32_t lane = 0; lane < fabric::kLanes; ++lane) {
    for (uint32_t rail = 0; rail < identity.addresses[lane].size(); ++rail) {
      lanes.push_back({lane + rail * fabric::kLanes, identity.addresses[lane][rail]});
    }
  }
  return lanes;
}

fabric::NodeIdentity identity_of(const group::NodeIdentity& node) {
  fabric::NodeIdentity identity;
  identity.node_id = node.id;
  identity.name = node.name;
  for (const group::LaneAddress& lane : node.lanes) {
    const uint32_t rail = lane.lane / fabric::kLanes;
    if (rail < fabric::kMaxRails) {
      std::vector<std::string>& rails = identity.addresses[lane.lane % fabric::kLanes];
      rails.resize(std::max<size_t>(rails.size(), rail + 1));
      rails[rail] = lane.bytes;
    }
  }
  return identity;
}

}  // namespace

base::Result<std::unique_ptr<Nodes>> Nodes::create(const config::FabricConfig& config, engine::WakePort* wake,
                                                   const Beats& beats, device::Device* gpu) {
  std::unique_ptr<Nodes> nodes(new Nodes(config, beats));
  base::Result<std::string> key = fabric::read_cluster_key(config.cluster_key_file);
  if (!key.is_ok()) {
    return key.status();
  }
  nodes->cluster_key_ = std::move(key).value();
  nodes->identity_.name = fabric::node_name_or_host(config.node_name);
  EXPERTD_RETURN_IF_ERROR(nodes->open_fabric(wake, gpu));
  nodes->make_mesh();
  EXPERTD_RETURN_IF_ERROR(nodes->open_services());
  return nodes;
}

Nodes::~Nodes() {
  detach();
  if (server_ != nullptr) {
    server_->shutdown(base::now_ns() + kServerShutdownNs);
  }
  fabric_.reset();
  for (supervise::Beat* beat : beats_) {
    beat->retire();
  }
}

base::Status Nodes::open_fabric(engine::WakePort* wake, device::Device* gpu) {
  EXPERTD_RETURN_IF_ERROR(choose_backend(gpu));
  fabric::FabricOptions options = fabric_options(config_, identity_.name, gpu != nullptr);
  if (gpu != nullptr) {
    memory_ = std::make_unique<FabricMemory>(gpu);
    options.memory = memory_.get();
    options.gpu_memory = gpu_memory_.get();
  }
  base::Result<std::unique_ptr<fabric::Fabric>> created = fabric::Fabric::create(options, wake, this);
  if (!created.is_ok()) {
    return created.status().with_context("fabric");
  }
  fabric_ = std::move(created).value();
  identity_.id = fabric_->identity().node_id;
  identity_.lanes = lanes_of(fabric_->identity());
  return base::Status::ok();
}

base::Status Nodes::choose_backend(device::Device* gpu) {
  ProbeGpuMemory memory(gpu);
  fabric::UcxProbe probe(gpu == nullptr ? nullptr : &memory);
  base::Result<fabric::BackendChoice> choice = fabric::choose_backend(config_.require_direct, probe);
  if (!choice.is_ok()) {
    return choice.status();
  }
  backend_ = std::move(choice).value();
  if (backend_.live == fabric::Backend::kDirect) {
    gpu_memory_ = std::make_unique<FabricGpuMemory>(gpu);
  }
  base::log_info("backend of the fabric",
                 {{"backend", fabric::backend_name(backend_.live)}, {"cause", backend_.cause}});
  return base::Status::ok();
}

base::Status Nodes::open_services() {
  fabric::PeerServerOptions server;
  server.listen = config_.listen;
  server.cluster_key = cluster_key_;
  // With a port that is chosen here the own address is known only afterwards; hello has none then.
  const base::Result<fabric::HostPort> listen = fabric::parse_host_port(config_.listen);
  if (listen.is_ok() && listen.value().port != "0") {
    const auto port = static_cast<uint16_t>(std::stoul(listen.value().port));
    identity_.address = fabric::advertised_address(config_.advertise, config_.listen, port);
  }
  server.identity = identity_;
  server.probes = mesh_.get();
  server.rendezvous.max_nodes = config_.max_nodes;
  base::Result<std::unique_ptr<fabric::PeerServer>> served = fabric::PeerServer::create(server);
  if (!served.is_ok()) {
    return served.status();
  }
  server_ = std::move(served).value();
  identity_.address = fabric::advertised_address(config_.advertise, config_.listen, server_->port());
  return base::Status::ok();
}

base::Status Nodes::make_election() {
  if (config_.etcd.empty()) {
    base::log_info("the rendezvous is found by a list",
                   {{"source", fabric::source_of(config_.rendezvous)}, {"rendezvous", joined(config_.rendezvous)}});
    return base::Status::ok();
  }
  const std::string key = config_.etcd_prefix + "/rendezvous";
  base::Result<std::unique_ptr<group::EtcdStore>> store = group::EtcdStore::create(
      {config_.etcd, key, std::min(kEtcdCallMaxNs, config_.etcd_lease_ns / kEtcdCallsPerLease)});
  if (!store.is_ok()) {
    return store.status();
  }
  group::CandidacyOptions options;
  options.self = {identity_.id, identity_.name, identity_.address};
  options.where = "etcd key " + key;
  options.lease_ns = config_.etcd_lease_ns;
  election_ = std::make_unique<group::Election>(options, std::move(store).value());
  base::log_info("the rendezvous is found by etcd", {{"source", "etcd"}, {"etcd", joined(config_.etcd)}, {"key", key}});
  return base::Status::ok();
}

base::Status Nodes::start_election() {
  // detach() ends the thread that calls this before the client.
  return election_->start(
      [this, client = client_.get(), term = uint64_t{0}, answered = false](const group::Elected& elected) mutable {
        if (elected.here) {
          server_->set_elected(elected.term, elected.until_ns);
        } else {
          server_->set_hosting(false);
        }
        const bool moved = std::exchange(term, elected.term) != elected.term;
        const bool back = !std::exchange(answered, elected.cause.empty()) && answered;  // the host may serve again, too
        if (moved || back) {
          client->host_elected(elected.term);
        }
      });
}

base::Status Nodes::attach(session::SessionService* sessions) {
  sessions_ = sessions;
  mesh_->introduce(identity_);
  EXPERTD_RETURN_IF_ERROR(make_election());
  fabric::RendezvousClientOptions options;
  options.identity = identity_;
  options.rendezvous = config_.rendezvous;
  if (election_ != nullptr) {
    options.rendezvous = config_.etcd;
    options.elected = [election = election_.get()] { return election->elected(); };
  }
  options.cluster_key = cluster_key_;
  options.own_port = server_->port();
  options.own_listen = config_.listen;
  base::Result<std::unique_ptr<fabric::RendezvousClient>> client =
      fabric::RendezvousClient::create(options, [this](bool hosting) { server_->set_hosting(hosting); });
  if (!client.is_ok()) {
    return client.status();
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    client_ = std::move(client).value();
  }
  if (election_ != nullptr) {
    EXPERTD_RETURN_IF_ERROR(start_election());
  }
  sessions->use_nodes(client_.get(), this);
  try {
    teller_ = std::thread([this] { teller_main(); });
  } catch (const std::system_error& error) {
    return base::Status(EXPERTD_REASON_SYSTEM,
                        std::string("starting the thread that tells of lost nodes: ") + error.what());
  }
  return base::Status::ok();
}

void Nodes::detach() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  if (mesh_ != nullptr) {
    mesh_->stop();
  }
  if (teller_.joinable()) {
    teller_.join();
  }
  if (election_ != nullptr) {
    election_->stop();
  }
  std::unique_ptr<fabric::RendezvousClient> client;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    client.swap(client_);
  }
}

NodeFacts Nodes::facts() {
  NodeFacts facts;
  facts.enabled = true;
  facts.name = identity_.name;
  facts.id = identity_.id;
  facts.address = identity_.address;
  facts.transports = config_.transports.empty() ? "auto" : joined(config_.transports);
  facts.backend = fabric::backend_name(backend_.live);
  facts.backend_cause = backend_.cause;
  facts.options = fabric_options(config_, identity_.name, memory_ != nullptr);
  facts.hosting = server_->hosting();
  facts.now_ns = base::now_ns();
  base::Result<fabric::FabricSnapshot> snapshot = fabric_->snapshot();
  facts.answered = snapshot.status();
  facts.measured = mesh_ == nullptr ? decltype(facts.measured){} : mesh_->measured();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (snapshot.is_ok()) {
    last_ = std::move(snapshot).value();
  }
  facts.fabric = last_;
  facts.addresses = addresses_;
  facts.rendezvous = client_ == nullptr ? fabric::RendezvousState{} : client_->state();
  return facts;
}

void Nodes::keep_address(const group::NodeIdentity& node) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (addresses_.size() >= kAddresses && !addresses_.contains(node.id)) {
    // Nodes that were restarted often: those that are still there are told of again with the next group.
    addresses_.clear();
  }
  addresses_[node.id] = node.address;
}

base::Status Nodes::connect(const group::NodeIdentity& node) {
  const base::Status connected = fabric_->connect(identity_of(node));
  if (!connected.is_ok()) {
    return connected.with_context("node " + node.name + " at " + node.address);
  }
  keep_address(node);
  return base::Status::ok();
}

base::Status Nodes::connect_all(const group::Placed& placed) {
  for (const group::NodeIdentity& node : placed.nodes) {
    if (node.id != identity_.id) {
      EXPERTD_RETURN_IF_ERROR(connect(node));
    }
  }
  return base::Status::ok();
}

base::Status Nodes::wait_up(const group::NodeIdentity& node, uint64_t deadline_ns) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    const auto peer = peers_.find(node.id);
    if (peer != peers_.end() && peer->second) {
      return base::Status::ok();
    }
    if (stop_ || base::now_ns() >= deadline_ns) {
      return base::Status(
          EXPERTD_REASON_PEER_LOST,
          "node " + node.name + " at " + node.address +
              " gave its addresses but no sign of life over the fabric (transports " +
              (config_.transports.empty() ? "auto" : joined(config_.transports)) +
              "): one was expected from it by the control lane before the join's deadline; look whether "
              "fabric.transports and fabric.devices fit both nodes and whether packets pass both ways "
              "(expertctl doctor on each, expertctl mesh)");
    }
    changed_.wait_for(lock, kLook);
  }
}

void Nodes::make_mesh() {
  MeshSurroundings surroundings;
  surroundings.fabric = fabric_.get();
  surroundings.cluster_key = cluster_key_;
  surroundings.connect = [this](const group::NodeIdentity& node, uint64_t deadline_ns) {
    const base::Status connected = connect(node);
    return connected.is_ok() && deadline_ns != 0 ? wait_up(node, deadline_ns) : connected;
  };
  surroundings.rendezvous = [this](std::string* cause) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const fabric::RendezvousState state = client_ == nullptr ? fabric::RendezvousState{} : client_->state();
    *cause = state.cause;
    return state.address;
  };
  mesh_ = std::make_unique<Mesh>(std::move(surroundings));
}

base::Result<std::shared_ptr<engine::FabricPort>> Nodes::open(const group::Placed& placed,
                                                              const engine::GroupSettings& settings,
                                                              uint64_t deadline_ns) {
  EXPERTD_RETURN_IF_ERROR(connect_all(placed));
  // Nobody may send before every node has opened the group, so a node that does not answer is found out here.
  for (const group::NodeIdentity& node : placed.nodes) {
    if (node.id != identity_.id) {
      EXPERTD_RETURN_IF_ERROR(wait_up(node, deadline_ns));
    }
  }
  fabric::GroupLink link;
  link.key = placed.key;
  link.epoch = static_cast<uint32_t>(placed.epoch);
  link.placement = *settings.placement;
  for (const group::NodeIdentity& node : placed.nodes) {
    link.node_ids.push_back(node.id);
  }
  const auto places = link.placement.ranks_on(link.placement.own_node);
  link.devices.assign(settings.shape.devices.begin(), settings.shape.devices.begin() + places);
  link.lanes = settings.fabric_lanes;
  link.weight = settings.fabric_weight;
  const bool on_gpus = placed.ranks.front().facts.cuda;
  size_messages(config_, static_cast<uint32_t>(placed.nodes.size()), on_gpus, &link);
  if (on_gpus) {
    // So that one message holds a low latency operation's rows or sums for a node.
    const uint64_t wanted = device::low_latency_message_bytes(settings.shape, link.placement);
    link.message_bytes = std::min(std::max(link.message_bytes, wanted), fabric::kMaxMessageBytes);
    link.gpu_memory = gpu_memory_ != nullptr;
  }
  base::Result<std::unique_ptr<engine::FabricPort>> port = fabric_->open_group(link);
  if (!port.is_ok()) {
    return port.status();
  }
  return std::shared_ptr<engine::FabricPort>(std::move(port).value());
}

void Nodes::post(const Event& event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  events_.push_back(event);
  changed_.notify_all();
}

void Nodes::node_up(uint64_t node_id, const std::string& name) {
  base::log_info("node up", {{"node", name}});
  const std::lock_guard<std::mutex> lock(mutex_);
  peers_[node_id] = true;
  changed_.notify_all();
}

void Nodes::node_lost(uint64_t node_id, const std::string& name, fabric::LossCause cause, const std::string& detail) {
  base::log_warn("node lost", {{"node", name}, {"cause", fabric::loss_cause_name(cause)}, {"detail", detail}});
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    peers_.erase(node_id);
  }
  post(NodeLost{node_id});
}

void Nodes::view_message(uint64_t group_key, uint32_t node, const engine::ViewMessage& message) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (views_waiting_ < kViewsWaiting) {
    ++views_waiting_;
    events_.push_back(ViewSaid{group_key, node, message});
    changed_.notify_all();
  }
}

void Nodes::views_changed() {
  const std::lock_guard<std::mutex> lock(mutex_);
  views_changed_ = true;
  changed_.notify_all();
}

void Nodes::tell(const Event& event) {
  if (const auto* gone = std::get_if<RankGone>(&event)) {
    sessions_->remote_rank_gone(gone->group_key, gone->rank, gone->through);
  } else if (const auto* lost = std::get_if<NodeLost>(&event)) {
    sessions_->node_lost(lost->node_id);
  } else {
    const ViewSaid& said = std::get<ViewSaid>(event);
    sessions_->view_message(said.group_key, said.node, said.message);
  }
}

void Nodes::teller_main() {
  uint64_t next_ns = UINT64_MAX;
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    const uint64_t now_ns = base::now_ns();
    if (!events_.empty()) {
      const Event event = events_.front();
      events_.pop_front();
      views_waiting_ -= std::holds_alternative<ViewSaid>(event) ? 1 : 0;
      lock.unlock();
      tell(event);
      lock.lock();
    } else if (views_changed_ || now_ns >= next_ns) {
      views_changed_ = false;
      lock.unlock();
      next_ns = sessions_->tend_views(now_ns);
      lock.lock();
    } else if (next_ns == UINT64_MAX) {
      changed_.wait(lock);
    } else {
      changed_.wait_for(lock, std::chrono::nanoseconds(next_ns - now_ns));
    }
  }
}

}  // namespace expertd::app
