// SPDX-License-Identifier: Apache-2.0
// Which backend carries groups: `direct` only when every step of the proof succeeds, and what the UCX that is here
// says.
#include <gtest/gtest.h>

#include <functional>

#include "daemon/fabric/backend.h"
#include "daemon/fabric/ucx_probe.h"

namespace expertd::fabric_test {
namespace {

using fabric::Backend;
using fabric::BackendChoice;
using fabric::choose_backend;

base::Status missing(const char* what) {
  return base::Status(EXPERTD_REASON_UNAVAILABLE, what);
}

class FakeProbe final : public fabric::DirectProbe {
 public:
  base::Status check_library() override { return step(library); }
  base::Status register_memory() override { return step(registered); }
  base::Result<bool> is_gpu_memory() override {
    ++steps;
    return queried.is_ok() ? base::Result<bool>(gpu_memory) : base::Result<bool>(queried);
  }
  base::Result<std::vector<std::byte>> round_trip(const std::vector<std::byte>& pattern) override {
    ++steps;
    std::vector<std::byte> arrived = pattern;
    arrived[pattern.size() / 2] ^= flipped;
    return sent.is_ok() ? base::Result<std::vector<std::byte>>(arrived) : base::Result<std::vector<std::byte>>(sent);
  }

  base::Status library;
  base::Status registered;
  base::Status queried;
  bool gpu_memory = true;
  base::Status sent;
  std::byte flipped{0};
  int steps = 0;

 private:
  base::Status step(const base::Status& status) {
    ++steps;
    return status;
  }
};

TEST(FabricBackend, IsDirectWhenEveryStepSucceeds) {
  for (const bool required : {false, true}) {
    FakeProbe probe;
    const auto choice = choose_backend(required, probe);
    ASSERT_TRUE(choice.is_ok());
    EXPECT_EQ(choice.value().live, Backend::kDirect);
    EXPECT_EQ(choice.value().cause, "");
    EXPECT_EQ(probe.steps, 4);
  }
}

TEST(FabricBackend, IsStagedWithItsCauseOrRefusedAtTheFirstStepThatFails) {
  struct Case {
    std::function<void(FakeProbe*)> change;
    const char* word;
    int steps;
  };
  const std::vector<Case> cases = {
      {[](FakeProbe* probe) { probe->library = missing("old library"); }, "old library", 1},
      {[](FakeProbe* probe) { probe->registered = missing("no registration"); }, "no registration", 2},
      {[](FakeProbe* probe) { probe->queried = missing("no answer"); }, "no answer", 3},
      {[](FakeProbe* probe) { probe->gpu_memory = false; }, "takes it for the host's", 3},
      {[](FakeProbe* probe) { probe->sent = missing("not sent"); }, "not sent", 4},
      {[](FakeProbe* probe) { probe->flipped = std::byte{1}; }, "did not arrive as it was", 4},
  };
  for (const Case& each : cases) {
    FakeProbe probe;
    each.change(&probe);
    const auto staged = choose_backend(false, probe);
    ASSERT_TRUE(staged.is_ok()) << each.word;
    EXPECT_EQ(staged.value().live, Backend::kStaged) << each.word;
    EXPECT_NE(staged.value().cause.find(each.word), std::string::npos) << staged.value().cause;
    EXPECT_EQ(probe.steps, each.steps) << each.word;
    const auto refused = choose_backend(true, probe);
    ASSERT_FALSE(refused.is_ok()) << each.word;
    EXPECT_EQ(refused.status().reason(), EXPERTD_REASON_UNAVAILABLE);
    EXPECT_NE(refused.status().message().find("fabric.require = direct"), std::string::npos);
    EXPECT_NE(refused.status().message().find(each.word), std::string::npos) << refused.status().message();
  }
}

/// Memory of the host that says it is a GPU's.
class HostMemory final : public fabric::GpuMemory {
 public:
  base::Result<void*> allocate(uint64_t bytes) override { return ::operator new(bytes); }
  void free(void* data) override { ::operator delete(data); }
  base::Status write(void* to, const std::vector<std::byte>& from) override {
    std::copy(from.begin(), from.end(), static_cast<std::byte*>(to));
    return base::Status::ok();
  }
  base::Result<std::vector<std::byte>> read(const void* from, uint64_t bytes) override {
    const auto* const begin = static_cast<const std::byte*>(from);
    return std::vector<std::byte>(begin, begin + bytes);
  }
};

TEST(FabricBackend, AUcxWithoutCudaIsNotTakenForOneWithIt) {
  HostMemory memory;
  for (fabric::GpuMemory* given :
       {static_cast<fabric::GpuMemory*>(&memory), static_cast<fabric::GpuMemory*>(nullptr)}) {
    fabric::UcxProbe probe(given);
    const base::Status library = probe.check_library();
    if (library.is_ok() && given != nullptr) {
      // A UCX with CUDA says of this memory what it is.
      const base::Status registered = probe.register_memory();
      const auto known = registered.is_ok() ? probe.is_gpu_memory() : base::Result<bool>(false);
      EXPECT_FALSE(known.is_ok() && known.value());
      continue;
    }
    const auto choice = choose_backend(false, probe);
    ASSERT_TRUE(choice.is_ok());
    EXPECT_EQ(choice.value().live, Backend::kStaged);
    EXPECT_NE(choice.value().cause, "");
  }
}

/// What lies: the registration of memory of the host as a GPU's succeeds with UCX 1.13, and only the question tells.
TEST(FabricBackend, MemoryOfTheHostIsFoundOutByAskingBack) {
  HostMemory memory;
  fabric::UcxProbe probe(&memory);
  (void)probe.check_library();
  if (const base::Status registered = probe.register_memory(); registered.is_ok()) {
    const auto known = probe.is_gpu_memory();
    ASSERT_TRUE(known.is_ok()) << known.status().message();
    EXPECT_FALSE(known.value());
  }
}

}  // namespace
}  // namespace expertd::fabric_test
