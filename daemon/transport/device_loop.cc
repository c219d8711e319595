// SPDX-License-Identifier: Apache-2.0
#include "daemon/transport/device_loop.h"

#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <future>
#include <system_error>

#include "daemon/base/clock.h"

namespace expertd::transport {

namespace {

// The longest sleep: the watchdog hears from an idle loop this often.
constexpr uint64_t kBeatNs = 500'000'000;

// A loop with parts on a GPU spins this long after something moved (longer than any operation takes), then sleeps
// between looks for an eighth of the time since, within these.
constexpr uint64_t kPollSpinNs = 2'000'000;
constexpr uint64_t kPollNsMin = 20'000;
constexpr uint64_t kPollNsMax = 1'000'000;

void relax() {
  __builtin_ia32_pause();
}

}  // namespace

base::Result<std::unique_ptr<DeviceLoop>> DeviceLoop::create(base::DeviceIndex device, const LoopOptions& options) {
  base::ScopedFd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event.valid()) {
    return base::errno_status("eventfd of a device loop");
  }
  base::ScopedFd rings(::epoll_create1(EPOLL_CLOEXEC));
  if (!rings.valid()) {
    return base::errno_status("epoll set of a device loop");
  }
  return std::unique_ptr<DeviceLoop>(new DeviceLoop(device, options, std::move(event), std::move(rings)));
}

DeviceLoop::~DeviceLoop() {
  stop();
}

base::Status DeviceLoop::start(engine::DevicePort* port, engine::WakePort* wake, engine::OpObserver* op_observer,
                               LoopObserver* loop_observer, FaultCallback fault) {
  port_ = port;
  engine_ = std::make_unique<engine::Engine>(device_, port, wake, op_observer,
                                             engine::ScheduleOptions{.policy = options_.schedule});
  observer_ = loop_observer;
  fault_ = std::move(fault);
  try {
    thread_ = std::thread([this] { thread_main(); });
  } catch (const std::system_error& error) {
    return base::Status(EXPERTD_REASON_SYSTEM, std::string("starting a device loop: ") + error.what());
  }
  return base::Status::ok();
}

void DeviceLoop::stop() {
  stop_.store(true, std::memory_order_release);
  wake();
  if (thread_.joinable()) {
    thread_.join();
  }
}

void DeviceLoop::wake() {
  // seq_cst pairs with the store in sleep_until_work: either the loop sees the flag or this sees it sleeping.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst)) {
    const uint64_t one = 1;
    (void)!::write(event_.get(), &one, sizeof(one));
  }
}

base::Status DeviceLoop::post(std::function<void()> task, Room room) {
  {
    const std::lock_guard<std::mutex> lock(tasks_mutex_);
    if (tasks_ended_) {
      return base::Status(EXPERTD_REASON_UNAVAILABLE, "the device loop has ended");
    }
    if (room == Room::kBounded && tasks_.size() >= base::kMaxLoopTasks) {
      return base::Status(EXPERTD_REASON_INTERNAL, "a device loop has too many requests waiting");
    }
    tasks_.push_back(std::move(task));
  }
  tasks_waiting_.fetch_add(1, std::memory_order_seq_cst);
  wake();
  return base::Status::ok();
}

base::Status DeviceLoop::run(std::function<void()> task) {
  // Whoever claims the task first decides: the loop runs it, or the caller gave up and it never runs, so that a caller
  // may take back whatever the task would have used.
  struct Ticket {
    std::atomic<bool> claimed{false};
    std::promise<void> done;
  };
  auto ticket = std::make_shared<Ticket>();
  std::future<void> done = ticket->done.get_future();
  EXPERTD_RETURN_IF_ERROR(post(
      [task = std::move(task), ticket] {
        if (!ticket->claimed.exchange(true, std::memory_order_acq_rel)) {
          task();
          ticket->done.set_value();
        }
      },
      Room::kBounded));
  if (done.wait_for(std::chrono::nanoseconds(options_.task_timeout_ns)) == std::future_status::ready) {
    return base::Status::ok();
  }
  if (!ticket->claimed.exchange(true, std::memory_order_acq_rel)) {
    return base::Status(EXPERTD_REASON_INTERNAL, "a device loop did not answer in time");
  }
  done.wait();  // the loop has just begun it, and tasks are short
  return base::Status::ok();
}

