// SPDX-License-Identifier: Apache-2.0
// The real daemon with host devices that can be made to fail as a GPU does whose context is lost: a loop that does not
// come back from the driver, and the loss as another loop or a probe sees it. SIGUSR1 with a set of lossy_daemon.h as
// its value says what happens from then on. Tests only.
#include <signal.h>
#include <unistd.h>

#include <atomic>

#include "daemon/app/serve.h"
#include "tests/support/lossy_daemon.h"

namespace {

using expertd::base::DeviceIndex;
using expertd::device::HostDevice;
using expertd::device::HostGroupDirectory;
using expertd::device::LossObserver;
using expertd::engine::WakePort;
using namespace expertd::support;

std::atomic<uint32_t> asked{0};
std::atomic<uint32_t> stuck{0};

bool is_asked(uint32_t fault) {
  return (asked.load() & fault) != 0;
}

// Whoever is asked to be stuck is, so that what follows cannot come of it.
bool all_are_stuck() {
  const uint32_t loops = asked.load() & (kLoop0Stuck | kLoop1Stuck);
  return (stuck.load() & loops) == loops;
}

class LossyDevice final : public HostDevice {
 public:
  LossyDevice(DeviceIndex index, uint32_t ordinal, HostGroupDirectory* groups, WakePort* wake, uint64_t pool_max_bytes)
      : HostDevice(index, ordinal, groups, wake, pool_max_bytes), ordinal_(ordinal) {}

  void watch_context(LossObserver* observer) override { observer_ = observer; }
  bool can_lose_context() const override { return true; }
  void probe_context() override {
    if (ordinal_ == 0 && is_asked(kProbe0SeesLoss) && all_are_stuck()) {
      observer_->context_lost(index());
    }
  }
  bool polls() const override { return true; }  // as a GPU with work does
  bool tend(uint64_t /*now_ns*/) override {
    const uint32_t own = ordinal_ == 0 ? kLoop0Stuck : kLoop1Stuck;
    while (is_asked(own)) {
      stuck.fetch_or(own);
      ::pause();
    }
    if (ordinal_ == 1 && is_asked(kLoop1SeesLoss) && all_are_stuck()) {
      observer_->context_lost(index());
    }
    return false;
  }

 private:
  uint32_t ordinal_;
  LossObserver* observer_ = nullptr;
};

void on_signal(int /*number*/, siginfo_t* info, void* /*context*/) {
  asked.fetch_or(static_cast<uint32_t>(info->si_value.sival_int));
}

}  // namespace

int main(int argc, char** argv) {
  struct sigaction action {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  (void)::sigaction(SIGUSR1, &action, nullptr);
  return expertd::app::serve(argc, argv,
                             [](DeviceIndex index, uint32_t ordinal, HostGroupDirectory* groups, WakePort* wake,
                                uint64_t pool) -> std::unique_ptr<expertd::device::Device> {
                               return std::make_unique<LossyDevice>(index, ordinal, groups, wake, pool);
                             });
}
