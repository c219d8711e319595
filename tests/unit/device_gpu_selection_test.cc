// SPDX-License-Identifier: Apache-2.0
// Which GPUs a daemon serves: by index, by UUID, all of them; and what it refuses by name. Slices of a GPU are only
// here: a machine with whole GPUs cannot show them.
#include "daemon/device/cuda/gpu_selection.h"

#include <gtest/gtest.h>

#include "daemon/base/limits.h"

namespace expertd::device::cuda {
namespace {

const std::vector<FoundGpu> kTwo = {{"GPU-aaaa", "NVIDIA H200"}, {"GPU-bbbb", "NVIDIA H200"}};

CudaOptions wanting(std::vector<std::string> gpus) {
  CudaOptions options;
  options.gpus = std::move(gpus);
  return options;
}

TEST(GpuSelection, TakesAllInOrderWhenNoneIsNamed) {
  const auto chosen = choose_gpus(kTwo, {});
  ASSERT_TRUE(chosen.is_ok());
  EXPECT_EQ(chosen.value(), (std::vector<size_t>{0, 1}));
}

TEST(GpuSelection, FindsByIndexAndByUuidInTheOrderOfTheNames) {
  const auto chosen = choose_gpus(kTwo, wanting({"GPU-bbbb", "0"}));
  ASSERT_TRUE(chosen.is_ok());
  EXPECT_EQ(chosen.value(), (std::vector<size_t>{1, 0}));
}

TEST(GpuSelection, NamesTheGpuThatIsNotThere) {
  for (const char* wanted : {"2", "GPU-cccc", "GPU-aaa", ""}) {
    const auto chosen = choose_gpus(kTwo, wanting({"0", wanted}));
    EXPECT_EQ(chosen.status().reason(), EXPERTD_REASON_NO_GPU) << wanted;
    EXPECT_NE(chosen.status().message().find(std::string("no GPU ") + wanted + " here (2 found)"), std::string::npos)
        << chosen.status().message();
  }
  EXPECT_EQ(choose_gpus({}, {}).status().reason(), EXPERTD_REASON_NO_GPU);
}

TEST(GpuSelection, RefusesSlicesByNameUnlessTheyAreNotAskedFor) {
  std::vector<FoundGpu> found = kTwo;
  found.push_back({"MIG-cccc", "NVIDIA H200 MIG 1g.18gb"});
  for (const auto& chosen : {choose_gpus(found, {}), choose_gpus(found, wanting({"MIG-cccc"}))}) {
    EXPECT_EQ(chosen.status().reason(), EXPERTD_REASON_MIG_UNSUPPORTED);
    EXPECT_NE(chosen.status().message().find("MIG-cccc (NVIDIA H200 MIG 1g.18gb)"), std::string::npos)
        << chosen.status().message();
  }
  EXPECT_TRUE(choose_gpus(found, wanting({"0", "1"})).is_ok());
}

TEST(GpuSelection, RefusesMoreThanOneDaemonServes) {
  const std::vector<FoundGpu> many(base::kMaxGpuRanks + 1, FoundGpu{"GPU-x", "NVIDIA H200"});
  EXPECT_EQ(choose_gpus(many, {}).status().reason(), EXPERTD_REASON_UNSUPPORTED);
  CudaOptions late;
  late.first_index.value = base::kMaxDevices - 1;
  EXPECT_EQ(choose_gpus(kTwo, late).status().reason(), EXPERTD_REASON_UNSUPPORTED);
}

}  // namespace
}  // namespace expertd::device::cuda
