// SPDX-License-Identifier: Apache-2.0
// Goal: what the shared library is to the process that loads it: its exports, its size, what it needs, how long it
// takes to load. Method: nm and readelf on the built file, and dlopen in a child-free process that does not link it.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <set>
#include <sstream>
#include <string>

namespace {

std::string library_path() {
  const char* given = getenv("EXPERTD_CLIENT_LIBRARY");
#ifdef EXPERTD_CLIENT_LIBRARY_FILE
  return given == nullptr ? EXPERTD_CLIENT_LIBRARY_FILE : given;
#else
  return given == nullptr ? "" : given;
#endif
}

std::string output_of(const std::string& command) {
  struct Closer {
    void operator()(FILE* file) const { pclose(file); }
  };
  const std::unique_ptr<FILE, Closer> pipe(popen(command.c_str(), "r"));
  std::string text;
  std::array<char, 4096> part;
  while (pipe != nullptr) {
    const size_t size = fread(part.data(), 1, part.size(), pipe.get());
    if (size == 0) {
      break;
    }
    text.append(part.data(), size);
  }
  return text;
}

class ClientLibrary : public ::testing::Test {
 protected:
  void SetUp() override {
    if (library_path().empty()) {
      GTEST_SKIP() << "EXPERTD_CLIENT_LIBRARY names no library";
    }
  }
};

TEST_F(ClientLibrary, ExportsNothingButItsInterface) {
  std::istringstream lines(output_of("nm -D --defined-only '" + library_path() + "'"));
  std::string address;
  std::string type;
  std::string name;
  int functions = 0;
  while (lines >> address >> type >> name) {
    EXPECT_TRUE(name.rfind("expertd_", 0) == 0 || name.rfind("EXPERTD_1", 0) == 0) << name;
    EXPECT_NE("u", type) << name << " is unique in the process";
    functions += type == "T" ? 1 : 0;
  }
  EXPECT_GT(functions, 40);
}

TEST_F(ClientLibrary, NeedsNoCppNoGrpcNoCuda) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "a sanitizer build links and holds more than what is installed";
#endif
  const std::string needed = output_of("readelf -d '" + library_path() + "'");
  for (const char* name : {"libstdc++", "libgrpc", "libprotobuf", "libcuda", "libgcc_s"}) {
    EXPECT_EQ(std::string::npos, needed.find(name)) << name;
  }
  EXPECT_NE(std::string::npos, needed.find("libnghttp2.so.14"));
}

TEST_F(ClientLibrary, IsSmallWithoutItsSymbols) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "a sanitizer build links and holds more than what is installed";
#endif
  const std::string stripped = std::string(::testing::TempDir()) + "expertd_client_stripped.so";
  ASSERT_EQ("", output_of("strip -o '" + stripped + "' '" + library_path() + "' 2>&1"));
  EXPECT_LE(std::filesystem::file_size(stripped), 500u * 1024);
  std::filesystem::remove(stripped);
}

TEST_F(ClientLibrary, LoadsInAMoment) {
  const auto start = std::chrono::steady_clock::now();
  void* library = dlopen(library_path().c_str(), RTLD_NOW | RTLD_LOCAL);
  const auto spent = std::chrono::steady_clock::now() - start;
  ASSERT_NE(nullptr, library) << dlerror();
  EXPECT_NE(nullptr, dlsym(library, "expertd_attach"));
  // The target is 2 ms; a machine that loses its processors to neighbours gets more.
  EXPECT_LT(spent, std::chrono::milliseconds(500));
  RecordProperty("load_us", static_cast<int>(std::chrono::duration_cast<std::chrono::microseconds>(spent).count()));
  dlclose(library);
}

}  // namespace
