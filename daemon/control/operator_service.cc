// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <memory>
#include <utility>

#include "daemon/base/clock.h"
#include "daemon/base/log.h"
#include "daemon/control/convert.h"
#include "daemon/control/services.h"
#include "daemon/control/unary_call.h"
#include "expertd/v1/control.grpc.pb.h"

namespace expertd::control {

namespace {

ProcessFacts process_facts() {
  ProcessFacts facts;
  facts.pid = static_cast<uint32_t>(getpid());
  uint64_t total_pages = 0;
  uint64_t resident_pages = 0;
  std::ifstream statm("/proc/self/statm");
  if (statm >> total_pages >> resident_pages) {
    facts.resident_bytes = resident_pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  }
  return facts;
}

class OperatorService final : public v1::Control::CallbackService {
 public:
  explicit OperatorService(const ServiceContext& services) : services_(services), api_(*services.operator_api) {}

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context, const v1::GetStatusRequest* request,
                                      v1::GetStatusResponse* response) override {
    return run(context, *request, response, Right::kLook, [this](const Caller&, const auto&, auto* out) {
      to_proto(api_.status(), process_facts(), out);
      return base::Status::ok();
    });
  }

  grpc::ServerUnaryReactor* ListSessions(grpc::CallbackServerContext* context, const v1::ListSessionsRequest* request,
                                         v1::ListSessionsResponse* response) override {
    return run(context, *request, response, Right::kLook, [this](const Caller&, const auto&, auto* out) {
      to_proto(api_.sessions(), out);
      return base::Status::ok();
    });
  }

  grpc::ServerUnaryReactor* GetCounters(grpc::CallbackServerContext* context, const v1::GetCountersRequest* request,
                                        v1::GetCountersResponse* response) override {
    return run(context, *request, response, Right::kLook, [this](const Caller&, const auto&, auto* out) {
      const std::vector<session::OpCounterSnapshot> counters = api_.counters();
      to_proto(counters, base::now_ns(), out);
      return base::Status::ok();
    });
  }

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override {
    return run(context, *request, response, Right::kAct, [this](const Caller& caller, const auto& message, auto* out) {
      base::log_info("drain asked for", {{"uid", caller.peer.uid}, {"pid", caller.peer.pid}});
      out->set_sessions(api_.drain(message.timeout_ns()));
      return base::Status::ok();
    });
  }

  grpc::ServerUnaryReactor* SetLogLevel(grpc::CallbackServerContext* context, const v1::SetLogLevelRequest* request,
                                        v1::SetLogLevelResponse* response) override {
    return run(context, *request, response, Right::kAct, [this](const Caller&, const auto& message, auto* out) {
      const base::Result<std::string> previous = api_.set_log_level(message.level());
      if (previous.is_ok()) {
        out->set_previous(previous.value());
      }
      return previous.status();
    });
  }

  grpc::ServerUnaryReactor* ListPeers(grpc::CallbackServerContext* context, const v1::ListPeersRequest* request,
                                      v1::ListPeersResponse* response) override {
    return run(context, *request, response, Right::kLook, [this](const Caller&, const auto&, auto* out) {
      const base::Result<session::PeersSnapshot> peers = api_.peers();
      if (peers.is_ok()) {
        to_proto(peers.value(), out);
      }
      return peers.status();
    });
  }

  grpc::ServerUnaryReactor* ListWaits(grpc::CallbackServerContext* context, const v1::ListWaitsRequest* request,
                                      v1::ListWaitsResponse* response) override {
    return run(context, *request, response, Right::kLook, [this](const Caller&, const auto& message, auto* out) {
      to_proto(api_.waits(message.last()), out);
      return base::Status::ok();
    });
  }

  grpc::ServerUnaryReactor* ListNodes(grpc::CallbackServerContext* context, const v1::ListNodesRequest*,
                                      v1::ListNodesResponse* response) override {
    return on_mesh(context, response, Right::kLook, [](session::MeshApi* mesh, const auto& call) {
      mesh->list_nodes([mesh, call](const base::Status& status, const std::vector<session::NodePlace>& nodes) {
        v1::ListNodesResponse out;
        to_proto(mesh->node(), nodes, &out);
        call->finish(session::ErrorDetail{status, -1, {}, {}, {}}, std::move(out));
      });
    });
  }

