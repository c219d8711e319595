// SPDX-License-Identifier: Apache-2.0
// The verb mesh: asks one daemon for the nodes, and then for one pair after the other.
#include <CLI/CLI.hpp>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <utility>

#include "client/ctl/exit_codes.h"
#include "client/ctl/format.h"
#include "client/ctl/mesh.h"
#include "client/ctl/render.h"
#include "client/ctl/verbs.h"

namespace expertd::ctl {

namespace {

constexpr uint64_t kCallSlackNs = 3'000'000'000;  // so that the daemon's own words arrive
constexpr uint32_t kGiveUpAfter = 3;              // failures of a node that never answered

struct Options {
  std::string svg;
  std::string timeout = "3s";
};

std::string check_timeout(const std::string& text) {
  const std::optional<uint64_t> ns = parse_duration_ns(text);
  return ns.has_value() && *ns >= 50'000'000 && *ns <= 10'000'000'000 ? "" : "\"" + text + "\" is not 50ms to 10s";
}

/// What became of the pairs of a node so far.
struct Tries {
  uint32_t good = 0;
  uint32_t bad = 0;
  bool hopeless() const { return good == 0 && bad >= kGiveUpAfter; }
};

class Round {
 public:
  Round(const Context& context, const v1::ListNodesResponse& nodes, uint64_t timeout_ns)
      : context_(context), nodes_(nodes), timeout_ns_(timeout_ns), tries_(static_cast<size_t>(nodes.nodes_size())) {
    for (const v1::NodePlace& node : nodes.nodes()) {
      mesh_.nodes.push_back(node.name());
    }
  }

  Mesh run() {
    for (size_t source = 0; source < tries_.size(); ++source) {
      for (size_t destination = 0; destination < tries_.size(); ++destination) {
        if (source != destination) {
          measure(source, destination);
        }
      }
    }
    return std::move(mesh_);
  }

 private:
  void measure(size_t source, size_t destination) {
    MeshPair pair{source, destination, {}, {}, {}};
    for (const size_t node : {source, destination}) {
      if (tries_[node].hopeless() && pair.reason.empty()) {
        pair.reason = "SKIPPED";
        pair.message = "node \"" + mesh_.nodes[node] + "\" failed " + std::to_string(kGiveUpAfter) +
                       " times and never answered, so this was not tried";
      }
    }
    if (pair.reason.empty()) {
      ask(&pair);
      for (const size_t node : {source, destination}) {
        ++(pair.reason.empty() ? tries_[node].good : tries_[node].bad);
      }
    }
    tell(pair);
    mesh_.pairs.push_back(std::move(pair));
  }

  void ask(MeshPair* pair) {
    v1::MeasurePairRequest request;
    request.set_source_id(nodes_.nodes(static_cast<int>(pair->source)).node_id());
    request.set_destination_id(nodes_.nodes(static_cast<int>(pair->destination)).node_id());
    request.set_timeout_ns(timeout_ns_);
    DaemonClient daemon(context_.socket, timeout_ns_ + kCallSlackNs);
    const Reply<v1::MeasurePairResponse> reply = daemon.measure_pair(request);
    if (!reply.ok) {
      pair->reason = reply.error.reason.empty() ? "UNAVAILABLE" : reply.error.reason;
      pair->message = reply.error.message;
      return;
    }
    for (const v1::PairLane& lane : reply.value.lanes()) {
      pair->lanes.push_back(
          {lane.lane(), lane.device(), lane.latency_p50_ns(), lane.latency_p99_ns(), lane.bytes_per_second()});
    }
  }

  void tell(const MeshPair& pair) const {
    const size_t all = tries_.size() * (tries_.size() - 1);
    *context_.err << mesh_.pairs.size() + 1 << "/" << all << " " << mesh_.nodes[pair.source] << " -> "
                  << mesh_.nodes[pair.destination] << (pair.reason.empty() ? "" : ": " + pair.reason) << std::endl;
  }

  const Context& context_;
  const v1::ListNodesResponse& nodes_;
  const uint64_t timeout_ns_;
  std::vector<Tries> tries_;  // by node
  Mesh mesh_;
};

int run_mesh(const Context& context, const Options& options) {
  DaemonClient daemon(context.socket, context.timeout_ns);
  const Reply<v1::ListNodesResponse> nodes = daemon.nodes();
  if (!nodes.ok) {
    return report(context, nodes.error);
  }
  if (nodes.value.nodes_size() < 2) {
    return report(context, {kExitCheckFailed, "the rendezvous knows no other node yet; a mesh has at least two", ""});
  }
  const Mesh mesh = Round(context, nodes.value, *parse_duration_ns(options.timeout)).run();
  *context.out << (context.json ? json_text(mesh_json(mesh)) : mesh_text(mesh));
  if (!options.svg.empty()) {
    std::ofstream file(options.svg);
    file << mesh_svg(mesh);
    file.close();
    if (!file) {
      return report(context,
                    {kExitUsage, "cannot write " + options.svg + "; name a file in a folder that is there", ""});
    }
  }
  for (const MeshPair& pair : mesh.pairs) {
    if (!pair.reason.empty()) {
      return kExitCheckFailed;
    }
  }
  return kExitOk;
}

}  // namespace

Action add_mesh(CLI::App& verb, const Context& context) {
  const auto options = std::make_shared<Options>();
  verb.add_option("--svg", options->svg, "Write heat maps of latency and bandwidth there")->type_name("FILE");
  verb.add_option("--pair-timeout", options->timeout, "For one pair, 50ms to 10s")
      ->check(check_timeout)
      ->capture_default_str()
      ->type_name("TIME");
  return [&context, options] { return run_mesh(context, *options); };
}

}  // namespace expertd::ctl