base::Status DeviceLoop::add_session(session::SessionTables* tables, session::RingMemory* ring, void* flag_page) {
  EXPERTD_RETURN_IF_ERROR(watch(*ring));
  auto server = std::make_shared<std::unique_ptr<RingServer>>(
      std::make_unique<RingServer>(tables, ring, flag_page, options_.default_timeout_ns));
  const base::Status added = run([this, server] {
    engine_->add_session(&(*server)->engine_session());
    if (raised_flags_ != 0) {
      (*server)->set_flags(raised_flags_);
    }
    servers_.push_back(std::move(*server));
  });
  if (!added.is_ok()) {
    unwatch(*ring);
  }
  return added;
}

base::Status DeviceLoop::close_session(base::SessionId session, std::function<void()> drained) {
  // Always taken: each session closes once, and its memory may not be given back before the loop has let go of it.
  const auto task = [this, session, drained = std::move(drained)] {
    const auto found = std::find_if(servers_.begin(), servers_.end(), [&](const std::unique_ptr<RingServer>& server) {
      return server->tables().id == session;
    });
    if (found == servers_.end()) {
      drained();
      return;
    }
    (*found)->set_flags(EXPERTD_SESSION_CLOSED);
    unwatch((*found)->ring());
    engine_->close_session(&(*found)->engine_session(), base::now_ns());
    closing_.push_back({std::move(*found), drained});
    servers_.erase(found);
    std::erase(fault_reported_, session);
  };
  return post(task, Room::kAlways);
}

// What a client submitted before it asked is in its ring already, but perhaps not in the engine: a loop that wakes for
// both runs tasks first. It is taken in here, so that it counts as in flight.
void DeviceLoop::catch_up(base::SessionId session) {
  for (const std::unique_ptr<RingServer>& server : servers_) {
    if (server->tables().id == session) {
      (void)server->poll(*engine_, base::now_ns());
    }
  }
}

// A session that closes has operations in flight until it has drained, so both lists count.
template <typename Thing>
bool DeviceLoop::in_flight(base::SessionId session, const Thing* thing) {
  catch_up(session);
  const auto names = [&](RingServer& server) {
    return server.tables().id == session && server.engine_session().uses(thing);
  };
  return std::any_of(servers_.begin(), servers_.end(), [&](const auto& server) { return names(*server); }) ||
         std::any_of(closing_.begin(), closing_.end(), [&](const Closing& closing) { return names(*closing.server); });
}

bool DeviceLoop::uses(base::SessionId session, const engine::Mapping* mapping) {
  return in_flight(session, mapping) || port_->captured(mapping);
}

bool DeviceLoop::uses_group(base::SessionId session, const engine::RankState* rank) {
  const bool captures = !port_->end_captures(session, rank->group->settings().shape.id);
  return in_flight(session, rank) || captures;
}

void DeviceLoop::raise_session_flags(uint32_t flags) {
  raised_flags_ |= flags;
  for (const std::unique_ptr<RingServer>& server : servers_) {
    server->set_flags(flags);
  }
}

bool DeviceLoop::run_tasks() {
  if (tasks_waiting_.load(std::memory_order_seq_cst) == 0) {
    return false;
  }
  std::deque<std::function<void()>> tasks;
  {
    const std::lock_guard<std::mutex> lock(tasks_mutex_);
    tasks.swap(tasks_);
  }
  tasks_waiting_.fetch_sub(static_cast<uint32_t>(tasks.size()), std::memory_order_seq_cst);
  for (std::function<void()>& task : tasks) {
    task();
  }
  return !tasks.empty();
}

// From here on post() refuses, so that nobody waits for a task that nobody runs.
void DeviceLoop::end_tasks() {
  {
    const std::lock_guard<std::mutex> lock(tasks_mutex_);
    tasks_ended_ = true;
  }
  (void)run_tasks();
}

bool DeviceLoop::poll_rings(uint64_t now_ns) {
  bool moved = false;
  uint32_t used = 0;
  uint32_t fullest = 0;
  for (const std::unique_ptr<RingServer>& server : servers_) {
    moved |= server->poll(*engine_, now_ns);
    used += server->slots_used();
    fullest = std::max(fullest, server->slots_used());
    if (server->faulted() &&
        std::find(fault_reported_.begin(), fault_reported_.end(), server->tables().id) == fault_reported_.end()) {
      fault_reported_.push_back(server->tables().id);
      fault_(server->tables().id);
    }
  }
  outstanding_.store(used, std::memory_order_relaxed);
  if (moved) {
    observer_->ring_fill(device_, fullest, servers_.front()->slot_count());  // all rings of a daemon have one size
  }
  return moved;
}

