// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/nccl.h"

#include <dlfcn.h>

#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace expertd::bench {

namespace {

// Of nccl.h, by value.
constexpr int kSuccess = 0;
constexpr int kUint8 = 1;

}  // namespace

// As nccl.h declares them: ncclComm_t is a pointer, ncclResult_t and ncclDataType_t are enums.
struct Nccl::Functions {
  int (*get_version)(int*) = nullptr;
  const char* (*get_error_string)(int) = nullptr;
  int (*comm_init_all)(void**, int, const int*) = nullptr;
  int (*comm_destroy)(void*) = nullptr;
  int (*group_start)() = nullptr;
  int (*group_end)() = nullptr;
  int (*send)(const void*, size_t, int, int, void*, cudaStream_t) = nullptr;
  int (*recv)(void*, size_t, int, int, void*, cudaStream_t) = nullptr;
};

Nccl::Nccl() : functions_(std::make_unique<Functions>()) {}

std::unique_ptr<Nccl> Nccl::open(const std::vector<int>& devices, std::string* problem) {
  const char* const given = std::getenv("EXPERTD_NCCL_LIBRARY");
  // It keeps threads and exit handlers of its own, so it stays loaded.
  void* const library = dlopen(given == nullptr ? "libnccl.so.2" : given, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    *problem = dlerror();
    return nullptr;
  }
  std::unique_ptr<Nccl> nccl(new Nccl());
  Functions& f = *nccl->functions_;
  const auto find = [&](auto* function, const char* name) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
    if (*function == nullptr && problem->empty()) {
      *problem = std::string("the NCCL library has no ") + name;
    }
  };
  problem->clear();
  find(&f.get_version, "ncclGetVersion");
  find(&f.get_error_string, "ncclGetErrorString");
  find(&f.comm_init_all, "ncclCommInitAll");
  find(&f.comm_destroy, "ncclCommDestroy");
  find(&f.group_start, "ncclGroupStart");
  find(&f.group_end, "ncclGroupEnd");
  find(&f.send, "ncclSend");
  find(&f.recv, "ncclRecv");
  if (!problem->empty()) {
    return nullptr;
  }
  std::vector<void*> made(devices.size(), nullptr);
  nccl->check(f.comm_init_all(made.data(), static_cast<int>(devices.size()), devices.data()), "ncclCommInitAll");
  nccl->communicators_ = std::move(made);
  return nccl;
}

Nccl::~Nccl() {
  for (void* communicator : communicators_) {
    static_cast<void>(functions_->comm_destroy(communicator));  // the program ends anyway
  }
}

void Nccl::check(int result, const char* what) const {
  if (result != kSuccess) {
    throw std::runtime_error(std::string(what) + ": " + functions_->get_error_string(result));
  }
}

std::string Nccl::version() const {
  constexpr int kMajor = 10000;
  constexpr int kMinor = 100;
  int number = 0;
  check(functions_->get_version(&number), "ncclGetVersion");
  return std::to_string(number / kMajor) + "." + std::to_string(number % kMajor / kMinor) + "." +
         std::to_string(number % kMinor);
}

void Nccl::group_begin() const {
  check(functions_->group_start(), "ncclGroupStart");
}

void Nccl::group_end() const {
  check(functions_->group_end(), "ncclGroupEnd");
}

void Nccl::send(const Peer& to, const void* data, uint64_t bytes, cudaStream_t stream) const {
  check(functions_->send(data, bytes, kUint8, static_cast<int>(to.peer), communicators_[to.rank], stream), "ncclSend");
}

void Nccl::receive(const Peer& from, void* data, uint64_t bytes, cudaStream_t stream) const {
  check(functions_->recv(data, bytes, kUint8, static_cast<int>(from.peer), communicators_[from.rank], stream),
        "ncclRecv");
}

}  // namespace expertd::bench
