// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/driver.h"

#include <dlfcn.h>

#include <string_view>

namespace expertd::device::cuda {
namespace {

// Two levels, so that cuda.h's version macros are expanded before the name becomes text ("cuIpcOpenMemHandle_v2").
#define EXPERTD_TEXT_OF(name) #name
#define EXPERTD_TEXT(name) EXPERTD_TEXT_OF(name)

base::Result<Driver> load_table() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* error = dlerror();
    return base::Status(EXPERTD_REASON_NO_GPU, std::string("no CUDA driver: ") + (error != nullptr ? error : ""));
  }
  Driver driver;
  std::string missing;
#define EXPERTD_DRIVER_LOAD(name)                                                            \
  driver.name = reinterpret_cast<decltype(driver.name)>(dlsym(library, EXPERTD_TEXT(name))); \
  if (driver.name == nullptr) {                                                              \
    missing += missing.empty() ? "" : ", ";                                                  \
    missing += EXPERTD_TEXT(name);                                                           \
  }
  EXPERTD_DRIVER_FUNCTIONS(EXPERTD_DRIVER_LOAD)
#undef EXPERTD_DRIVER_LOAD
  if (!missing.empty()) {
    return base::Status(EXPERTD_REASON_NO_GPU, "the CUDA driver is too old, it lacks " + missing);
  }
  return driver;
}

}  // namespace

base::Result<const Driver*> Driver::load() {
  static const base::Result<Driver> table = load_table();
  if (!table.is_ok()) {
    return table.status();
  }
  return &table.value();
}

base::Status Driver::check(CUresult result, const char* call) const {
  if (result == CUDA_SUCCESS) {
    return base::Status::ok();
  }
  const char* name = nullptr;
  const char* text = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &text);
  const std::string_view all(call);
  const std::string shortened(all.substr(0, all.find('(')));
  return base::Status(EXPERTD_REASON_CUDA, shortened + ": " + (name != nullptr ? name : std::to_string(result)) + " (" +
                                               (text != nullptr ? text : "unknown") + ")");
}

}  // namespace expertd::device::cuda
