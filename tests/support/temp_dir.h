// SPDX-License-Identifier: Apache-2.0
// A fresh directory that goes away with the object, files in it, and a wait with a deadline. One thread; tests only.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

namespace expertd::support {

/// A new directory under $TMPDIR (else /tmp), removed with everything in it. The path is short enough for sockets.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// The whole file, or an empty text when it cannot be read.
std::string read_text(const std::string& path);
void write_text(const std::string& path, const std::string& text);

/// Looks until `condition` holds or the time is over, with a pause of a millisecond between looks.
bool wait_until(const std::function<bool()>& condition, std::chrono::milliseconds limit);

/// CLOCK_MONOTONIC in nanoseconds, as in completions.
uint64_t monotonic_ns();
/// Milliseconds since `begin_ns`, for measured times in the output.
double elapsed_ms(uint64_t begin_ns);

/// True when timing bounds must be loose: more threads want to run than the machine has cores.
bool machine_is_loaded();
/// The bound to assert for an average or median with a specified time: as given, or five times that on a loaded
/// machine.
double bound_ms(double specified_ms);
/// The bound to assert for a single time or the worst of many: five times the specified one, because a virtual machine
/// can lose its processors for that long to neighbours that no load average shows. The figure itself is printed.
double worst_bound_ms(double specified_ms);

}  // namespace expertd::support
