// SPDX-License-Identifier: Apache-2.0
#include "daemon/device/cuda/cuda_devices.h"

#include <stdlib.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <utility>

#include "daemon/device/cuda/cuda_device.h"
#include "daemon/device/cuda/gpu_selection.h"
#include "daemon/device/cuda/gpu_use.h"

namespace expertd::device::cuda {
namespace {

std::string format_uuid(const CUuuid& uuid) {
  std::array<char, 48> text{};
  std::array<unsigned, 16> b{};
  for (size_t i = 0; i < b.size(); ++i) {
    b[i] = static_cast<unsigned char>(uuid.bytes[i]);
  }
  std::snprintf(text.data(), text.size(), "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
                b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
  return text.data();
}

base::Result<int> attribute(const Driver& driver, CUdevice_attribute which, CUdevice device) {
  int value = 0;
  EXPERTD_DRIVER_CALL(driver, cuDeviceGetAttribute(&value, which, device));
  return value;
}

/// What a GPU must be able to do, by name.
base::Status check_abilities(const Driver& driver, const GpuFacts& gpu) {
  struct Ability {
    CUdevice_attribute which;
    int least;
    const char* name;
  };
  constexpr std::array<Ability, 5> kAbilities{{
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 8, "compute capability 8.0 or later"},
      {CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS, 1, "64-bit stream memory operations"},
      {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1, "virtual memory management"},
      {CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 1, "memory export as a descriptor"},
      {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1, "unified addressing"},
  }};
  for (const Ability& ability : kAbilities) {
    const auto value = attribute(driver, ability.which, gpu.view.device);
    if (!value.is_ok()) {
      return value.status();
    }
    if (value.value() < ability.least) {
      return base::Status(EXPERTD_REASON_UNSUPPORTED, gpu.uuid + " (" + gpu.name + ") lacks " + ability.name);
    }
  }
  return base::Status::ok();
}

/// A GPU of the machine by ordinal; no context is made yet.
base::Result<GpuFacts> find_gpu(const Driver& driver, int ordinal) {
  GpuFacts gpu;
  EXPERTD_DRIVER_CALL(driver, cuDeviceGet(&gpu.view.device, ordinal));
  std::array<char, 256> name{};
  EXPERTD_DRIVER_CALL(driver, cuDeviceGetName(name.data(), static_cast<int>(name.size()), gpu.view.device));
  gpu.name = name.data();
  CUuuid uuid{};
  EXPERTD_DRIVER_CALL(driver, cuDeviceGetUuid(&uuid, gpu.view.device));
  gpu.uuid = format_uuid(uuid);
  return gpu;
}

base::Result<std::vector<GpuFacts>> select_gpus(const Driver& driver, const CudaOptions& options) {
  int count = 0;
  EXPERTD_DRIVER_CALL(driver, cuDeviceGetCount(&count));
  std::vector<GpuFacts> found;
  std::vector<FoundGpu> names;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    auto gpu = find_gpu(driver, ordinal);
    if (!gpu.is_ok()) {
      return gpu.status();
    }
    found.push_back(std::move(gpu).value());
    names.push_back({found.back().uuid, found.back().name});
  }
  const auto chosen = choose_gpus(names, options);
  if (!chosen.is_ok()) {
    return chosen.status();
  }
  std::vector<GpuFacts> selected;
  for (const size_t ordinal : chosen.value()) {
    selected.push_back(found[ordinal]);
  }
  return selected;
}

/// Attributes and the primary context, which the caller owns from then on.
base::Status open_gpu(const Driver& driver, GpuFacts* gpu) {
  EXPERTD_RETURN_IF_ERROR(check_abilities(driver, *gpu));
  const auto multiprocessors = attribute(driver, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, gpu->view.device);
  if (!multiprocessors.is_ok()) {
    return multiprocessors.status();
  }
  gpu->multiprocessors = static_cast<uint32_t>(multiprocessors.value());
  const auto major = attribute(driver, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, gpu->view.device);
  gpu->has_bulk_copies = major.is_ok() && major.value() >= 9;
  const auto flush = attribute(driver, CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES, gpu->view.device);
  gpu->can_flush_remote_writes = flush.is_ok() && flush.value() != 0;
  // Says whether contexts made on this device are shared through MPS, so it is true only for a client of a server. A
  // driver that does not know the attribute leaves it false.
  const auto mps = attribute(driver, CU_DEVICE_ATTRIBUTE_MPS_ENABLED, gpu->view.device);
  gpu->mps = mps.is_ok() && mps.value() != 0;
  EXPERTD_DRIVER_CALL(driver, cuDevicePrimaryCtxRetain(&gpu->view.context, gpu->view.device));
  return base::Status::ok();
}

void fill_peer_masks(const Driver& driver, bool peer_access, std::vector<GpuFacts>* gpus) {
  for (GpuFacts& gpu : *gpus) {
    for (const GpuFacts& other : *gpus) {
      int can = gpu.view.index == other.view.index ? 1 : 0;
      if (can == 0 && peer_access) {
        driver.cuDeviceCanAccessPeer(&can, gpu.view.device, other.view.device);
      }
      gpu.peer_mask |= can != 0 ? uint64_t{1} << other.view.index.value : 0;
    }
  }
}

void release_contexts(const Driver& driver, std::vector<GpuFacts>* gpus, size_t first) {
  for (size_t i = first; i < gpus->size(); ++i) {
    if ((*gpus)[i].view.context != nullptr) {
      driver.cuDevicePrimaryCtxRelease((*gpus)[i].view.device);
    }
  }
}

std::vector<GpuUse> look_at_all(const NvmlCalls& nvml, const std::vector<GpuFacts>& gpus) {
  std::vector<GpuUse> uses;
  for (const GpuFacts& gpu : gpus) {
    uses.push_back(look_at_gpu(nvml, gpu.uuid, static_cast<uint32_t>(::getpid())));
  }
  return uses;
}

/// One device per GPU, whose contexts they own from then on; those of the others are released on failure.
base::Result<std::vector<std::unique_ptr<CudaDevice>>> make_devices(const Driver& driver, const CudaOptions& options,
                                                                    std::vector<GpuFacts>* gpus) {
  const auto registry = std::make_shared<Registry>(driver);
  for (GpuFacts& gpu : *gpus) {
    gpu.view.gate = &registry->gates[gpu.view.index.value];
  }
  std::vector<std::unique_ptr<CudaDevice>> devices;
  for (size_t i = 0; i < gpus->size(); ++i) {
    CudaDevice::Setup setup;
    setup.driver = &driver;
    setup.gpu = (*gpus)[i];
    setup.all = *gpus;
    setup.registry = registry;
    setup.pool_max_bytes = options.pool_max_bytes;
    setup.bulk_copies = (*gpus)[i].has_bulk_copies && options.kernels != "generic";
    setup.link_sms = options.link_sms;
    auto device = CudaDevice::create(std::move(setup));
    if (!device.is_ok()) {
      release_contexts(driver, gpus, i + 1);  // those before belong to their devices, this one's died with it
      return device.status();
    }
    devices.push_back(std::move(device).value());
  }
  return devices;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

base::Result<std::vector<std::unique_ptr<device::Device>>> create_cuda_devices(const CudaOptions& options) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // measured: 32 parked streams progress independently, else 8
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);       // measured: a lazy first launch hangs behind a parked stream
  const auto loaded = Driver::load();
  if (!loaded.is_ok()) {
    return loaded.status();
  }
  const Driver& driver = *loaded.value();
  if (const CUresult result = driver.cuInit(0); result != CUDA_SUCCESS) {
    return base::Status(EXPERTD_REASON_NO_GPU, driver.check(result, "cuInit").message());
  }
  auto selected = select_gpus(driver, options);
  if (!selected.is_ok()) {
    return selected.status();
  }
  std::vector<GpuFacts> gpus = std::move(selected).value();
  const NvmlLibrary nvml;
  const std::vector<GpuUse> before = look_at_all(nvml.calls(), gpus);
  for (size_t i = 0; i < gpus.size(); ++i) {
    gpus[i].view.index.value = options.first_index.value + static_cast<uint32_t>(i);
    if (const base::Status opened = open_gpu(driver, &gpus[i]); !opened.is_ok()) {
      release_contexts(driver, &gpus, 0);
      return opened.with_context("GPU " + gpus[i].uuid);
    }
  }
  fill_peer_masks(driver, options.peer_access, &gpus);
  auto made = make_devices(driver, options, &gpus);
  if (!made.is_ok()) {
    return made.status();
  }
  // After all of them, because each one's tables are mapped in the contexts of its peers.
  const std::vector<GpuUse> after = look_at_all(nvml.calls(), gpus);
  std::vector<std::unique_ptr<device::Device>> devices;
  for (size_t i = 0; i < gpus.size(); ++i) {
    std::unique_ptr<CudaDevice> device = std::move(made.value()[i]);
    device->set_context_use(context_use(before[i], after[i], device->info().pool_used_bytes, gpus[i].mps));
    devices.push_back(std::move(device));
  }
  return devices;
}

CudaVersions cuda_versions() {
  CudaVersions versions;
  versions.toolkit = version_text(CUDA_VERSION);
  int driver_version = 0;
  const auto driver = Driver::load();
  if (driver.is_ok() && driver.value()->cuDriverGetVersion(&driver_version) == CUDA_SUCCESS) {
    versions.driver = version_text(driver_version);
  }
  return versions;
}

}  // namespace expertd::device::cuda
