// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/engine_world.h"

#include <algorithm>
#include <bit>

namespace expertd::test {

namespace {

constexpr uint32_t kLocal = ~0U;
constexpr uint64_t kStepsMax = 400'000;

std::string text_of(const RankResult& result) {
  return " rank " + std::to_string(result.rank) + "=" + std::to_string(result.completion.reason) + "/mask " +
         std::to_string(result.completion.rank_mask);
}

}  // namespace

EngineWorld::EngineWorld(uint64_t seed) : random_(seed * 0x9E3779B97F4A7C15ULL + 1) {
  devices_count_ = static_cast<uint32_t>(2 + pick(7));
  faults_ = chance(40);
  deadlines_ = chance(25);
  masks_ = chance(20);
  strays_ = masks_ && chance(40);
  faults_ = faults_ && !strays_;
  deadlines_ = deadlines_ && !strays_;
  refusals_percent_ = chance(50) ? 5 : 0;
  for (uint32_t i = 0; i < devices_count_; ++i) {
    auto device = std::make_unique<Device>();
    device->port = std::make_unique<SimDevice>(random_(), i, this);
    device->port->ticks_max = 1 + pick(40);
    device->port->on_loop = chance(50);
    const auto policy = static_cast<engine::Policy>(pick(3));
    device->engine = std::make_unique<engine::Engine>(base::DeviceIndex{i}, device->port.get(), this, &observer_,
                                                      engine::ScheduleOptions{policy, 1 + pick(60)});
    devices_.push_back(std::move(device));
  }
  build_groups();
  build_clients();
  if (strays_) {
    for (const std::unique_ptr<engine::GroupShared>& group : groups_) {
      group->change_excluded(base::RankSet(random_() & group->all_ranks().low() & ~1ULL), {});
    }
  } else if (masks_) {
    mask_change_ns_ = 1 + pick(200);
  }
}

void EngineWorld::build_groups() {
  const uint32_t count = chance(40) ? 2 : 1;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t ranks = i == 0 ? devices_count_ : static_cast<uint32_t>(1 + pick(devices_count_));
    engine::GroupSettings settings = group_settings(ranks, masks_ || chance(50));
    settings.shape.id = base::GroupId{i + 1};
    const uint32_t shift = static_cast<uint32_t>(pick(devices_count_));
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      settings.shape.devices[rank] = base::DeviceIndex{(rank + (i == 0 ? 0 : shift)) % devices_count_};
    }
    groups_.push_back(std::make_unique<engine::GroupShared>(settings));
  }
}

// The ranks of the second group sit in sessions of their own, or in those of the first when they cover the same
// devices.
void EngineWorld::build_clients() {
  const bool both = groups_.size() == 2 && groups_[0]->ranks() == groups_[1]->ranks() && chance(70);
  const size_t groups = both ? 1 : groups_.size();
  for (uint32_t group = 0; group < groups; ++group) {
    for (uint32_t rank = 0; rank < groups_[group]->ranks(); ++rank) {
      add_client(group, rank, both);
    }
  }
  const uint32_t operations = static_cast<uint32_t>(chance(10) ? 150 + pick(150) : 5 + pick(40));
  const uint64_t order_seed = random_();
  for (const std::unique_ptr<Client>& client : clients_) {
    std::mt19937_64 order(order_seed);  // collectives of several groups come in one order in all sessions
    for (uint32_t i = 0; i < operations; ++i) {
      client->plan.push_back(static_cast<uint32_t>(order() % client->memberships.size()));
      if (chance(10)) {
        client->plan.push_back(kLocal);
      }
    }
    client->completed.resize(client->plan.size() + 1);
    operations_ += client->plan.size();
  }
  // A small queue on a device is only safe with one collective order, as with armed streams.
  if (groups == 1 && chance(30)) {
    for (const std::unique_ptr<Device>& device : devices_) {
      device->port->parts_max = 1 + pick(8);
    }
  }
}

