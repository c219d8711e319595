// SPDX-License-Identifier: Apache-2.0
// peer_process TRANSPORT [hold | flood]: a daemon's fabric alone, as node 1 of a group of two with one rank each.
// Writes its identity, reads the other one, says "open", and sends back every message it gets; with `hold` it takes
// none and so lets no more in, with `flood` it sends as many as it can. Ends with its standard input.
#include <poll.h>

#include <cstring>
#include <iostream>

#include "tests/fabric/fabric_pair.h"
#include "tests/fabric/identity_text.h"

namespace expertd::fabric_test {
namespace {

bool input_ended() {
  pollfd input{0, POLLIN, 0};
  return ::poll(&input, 1, 0) > 0;
}

void send_back(Node& node, const engine::Arrival& arrival) {
  engine::SendBuffer buffer;
  while (buffer.data == nullptr && !input_ended()) {
    buffer = node.port->take(1, arrival.header.lane);
  }
  if (buffer.data != nullptr) {
    std::memcpy(buffer.data, arrival.data, arrival.bytes);
    engine::MessageHeader header = arrival.header;
    header.targets = 1;
    node.port->send(1, buffer, header, arrival.bytes);
  }
}

void flood(Node& node) {
  const engine::MessageHeader header{.kind = engine::MessageKind::kRows, .op = 1, .node = 0, .targets = 1};
  while (!input_ended()) {
    const engine::SendBuffer buffer = node.port->take(1, header.lane);
    if (buffer.data != nullptr) {
      node.port->send(1, buffer, header, buffer.capacity);
    }
  }
}

int run(const std::string& transport, const std::string& mode) {
  World world({1});
  world.create([&](uint32_t) { return options_for(transport, "child"); });
  Node& node = world.node(0);
  std::cout << identity_to_text(node.fabric->identity()) << std::endl;
  std::string line;
  if (!std::getline(std::cin, line)) {
    return 1;
  }
  const fabric::NodeIdentity other = identity_from_text(line);
  const fabric::NodeIdentity own = node.fabric->identity();
  if (!node.fabric->connect(other).is_ok() || !node.bell->wait([&] { return !node.bell->up().empty(); })) {
    return 2;
  }
  auto port = node.fabric->open_group(pair_link(1, {other.node_id, own.node_id}));
  if (!port.is_ok()) {
    std::cerr << port.status().message() << std::endl;
    return 3;
  }
  node.port = std::move(port).value();
  std::cout << "open" << std::endl;
  if (mode == "flood") {
    flood(node);
  }
  while (!input_ended()) {
    engine::Arrival arrival;
    if (mode == "hold") {
      (void)node.bell->wait(input_ended);
    } else if (receive(node, 1, &arrival, std::chrono::milliseconds(10))) {
      send_back(node, arrival);
      node.port->release(1, arrival);
    }
  }
  return 0;
}

}  // namespace
}  // namespace expertd::fabric_test

int main(int count, char** arguments) {
  return count < 2 ? 64 : expertd::fabric_test::run(arguments[1], count > 2 ? arguments[2] : "");
}
