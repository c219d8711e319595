#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of tests/bench/plot_table.py on a table made up here: it draws every row that it can, and says what it cannot."""
import json
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree
from pathlib import Path

PLOT = Path(__file__).resolve().parents[1] / "bench" / "plot_table.py"
NAMESPACE = "{http://www.w3.org/2000/svg}"


def row(tokens, **other):
    made = {
        "operation": "dispatch", "half": "both", "captured": False, "mode": "ht", "dtype": "fp8", "tokens": tokens,
        "hidden": 7168, "top_k": 8, "executor": "sm", "sms": 132, "mps": False, "client": "idle", "p50_us": tokens / 10,
        "p99_us": tokens / 5, "floor_us": tokens / 20, "nccl_us": None, "verified": True,
    }
    made.update(other)
    return made


class PlotTableTest(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.table = Path(scratch.name) / "table.json"

    def plot(self, text):
        self.table.write_text(text, encoding="utf-8")
        return subprocess.run([sys.executable, str(PLOT), str(self.table)], capture_output=True, text=True, check=False)

    def drawn(self, rows):
        result = self.plot(json.dumps({"commit": "abc", "device": "a GPU", "ranks": 2, "rows": rows}))
        self.assertEqual(result.returncode, 0, result.stderr)
        return ElementTree.parse(self.table.with_suffix(".svg")).getroot()

    def words(self, root):
        return [element.text for element in root.iter(NAMESPACE + "text")]

    def test_a_panel_for_each_path_with_its_floor_dashed(self):
        rows = [row(tokens, operation=name) for name in ("dispatch", "combine") for tokens in (512, 4096)]
        root = self.drawn(rows)
        self.assertIn("dispatch ht", self.words(root))
        self.assertIn("combine ht", self.words(root))
        self.assertEqual(self.words(root).count("floor fp8"), 2)
        dashes = [line.get("stroke-dasharray") for line in root.iter(NAMESPACE + "polyline")]
        self.assertEqual(dashes.count("none"), 2)
        self.assertEqual(dashes.count("6 4"), 2)

    def test_other_shapes_and_failed_rows_are_left_out(self):
        rows = [row(512), row(4096), row(4096, hidden=2048, operation="combine"),
                row(8192, p50_us=None, verified=False, error="wrong output", mode="ll")]
        self.assertNotIn("combine ht", self.words(self.drawn(rows)))

    def test_a_table_without_rows_is_an_empty_drawing(self):
        self.assertEqual(list(self.drawn([]).iter(NAMESPACE + "polyline")), [])

    def test_what_is_no_json_is_told(self):
        result = self.plot("{")
        self.assertEqual(result.returncode, 1)
        self.assertIn("table.json", result.stderr)


if __name__ == "__main__":
    unittest.main()