void EngineWorld::add_client(uint32_t group, uint32_t rank, bool both) {
  auto client = std::make_unique<Client>();
  client->world = this;
  client->device = groups_[group]->settings().shape.devices[rank].value;
  const base::SessionId id{clients_.size() + 1};
  client->session = std::make_unique<engine::EngineSession>(id, client.get(), nullptr);
  client->memberships.push_back({group, {groups_[group].get(), rank, 1}, false});
  if (both) {
    uint32_t other = 0;
    while (groups_[1]->settings().shape.devices[other].value != client->device) {
      ++other;
    }
    client->memberships.push_back({1, {groups_[1].get(), other, 1}, false});
  }
  client->window = static_cast<uint32_t>(1 + pick(EXPERTD_RING_SLOTS_MAX));
  if (faults_ && chance(30)) {
    client->dies_ns = 1 + pick(600);
    client->closes_ns = chance(20) ? ~0ULL : client->dies_ns + pick(60);  // sometimes it only leaves its groups
  }
  devices_[client->device]->engine->add_session(client->session.get());
  clients_.push_back(std::move(client));
}

void EngineWorld::Client::complete(const engine::Request& request, const expertd_completion& completion) {
  if (closed) {
    world->breach("session " + std::to_string(session->id().value) + ": completion after its close");
  }
  ++completed[request.seq];
  const uint32_t place = plan[request.seq - 1];
  if (place == kLocal) {
    if (completion.reason != 0 && !world->deadlines_) {
      world->breach("a local operation failed with " + std::to_string(completion.reason));
    }
    return;
  }
  const Membership& membership = memberships[place];
  world->results_[{membership.group, request.submit_ns}].push_back(
      {membership.state.rank, request.rejected_reason, membership.left, completion});
}

engine::Request EngineWorld::make_request(const Client& client, const Membership* membership) {
  engine::Request request = plain_request();
  request.session = client.session->id();
  const uint64_t number = membership == nullptr ? pick(4) : membership->state.next_number * 7 + membership->group;
  request.traffic = number % 3 == 0 ? engine::Traffic::kLatency : engine::Traffic::kThroughput;
  const bool excluded = membership != nullptr && membership->state.group->excluded().contains(membership->state.rank);
  const bool near = strays_ ? excluded && chance(50) : deadlines_ && chance(20);
  request.deadline_ns = now_ns_ + (near ? 1 + pick(300) : kFarNs);
  if (membership == nullptr) {
    return request;
  }
  request.submit_ns = membership->state.next_number;  // the device compares it with the operation it launches
  if (chance(refusals_percent_)) {
    request.rejected_reason = EXPERTD_REASON_NO_SUCH_BUFFER;
    request.without_words = chance(50);
  } else if (chance(refusals_percent_)) {
    request.shape.top_k = 3;
  }
  return request;
}

void EngineWorld::submit_some(Client& client, uint64_t count) {
  for (; count > 0 && !client.closed && client.submitted < client.plan.size(); --count) {
    const uint32_t slot = static_cast<uint32_t>(client.submitted % EXPERTD_RING_SLOTS_MAX);
    if (client.session->outstanding() >= client.window || !client.session->slot_free(slot)) {
      return;
    }
    const uint32_t place = client.plan[client.submitted];
    Membership* membership = place == kLocal ? nullptr : &client.memberships[place];
    if (membership != nullptr && membership->left && client.closes_ns == ~0ULL) {
      return;  // a client that left a group submits nothing to it
    }
    engine::Request& request = client.session->request(slot);
    request = make_request(client, membership);
    request.slot = slot;
    request.seq = ++client.submitted;
    devices_[client.device]->engine->submit(client.session.get(), slot,
                                            membership == nullptr ? nullptr : &membership->state);
    devices_[client.device]->woken = true;
  }
}

void EngineWorld::wake_group(uint32_t group) {
  for (uint32_t rank = 0; rank < groups_[group]->ranks(); ++rank) {
    wake(groups_[group]->settings().shape.devices[rank]);
  }
}

// As the session service does it: the ranks are marked lost, the loops woken, and later the loop closes the session.
void EngineWorld::end_sessions(Client& client) {
  if (now_ns_ >= client.dies_ns) {
    client.dies_ns = ~0ULL;
    for (Membership& membership : client.memberships) {
      membership.left = true;
      membership.state.group->set_lost(membership.state.rank);
      wake_group(membership.group);
    }
  }
  if (now_ns_ >= client.closes_ns && client.dies_ns == ~0ULL && !client.closed) {
    client.closed = true;
    SimDevice& port = *devices_[client.device]->port;
    port.closed_session = client.session->id().value;
    port.now_ns = now_ns_;
    devices_[client.device]->engine->close_session(client.session.get(), now_ns_);
    devices_[client.device]->woken = true;
  }
  if (client.closed && !client.drained) {
    client.drained = devices_[client.device]->engine->forget_if_drained(client.session.get());
  }
}

