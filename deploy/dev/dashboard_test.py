#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""dashboard_test DASHBOARD [CATALOGUE]: the Grafana dashboard is whole, and every metric it asks for is in the catalogue."""
import json
import re
import sys
from pathlib import Path

METRIC = re.compile(r"\bexpertd_[a-z0-9_]+\b")
SUFFIX = re.compile(r"_(bucket|sum|count)$")
VARIABLES = {"datasource", "node", "gpu"}


def expressions(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]


def overlaps(panels):
    taken = {}
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                other = taken.setdefault((x, y), panel["title"])
                if other != panel["title"]:
                    return [f"'{panel['title']}' lies over '{other}'"]
    return []


def check_shape(dashboard):
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    breaches = overlaps(panels)
    if not dashboard.get("uid"):
        breaches.append("no fixed uid")
    if len(ids) != len(set(ids)):
        breaches.append("two panels have one id")
    missing = VARIABLES - {variable["name"] for variable in dashboard["templating"]["list"]}
    if missing:
        breaches.append(f"no variable {', '.join(sorted(missing))}")
    for panel in panels:
        if panel["type"] == "row":
            continue
        if panel["datasource"].get("uid") != "${datasource}":
            breaches.append(f"'{panel['title']}' names a data source of its own")
        if not panel.get("description"):
            breaches.append(f"'{panel['title']}' does not say what it shows")
    for title, expression in expressions(dashboard):
        if expression.count("(") != expression.count(")") or expression.count("{") != expression.count("}"):
            breaches.append(f"'{title}': brackets do not match")
        if "$__all" in expression or ("$node" not in expression and title not in VARIABLES):
            breaches.append(f"'{title}' does not follow the variable node")
    return breaches


def check_names(dashboard, catalogue):
    known = set(METRIC.findall(catalogue))
    breaches = []
    for title, expression in expressions(dashboard):
        for name in sorted(set(METRIC.findall(expression))):
            if name not in known and SUFFIX.sub("", name) not in known:
                breaches.append(f"'{title}' asks for {name}, which is not in the catalogue")
    return breaches


def main():
    dashboard = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    breaches = check_shape(dashboard)
    if len(sys.argv) > 2:
        breaches += check_names(dashboard, Path(sys.argv[2]).read_text(encoding="utf-8"))
    names = {SUFFIX.sub("", name) for _, e in expressions(dashboard) for name in METRIC.findall(e)}
    what = "names compared" if len(sys.argv) > 2 else "shape"
    print("\n".join(breaches) if breaches else f"dashboard: {len(dashboard['panels'])} panels, {len(names)} metrics: {what}")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
