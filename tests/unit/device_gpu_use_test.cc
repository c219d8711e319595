// SPDX-License-Identifier: Apache-2.0
// What a CUDA context takes, out of NVML's answers; a fake NVML stands in for the driver's.
#include "daemon/device/cuda/gpu_use.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace expertd::device::cuda {
namespace {

constexpr uint64_t kMiB = 1ULL << 20;
constexpr uint32_t kOwnPid = 4711;
constexpr const char* kUuid = "GPU-0001";

/// The GPU that the fake calls tell of; the calls are plain functions, so it is one of the process.
struct FakeGpu {
  uint64_t used_bytes = 0;
  std::vector<NvmlProcess> processes;
  std::vector<NvmlProcess> mps_processes;
  int error = 0;
};
FakeGpu gpu;

int put(const std::vector<NvmlProcess>& from, unsigned* count, NvmlProcess* list) {
  constexpr int kInsufficientSize = 7;
  if (gpu.error != 0 || *count < from.size()) {
    return gpu.error != 0 ? gpu.error : kInsufficientSize;
  }
  *count = static_cast<unsigned>(from.size());
  for (size_t i = 0; i < from.size(); ++i) {
    list[i] = from[i];
  }
  return 0;
}

NvmlCalls fake_calls() {
  NvmlCalls calls;
  calls.device_by_uuid = [](const char* uuid, void** device) {
    *device = &gpu;
    return std::strcmp(uuid, kUuid) == 0 ? 0 : 6;
  };
  calls.memory = [](void* device, NvmlMemory* memory) {
    memory->used = static_cast<FakeGpu*>(device)->used_bytes;
    return gpu.error;
  };
  calls.processes = [](void*, unsigned* count, NvmlProcess* list) { return put(gpu.processes, count, list); };
  calls.mps_processes = [](void*, unsigned* count, NvmlProcess* list) { return put(gpu.mps_processes, count, list); };
  return calls;
}

class LookAtGpu : public ::testing::Test {
 protected:
  void SetUp() override { gpu = FakeGpu{}; }
};

TEST_F(LookAtGpu, FindsTheProcessAmongOthers) {
  gpu.used_bytes = 900 * kMiB;
  gpu.processes = {{.pid = 1, .used_bytes = 300 * kMiB}, {.pid = kOwnPid, .used_bytes = 500 * kMiB}};
  const GpuUse use = look_at_gpu(fake_calls(), kUuid, kOwnPid);
  EXPECT_EQ(use.device_bytes, 900 * kMiB);
  EXPECT_EQ(use.process_bytes, 500 * kMiB);
}

TEST_F(LookAtGpu, FindsTheProcessAmongTheClientsOfMps) {
  gpu.processes = {{.pid = 1, .used_bytes = 30 * kMiB}};
  gpu.mps_processes = {{.pid = kOwnPid, .used_bytes = 200 * kMiB}};
  EXPECT_EQ(look_at_gpu(fake_calls(), kUuid, kOwnPid).process_bytes, 200 * kMiB);
}

TEST_F(LookAtGpu, TakesAFigureThatTheDriverDoesNotTellForNone) {
  gpu.processes = {{.pid = kOwnPid, .used_bytes = ~0ULL}};
  EXPECT_FALSE(look_at_gpu(fake_calls(), kUuid, kOwnPid).process_bytes.has_value());
}

TEST_F(LookAtGpu, KnowsNothingOfAGpuThatNvmlDoesNotKnow) {
  gpu.used_bytes = 900 * kMiB;
  const GpuUse use = look_at_gpu(fake_calls(), "GPU-0002", kOwnPid);
  EXPECT_FALSE(use.device_bytes.has_value());
  EXPECT_FALSE(use.process_bytes.has_value());
}

TEST_F(LookAtGpu, KnowsNothingWhenTheCallsFailOrAreMissing) {
  gpu.processes = {{.pid = kOwnPid, .used_bytes = kMiB}};
  gpu.error = 3;
  const GpuUse failed = look_at_gpu(fake_calls(), kUuid, kOwnPid);
  EXPECT_FALSE(failed.device_bytes.has_value() || failed.process_bytes.has_value());
  const GpuUse missing = look_at_gpu(NvmlCalls{}, kUuid, kOwnPid);
  EXPECT_FALSE(missing.device_bytes.has_value() || missing.process_bytes.has_value());
}

TEST_F(LookAtGpu, SurvivesMoreProcessesThanItHasRoomFor) {
  gpu.processes.assign(5000, {.pid = kOwnPid, .used_bytes = kMiB});
  EXPECT_FALSE(look_at_gpu(fake_calls(), kUuid, kOwnPid).process_bytes.has_value());
}

TEST(ContextUse, IsWhatTheProcessHoldsWithoutItsPool) {
  const ContextUse use =
      context_use({100 * kMiB, std::nullopt}, {900 * kMiB, 520 * kMiB}, /*pool_bytes=*/20 * kMiB, /*mps=*/false);
  EXPECT_EQ(use.bytes, 500 * kMiB);
  EXPECT_EQ(use.source, "process");
}

TEST(ContextUse, FallsBackToTheGrowthOfTheWholeGpu) {
  const ContextUse use = context_use({100 * kMiB, std::nullopt}, {640 * kMiB, std::nullopt}, 40 * kMiB, false);
  EXPECT_EQ(use.bytes, 500 * kMiB);
  EXPECT_EQ(use.source, "device");
}

TEST(ContextUse, DoesNotTakeAProcessThatWasThereBeforeForItself) {
  const ContextUse use = context_use({100 * kMiB, 70 * kMiB}, {640 * kMiB, 70 * kMiB}, 40 * kMiB, false);
  EXPECT_EQ(use.bytes, 500 * kMiB);
  EXPECT_EQ(use.source, "device");
}

TEST(ContextUse, OfAnMpsClientIsOnlyKnownByItsProcess) {
  const GpuUse before{100 * kMiB, std::nullopt};
  EXPECT_EQ(context_use(before, {640 * kMiB, std::nullopt}, 40 * kMiB, true).source, "");
  EXPECT_EQ(context_use(before, {640 * kMiB, 240 * kMiB}, 40 * kMiB, true).bytes, 200 * kMiB);
  // The server lists its clients from their cuInit on.
  EXPECT_EQ(context_use({100 * kMiB, 0}, {640 * kMiB, 240 * kMiB}, 40 * kMiB, true).bytes, 200 * kMiB);
}

TEST(ContextUse, IsUnknownRatherThanZero) {
  for (const GpuUse& after : {GpuUse{}, GpuUse{100 * kMiB, std::nullopt}, GpuUse{120 * kMiB, 30 * kMiB}}) {
    const ContextUse use = context_use({100 * kMiB, std::nullopt}, after, 40 * kMiB, false);
    EXPECT_EQ(use.source, "");
    EXPECT_EQ(use.bytes, 0U);
  }
}

TEST(NvmlLibrary, ComesAndGoesWithOrWithoutADriver) {
  for (int i = 0; i < 2; ++i) {
    const NvmlLibrary nvml;
    EXPECT_FALSE(look_at_gpu(nvml.calls(), "GPU-none", kOwnPid).process_bytes.has_value());
  }
}

}  // namespace
}  // namespace expertd::device::cuda
