// SPDX-License-Identifier: Apache-2.0
// Doctor: NVIDIA driver and GPUs, through libraries opened at run time. The declarations below are the driver's and
// NVML's C interfaces, as far as they are used.
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "client/ctl/doctor.h"
#include "client/ctl/doctor_mps.h"
#include "client/ctl/shared_library.h"

namespace expertd::ctl {

namespace {

constexpr int kCudaVersionLeast = 12000;
constexpr int kAttributeComputeMode = 20;
constexpr int kAttributeMemoryManagement = 102;
constexpr int kAttributePosixDescriptor = 103;
constexpr int kComputeModeProhibited = 2;
constexpr int kComputeModeExclusiveProcess = 3;
constexpr unsigned kNvLinksMax = 18;

struct CudaUuid {
  unsigned char bytes[16];
};

struct Gpu {
  int device = 0;
  std::string name;
  std::string uuid;
  int compute_mode = 0;
  bool memory_management = false;
  bool posix_descriptor = false;
};

struct Driver {
  const SharedLibrary loaded{"libcuda.so.1"};
  int (*init)(unsigned) = loaded.find<int(unsigned)>("cuInit");
  int (*version)(int*) = loaded.find<int(int*)>("cuDriverGetVersion");
  int (*count)(int*) = loaded.find<int(int*)>("cuDeviceGetCount");
  int (*get)(int*, int) = loaded.find<int(int*, int)>("cuDeviceGet");
  int (*name)(char*, int, int) = loaded.find<int(char*, int, int)>("cuDeviceGetName");
  int (*uuid)(CudaUuid*, int) = loaded.find<int(CudaUuid*, int)>("cuDeviceGetUuid");
  int (*attribute)(int*, int, int) = loaded.find<int(int*, int, int)>("cuDeviceGetAttribute");
  int (*can_access)(int*, int, int) = loaded.find<int(int*, int, int)>("cuDeviceCanAccessPeer");
  int (*error_name)(int, const char**) = loaded.find<int(int, const char**)>("cuGetErrorName");

