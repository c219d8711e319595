// SPDX-License-Identifier: Apache-2.0
#include "tests/integration/raw_rpc.h"

#include <fcntl.h>
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/grpcpp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>

namespace expertd::support {
namespace {

// Field numbers of google.rpc.Status and google.protobuf.Any: details = 3, value = 2.
v1::ErrorInfo info_of(const std::string& details) {
  v1::ErrorInfo info;
  const std::string type = "expertd.v1.ErrorInfo";
  const size_t at = details.find(type);
  if (at != std::string::npos && at + type.size() + 2 <= details.size()) {
    // Behind the type follow the key of `value` and its length, which is below 128 or takes two bytes.
    size_t begin = at + type.size() + 1;
    size_t length = static_cast<unsigned char>(details[begin++]);
    if (length >= 0x80 && begin < details.size()) {
      length = (length & 0x7f) | static_cast<size_t>(static_cast<unsigned char>(details[begin++])) << 7;
    }
    info.ParseFromString(details.substr(begin, length));
  }
  return info;
}

RpcEnd end_of(const grpc::Status& status) {
  RpcEnd end;
  end.ok = status.ok();
  end.code = static_cast<int>(status.error_code());
  end.message = status.error_message();
  end.info = info_of(status.error_details());
  return end;
}

/// A context with a deadline, which every call must carry.
struct Call {
  Call() { context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10)); }
  grpc::ClientContext context;
};

}  // namespace

RawRpc::RawRpc(RawClient* client) : client_(client) {
  const int fd = client->take_rpc_fd();
  ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
  stub_ = v1::Session::NewStub(grpc::CreateInsecureChannelFromFd("expertd", fd));
}

RpcEnd RawRpc::open(const std::string& name) {
  Call call;
  v1::OpenSessionRequest request;
  request.set_client_id(name);
  v1::OpenSessionResponse response;
  return end_of(stub_->OpenSession(&call.context, request, &response));
}

RpcEnd RawRpc::register_buffer(const v1::RegisterBufferRequest& request, uint32_t* buffer) {
  Call call;
  v1::RegisterBufferResponse response;
  const RpcEnd end = end_of(stub_->RegisterBuffer(&call.context, request, &response));
  *buffer = response.buffer_id();
  return end;
}

uint32_t RawRpc::register_memfd(uint64_t bytes) {
  const int fd = make_memfd(bytes, true);
  uint32_t reason = 0;
  v1::RegisterBufferRequest request;
  request.set_fd_token(client_->put_fd(fd, &reason));
  request.set_size(bytes);
  ::close(fd);
  uint32_t buffer = 0;
  return register_buffer(request, &buffer).ok ? buffer : 0;
}

RpcEnd RawRpc::unregister(uint32_t buffer) {
  Call call;
  v1::UnregisterBufferRequest request;
  request.set_buffer_id(buffer);
  v1::UnregisterBufferResponse response;
  return end_of(stub_->UnregisterBuffer(&call.context, request, &response));
}

RpcEnd RawRpc::create_window(uint64_t bytes, v1::CreateWindowResponse* window) {
  Call call;
  v1::CreateWindowRequest request;
  request.set_size(bytes);
  return end_of(stub_->CreateWindow(&call.context, request, window));
}

RpcEnd RawRpc::join(const v1::JoinGroupRequest& request, v1::JoinGroupResponse* response) {
  Call call;
  return end_of(stub_->JoinGroup(&call.context, request, response));
}

RpcEnd RawRpc::leave(uint64_t group) {
  Call call;
  v1::LeaveGroupRequest request;
  request.set_group_id(group);
  v1::LeaveGroupResponse response;
  return end_of(stub_->LeaveGroup(&call.context, request, &response));
}

v1::JoinGroupRequest lone_group(const std::string& name) {
  v1::JoinGroupRequest request;
  request.set_name(name);
  v1::GroupConfig* config = request.mutable_config();
  config->set_expert_parallel_size(1);
  config->set_num_experts(4);
  config->set_hidden(128);
  config->set_top_k(2);
  config->set_max_tokens(16);
  config->set_mode(v1::GROUP_MODE_AUTO);
  config->set_on_rank_loss(v1::ON_RANK_LOSS_FAIL);
  return request;
}

int make_memfd(uint64_t bytes, bool sealed) {
  const int fd = ::memfd_create("expertd-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
      (sealed && ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)) {
    ::close(fd);
    return -1;
  }
  return fd;
}

}  // namespace expertd::support