void EngineWorld::change_masks() {
  if (now_ns_ < mask_change_ns_) {
    return;
  }
  const bool clear = chance(50);
  for (uint32_t group = 0; group < groups_.size(); ++group) {
    const uint64_t mask = clear ? 0 : random_() & random_() & groups_[group]->all_ranks().low() & ~1ULL;
    groups_[group]->change_excluded(base::RankSet(mask), base::RankSet(~mask));
    wake_group(group);
  }
  mask_change_ns_ = now_ns_ > 2000 && clear ? ~0ULL : now_ns_ + 20 + pick(200);
}

bool EngineWorld::step() {
  submit_some(*clients_[pick(clients_.size())], pick(4));
  std::vector<Device*> runnable;
  for (const std::unique_ptr<Device>& device : devices_) {
    const bool due = std::min(device->port->next_event_ns(), device->engine->next_deadline_ns()) <= now_ns_;
    if (device->woken || (due && device->last_run_ns != now_ns_)) {
      runnable.push_back(device.get());
    }
  }
  if (runnable.empty()) {
    return false;
  }
  Device& device = *runnable[pick(runnable.size())];
  device.port->now_ns = now_ns_;
  device.last_run_ns = now_ns_;
  device.woken = false;  // the loop looks once more before it sleeps; what wakes it meanwhile counts
  if (device.engine->run_once(now_ns_)) {
    device.woken = true;
  } else if (device.port->busy()) {
    device.woken = true;  // the loop goes on turning, as time does
    ++now_ns_;
  }
  if (chance(10)) {
    ++now_ns_;
  }
  return true;
}

bool EngineWorld::advance_time() {
  uint64_t next = mask_change_ns_;
  for (const std::unique_ptr<Device>& device : devices_) {
    for (const uint64_t event : {device->port->next_event_ns(), device->engine->next_deadline_ns()}) {
      next = event > now_ns_ ? std::min(next, event) : next;
    }
  }
  for (const std::unique_ptr<Client>& client : clients_) {
    next = std::min(next, client->dies_ns);
    next = client->closed ? next : std::min(next, std::max(client->closes_ns, now_ns_ + 1));
  }
  if (next == ~0ULL) {
    return false;
  }
  now_ns_ = std::max(now_ns_ + 1, next);
  return true;
}

bool EngineWorld::all_done() const {
  return std::all_of(clients_.begin(), clients_.end(), [](const std::unique_ptr<Client>& client) {
    if (client->closed) {
      return client->drained;
    }
    const bool gone = client->dies_ns == ~0ULL && client->memberships[0].left && client->closes_ns == ~0ULL;
    return client->session->outstanding() == 0 && (gone || client->submitted == client->plan.size());
  });
}

std::string EngineWorld::run() {
  uint64_t idle = 0;
  for (uint64_t steps = 0; steps < kStepsMax && breach_.empty(); ++steps) {
    for (const std::unique_ptr<Client>& client : clients_) {
      end_sessions(*client);
    }
    change_masks();
    if (all_done()) {
      check_end();
      return breach_;
    }
    if (step()) {
      idle = 0;
      continue;
    }
    if (++idle % 4 != 0) {
      continue;
    }
    bool submitted = false;  // time stands still while a client could go on
    for (const std::unique_ptr<Client>& client : clients_) {
      const size_t before = client->submitted;
      submit_some(*client, 1);
      submitted |= client->submitted != before;
    }
    if (!submitted && !advance_time() && idle > 1000) {
      breach("nothing can move and nothing is due");
    }
    if (now_ns_ >= kFarNs) {
      breach("operations ended only at their far deadline: a wake-up was lost");
    }
  }
  if (breach_.empty()) {
    breach("no end after " + std::to_string(kStepsMax) + " steps");
  }
  return breach_;
}

void EngineWorld::breach(const std::string& text) {
  if (breach_.empty()) {
    breach_ = text + describe();
  }
}

