// SPDX-License-Identifier: Apache-2.0
// Messages with which the nodes of a group agree on its views (daemon/engine/view_change.h). Of the control lane's
// thread.
#include <algorithm>
#include <iterator>
#include <string>

#include "daemon/fabric/control_channel.h"

namespace expertd::fabric {

namespace {

static_assert(base::RankSet::kWords == kWireRankWords,
              "ranks of a view: another number of words is a new kWireVersion");

void fill(const base::RankSet& ranks, uint64_t* words) {
  std::copy(std::begin(ranks.words), std::end(ranks.words), words);
}

base::RankSet ranks_of(const uint64_t* words) {
  base::RankSet ranks;
  std::copy_n(words, kWireRankWords, ranks.words);
  return ranks;
}

void fill(const engine::ViewMessage& message, WireView* header) {
  header->kind = static_cast<uint32_t>(message.kind);
  header->view = message.epoch;
  header->ballot = message.ballot;
  header->accepted = message.accepted;
  header->made = message.value.made;
  header->from = message.value.view.from;
  fill(message.value.view.lost, header->lost);
  fill(message.value.view.excluded, header->excluded);
  header->last = message.report.last;
  header->lost_nodes = message.report.lost_nodes;
  fill(message.report.gone, header->gone);
  fill(message.report.exclude, header->exclude);
  fill(message.report.readmit, header->readmit);
}

}  // namespace

engine::ViewMessage view_message_of(const WireView& header) {
  engine::ViewMessage message;
  message.kind = static_cast<engine::ViewKind>(header.kind);
  message.epoch = header.view;
  message.ballot = header.ballot;
  message.accepted = header.accepted;
  message.value.made = header.made;
  message.value.view = {header.view, header.from, ranks_of(header.lost), ranks_of(header.excluded)};
  message.report = {header.last, header.lost_nodes, ranks_of(header.gone), ranks_of(header.exclude),
                    ranks_of(header.readmit)};
  return message;
}

void ControlChannel::tell_view(uint32_t node, const engine::ViewMessage& message) {
  if (node >= view_links_.size() || view_links_[node].peer == nullptr) {
    return;
  }
  ViewLink& link = view_links_[node];
  if (link.count == ViewLink::kMost) {
    link.first = (link.first + 1) % ViewLink::kMost;
    --link.count;
  }
  link.waiting[(link.first + link.count) % ViewLink::kMost] = message;
  ++link.count;
}

bool ControlChannel::send_views() {
  bool moved = false;
  for (ViewLink& link : view_links_) {
    if (link.peer == nullptr || link.peer->lost()) {
      link.count = 0;  // who is lost hears nothing
    }
    while (link.count != 0 && !link.under_way && !link.peer->failed()) {
      send_view(link);
      moved = true;
    }
  }
  return moved;
}

void ControlChannel::send_view(ViewLink& to) {
  to.header = WireView{};
  fill(to.waiting[to.first], &to.header);
  to.first = (to.first + 1) % ViewLink::kMost;
  --to.count;
  to.header.prefix.source_node = own_node_id_;
  to.header.group_key = link_.key;
  to.header.epoch = link_.epoch;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = on_view_sent;
  param.user_data = &to;
  const ucs_status_ptr_t sent =
      ucp_am_send_nbx(to.peer->endpoint(), kWireView, &to.header, sizeof(to.header), nullptr, 0, &param);
  if (UCS_PTR_IS_PTR(sent)) {
    to.under_way = true;
  } else if (UCS_PTR_IS_ERR(sent)) {
    to.peer->fail(LossCause::kTransport,
                  std::string("a view could not be sent to it: ") + ucs_status_string(UCS_PTR_STATUS(sent)));
  }
}

void ControlChannel::on_view_sent(void* request, ucs_status_t status, void* link) {
  ViewLink& of = *static_cast<ViewLink*>(link);
  of.under_way = false;
  if (status != UCS_OK) {
    of.peer->fail(LossCause::kTransport, std::string("a view could not be sent to it: ") + ucs_status_string(status));
  }
  ucp_request_free(request);
}

// What still waits goes out before the group closes: a node that ends its part says so.
bool ControlChannel::views_under_way() const {
  return std::any_of(view_links_.begin(), view_links_.end(),
                     [](const ViewLink& link) { return link.under_way || link.count != 0; });
}

}  // namespace expertd::fabric
