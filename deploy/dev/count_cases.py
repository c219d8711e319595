#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""count_cases FILE: prints "PASSED FAILED SKIPPED" of a JUnit file that ctest wrote."""
import sys
import xml.etree.ElementTree as ElementTree


def main() -> int:
    counts = {"run": 0, "fail": 0, "other": 0}
    for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
        status = case.get("status", "run")
        counts[status if status in counts else "other"] += 1
    print(counts["run"], counts["fail"], counts["other"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