std::string EngineWorld::describe() const {
  std::string text = " at " + std::to_string(now_ns_) + (faults_ ? ", faults" : "") +
                     (deadlines_ ? ", deadlines" : "") + (masks_ ? ", masks" : "") + (strays_ ? ", strays" : "");
  for (const std::unique_ptr<engine::GroupShared>& group : groups_) {
    text += "; group of " + std::to_string(group->ranks()) + (group->settings().mask_on_loss ? " (mask)" : " (fail)") +
            " lost " + std::to_string(group->lost().low()) + " excluded " + std::to_string(group->excluded().low());
  }
  for (const std::unique_ptr<Client>& client : clients_) {
    text += "\n  session " + std::to_string(client->session->id().value) + " on device " +
            std::to_string(client->device) + (client->closed ? " closed" : "") + " submitted " +
            std::to_string(client->submitted) + "/" + std::to_string(client->plan.size()) + " outstanding " +
            std::to_string(client->session->outstanding()) + " parts " +
            std::to_string(devices_[client->device]->port->parts());
    for (const Membership& membership : client->memberships) {
      text += " [group " + std::to_string(membership.group) + " rank " + std::to_string(membership.state.rank) +
              " next " + std::to_string(membership.state.next_number) + (membership.left ? " left]" : "]");
    }
  }
  return text;
}

// All ranks agree on an operation, except where one was refused, left out, lost, or late beyond the operation.
void EngineWorld::check_operation(uint32_t group, uint64_t number, const std::vector<RankResult>& results) {
  std::string all;
  const RankResult* good = nullptr;
  const RankResult* bad = nullptr;
  bool unlaunched = false;
  bool launched = false;
  for (const RankResult& result : results) {
    all += text_of(result);
    const expertd_completion& completion = result.completion;
    const bool apart = completion.reason == EXPERTD_REASON_BAD_STATE || result.left ||
                       (completion.reason == EXPERTD_REASON_TIMEOUT && completion.rank_mask == 0 &&
                        completion.rank == static_cast<int32_t>(result.rank));
    if (result.own_refusal != 0 && completion.reason != result.own_refusal) {
      breach("a refused rank got another Reason:" + all);
    }
    if (apart || result.own_refusal != 0) {
      continue;
    }
    launched |= completion.rank_mask != 0;
    unlaunched |= completion.reason != EXPERTD_REASON_PEER_LOST && completion.reason != EXPERTD_REASON_TIMEOUT &&
                  completion.reason != 0;
    const RankResult*& other = completion.reason == 0 ? good : bad;
    if (other != nullptr && (other->completion.reason != completion.reason ||
                             (completion.reason == 0 && (other->completion.rank_mask != completion.rank_mask ||
                                                         other->completion.epoch != completion.epoch)))) {
      breach("group " + std::to_string(group) + " operation " + std::to_string(number) + " disagrees:" + all);
    }
    other = &result;
  }
  const bool aborts = faults_ || deadlines_;
  if ((launched && unlaunched) || (good != nullptr && bad != nullptr && !aborts)) {
    breach("group " + std::to_string(group) + " operation " + std::to_string(number) + " ended both ways:" + all);
  }
  if (bad != nullptr && bad->completion.reason == EXPERTD_REASON_TIMEOUT && !deadlines_) {
    breach("group " + std::to_string(group) + " operation " + std::to_string(number) + " timed out:" + all);
  }
}

void EngineWorld::check_end() {
  for (const std::unique_ptr<Client>& client : clients_) {
    for (size_t seq = 1; seq <= client->submitted && !client->closed; ++seq) {
      if (client->completed[seq] != 1) {
        breach("session " + std::to_string(client->session->id().value) + " sequence " + std::to_string(seq) +
               " completed " + std::to_string(client->completed[seq]) + " times");
      }
    }
  }
  for (const auto& [key, results] : results_) {
    check_operation(key.first, key.second, results);
  }
  for (const std::unique_ptr<Device>& device : devices_) {
    if (!device->port->first_breach().empty()) {
      breach(device->port->first_breach());
    }
    if (device->port->parts() != 0 || !device->engine->idle()) {
      breach("a part was left unfinished");
    }
  }
  for (const std::unique_ptr<engine::GroupShared>& group : groups_) {
    for (uint32_t rank = 0; rank < group->ranks(); ++rank) {
      if (!group->quiet(rank)) {
        breach("a group is not quiet at the end");
      }
    }
  }
}

}  // namespace expertd::test