  grpc::ServerUnaryReactor* MeasurePair(grpc::CallbackServerContext* context, const v1::MeasurePairRequest* request,
                                        v1::MeasurePairResponse* response) override {
    return on_mesh(context, response, Right::kAct, [&request](session::MeshApi* mesh, const auto& call) {
      mesh->measure_pair(node_id_of(request->source_id()), node_id_of(request->destination_id()), request->timeout_ns(),
                         [call](const base::Status& status, const std::vector<session::PairLaneSnapshot>& lanes) {
                           v1::MeasurePairResponse out;
                           to_proto(lanes, &out);
                           call->finish(session::ErrorDetail{status, -1, {}, {}, {}}, std::move(out));
                         });
    });
  }

 private:
  enum class Right { kLook, kAct };

  /// What takes long: begun here, ended by the mesh's own thread.
  template <typename Response, typename Begin>
  grpc::ServerUnaryReactor* on_mesh(grpc::CallbackServerContext* context, Response* response, Right right,
                                    const Begin& begin) {
    auto call = UnaryCall<Response>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    Admission admission = admit_call(services_, *context, PeerKind::kOperator);
    if (admission.error.status.is_ok()) {
      admission.error = authorise(admission.caller, right);
    }
    session::MeshApi* const mesh = api_.mesh();
    if (admission.error.status.is_ok() && mesh == nullptr) {
      admission.error.status = base::Status(EXPERTD_REASON_UNAVAILABLE,
                                            "the fabric is off (fabric.enabled = false), so there are no other nodes");
    }
    if (admission.error.status.is_ok()) {
      begin(mesh, call);
    } else {
      call->finish(admission.error);
    }
    return reactor;
  }

  /// Acting is for root and the daemon's own user; looking for everyone whom the socket lets in.
  session::ErrorDetail authorise(const Caller& caller, Right right) const {
    session::ErrorDetail error;
    if (right == Right::kAct && caller.peer.uid != 0 && caller.peer.uid != services_.owner_uid) {
      error.status = base::Status(EXPERTD_REASON_PERMISSION, "only root and the daemon's own user may do this");
    }
    return error;
  }

  template <typename Request, typename Response, typename Work>
  grpc::ServerUnaryReactor* run(grpc::CallbackServerContext* context, const Request& request, Response* response,
                                Right right, Work work) {
    auto call = UnaryCall<Response>::start(response);
    grpc::ServerUnaryReactor* const reactor = call->reactor();
    Admission admission = admit_call(services_, *context, PeerKind::kOperator);
    if (admission.error.status.is_ok()) {
      admission.error = authorise(admission.caller, right);
    }
    if (!admission.error.status.is_ok()) {
      call->finish(admission.error);
      return reactor;
    }
    auto job = [call, caller = admission.caller, message = request, work = std::move(work)] {
      if (call->ended()) {
        return;  // cancelled while it waited: nothing was done
      }
      Response out;
      session::ErrorDetail error;
      error.status = work(caller, message, &out);
      call->finish(error, std::move(out));
    };
    // A key of its own for each call: operators do not wait for one another.
    const uint64_t key = next_key_.fetch_add(1, std::memory_order_relaxed);
    const base::Status queued = services_.operator_calls->submit(
        {key, admission.caller.peer.uid}, [call] { return call->ended(); }, std::move(job));
    if (!queued.is_ok()) {
      call->finish(session::ErrorDetail{queued, -1, {}, {}, {}});
    }
    return reactor;
  }

  const ServiceContext services_;
  session::OperatorApi& api_;
  std::atomic<uint64_t> next_key_{1};  // a plain counter; orders nothing
};

}  // namespace

std::unique_ptr<grpc::Service> make_operator_service(const ServiceContext& services) {
  return std::make_unique<OperatorService>(services);
}

}  // namespace expertd::control
