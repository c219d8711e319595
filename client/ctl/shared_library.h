// SPDX-License-Identifier: Apache-2.0
// A library opened at run time, because it may not be there. Owner of the handle, one thread. Never calls into it
// itself.
#pragma once

#include <dlfcn.h>

namespace expertd::ctl {

class SharedLibrary {
 public:
  explicit SharedLibrary(const char* name) : handle_(dlopen(name, RTLD_NOW | RTLD_LOCAL)) {}
  // Vendor libraries keep threads and exit handlers of their own: they stay loaded until the process ends.
  ~SharedLibrary() = default;
  SharedLibrary(const SharedLibrary&) = delete;
  SharedLibrary& operator=(const SharedLibrary&) = delete;

  bool is_open() const { return handle_ != nullptr; }
  /// Null when the library has no such function.
  template <typename Function>
  Function* find(const char* name) const {
    return handle_ == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(handle_, name));
  }

 private:
  void* const handle_;
};

}  // namespace expertd::ctl
