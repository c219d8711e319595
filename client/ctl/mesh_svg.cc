// SPDX-License-Identifier: Apache-2.0
// The heat maps of `expertctl mesh`: plain SVG that any browser shows, with the figures as titles of the cells.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "client/ctl/format.h"
#include "client/ctl/mesh.h"

namespace expertd::ctl {

namespace {

constexpr int kCell = 28;  // pixels
constexpr int kGap = 40;
constexpr int kLetter = 7;
constexpr int kLine = 16;
constexpr size_t kLettersMost = 24;

struct Layout {
  int label = 0;  // width of the names
  int side = 0;   // of the square of cells
  int width() const { return label + side; }
  int height() const { return label + side + kLine; }
};

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '"' ? "&quot;" : std::string(1, c);
  }
  return out;
}

std::string name_text(const std::string& name) {
  return escaped(name.size() <= kLettersMost ? name : name.substr(0, kLettersMost - 2) + "..");
}

// From blue, a quarter of the median, over white to red, four times it; `badness` is in powers of two.
std::string colour(double badness) {
  const double part = std::clamp(badness / 2, -1.0, 1.0);
  const auto faded = static_cast<int>(std::lround(255 * (1 - std::abs(part) * 0.8)));
  std::array<char, 8> text{};
  std::snprintf(text.data(), text.size(), "#%02x%02x%02x", part > 0 ? 255 : faded, faded, part > 0 ? faded : 255);
  return text.data();
}

std::string place(const char* x, int at_x, const char* y, int at_y) {
  return std::string(x) + "=\"" + std::to_string(at_x) + "\" " + y + "=\"" + std::to_string(at_y) + "\"";
}

std::string text_at(int x, int y, const std::string& more, const std::string& words) {
  return "<text " + place("x", x, "y", y) + more + ">" + words + "</text>\n";
}

std::string cell(const Mesh& mesh, const MeshPair& pair, const std::string& lane, MeshFigure figure, double median) {
  const double value = mesh_value(pair, lane, figure);
  std::string fill = "#bbbbbb";
  std::string words = pair.reason.empty() ? "not measured" : pair.message;
  if (value > 0 && median > 0) {
    fill = colour(figure == MeshFigure::kLatency ? std::log2(value / median) : std::log2(median / value));
    words = figure == MeshFigure::kLatency ? duration_text(static_cast<uint64_t>(value)) : rate_text(value);
  }
  return "fill=\"" + fill + "\" stroke=\"#ffffff\"><title>" +
         escaped(mesh.nodes[pair.source] + " -> " + mesh.nodes[pair.destination] + ": " + words) + "</title></rect>\n";
}

std::string map_of(const Mesh& mesh, const Layout& layout, const std::string& lane, MeshFigure figure) {
  std::vector<double> values;
  for (const MeshPair& pair : mesh.pairs) {
    if (const double value = mesh_value(pair, lane, figure); value > 0) {
      values.push_back(value);
    }
  }
  const double median = values.empty() ? 0 : median_of(values);
  const std::string middle =
      values.empty() ? "nothing measured"
                     : "median " + (figure == MeshFigure::kLatency ? duration_text(static_cast<uint64_t>(median))
                                                                   : rate_text(median));
  std::string out =
      text_at(0, kLine - 4, " font-weight=\"bold\"",
              escaped("lane " + lane + ", " + (figure == MeshFigure::kLatency ? "one-way latency" : "bandwidth") +
                      ", " + middle));
  for (size_t node = 0; node < mesh.nodes.size(); ++node) {
    const int along = layout.label + static_cast<int>(node) * kCell + kCell / 2 + 4;
    out += text_at(layout.label - 4, along + kLine, " text-anchor=\"end\"", name_text(mesh.nodes[node]));
    const std::string turned =
        " transform=\"rotate(-90 " + std::to_string(along) + " " + std::to_string(layout.label + kLine - 4) + ")\"";
    out += text_at(along, layout.label + kLine - 4, turned, name_text(mesh.nodes[node]));
  }
  for (const MeshPair& pair : mesh.pairs) {
    const int x = layout.label + static_cast<int>(pair.destination) * kCell;
    const int y = layout.label + kLine + static_cast<int>(pair.source) * kCell;
    out += "<rect " + place("x", x, "y", y) + " " + place("width", kCell, "height", kCell) + " " +
           cell(mesh, pair, lane, figure, median);
  }
  return out;
}

}  // namespace

std::string mesh_svg(const Mesh& mesh) {
  size_t letters = 8;
  for (const std::string& node : mesh.nodes) {
    letters = std::max(letters, std::min(node.size(), kLettersMost));
  }
  Layout layout;
  layout.label = static_cast<int>(letters) * kLetter + 8;
  layout.side = std::max(static_cast<int>(mesh.nodes.size()) * kCell, 45 * kLetter - layout.label);  // room for a title
  const std::vector<std::string> lanes = mesh.lanes();
  const int width = 2 * layout.width() + 3 * kGap;
  const int height = static_cast<int>(lanes.size()) * (layout.height() + kGap) + 2 * kGap;
  std::string out = "<svg xmlns=\"http://www.w3.org/2000/svg\" " + place("width", width, "height", height) +
                    " font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" "
                    "fill=\"#f4f4f4\"/>\n";
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    int x = kGap;
    for (const MeshFigure figure : {MeshFigure::kLatency, MeshFigure::kBandwidth}) {
      const int y = kGap + static_cast<int>(lane) * (layout.height() + kGap);
      out += "<g transform=\"translate(" + std::to_string(x) + " " + std::to_string(y) + ")\">\n" +
             map_of(mesh, layout, lanes[lane], figure) + "</g>\n";
      x += layout.width() + kGap;
    }
  }
  out += text_at(kGap, height - kGap / 2, "",
                 "Rows send, columns receive. White is the median, red four times worse, blue four times better, grey "
                 "failed.");
  return out + "</svg>\n";
}

}  // namespace expertd::ctl
