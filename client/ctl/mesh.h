// SPDX-License-Identifier: Apache-2.0
// What `expertctl mesh` measured between all pairs of nodes, and what it shows of it: tables, JSON, heat maps, and
// which figures stand out. Value types and pure functions, any thread; mesh_run.cc asks the daemon.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace expertd::ctl {

/// From one node to another on one lane.
struct MeshLane {
  std::string lane;
  std::string device;           // empty: all that the lane uses
  uint64_t latency_p50_ns = 0;  // one way
  uint64_t latency_p99_ns = 0;
  uint64_t bytes_per_second = 0;

  /// "latency", or "latency mlx5_0".
  std::string title() const { return device.empty() ? lane : lane + " " + device; }
};

struct MeshPair {
  size_t source = 0;  // index into Mesh::nodes
  size_t destination = 0;
  std::vector<MeshLane> lanes;
  std::string reason;   // of a pair that could not be measured: name of the Reason, else empty
  std::string message;  // the same in words
};

struct Mesh {
  std::vector<std::string> nodes;
  std::vector<MeshPair> pairs;

  const MeshPair* find(size_t source, size_t destination) const;
  /// Titles of the lanes that any pair has, in the order in which they came.
  std::vector<std::string> lanes() const;
};

enum class MeshFigure { kLatency, kBandwidth };

/// A figure that is worse than others of its lane: beyond `factor` times the median, and by more than three times what
/// the middle half strays.
struct MeshOutlier {
  size_t source = 0;
  size_t destination = 0;
  std::string lane;  // title
  MeshFigure figure = MeshFigure::kLatency;
  double value = 0;   // nanoseconds or bytes per second
  double median = 0;  // of all pairs
};
inline constexpr double kOutlierFactor = 1.5;
inline constexpr size_t kOutlierPairs = 4;  // with fewer pairs nothing stands out

std::vector<MeshOutlier> mesh_outliers(const Mesh& mesh);

/// The node in most outliers and failed pairs: at least two, and more than any other. Empty: there is none.
std::string mesh_suspect(const Mesh& mesh, const std::vector<MeshOutlier>& outliers);

/// Median of what is not empty.
double median_of(std::vector<double> values);
/// The figure of a pair's lane; negative where it has none.
double mesh_value(const MeshPair& pair, const std::string& lane, MeshFigure figure);

std::string mesh_text(const Mesh& mesh);
nlohmann::json mesh_json(const Mesh& mesh);
/// A picture per lane and figure, rows are sources; blue is better than the median, red is worse.
std::string mesh_svg(const Mesh& mesh);

}  // namespace expertd::ctl
