// SPDX-License-Identifier: Apache-2.0
#include "daemon/group/etcd/etcd_store.h"

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <string_view>
#include <utility>

#include "etcd/rpc.grpc.pb.h"

namespace expertd::group {

namespace {

namespace wire = etcdserverpb;

constexpr std::string_view kScheme = "http://";
constexpr int kAnswerBytesMax = 64 << 10;
constexpr size_t kMessageBytesMax = 256;
constexpr uint64_t kSecondNs = 1'000'000'000;

/// Makes a member that has no leader refuse, where it would answer from what it last knew.
constexpr const char* kNeedsLeader = "hasleader";

ElectionStore::Look look_of(int64_t revision, const google::protobuf::RepeatedPtrField<wire::KeyValue>& values) {
  ElectionStore::Look look;
  look.revision = revision;
  if (!values.empty()) {
    const wire::KeyValue& first = values[0];
    look.record = {first.value(), static_cast<uint64_t>(first.create_revision()), first.lease()};
  }
  return look;
}

uint64_t ttl_ns_of(int64_t seconds) {
  constexpr int64_t kLongest = 24 * 3600;
  return static_cast<uint64_t>(std::clamp<int64_t>(seconds, 0, kLongest)) * kSecondNs;
}

}  // namespace

struct EtcdStore::Parts {
  explicit Parts(const EtcdStoreOptions& given) : options(given), failures(given.endpoints.size()) {}

  void open();
  base::Status outcome(const grpc::Status& status);
  std::string place() const { return "etcd " + options.endpoints[next]; }

  const EtcdStoreOptions options;
  size_t next = 0;                    // index into options.endpoints of the one that is used
  std::vector<std::string> failures;  // of each endpoint since one answered
  std::unique_ptr<wire::KV::Stub> kv;
  std::unique_ptr<wire::Lease::Stub> leases;
  std::unique_ptr<wire::Watch::Stub> watches;

  std::mutex mutex;
  grpc::ClientContext* under_way = nullptr;  // under mutex
  bool interrupted = false;                  // under mutex

  /// The context of one call, which interrupt() can reach while it lasts.
  class Call {
   public:
    Call(Parts* parts, uint64_t limit_ns, bool always = false) : parts_(*parts) {
      parts_.open();
      context_.set_deadline(
          std::chrono::system_clock::now() +
          std::chrono::duration_cast<std::chrono::system_clock::duration>(std::chrono::nanoseconds(limit_ns)));
      context_.AddMetadata(kNeedsLeader, "true");
      const std::lock_guard lock(parts_.mutex);
      parts_.under_way = &context_;
      if (parts_.interrupted && !always) {
        context_.TryCancel();
      }
    }
    ~Call() {
      const std::lock_guard lock(parts_.mutex);
      parts_.under_way = nullptr;
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    grpc::ClientContext* context() { return &context_; }

   private:
    Parts& parts_;
    grpc::ClientContext context_;
  };
};

void EtcdStore::Parts::open() {
  if (kv != nullptr) {
    return;
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kAnswerBytesMax);
  // A connection of its own each time, without what an earlier one of the process learned; and no detour by a proxy.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  const std::string target = options.endpoints[next].substr(kScheme.size());
  const std::shared_ptr<grpc::Channel> channel =
      grpc::CreateCustomChannel("dns:///" + target, grpc::InsecureChannelCredentials(), arguments);
  kv = wire::KV::NewStub(channel);
  leases = wire::Lease::NewStub(channel);
  watches = wire::Watch::NewStub(channel);
}

base::Status EtcdStore::Parts::outcome(const grpc::Status& status) {
  if (status.ok()) {
    failures.assign(failures.size(), "");
    return base::Status::ok();
  }
  {
    const std::lock_guard lock(mutex);
    if (interrupted && status.error_code() == grpc::StatusCode::CANCELLED) {
      return base::Status(EXPERTD_REASON_CANCELLED, "this daemon is stopping");
    }
  }
  const std::string message = status.error_message().substr(0, kMessageBytesMax);
  const std::string why = status.error_code() == grpc::StatusCode::UNIMPLEMENTED ? "what listens there is no etcd v3"
                          : message.empty()                                      ? "no answer"
                                                                                 : message;
  failures[next] = place() + ": " + why;
  // All that failed, so that the text stays the same while all are asked in turn.
  std::string all;
  for (const std::string& failure : failures) {
    all += (all.empty() || failure.empty() ? "" : "; ") + failure;
  }
  kv.reset();
  leases.reset();
  watches.reset();
  next = (next + 1) % options.endpoints.size();
  return base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE, all);
}

base::Result<std::unique_ptr<EtcdStore>> EtcdStore::create(const EtcdStoreOptions& options) {
  for (const std::string& endpoint : options.endpoints) {
    if (!endpoint.starts_with(kScheme) || endpoint.size() == kScheme.size()) {
      return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE,
                          "fabric.etcd: \"" + endpoint + "\": write \"http://HOST:PORT\"");
    }
  }
  if (options.endpoints.empty() || options.key.empty()) {
    return base::Status(EXPERTD_REASON_CONFIG_BAD_VALUE, "fabric.etcd: names no etcd, or no key in it");
  }
  return std::unique_ptr<EtcdStore>(new EtcdStore(std::make_unique<Parts>(options)));
}