  bool complete() const {
    return init != nullptr && version != nullptr && count != nullptr && get != nullptr && name != nullptr &&
           uuid != nullptr && attribute != nullptr && can_access != nullptr;
  }
  std::string text_of(int error) const {
    const char* text = nullptr;
    if (error_name != nullptr && error_name(error, &text) == 0 && text != nullptr) {
      return text;
    }
    return "error " + std::to_string(error);
  }
  int attribute_of(int which, int device) const {
    int value = 0;
    return attribute(&value, which, device) == 0 ? value : 0;
  }
};

Check make(const char* name, Level level, std::string finding, std::string remedy = {}, std::string without = {}) {
  return Check{name, level, std::move(finding), std::move(remedy), std::move(without)};
}

const char* const kWithoutGpu = "host devices: the whole protocol, at the speed of the CPU";

std::vector<Gpu> list_gpus(const Driver& driver) {
  std::vector<Gpu> gpus;
  int count = 0;
  driver.count(&count);
  for (int i = 0; i < count; ++i) {
    Gpu gpu;
    char name[256] = "";
    CudaUuid uuid{};
    if (driver.get(&gpu.device, i) != 0 || driver.name(name, sizeof(name), gpu.device) != 0 ||
        driver.uuid(&uuid, gpu.device) != 0) {
      continue;
    }
    gpu.name = name;
    gpu.uuid = gpu_uuid_text(uuid.bytes);
    gpu.compute_mode = driver.attribute_of(kAttributeComputeMode, gpu.device);
    gpu.memory_management = driver.attribute_of(kAttributeMemoryManagement, gpu.device) != 0;
    gpu.posix_descriptor = driver.attribute_of(kAttributePosixDescriptor, gpu.device) != 0;
    gpus.push_back(std::move(gpu));
  }
  return gpus;
}

Check check_driver(const Driver& driver, int version) {
  const std::string text = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  std::string finding = "CUDA " + text;
  const SharedLibrary nvml("libnvidia-ml.so.1");
  auto* const init = nvml.find<int()>("nvmlInit_v2");
  auto* const driver_version = nvml.find<int(char*, unsigned)>("nvmlSystemGetDriverVersion");
  char buffer[96] = "";
  if (init != nullptr && driver_version != nullptr && init() == 0 && driver_version(buffer, sizeof(buffer)) == 0) {
    finding += ", driver " + std::string(buffer);
  }
  if (driver.loaded.is_open() && version < kCudaVersionLeast) {
    return make("gpu_driver", Level::kFail, finding, "install a driver for CUDA 12.0 or newer", kWithoutGpu);
  }
  return make("gpu_driver", Level::kOk, finding);
}

Check check_list(const std::vector<Gpu>& gpus) {
  std::string finding = std::to_string(gpus.size()) + (gpus.size() == 1 ? " GPU" : " GPUs");
  for (size_t i = 0; i < gpus.size(); ++i) {
    finding += (i == 0 ? ": " : ", ") + std::to_string(i) + " " + gpus[i].name + " " + gpus[i].uuid;
  }
  return make("gpus", Level::kOk, finding);
}

Check check_peers(const Driver& driver, const std::vector<Gpu>& gpus) {
  size_t pairs = 0;
  std::string apart;
  for (size_t i = 0; i < gpus.size(); ++i) {
    for (size_t j = 0; j < gpus.size(); ++j) {
      if (i == j) {
        continue;
      }
      int can = 0;
      ++pairs;
      if (driver.can_access(&can, gpus[i].device, gpus[j].device) != 0 || can == 0) {
        apart += (apart.empty() ? "" : ", ") + std::to_string(i) + "->" + std::to_string(j);
      }
    }
  }
  if (pairs == 0) {
    return make("peer_access", Level::kOk, "one GPU, no peers");
  }
  if (apart.empty()) {
    return make("peer_access", Level::kOk, "all " + std::to_string(pairs) + " ordered pairs");
  }
  return make("peer_access", Level::kWarn, "not between " + apart,
              "give the container all GPUs of the node; turn off PCIe ACS where there is no NVLink",
              "these pairs exchange through pinned host memory");
}

struct NvmlView {
  std::string links;  // active NVLinks per GPU
  unsigned active_links = 0;
  std::string mig;  // GPUs in MIG mode
};

std::optional<NvmlView> look_through_nvml() {
  const SharedLibrary nvml("libnvidia-ml.so.1");
  using Handle = void*;
  auto* const init = nvml.find<int()>("nvmlInit_v2");
  auto* const count_of = nvml.find<int(unsigned*)>("nvmlDeviceGetCount_v2");
  auto* const handle_of = nvml.find<int(unsigned, Handle*)>("nvmlDeviceGetHandleByIndex_v2");
  auto* const mig_mode = nvml.find<int(Handle, unsigned*, unsigned*)>("nvmlDeviceGetMigMode");
  auto* const link_state = nvml.find<int(Handle, unsigned, unsigned*)>("nvmlDeviceGetNvLinkState");
  unsigned count = 0;
  if (init == nullptr || count_of == nullptr || handle_of == nullptr || init() != 0 || count_of(&count) != 0) {
    return std::nullopt;
  }
  NvmlView view;
  for (unsigned i = 0; i < count; ++i) {
    Handle handle = nullptr;
    if (handle_of(i, &handle) != 0) {
      continue;
    }
    unsigned current = 0;
    unsigned pending = 0;
    if (mig_mode != nullptr && mig_mode(handle, &current, &pending) == 0 && current != 0) {
      view.mig += (view.mig.empty() ? "" : ", ") + std::to_string(i);
    }
    unsigned links = 0;
    for (unsigned link = 0; link_state != nullptr && link < kNvLinksMax; ++link) {
      unsigned active = 0;
      links += link_state(handle, link, &active) == 0 && active != 0 ? 1 : 0;
    }
    view.active_links += links;
    view.links += (view.links.empty() ? "" : ", ") + std::to_string(links);
  }
  return view;
}

Checks check_nvml() {
  const std::optional<NvmlView> view = look_through_nvml();
  if (!view.has_value()) {
    return {make("nvml", Level::kWarn, "libnvidia-ml.so.1 cannot be used",
                 "add \"utility\" to NVIDIA_DRIVER_CAPABILITIES of the container", "everything but these two checks")};
  }
  Checks checks;
  checks.push_back(view->mig.empty()
                       ? make("mig", Level::kOk, "off")
                       : make("mig", Level::kFail, "on, GPU " + view->mig,
                              "nvidia-smi -i GPU -mig 0: instances have no peer access", "GPUs without MIG"));
  checks.push_back(view->active_links > 0 ? make("nvlink", Level::kOk, "active links per GPU: " + view->links)
                                          : make("nvlink", Level::kOk, "none", {}, "GPUs exchange over PCIe"));
  return checks;
}

std::string mps_directory() {
  const char* const directory = std::getenv("CUDA_MPS_PIPE_DIRECTORY");
  return directory != nullptr && *directory != '\0' ? directory : "/tmp/nvidia-mps";
}

bool mps_is_there() {
  struct stat info {};
  return stat((mps_directory() + "/control").c_str(), &info) == 0;
}

Check check_mps(const std::vector<Gpu>& gpus) {
  const std::string control = mps_directory() + "/control";
  const bool mps = mps_is_there();
  const std::string socket = mps ? "control pipe " + control : "no MPS control pipe at " + control;
  for (size_t i = 0; i < gpus.size(); ++i) {
    const std::string gpu = "GPU " + std::to_string(i);
    if (gpus[i].compute_mode == kComputeModeProhibited) {
      return make("mps", Level::kFail, gpu + " is in prohibited compute mode", "nvidia-smi -c DEFAULT", kWithoutGpu);
    }
    if (gpus[i].compute_mode == kComputeModeExclusiveProcess && !mps) {
      return make("mps", Level::kFail, gpu + " is in exclusive-process mode and there is " + socket,
                  "start expertd with the MPS pipe directory of the node, or nvidia-smi -c DEFAULT", kWithoutGpu);
    }
  }
  return mps ? make("mps", Level::kOk, socket + "; a fault of one client ends the contexts of all on that server")
             : make("mps", Level::kOk, socket, {},
                    "sharing in time slices; copies overlap, kernels of two processes do not");
}

Check check_sharing(const std::vector<Gpu>& gpus) {
  bool descriptors = true;
  for (const Gpu& gpu : gpus) {
    descriptors = descriptors && gpu.memory_management && gpu.posix_descriptor;
  }
  if (descriptors) {
    return make("memory_sharing", Level::kOk, "descriptors (VMM) and IPC handles");
  }
  return make("memory_sharing", Level::kFail, "no descriptors of GPU memory on every GPU",
              "use whole GPUs of a bare-metal or passed-through kind, not vGPUs", kWithoutGpu);
}

}  // namespace

std::string gpu_uuid_text(const unsigned char (&bytes)[16]) {
  std::string out = "GPU-";
  for (size_t i = 0; i < sizeof(bytes); ++i) {
    char hex[3];
    std::snprintf(hex, sizeof(hex), "%02x", bytes[i]);
    out += hex;
    if (i == 3 || i == 5 || i == 7 || i == 9) {
      out += "-";
    }
  }
  return out;
}

Checks check_gpus() {
  const Driver driver;
  if (!driver.loaded.is_open()) {
    return {make("gpu_driver", Level::kWarn, "libcuda.so.1 is not there",
                 "install the NVIDIA driver, or start the container with GPUs", kWithoutGpu)};
  }
  if (!driver.complete()) {
    return {make("gpu_driver", Level::kFail, "libcuda.so.1 lacks functions", "install a driver for CUDA 12.0 or newer",
                 kWithoutGpu)};
  }
  const int error = driver.init(0);
  if (error != 0) {
    return {make("gpu_driver", Level::kWarn, "cuInit: " + driver.text_of(error),
                 "nvidia-smi shows whether the kernel driver works; give the container its GPUs", kWithoutGpu)};
  }
  int version = 0;
  driver.version(&version);
  const std::vector<Gpu> gpus = list_gpus(driver);
  if (gpus.empty()) {
    return {make("gpus", Level::kWarn, "no GPU is visible", "look at CUDA_VISIBLE_DEVICES", kWithoutGpu)};
  }
  Checks checks = {check_driver(driver, version), check_list(gpus), check_peers(driver, gpus)};
  for (Check& check : check_nvml()) {
    checks.push_back(std::move(check));
  }
  checks.push_back(check_mps(gpus));
  if (mps_is_there()) {
    checks.push_back(check_mps_users(look_for_mps("/proc", mps_directory())));
  }
  checks.push_back(check_sharing(gpus));
  return checks;
}

}  // namespace expertd::ctl
