#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the JSON of op_table: time against tokens, a panel per path, floors as dashed lines.

plot_table.py TABLE.json [OUT.svg]: writes TABLE.svg beside it, or OUT.svg. A panel is an operation in a mode; a line is
what else tells rows apart (dtype, executor, MPS, client). Rows of other shapes than the commonest are left out, as are
rows with an error. Both axes are logarithmic.
"""
import argparse
import html
import json
import math
import sys
from collections import Counter
from pathlib import Path

PANEL_WIDTH, PANEL_HEIGHT = 460, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 46
LEGEND_LINE = 15
COLUMNS = 2
HEAD = 46
COLOURS = ("#0b6fb8", "#d1495b", "#2e933c", "#8e5bd0", "#e08e0b", "#148f8b", "#7a5230", "#5c677d")
FLOOR, NCCL = "#444444", "#999999"


def shape_of(row):
    return row["hidden"], row["top_k"]


def path_of(row):
    parts = [row["operation"], row["mode"]]
    if row.get("half", "both") != "both":
        parts.append(row["half"])
    if row.get("captured"):
        parts.append("captured")
    return " ".join(parts)


def line_of(row):
    parts = [row.get("dtype") or "", row.get("executor") or "", "MPS" if row.get("mps") else "no MPS"]
    parts.append(f"client {row.get('client')}")
    return ", ".join(part for part in parts if part)


def plottable(rows):
    """Rows of the commonest shape that have a time, and that shape."""
    timed = [row for row in rows if row.get("p50_us") and row.get("tokens") and not row.get("error")]
    timed = [row for row in timed if row["operation"] != "empty"]
    if not timed:
        return [], None
    shape = Counter(shape_of(row) for row in timed).most_common(1)[0][0]
    return [row for row in timed if shape_of(row) == shape], shape


def lines_of(rows, key):
    """{name: sorted [(tokens, value)]} of a figure."""
    lines = {}
    for row in rows:
        if (row.get(key) or 0) > 0:  # a receive half that waits for nothing can come out below its clock's own time
            lines.setdefault(line_of(row), []).append((row["tokens"], row[key]))
    return {name: sorted(points) for name, points in lines.items()}


def steps(low, high):
    """Ticks at 1, 2 and 5 of each decade within the range."""
    ticks = []
    for decade in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        ticks += [factor * 10**decade for factor in (1, 2, 5) if low <= factor * 10**decade <= high]
    return ticks


def number(value):
    return f"{value:g}"


class Scale:
    """Positions on a logarithmic axis."""

    def __init__(self, low, high, first, last):
        self.low, self.high = low, high
        self.first, self.last = first, last

    def __call__(self, value):
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.first + part * (self.last - self.first)


def text(x, y, words, size=11, anchor="start", fill="#222222", extra=""):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" {extra}>'
        f"{html.escape(words)}</text>"
    )


def polyline(points, scale_x, scale_y, colour, dash, dots):
    places = [(scale_x(x), scale_y(y)) for x, y in points]
    drawn = []
    if len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"/>'
        )
    if dots or len(places) == 1:
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{colour}"/>' for x, y in places]
    return drawn


def curves_of(rows):
    """[(name, colour, dash, dots, points)] of a panel: the operation, its floors, NCCL."""
    curves = []
    for index, (name, points) in enumerate(sorted(lines_of(rows, "p50_us").items())):
        curves.append((name, COLOURS[index % len(COLOURS)], "none", True, points))
    idle = [row for row in rows if row.get("client") != "busy"] or rows
    # A floor is a property of the bytes: one line per dtype, the lower of several runs.
    for key, label, colour, dash in (("floor_us", "floor", FLOOR, "6 4"), ("nccl_us", "NCCL all-to-all", NCCL, "2 3")):
        for dtype in sorted({row.get("dtype") or "" for row in idle}):
            best = {}
            for row in idle:
                if (row.get("dtype") or "") == dtype and row.get(key):
                    best[row["tokens"]] = min(row[key], best.get(row["tokens"], math.inf))
            if best:
                curves.append((f"{label} {dtype}".strip(), colour, dash, key == "nccl_us", sorted(best.items())))
    return curves


def panel(title, curves, x0, y0):
    tokens = [x for *_, points in curves for x, _ in points]
    times = [y for *_, points in curves for _, y in points]
    low_x, high_x = min(tokens) / 1.2, max(tokens) * 1.2
    low_y, high_y = min(times) / 1.4, max(times) * 1.4
    scale_x = Scale(low_x, high_x, x0 + LEFT, x0 + PANEL_WIDTH - RIGHT)
    scale_y = Scale(low_y, high_y, y0 + PANEL_HEIGHT - BOTTOM, y0 + TOP)
    drawn = [text(x0 + LEFT, y0 + TOP - 12, title, 14, extra='font-weight="bold"')]
    for tick in steps(low_y, high_y):
        y = scale_y(tick)
        drawn.append(
            f'<line x1="{x0 + LEFT}" x2="{x0 + PANEL_WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>'
        )
        drawn.append(text(x0 + LEFT - 6, y + 4, number(tick), anchor="end"))
    for tick in sorted(set(tokens)):
        x = scale_x(tick)
        drawn.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y0 + TOP}" y2="{y0 + PANEL_HEIGHT - BOTTOM}" stroke="#f0f0f0"/>'
        )
        drawn.append(text(x, y0 + PANEL_HEIGHT - BOTTOM + 15, number(tick), anchor="middle"))
    drawn.append(
        f'<rect x="{x0 + LEFT}" y="{y0 + TOP}" width="{PANEL_WIDTH - LEFT - RIGHT}" '
        f'height="{PANEL_HEIGHT - TOP - BOTTOM}" fill="none" stroke="#888888"/>'
    )
    drawn.append(text(x0 + PANEL_WIDTH / 2, y0 + PANEL_HEIGHT - BOTTOM + 32, "tokens per rank", anchor="middle"))
    middle = y0 + (TOP + PANEL_HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 {x0 + 16} {middle:.1f})"'
    drawn.append(text(x0 + 16, middle, "µs, p50 of the slowest rank", anchor="middle", extra=turned))
    for line, (name, colour, dash, dots, points) in enumerate(curves):
        drawn += polyline(points, scale_x, scale_y, colour, dash, dots)
        y = y0 + PANEL_HEIGHT + line * LEGEND_LINE
        drawn.append(
            f'<line x1="{x0 + LEFT}" x2="{x0 + LEFT + 28}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="1.8" '
            f'stroke-dasharray="{dash}"/>'
        )
        drawn.append(text(x0 + LEFT + 36, y + 4, name))
    return drawn


def svg(document):
    rows, shape = plottable(document.get("rows", []))
    panels = {}
    for row in rows:
        panels.setdefault(path_of(row), []).append(row)
    drawn, y = [], HEAD
    names = sorted(panels)
    for first in range(0, len(names), COLUMNS):
        height = 0
        for column, name in enumerate(names[first : first + COLUMNS]):
            curves = curves_of(panels[name])
            drawn += panel(name, curves, column * PANEL_WIDTH, y)
            height = max(height, PANEL_HEIGHT + (len(curves) + 1) * LEGEND_LINE)
        y += height
    width = PANEL_WIDTH * COLUMNS
    head = f"{document.get('device', 'unknown device')}, {document.get('ranks', '?')} ranks"
    if shape:
        head += f", hidden {shape[0]}, top {shape[1]}"
    head += f"; commit {document.get('commit', 'unknown')}, {document.get('date', '')}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" '
            'font-family="sans-serif">',
            f'<rect width="{width}" height="{y}" fill="#ffffff"/>',
            text(16, 26, head, 13),
            *drawn,
            "</svg>",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="JSON of op_table")
    parser.add_argument("out", type=Path, nargs="?", help="default: beside the table, with .svg")
    arguments = parser.parse_args()
    try:
        document = json.loads(arguments.table.read_text(encoding="utf-8"))
        drawn = svg(document)
        (arguments.out or arguments.table.with_suffix(".svg")).write_text(drawn, encoding="utf-8")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        print(f"plot_table: {arguments.table}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
