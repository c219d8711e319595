// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/mesh.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "client/ctl/format.h"

namespace expertd::ctl {

namespace {

using nlohmann::json;

constexpr MeshFigure kFigures[] = {MeshFigure::kLatency, MeshFigure::kBandwidth};
constexpr double kStraysMost = 3;
constexpr double kMadToDeviation = 1.4826;  // of a normal distribution

std::vector<double> values_of(const Mesh& mesh, const std::string& lane, MeshFigure figure) {
  std::vector<double> values;
  for (const MeshPair& pair : mesh.pairs) {
    if (const double value = mesh_value(pair, lane, figure); value >= 0) {
      values.push_back(value);
    }
  }
  return values;
}

// How far the middle half is from the median, as a standard deviation.
double spread_of(std::vector<double> values, double median) {
  for (double& value : values) {
    value = std::abs(value - median);
  }
  return kMadToDeviation * median_of(std::move(values));
}

std::string number_text(double number) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), number < 100 ? "%.1f" : "%.0f", number);
  return text.data();
}

std::string cell_text(const MeshPair* pair, const std::string& lane, MeshFigure figure) {
  if (pair == nullptr) {
    return "-";
  }
  for (const MeshLane& each : pair->lanes) {
    if (each.title() == lane) {
      return figure == MeshFigure::kLatency ? number_text(static_cast<double>(each.latency_p50_ns) / 1e3) + "/" +
                                                  number_text(static_cast<double>(each.latency_p99_ns) / 1e3)
                                            : number_text(static_cast<double>(each.bytes_per_second) / 1e9);
    }
  }
  return pair->reason.empty() ? "-" : pair->reason;
}

std::string table_text(const Mesh& mesh, const std::string& lane, MeshFigure figure) {
  std::vector<Table::Column> columns = {{"FROM \\ TO"}};
  for (const std::string& node : mesh.nodes) {
    columns.push_back({node, Align::kRight});
  }
  Table table(columns);
  for (size_t source = 0; source < mesh.nodes.size(); ++source) {
    std::vector<std::string> cells = {mesh.nodes[source]};
    for (size_t destination = 0; destination < mesh.nodes.size(); ++destination) {
      cells.push_back(cell_text(mesh.find(source, destination), lane, figure));
    }
    table.add(std::move(cells));
  }
  const char* const what =
      figure == MeshFigure::kLatency ? ": one way, p50/p99 in microseconds\n" : ": gigabytes per second\n";
  return "lane " + lane + what + table.text() + "\n";
}

std::string value_text(double value, MeshFigure figure) {
  return figure == MeshFigure::kLatency ? duration_text(static_cast<uint64_t>(value)) : rate_text(value);
}

std::string pair_text(const Mesh& mesh, size_t source, size_t destination) {
  return mesh.nodes[source] + " -> " + mesh.nodes[destination];
}

const char* figure_name(MeshFigure figure) {
  return figure == MeshFigure::kLatency ? "latency" : "bandwidth";
}

json pair_json(const Mesh& mesh, const MeshPair& pair) {
  json lanes = json::array();
  for (const MeshLane& lane : pair.lanes) {
    lanes.push_back({{"lane", lane.lane},
                     {"device", lane.device},
                     {"latency_p50_ns", lane.latency_p50_ns},
                     {"latency_p99_ns", lane.latency_p99_ns},
                     {"bytes_per_second", lane.bytes_per_second}});
  }
  json out = {
      {"source", mesh.nodes[pair.source]}, {"destination", mesh.nodes[pair.destination]}, {"lanes", std::move(lanes)}};
  if (!pair.reason.empty()) {
    out["reason"] = pair.reason;
    out["error"] = pair.message;
  }
  return out;
}

}  // namespace

const MeshPair* Mesh::find(size_t source, size_t destination) const {
  const auto found = std::find_if(pairs.begin(), pairs.end(), [&](const MeshPair& pair) {
    return pair.source == source && pair.destination == destination;
  });
  return found == pairs.end() ? nullptr : &*found;
}

