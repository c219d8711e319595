#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Small trees that include_graph.py must accept or refuse."""
import sys
import tempfile
from pathlib import Path

import include_graph

HEADERS = (
    "daemon/base/status.h",
    "daemon/base/limits.h",
    "daemon/config/config.h",
    "daemon/engine/ports.h",
    "daemon/kernels/op_params.h",
    "daemon/kernels/cuda/ptx.cuh",
    "daemon/session/api.h",
    "daemon/device/device.h",
    "daemon/device/host/host_device.h",
    "daemon/group/group.h",
    "daemon/transport/listener.h",
    "proto/abi/ring_v1.h",
    "client/include/expertd.h",
    "client/rpc/channel.h",
    "tests/support/fake.h",
)

# Including file, included name (quoted unless in <>), part of the reason or None when it is fine.
CASES = (
    ("daemon/engine/plan.cc", "daemon/base/status.h", None),
    ("daemon/engine/plan.cc", "daemon/engine/ports.h", None),
    ("daemon/engine/plan.cc", "daemon/kernels/op_params.h", None),
    ("daemon/engine/plan.cc", "proto/abi/ring_v1.h", None),
    ("daemon/engine/plan.cc", "<atomic>", None),
    ("daemon/engine/plan.cc", "<thread>", "no threads"),
    ("daemon/engine/plan.cc", "<sys/socket.h>", "no threads"),
    ("daemon/engine/plan.cc", "daemon/device/device.h", "daemon/engine/ may include"),
    ("daemon/engine/plan.cc", "daemon/session/api.h", "daemon/engine/ may include"),
    ("daemon/base/status.cc", "<spdlog/spdlog.h>", "spdlog belongs"),
    ("daemon/base/log.cc", "<spdlog/spdlog.h>", None),
    ("daemon/base/status.cc", "daemon/engine/ports.h", "daemon/base/ may include"),
    ("daemon/config/loader.cc", "<toml++/toml.h>", None),
    ("daemon/metrics/server.cc", "<toml++/toml.h>", "toml++ belongs"),
    ("daemon/transport/ring.cc", "daemon/session/api.h", None),
    ("daemon/transport/ring.cc", "daemon/group/group.h", "daemon/transport/ may include"),
    ("daemon/transport/ring.cc", "<grpcpp/grpcpp.h>", "gRPC belongs"),
    ("daemon/session/session.cc", "daemon/device/device.h", None),
    ("daemon/session/session.cc", "daemon/device/host/host_device.h", "daemon/session/ may include"),
    ("daemon/session/session.cc", "daemon/transport/listener.h", "daemon/session/ may include"),
    ("daemon/control/service.cc", "<grpcpp/grpcpp.h>", None),
    ("daemon/control/service.cc", "expertd/v1/session.grpc.pb.h", None),
    ("daemon/control/service.cc", "<ucp/api/ucp.h>", "UCX belongs"),
    ("daemon/group/rendezvous.cc", "daemon/session/api.h", None),
    ("daemon/group/rendezvous.cc", "expertd/v1/session.grpc.pb.h", "gRPC belongs"),
    ("daemon/device/cuda/memory.cc", "<cuda.h>", None),
    ("daemon/device/host/memory.cc", "<cuda_runtime.h>", "CUDA belongs"),
    ("daemon/kernels/cuda/pack.cu", "daemon/kernels/cuda/ptx.cuh", None),
    ("daemon/kernels/cuda/pack.cc", "daemon/kernels/cuda/ptx.cuh", "only from .cu"),
    ("daemon/kernels/host/pack.cc", "daemon/base/limits.h", None),
    ("daemon/kernels/host/pack.cc", "daemon/base/status.h", "daemon/kernels/ may include"),
    ("daemon/metrics/server.cc", "<prometheus/exposer.h>", None),
    ("daemon/supervise/signals.cc", "daemon/config/config.h", "daemon/supervise/ may include"),
    ("daemon/main.cc", "daemon/config/config.h", None),
    ("daemon/app/daemon.cc", "daemon/transport/listener.h", None),
    ("daemon/app/daemon.cc", "<grpcpp/grpcpp.h>", "gRPC belongs"),
    ("daemon/main.cc", "tests/support/fake.h", "does not know tests"),
    ("daemon/base/status.cc", "tests/support/fake.h", "does not know tests"),
    ("daemon/odd/new.cc", "daemon/base/status.h", "no row in the table"),
    ("daemon/engine/plan.cc", "daemon/engine/absent.h", "no such file"),
    ("client/src/attach.cc", "expertd.h", None),
    ("client/src/attach.cc", "client/rpc/channel.h", None),
    ("client/src/attach.cc", "daemon/base/status.h", "does not use the daemon"),
    ("client/src/attach.cc", "<grpcpp/grpcpp.h>", "gRPC belongs"),
    ("client/src/cuda_import.cc", "<cuda.h>", None),
    ("client/ctl/main.cc", "<grpcpp/grpcpp.h>", None),
    ("client/ctl/main.cc", "daemon/base/status.h", "does not use the daemon"),
    ("tests/unit/plan_test.cc", "daemon/engine/ports.h", None),
    ("tests/device/ipc_test.cc", "<cuda.h>", None),
    ("tests/unit/plan_test.cc", "<cuda.h>", "CUDA belongs"),
)


def write_tree(root, files):
    for name in HEADERS:
        files.setdefault(name, "#pragma once\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def breaches_of(files):
    with tempfile.TemporaryDirectory() as directory:
        write_tree(Path(directory), files)
        return include_graph.check_tree(Path(directory))


def main():
    failures = []
    for path, name, reason in CASES:
        quoted = name if name.startswith("<") else f'"{name}"'
        found = breaches_of({path: f"// A sample.\n#include {quoted}\n"})
        good = not found if reason is None else len(found) == 1 and reason in found[0]
        if not good:
            failures.append(f"{path} includes {name}: wanted {reason}, got {found}")
    line = "#include <prometheus/counter.h>\n"
    if len(breaches_of({"daemon/metrics/a.cc": line, "daemon/metrics/b.cc": line})) != 1:
        failures.append("two files with prometheus headers are not one breach")
    if breaches_of({"daemon/engine/a.cc": "// #include <thread>\n"}):
        failures.append("a comment counts as an include")
    print("\n".join(failures) if failures else f"include_graph_test: {len(CASES) + 2} cases")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
