#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Pairs of .proto files that proto_compat.py must accept or refuse."""
import sys
import tempfile
from pathlib import Path

import proto_compat

HEAD = 'syntax = "proto3"; package t;\n'
OLD = HEAD + """
enum Kind { KIND_UNSPECIFIED = 0; KIND_ONE = 1; }
message A { uint64 bytes = 1; string name = 2; oneof one { bool x = 3; } message In { int32 y = 1; } }
message B {}
service S { rpc Get(A) returns (B); }
"""

# What to replace in OLD, by what, and part of the one sentence expected (breach or addition).
CASES = (
    ("", "", None),
    ("string name = 2;", "", "field t.A 2 (name): removed"),
    ("string name = 2;", "reserved 2;", "field t.A 2 (name): removed"),
    ("string name", "bytes name", "type was TYPE_STRING, is TYPE_BYTES"),
    ("string name", "repeated string name", "label was LABEL_OPTIONAL"),
    ("string name", "string title", "name was name, is title"),
    ("int32 y = 1", "int64 y = 1", "field t.A.In 1 (y): type"),
    ("oneof one { bool x = 3; }", "bool x = 3;", "oneof was one"),
    ("KIND_ONE = 1", "KIND_TWO = 1", "name was KIND_ONE"),
    ("rpc Get(A)", "rpc Get(B)", "request was .t.A"),
    ("rpc Get(A)", "rpc Get(stream A)", "streams was"),
    ("rpc Get(A) returns (B);", "", "method t.S Get: removed"),
    ("message B {}", "message B { bool z = 1; }", "field t.B 1"),
)


def compiled(text):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "t.proto").write_text(text, encoding="utf-8")
        return proto_compat.compile_tree(Path(directory))


def main():
    failures = []
    old = compiled(OLD)
    for what, by, wanted in CASES:
        breaches, additions = proto_compat.compare(old, compiled(OLD.replace(what, by) if what else OLD))
        found = breaches + additions
        good = not found if wanted is None else len(found) == 1 and wanted in found[0]
        if not good:
            failures.append(f"{what!r} -> {by!r}: wanted {wanted}, got {found}")
    renumbered = proto_compat.compare(old, compiled(OLD.replace("name = 2", "name = 9")))
    if len(renumbered[0]) != 1 or len(renumbered[1]) != 1:
        failures.append(f"a renumbered field: got {renumbered}")
    print("\n".join(failures) if failures else f"proto_compat_test: {len(CASES) + 1} cases")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