std::vector<std::string> Mesh::lanes() const {
  std::vector<std::string> titles;
  for (const MeshPair& pair : pairs) {
    for (const MeshLane& lane : pair.lanes) {
      if (std::find(titles.begin(), titles.end(), lane.title()) == titles.end()) {
        titles.push_back(lane.title());
      }
    }
  }
  return titles;
}

double median_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

double mesh_value(const MeshPair& pair, const std::string& lane, MeshFigure figure) {
  for (const MeshLane& each : pair.lanes) {
    if (each.title() == lane) {
      return static_cast<double>(figure == MeshFigure::kLatency ? each.latency_p50_ns : each.bytes_per_second);
    }
  }
  return -1;
}

std::vector<MeshOutlier> mesh_outliers(const Mesh& mesh) {
  std::vector<MeshOutlier> outliers;
  for (const std::string& lane : mesh.lanes()) {
    for (const MeshFigure figure : kFigures) {
      const std::vector<double> values = values_of(mesh, lane, figure);
      if (values.size() < kOutlierPairs) {
        continue;
      }
      const double median = median_of(values);
      const double strays = kStraysMost * spread_of(values, median);
      for (const MeshPair& pair : mesh.pairs) {
        const double value = mesh_value(pair, lane, figure);
        const bool slow = figure == MeshFigure::kLatency ? value > median * kOutlierFactor && value > median + strays
                                                         : value < median / kOutlierFactor && value < median - strays;
        if (value >= 0 && slow) {
          outliers.push_back({pair.source, pair.destination, lane, figure, value, median});
        }
      }
    }
  }
  return outliers;
}

std::string mesh_suspect(const Mesh& mesh, const std::vector<MeshOutlier>& outliers) {
  std::vector<size_t> counts(mesh.nodes.size());
  for (const MeshOutlier& outlier : outliers) {
    ++counts[outlier.source];
    ++counts[outlier.destination];
  }
  for (const MeshPair& pair : mesh.pairs) {
    if (!pair.reason.empty()) {
      ++counts[pair.source];
      ++counts[pair.destination];
    }
  }
  const auto most = std::max_element(counts.begin(), counts.end());
  if (most == counts.end() || *most < 2 || std::count(counts.begin(), counts.end(), *most) != 1) {
    return "";
  }
  return mesh.nodes[static_cast<size_t>(most - counts.begin())];
}

std::string mesh_text(const Mesh& mesh) {
  std::string out;
  for (const std::string& lane : mesh.lanes()) {
    for (const MeshFigure figure : kFigures) {
      out += table_text(mesh, lane, figure);
    }
  }
  for (const MeshPair& pair : mesh.pairs) {
    if (!pair.reason.empty()) {
      out += "failed: " + pair_text(mesh, pair.source, pair.destination) + ": " + pair.message + "\n";
    }
  }
  const std::vector<MeshOutlier> outliers = mesh_outliers(mesh);
  for (const MeshOutlier& outlier : outliers) {
    out += "outlier: " + pair_text(mesh, outlier.source, outlier.destination) + ", lane " + outlier.lane + ": " +
           value_text(outlier.value, outlier.figure) + ", where the median is " +
           value_text(outlier.median, outlier.figure) + "\n";
  }
  if (const std::string suspect = mesh_suspect(mesh, outliers); !suspect.empty()) {
    out += "Most of these have node " + suspect + " in common.\n";
  }
  return out;
}

json mesh_json(const Mesh& mesh) {
  json pairs = json::array();
  for (const MeshPair& pair : mesh.pairs) {
    pairs.push_back(pair_json(mesh, pair));
  }
  const std::vector<MeshOutlier> found = mesh_outliers(mesh);
  json outliers = json::array();
  for (const MeshOutlier& outlier : found) {
    outliers.push_back({{"source", mesh.nodes[outlier.source]},
                        {"destination", mesh.nodes[outlier.destination]},
                        {"lane", outlier.lane},
                        {"figure", figure_name(outlier.figure)},
                        {"value", outlier.value},
                        {"median", outlier.median}});
  }
  return {{"nodes", mesh.nodes},
          {"pairs", std::move(pairs)},
          {"outliers", std::move(outliers)},
          {"suspect", mesh_suspect(mesh, found)}};
}

}  // namespace expertd::ctl