EtcdStore::EtcdStore(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

EtcdStore::~EtcdStore() = default;

base::Result<ElectionStore::Lease> EtcdStore::grant(uint64_t ttl_ns) {
  Parts::Call call(parts_.get(), parts_->options.call_ns);
  wire::LeaseGrantRequest request;
  request.set_ttl(static_cast<int64_t>((ttl_ns + kSecondNs - 1) / kSecondNs));
  wire::LeaseGrantResponse response;
  EXPERTD_RETURN_IF_ERROR(parts_->outcome(parts_->leases->LeaseGrant(call.context(), request, &response)));
  if (!response.error().empty() || response.id() == 0) {
    return base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE,
                        parts_->place() + " grants no lease: " + response.error().substr(0, kMessageBytesMax));
  }
  return Lease{response.id(), ttl_ns_of(response.ttl())};
}

base::Result<ElectionStore::Lease> EtcdStore::keep_alive(int64_t lease) {
  Parts::Call call(parts_.get(), parts_->options.call_ns);
  const auto stream = parts_->leases->LeaseKeepAlive(call.context());
  wire::LeaseKeepAliveRequest request;
  request.set_id(lease);
  wire::LeaseKeepAliveResponse response;
  const bool answered = stream->Write(request) && stream->Read(&response);
  if (answered) {
    call.context()->TryCancel();
  }
  const grpc::Status status = stream->Finish();
  if (!answered) {
    const base::Status failed = parts_->outcome(status);
    return failed.is_ok() ? base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE, parts_->place() + ": no answer")
                          : failed;
  }
  return Lease{lease, ttl_ns_of(response.ttl())};
}

base::Status EtcdStore::revoke(int64_t lease) {
  Parts::Call call(parts_.get(), parts_->options.call_ns, true);
  wire::LeaseRevokeRequest request;
  request.set_id(lease);
  wire::LeaseRevokeResponse response;
  return parts_->outcome(parts_->leases->LeaseRevoke(call.context(), request, &response));
}

base::Result<ElectionStore::Look> EtcdStore::look() {
  Parts::Call call(parts_.get(), parts_->options.call_ns);
  wire::RangeRequest request;
  request.set_key(parts_->options.key);
  wire::RangeResponse response;
  EXPERTD_RETURN_IF_ERROR(parts_->outcome(parts_->kv->Range(call.context(), request, &response)));
  return look_of(response.header().revision(), response.kvs());
}

base::Result<ElectionStore::Look> EtcdStore::claim(const std::string& value, int64_t lease) {
  Parts::Call call(parts_.get(), parts_->options.call_ns);
  wire::TxnRequest request;
  wire::Compare* const absent = request.add_compare();
  absent->set_result(wire::Compare::EQUAL);
  absent->set_target(wire::Compare::CREATE);
  absent->set_key(parts_->options.key);
  absent->set_create_revision(0);
  wire::PutRequest* const put = request.add_success()->mutable_request_put();
  put->set_key(parts_->options.key);
  put->set_value(value);
  put->set_lease(lease);
  request.add_failure()->mutable_request_range()->set_key(parts_->options.key);
  wire::TxnResponse response;
  EXPERTD_RETURN_IF_ERROR(parts_->outcome(parts_->kv->Txn(call.context(), request, &response)));
  if (response.succeeded()) {
    // The key came to be with this revision.
    const int64_t revision = response.header().revision();
    return Look{Record{value, static_cast<uint64_t>(revision), lease}, revision};
  }
  return look_of(response.header().revision(), response.responses_size() == 0
                                                   ? wire::RangeResponse().kvs()
                                                   : response.responses(0).response_range().kvs());
}

base::Status EtcdStore::wait_change(int64_t revision, uint64_t limit_ns) {
  Parts::Call call(parts_.get(), limit_ns);
  const auto stream = parts_->watches->Watch(call.context());
  wire::WatchRequest request;
  request.mutable_create_request()->set_key(parts_->options.key);
  request.mutable_create_request()->set_start_revision(revision + 1);
  wire::WatchResponse response;
  bool changed = false;
  bool canceled = false;
  bool answered = stream->Write(request);
  while (answered && !changed && !canceled) {
    answered = stream->Read(&response);
    changed = answered && response.events_size() != 0;
    canceled = answered && response.canceled();
  }
  if (answered) {
    call.context()->TryCancel();
  }
  const grpc::Status status = stream->Finish();
  if (changed || status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
    return base::Status::ok();
  }
  if (canceled) {  // what is behind the revision is compacted, for example: another look tells more
    return base::Status(EXPERTD_REASON_RENDEZVOUS_UNAVAILABLE,
                        parts_->place() + ": " + response.cancel_reason().substr(0, kMessageBytesMax));
  }
  return parts_->outcome(status);
}

void EtcdStore::interrupt() {
  const std::lock_guard lock(parts_->mutex);
  parts_->interrupted = true;
  if (parts_->under_way != nullptr) {
    parts_->under_way->TryCancel();
  }
}

}  // namespace expertd::group
