// SPDX-License-Identifier: Apache-2.0
// What expertctl mesh makes of figures: what stands out, and how it is shown.
#include "client/ctl/mesh.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace expertd::ctl {
namespace {

/// So many nodes, all as fast as each other but for a little.
Mesh even_mesh(size_t nodes) {
  Mesh mesh;
  for (size_t node = 0; node < nodes; ++node) {
    mesh.nodes.push_back("node-" + std::to_string(node));
  }
  for (size_t source = 0; source < nodes; ++source) {
    for (size_t destination = 0; destination < nodes; ++destination) {
      if (source != destination) {
        const uint64_t little = (source * 7 + destination * 3) % 5;
        mesh.pairs.push_back({source,
                              destination,
                              {{"latency", "", 10'000 + little * 100, 20'000, 9'000'000'000 + little * 10'000'000},
                               {"throughput", "", 12'000 + little * 100, 25'000, 11'000'000'000}},
                              {},
                              {}});
      }
    }
  }
  return mesh;
}

MeshPair& pair_of(Mesh* mesh, size_t source, size_t destination) {
  for (MeshPair& pair : mesh->pairs) {
    if (pair.source == source && pair.destination == destination) {
      return pair;
    }
  }
  return mesh->pairs.front();
}

TEST(Mesh, NothingStandsOutOfAnEvenOne) {
  const Mesh mesh = even_mesh(5);
  EXPECT_TRUE(mesh_outliers(mesh).empty());
  EXPECT_EQ(mesh_suspect(mesh, {}), "");
  EXPECT_EQ(mesh.lanes(), (std::vector<std::string>{"latency", "throughput"}));
}

TEST(Mesh, ASlowNodeIsInMostOutliers) {
  Mesh mesh = even_mesh(5);
  for (size_t node = 0; node < 5; ++node) {
    if (node != 3) {
      pair_of(&mesh, node, 3).lanes[0].latency_p50_ns = 80'000;
      pair_of(&mesh, node, 3).lanes[1].bytes_per_second = 2'000'000'000;
    }
  }
  const std::vector<MeshOutlier> outliers = mesh_outliers(mesh);
  ASSERT_EQ(outliers.size(), 8U);
  EXPECT_EQ(outliers[0].figure, MeshFigure::kLatency);
  EXPECT_EQ(outliers[0].destination, 3U);
  EXPECT_EQ(outliers[0].value, 80'000);
  EXPECT_LT(outliers[0].median, 11'000);
  EXPECT_EQ(outliers.back().lane, "throughput");
  EXPECT_EQ(outliers.back().figure, MeshFigure::kBandwidth);
  EXPECT_EQ(mesh_suspect(mesh, outliers), "node-3");
  const std::string text = mesh_text(mesh);
  EXPECT_NE(text.find("outlier: node-0 -> node-3, lane latency: 80.0 µs"), std::string::npos) << text;
  EXPECT_NE(text.find("Most of these have node node-3 in common."), std::string::npos) << text;
}

TEST(Mesh, ASlowDeviceOfALaneIsNamed) {
  Mesh mesh = even_mesh(4);
  for (MeshPair& pair : mesh.pairs) {
    MeshLane second = pair.lanes[1];
    pair.lanes[1].device = "mlx5_0:1";
    second.device = "mlx5_1:1";
    // A device that is slower everywhere is none that stands out, one that is slow on one way is.
    second.bytes_per_second = pair.source == 2 && pair.destination == 1 ? 1'000'000'000 : 5'000'000'000;
    pair.lanes.push_back(second);
  }
  EXPECT_EQ(mesh.lanes(), (std::vector<std::string>{"latency", "throughput mlx5_0:1", "throughput mlx5_1:1"}));
  const std::vector<MeshOutlier> outliers = mesh_outliers(mesh);
  ASSERT_EQ(outliers.size(), 1U);
  EXPECT_EQ(outliers[0].lane, "throughput mlx5_1:1");
  const std::string text = mesh_text(mesh);
  EXPECT_NE(text.find("outlier: node-2 -> node-1, lane throughput mlx5_1:1: "), std::string::npos) << text;
  EXPECT_NE(text.find("lane throughput mlx5_1:1: gigabytes per second"), std::string::npos) << text;
  EXPECT_NE(mesh_svg(mesh).find("throughput mlx5_1:1"), std::string::npos);
}

TEST(Mesh, WhatIsBetterThanOthersIsNoOutlier) {
  Mesh mesh = even_mesh(4);
  pair_of(&mesh, 0, 1).lanes[0].latency_p50_ns = 100;
  pair_of(&mesh, 0, 1).lanes[0].bytes_per_second = 90'000'000'000;
  EXPECT_TRUE(mesh_outliers(mesh).empty());
}

TEST(Mesh, FiguresThatStrayAnywayAreNoOutliers) {
  Mesh mesh = even_mesh(4);
  uint64_t latency_ns = 5'000;
  for (MeshPair& pair : mesh.pairs) {
    pair.lanes[0].latency_p50_ns = latency_ns;  // 5 to 38 µs, evenly
    latency_ns += 3'000;
  }
  EXPECT_TRUE(mesh_outliers(mesh).empty());
}

TEST(Mesh, OfTwoNodesNothingCanBeSaid) {
  Mesh mesh = even_mesh(2);
  pair_of(&mesh, 0, 1).lanes[0].latency_p50_ns = 900'000;
  EXPECT_TRUE(mesh_outliers(mesh).empty());
}

TEST(Mesh, FailedPairsAreShownWithTheirReason) {
  Mesh mesh = even_mesh(3);
  for (const auto& [source, destination] : {std::pair<size_t, size_t>{0, 2}, {2, 0}}) {
    MeshPair& pair = pair_of(&mesh, source, destination);
    pair.lanes.clear();
    pair.reason = "TIMEOUT";
    pair.message = "node \"node-2\" did not answer in time";
  }
  pair_of(&mesh, 1, 2).lanes.clear();
  pair_of(&mesh, 1, 2).reason = "TIMEOUT";
  const std::string text = mesh_text(mesh);
  EXPECT_NE(text.find("TIMEOUT"), std::string::npos) << text;
  EXPECT_NE(text.find("failed: node-0 -> node-2: node \"node-2\" did not"), std::string::npos) << text;
  EXPECT_EQ(mesh_suspect(mesh, mesh_outliers(mesh)), "node-2");
  const nlohmann::json json = mesh_json(mesh);
  EXPECT_EQ(json["pairs"].size(), 6U);
  EXPECT_EQ(json["suspect"], "node-2");
  for (const nlohmann::json& pair : json["pairs"]) {
    EXPECT_EQ(pair["lanes"].empty(), pair.contains("reason")) << pair;
  }
  EXPECT_NE(mesh_svg(mesh).find("#bbbbbb"), std::string::npos);
}

TEST(Mesh, ThePictureHasACellPerPairLaneAndFigure) {
  Mesh mesh = even_mesh(4);
  mesh.nodes[1] = "<b>&\"";
  pair_of(&mesh, 0, 1).lanes[0].latency_p50_ns = 80'000;
  const std::string svg = mesh_svg(mesh);
  size_t cells = 0;
  for (size_t at = svg.find("<title>"); at != std::string::npos; at = svg.find("<title>", at + 1)) {
    ++cells;
  }
  EXPECT_EQ(cells, 12U * 2 * 2);
  EXPECT_EQ(svg.find("<b>"), std::string::npos) << "names are escaped";
  EXPECT_NE(svg.find("&lt;b&gt;&amp;&quot;"), std::string::npos);
  EXPECT_NE(svg.find("#ff3333\" stroke=\"#ffffff\"><title>node-0 -&gt; "), std::string::npos) << "red, as it is slow";
  EXPECT_NE(svg.find("80.0 µs"), std::string::npos);
}

TEST(Mesh, DevicesOfALaneAreRowsOfTheirOwn) {
  Mesh mesh = even_mesh(2);
  for (MeshPair& pair : mesh.pairs) {
    pair.lanes.push_back({"throughput", "mlx5_1", 5'000, 9'000, 20'000'000'000});
  }
  EXPECT_EQ(mesh.lanes(), (std::vector<std::string>{"latency", "throughput", "throughput mlx5_1"}));
  EXPECT_NE(mesh_text(mesh).find("lane throughput mlx5_1: gigabytes per second"), std::string::npos);
}

}  // namespace
}  // namespace expertd::ctl