bool DeviceLoop::finish_closing() {
  bool moved = false;
  for (size_t i = 0; i < closing_.size();) {
    if (!engine_->forget_if_drained(&closing_[i].server->engine_session())) {
      ++i;
      continue;
    }
    const std::function<void()> drained = std::move(closing_[i].drained);
    closing_.erase(closing_.begin() + static_cast<std::ptrdiff_t>(i));
    drained();
    moved = true;
  }
  return moved;
}

bool DeviceLoop::anything_to_do() {
  if (tasks_waiting_.load(std::memory_order_seq_cst) != 0 || stop_.load(std::memory_order_acquire)) {
    return true;
  }
  return std::any_of(servers_.begin(), servers_.end(),
                     [](const std::unique_ptr<RingServer>& server) { return server->has_submissions(); });
}

void DeviceLoop::set_sleeping(bool sleeping) {
  for (const std::unique_ptr<RingServer>& server : servers_) {
    server->set_sleeping(sleeping);
  }
  sleeping_.store(sleeping, std::memory_order_seq_cst);
}

void DeviceLoop::sleep_until_work(uint64_t now_ns, uint64_t idle_ns) {
  set_sleeping(true);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  // Look once more: whatever was set before the flag was visible must not be slept over. A progress of the engine here
  // is work found, not lost; so is a part that did one slice of what it had waited for.
  if (!anything_to_do() && !engine_->run_once(now_ns) && !port_->busy()) {
    const uint64_t look_ns = port_->polls() ? std::clamp(idle_ns / 8, kPollNsMin, kPollNsMax) : kBeatNs;
    const uint64_t until_ns = std::min(engine_->next_deadline_ns(), now_ns + look_ns);
    wait_for_event(until_ns > now_ns ? until_ns - now_ns : 0);
  }
  set_sleeping(false);
}

void DeviceLoop::wait_for_event(uint64_t timeout_ns) {
  pollfd entries[2] = {{event_.get(), POLLIN, 0}, {rings_.get(), POLLIN, 0}};
  const timespec timeout{static_cast<time_t>(timeout_ns / 1'000'000'000),
                         static_cast<long>(timeout_ns % 1'000'000'000)};
  if (::ppoll(entries, 2, &timeout, nullptr) <= 0) {
    return;
  }
  if (entries[0].revents != 0) {
    uint64_t drained = 0;
    (void)!::read(event_.get(), &drained, sizeof(drained));  // nobody else has this one, so it cannot block
  }
  if (entries[1].revents != 0) {
    // Takes the edges out of the set; what is left over wakes the next sleep. Every ring is looked at in any case.
    constexpr int kEdges = 16;
    epoll_event edges[kEdges];
    (void)::epoll_wait(rings_.get(), edges, kEdges, 0);
  }
}

base::Status DeviceLoop::watch(const session::RingMemory& ring) {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLET;
  if (::epoll_ctl(rings_.get(), EPOLL_CTL_ADD, ring.wake_fd(), &event) != 0) {
    return base::errno_status("watching the eventfd of a ring");
  }
  return base::Status::ok();
}

// Closing the daemon's descriptor would not take it out of the set while the client has one of the same eventfd.
void DeviceLoop::unwatch(const session::RingMemory& ring) {
  epoll_event unused{};
  (void)::epoll_ctl(rings_.get(), EPOLL_CTL_DEL, ring.wake_fd(), &unused);
}

void DeviceLoop::thread_main() {
  const std::string name = "expertd-loop" + std::to_string(device_.value);  // at most 15 characters
  (void)::pthread_setname_np(::pthread_self(), name.c_str());
  uint64_t last_work_ns = base::now_ns();
  uint64_t last_beat_ns = 0;
  while (!stop_.load(std::memory_order_acquire)) {
    const uint64_t now_ns = base::now_ns();
    bool moved = run_tasks();
    moved |= poll_rings(now_ns);
    moved |= engine_->run_once(now_ns);
    if (!closing_.empty()) {
      moved |= finish_closing();
    }
    const uint64_t spent_ns = base::now_ns() - now_ns;
    if (now_ns - last_beat_ns > kBeatNs / 4 || spent_ns > 1'000'000) {
      observer_->beat(device_, now_ns, spent_ns);
      last_beat_ns = now_ns;
    }
    if (moved || port_->busy()) {
      last_work_ns = now_ns;
    } else if (now_ns - last_work_ns < (port_->polls() ? kPollSpinNs : options_.spin_ns)) {
      relax();
    } else {
      sleep_until_work(now_ns, now_ns - last_work_ns);
    }
  }
  end_tasks();
}

}  // namespace expertd::transport
