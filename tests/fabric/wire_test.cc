// SPDX-License-Identifier: Apache-2.0
// The document of the headers, row by row, against the structs.
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <utility>

#include "daemon/fabric/wire.h"

namespace expertd::fabric_test {
namespace {

using Rows = std::map<std::string, std::pair<size_t, size_t>>;  // field -> offset, size

/// The rows of the table under the heading that begins with `heading`.
Rows documented(const std::string& heading) {
  std::ifstream file(std::string(EXPERTD_SOURCE_DIR) + "/proto/abi/peer_v1.md");
  Rows rows;
  std::string line;
  bool inside = false;
  while (std::getline(file, line)) {
    if (line.rfind("## ", 0) == 0) {
      inside = line.rfind("## " + heading, 0) == 0;
    }
    if (!inside || line.rfind("| ", 0) != 0 || line.rfind("| offset", 0) == 0) {
      continue;
    }
    std::istringstream cells(line);
    std::string bar;
    std::string field;
    size_t offset = 0;
    size_t size = 0;
    cells >> bar >> offset >> bar >> size >> bar >> field;
    rows[field] = {offset, size};
  }
  return rows;
}

#define EXPERTD_ROW(type, field)                 \
  {                                              \
#field, {                                    \
      offsetof(type, field), sizeof(type::field) \
    }                                            \
  }

TEST(FabricWire, HeadersLieAsDocumented) {
  using fabric::WireCredit;
  using fabric::WireHeartbeat;
  using fabric::WireMessage;
  using fabric::WirePrefix;
  EXPECT_EQ(documented("Prefix"), (Rows{EXPERTD_ROW(WirePrefix, magic), EXPERTD_ROW(WirePrefix, version),
                                        EXPERTD_ROW(WirePrefix, type), EXPERTD_ROW(WirePrefix, source_node)}));
  EXPECT_EQ(
      documented("Message"),
      (Rows{EXPERTD_ROW(WireMessage, group_key), EXPERTD_ROW(WireMessage, epoch), EXPERTD_ROW(WireMessage, kind),
            EXPERTD_ROW(WireMessage, op), EXPERTD_ROW(WireMessage, targets), EXPERTD_ROW(WireMessage, source_rank),
            EXPERTD_ROW(WireMessage, entries), EXPERTD_ROW(WireMessage, sequence), EXPERTD_ROW(WireMessage, lane),
            EXPERTD_ROW(WireMessage, bytes), EXPERTD_ROW(WireMessage, credited), EXPERTD_ROW(WireMessage, view),
            EXPERTD_ROW(WireMessage, head_bytes)}));
  EXPECT_EQ(documented("Credit"),
            (Rows{EXPERTD_ROW(WireCredit, group_key), EXPERTD_ROW(WireCredit, epoch), EXPERTD_ROW(WireCredit, lane),
                  EXPERTD_ROW(WireCredit, credits), EXPERTD_ROW(WireCredit, reserved)}));
  EXPECT_EQ(documented("Heartbeat"),
            (Rows{EXPERTD_ROW(WireHeartbeat, destination_node), EXPERTD_ROW(WireHeartbeat, signal),
                  EXPERTD_ROW(WireHeartbeat, reserved), EXPERTD_ROW(WireHeartbeat, sent_ns)}));
  using fabric::WireGone;
  EXPECT_EQ(documented("Gone"), (Rows{EXPERTD_ROW(WireGone, group_key), EXPERTD_ROW(WireGone, epoch),
                                      EXPERTD_ROW(WireGone, rank), EXPERTD_ROW(WireGone, through)}));
  using fabric::WireView;
  EXPECT_EQ(documented("View"),
            (Rows{EXPERTD_ROW(WireView, group_key), EXPERTD_ROW(WireView, epoch), EXPERTD_ROW(WireView, kind),
                  EXPERTD_ROW(WireView, view), EXPERTD_ROW(WireView, ballot), EXPERTD_ROW(WireView, accepted),
                  EXPERTD_ROW(WireView, made), EXPERTD_ROW(WireView, from), EXPERTD_ROW(WireView, last),
                  EXPERTD_ROW(WireView, lost_nodes), EXPERTD_ROW(WireView, lost), EXPERTD_ROW(WireView, excluded),
                  EXPERTD_ROW(WireView, gone), EXPERTD_ROW(WireView, exclude), EXPERTD_ROW(WireView, readmit)}));
  using fabric::WireProbe;
  EXPECT_EQ(documented("Probe"), (Rows{EXPERTD_ROW(WireProbe, destination_node), EXPERTD_ROW(WireProbe, probe),
                                       EXPERTD_ROW(WireProbe, signal), EXPERTD_ROW(WireProbe, lane),
                                       EXPERTD_ROW(WireProbe, sequence), EXPERTD_ROW(WireProbe, bytes)}));
}

#undef EXPERTD_ROW

}  // namespace
}  // namespace expertd::fabric_test
