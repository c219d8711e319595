// SPDX-License-Identifier: Apache-2.0
// The test's side of a clock that is set.
#include <fcntl.h>
#include <sys/mman.h>

#include <atomic>
#include <filesystem>

#include "daemon/base/fd.h"
#include "tests/support/clock_jump.h"
#include "tests/support/daemon_process.h"

namespace expertd::support {
namespace {

constexpr size_t kBytes = sizeof(int64_t);

std::string library() {
  return binary_directory() + "/libexpertd_clock_jump.so";
}

}  // namespace

ClockJump::ClockJump() {
  const base::ScopedFd file(::open(directory_.file("seconds").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (::ftruncate(file.get(), kBytes) == 0) {
    void* const mapped = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    page_ = mapped == MAP_FAILED ? nullptr : mapped;
  }
}

ClockJump::~ClockJump() {
  if (page_ != nullptr) {
    (void)::munmap(page_, kBytes);
  }
}

std::string ClockJump::problem() const {
#ifdef __SANITIZE_ADDRESS__
  return "the library of the address sanitizer must be the first of a process";
#else
  std::error_code ignored;
  if (page_ == nullptr || !std::filesystem::exists(library(), ignored)) {
    return library() + " is not there; build the target expertd_clock_jump";
  }
  return "";
#endif
}

std::vector<std::string> ClockJump::environment() const {
  return {"LD_PRELOAD=" + library(), "EXPERTD_TEST_CLOCK_JUMP=" + directory_.file("seconds")};
}

void ClockJump::set(int64_t seconds) {
  std::atomic_ref<int64_t>(*static_cast<int64_t*>(page_)).store(seconds);
}

}  // namespace expertd::support
