// SPDX-License-Identifier: Apache-2.0
// The library of clock_jump.h: stands before libc's readings of the wall clock in the process that loads it.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

namespace {

const int64_t kNone = 0;
const int64_t* shared = nullptr;  // set once; two threads that come first map the same file

int64_t offset() {
  const int64_t* seconds = __atomic_load_n(&shared, __ATOMIC_ACQUIRE);
  if (seconds == nullptr) {
    const char* const path = std::getenv("EXPERTD_TEST_CLOCK_JUMP");
    const int file = path == nullptr ? -1 : ::open(path, O_RDONLY | O_CLOEXEC);
    void* const mapped = ::mmap(nullptr, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    ::close(file);
    seconds = mapped == MAP_FAILED ? &kNone : static_cast<const int64_t*>(mapped);
    __atomic_store_n(&shared, seconds, __ATOMIC_RELEASE);
  }
  return __atomic_load_n(seconds, __ATOMIC_RELAXED);
}

}  // namespace

extern "C" {

int clock_gettime(clockid_t clock, timespec* now) noexcept {
  const long result = ::syscall(SYS_clock_gettime, clock, now);
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_TAI)) {
    now->tv_sec += offset();
  }
  return static_cast<int>(result);
}

int gettimeofday(timeval* now, void*) noexcept {
  timespec exact{};
  const int result = clock_gettime(CLOCK_REALTIME, &exact);
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return result;
}

time_t time(time_t* out) noexcept {
  timespec exact{};
  (void)clock_gettime(CLOCK_REALTIME, &exact);
  if (out != nullptr) {
    *out = exact.tv_sec;
  }
  return exact.tv_sec;
}

}  // extern "C"
