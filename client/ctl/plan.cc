// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/plan.h"

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>

#include "client/ctl/exit_codes.h"
#include "client/ctl/format.h"
#include "client/ctl/verbs.h"

namespace expertd::ctl {

namespace {

const char* const kFooter =
    "Nothing is measured: figures come from a model (tests/scale/README.md), whose inputs are these options.\n"
    "Efficiency is the bytes of one row per (token, other node), divided by the NIC's rate times the time.";

struct PlanOptions {
  PlanLink link;
  PlanShape shape;
  std::string dtype = "fp8";
};

void add_link_options(CLI::App& verb, PlanLink* link) {
  const auto rate = [&verb](const char* name, double* value, const char* sentence) {
    verb.add_option(name, *value, sentence)->capture_default_str()->type_name("NUMBER");
  };
  rate("--nic-gb-per-s", &link->nic_gb_per_s, "Rate of each GPU's NIC, each way");
  rate("--nvlink-gb-per-s", &link->nvlink_gb_per_s, "Rate of each GPU to those of its node, each way");
  rate("--latency-us", &link->latency_us, "One way between nodes, of a small message");
  rate("--message-us", &link->message_us, "What a message takes its sender");
  rate("--operation-us", &link->operation_us, "An operation that moves nothing, submission to completion");
  verb.add_option("--message-bytes", link->message_bytes, "Size of a message: fabric.message_bytes")
      ->capture_default_str()
      ->type_name("N");
  verb.add_option("--gpus-per-node", link->gpus_per_node, "GPUs of a node, each with a NIC")
      ->capture_default_str()
      ->type_name("N")
      ->check(CLI::Range(1, 64));
}

void add_shape_options(CLI::App& verb, PlanOptions* options) {
  PlanShape* const shape = &options->shape;
  const auto number = [&verb](const char* name, uint32_t* value, const char* sentence) {
    verb.add_option(name, *value, sentence)->capture_default_str()->type_name("N")->check(CLI::Range(1, 1 << 24));
  };
  number("--hidden", &shape->hidden, "Channels");
  number("--top-k", &shape->top_k, "Experts of a token");
  number("--experts", &shape->experts, "Experts; more ranks take one each");
  number("--tokens", &shape->tokens, "Tokens per rank, high throughput");
  number("--ll-tokens", &shape->low_latency_tokens, "Tokens per rank, low latency");
  number("--expert-groups", &shape->expert_groups, "Group-limited routing: groups of experts");
  number("--groups-per-token", &shape->groups_per_token, "Of these a token uses as many");
  verb.add_option("--dtype", options->dtype, "Of dispatched rows")
      ->capture_default_str()
      ->check(CLI::IsMember({"fp8", "bf16"}));
}

}  // namespace

Action add_plan(CLI::App& verb, const Context& context) {
  const auto options = std::make_shared<PlanOptions>();
  add_link_options(verb, &options->link);
  add_shape_options(verb, options.get());
  verb.footer(kFooter);
  return [&context, options] {
    options->shape.fp8 = options->dtype == "fp8";
    const std::string problem = plan_problem(options->link, options->shape);
    if (!problem.empty()) {
      return report(context, {kExitUsage, "plan: " + problem, ""});
    }
    *context.out << (context.json ? plan_document(options->link, options->shape).dump(2) + "\n"
                                  : plan_text(options->link, options->shape));
    return kExitOk;
  };
}

}  // namespace expertd::ctl
