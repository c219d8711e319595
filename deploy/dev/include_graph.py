#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks who includes whom: the table of folders of the architecture, read by a machine.

include_graph [ROOT]: every #include of every source file below ROOT (default: this tree) is held against FOLDERS (which
house headers a folder may include) and LIBRARIES (which folders may include a foreign library). Exits 1 with one line
per breach. The first matching row of a table counts.
"""
import re
import sys
from pathlib import Path

SOURCES = {".h", ".hpp", ".c", ".cc", ".cpp", ".cu", ".cuh"}
ROOTS = ("daemon", "client", "proto", "tests")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include(?:_next)?[ \t]*([<"])([^">]+)[">]', re.MULTILINE)
# Where a quoted name without a folder may lie, besides beside the file itself.
INCLUDE_DIRECTORIES = ("", "client/include", "proto/abi", "proto")

ABI = "proto/abi/"
BASE = "daemon/base/"
EVERYTHING = ("",)

# Folder (or file) -> prefixes of house headers that it may include besides its own folder.
FOLDERS = (
    ("daemon/main.cc", EVERYTHING),
    ("daemon/app/", EVERYTHING),  # the composition root's other files
    ("daemon/base/", (ABI,)),
    ("daemon/config/", (BASE,)),
    ("daemon/transport/", (BASE, ABI, "daemon/engine/", "daemon/session/")),
    ("daemon/session/", (BASE, ABI, "daemon/engine/", "daemon/device/device.h", "daemon/group/directory.h", "daemon/group/rendezvous_port.h")),
    ("daemon/control/", (BASE, ABI, "daemon/session/", "daemon/group/", "daemon/rpc/", "expertd/v1/")),
    ("daemon/rpc/", (BASE, ABI, "daemon/session/api.h")),
    ("daemon/group/", (BASE, ABI, "daemon/session/api.h", "daemon/engine/", "expertd/peer/")),
    ("daemon/engine/", (BASE, ABI, "daemon/kernels/op_params.h")),
    ("daemon/device/", (BASE, ABI, "daemon/engine/", "daemon/kernels/")),
    ("daemon/kernels/", ("daemon/base/limits.h", "daemon/base/rank_set.h", ABI)),
    ("daemon/fabric/bootstrap/", (BASE, ABI, "daemon/engine/", "daemon/session/api.h", "daemon/group/", "daemon/rpc/", "expertd/")),
    ("daemon/fabric/", (BASE, ABI, "daemon/engine/", "expertd/peer/")),
    ("daemon/metrics/", (BASE, ABI)),
    ("daemon/supervise/", (BASE, ABI)),
    ("client/ctl/", ("client/", ABI, "expertd/")),
    ("client/", ("client/", ABI, "expertd/")),
    ("proto/", ("proto/", ABI)),
    ("tests/", EVERYTHING),
)

GRPC_USERS = ("daemon/control/", "daemon/rpc/", "daemon/group/etcd", "daemon/fabric/bootstrap", "client/ctl/", "tests/")
CUDA_USERS = ("daemon/device/cuda/", "daemon/kernels/cuda/", "client/src/cuda_import", "tests/device/", "tests/support/cuda",
              "tests/bench/")
# Name of the library, pattern of its headers, prefixes that may include them.
LIBRARIES = (
    ("gRPC", r"grpc(pp)?/|.*\.grpc\.pb\.h$", GRPC_USERS),
    ("protobuf", r"google/protobuf/", GRPC_USERS),
    ("CUDA", r"cuda[^/]*\.h$|cuda/|cooperative_groups|nvml\.h$|nvtx3/|curand|cub/|thrust/", CUDA_USERS),
    ("UCX", r"uc[pst]/", ("daemon/fabric/", "tests/fabric/", "tests/bench/ucx_")),
    ("prometheus-cpp", r"prometheus/", ("daemon/metrics/", "tests/")),
    ("spdlog", r"(spdlog|fmt)/", ("daemon/base/log.cc",)),
    ("toml++", r"toml\+\+/|toml\.hpp$", ("daemon/config/", "client/ctl/", "tests/")),
    ("CLI11", r"CLI/", ("daemon/config/", "client/ctl/", "client/examples/", "tests/")),
    ("nlohmann-json", r"nlohmann/", ("client/ctl/", "tests/")),
    ("nghttp2", r"nghttp2/", ("client/rpc/", "tests/")),
    ("nanopb", r"pb(_encode|_decode|_common)?\.h$", ("client/", "tests/")),
    ("GoogleTest", r"(gtest|gmock)/", ("tests/",)),
    ("benchmark", r"benchmark/", ("tests/",)),
)
# Headers that a folder must do without although no library is behind them.
FORBIDDEN = (
    (
        "daemon/engine/",
        "the engine has no threads, clocks or sockets",
        r"(thread|mutex|shared_mutex|condition_variable|future|semaphore|stop_token|chrono|ctime|time\.h|pthread\.h"
        r"|unistd\.h|poll\.h|sys/.*|netinet/.*|arpa/.*)$",
    ),
    ("daemon/", "the daemon does not use the client library", r"client/"),
    ("client/", "the client library does not use the daemon", r"daemon/"),
    ("daemon/", "production code does not know tests", r"tests/"),
    ("client/", "production code does not know tests", r"tests/"),
)
# Libraries whose headers only one file outside tests may include.
ONE_FILE = ("prometheus-cpp",)


def first_match(table, path):
    """The row of `table` for `path`, or None."""
    return next((row for row in table if path.startswith(row[0])), None)


def house_path(root, including, name):
    """The path of a house header from the root, or None when no such file is in the tree."""
    beside = Path(including).parent / name
    candidates = [beside.as_posix()] + [(Path(d) / name).as_posix() for d in INCLUDE_DIRECTORIES]
    return next((c for c in candidates if (root / c).is_file()), None)


def check_house(path, target):
    folder = first_match(FOLDERS, path)
    if folder is None:
        return "this folder has no row in the table of include_graph.py"
    own = folder[0] if folder[0].endswith("/") else ""
    if any(target.startswith(prefix) for prefix in folder[1]) or (own and target.startswith(own)):
        return None
    return f"{folder[0]} may include its own headers and {', '.join(folder[1]) or 'no others'}"


def check_foreign(path, name, users):
    for library, pattern, allowed in LIBRARIES:
        if not re.match(pattern, name):
            continue
        users.setdefault(library, set()).add(path)
        if not path.startswith(allowed):
            return f"{library} belongs in {', '.join(allowed)}"
    return None


def check_include(root, path, name, users):
    """The reason why `path` may not include `name`, or None."""
    for prefix, reason, pattern in FORBIDDEN:
        if path.startswith(prefix) and re.match(pattern, name):
            return reason
    if name.endswith(".cuh") and Path(path).suffix not in (".cu", ".cuh"):
        return "a .cuh is included only from .cu and .cuh"
    target = house_path(root, path, name)
    if target is not None:
        return check_house(path, target)
    if name.startswith(("daemon/", "client/", "tests/", "proto/")) and not name.endswith((".pb.h", "_generated.h")):
        return "there is no such file"
    if name.startswith("expertd/"):  # generated from proto/
        return check_foreign(path, name, users) or check_house(path, name)
    return check_foreign(path, name, users)


def check_tree(root):
    """All breaches below `root` as lines "path:line: ..."."""
    users = {}
    breaches = []
    for top in ROOTS:
        for file in sorted((root / top).rglob("*")):
            if file.suffix not in SOURCES or not file.is_file():
                continue
            path = file.relative_to(root).as_posix()
            text = file.read_text(encoding="utf-8", errors="replace")
            for match in INCLUDE.finditer(text):
                reason = check_include(root, path, match.group(2), users)
                if reason:
                    line = text.count("\n", 0, match.start()) + 1
                    breaches.append(f"{path}:{line}: includes {match.group(2)}: {reason}")
    for library in ONE_FILE:
        files = sorted(p for p in users.get(library, ()) if not p.startswith("tests/"))
        if len(files) > 1:
            breaches.append(f"{library} is included by more than one file: {', '.join(files)}")
    return breaches


def main():
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2]
    breaches = check_tree(root)
    print("\n".join(breaches) if breaches else "includes: as the architecture has it")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
