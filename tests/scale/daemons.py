# SPDX-License-Identifier: Apache-2.0
"""Daemons of many nodes on one machine: started together, waited for, looked at, and ended however the caller ends."""
import ctypes
import os
import re
import select
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

PR_SET_PDEATHSIG = 1
PORT_FIRST = 20000
PORT_LAST = 29999  # below the ports that the kernel hands out by itself
STOP_SECONDS = 10
LIBC = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """What was measured cannot be; the text says why and what the daemons said last."""


def free_ports(count):
    """Ports of the loopback address that nobody listens on, in rising order."""
    found = []
    for port in range(PORT_FIRST, PORT_LAST + 1):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise Failed(f"fewer than {count} ports of {PORT_FIRST}-{PORT_LAST} are free on 127.0.0.1")


def end_with_parent():
    """In the child: nothing outlives this program, not even when it is killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Daemon:
    def __init__(self, index, port, rendezvous_port, options, directory):
        self.index = index
        self.port = port
        self.directory = directory
        self.start_s = None
        directory.mkdir()
        self.log_path = directory / "log"
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(directory / "notify"))
        arguments = [
            options.expertd,
            f"--runtime-directory={directory}",
            "--metrics-port=0",
            "--device-gpus=none",
            f"--device-hosts={options.ranks_per_node}",
            "--fabric-enabled=true",
            f"--fabric-listen=127.0.0.1:{port}",
            f"--fabric-node-name=n{index}",
            f"--fabric-rendezvous=127.0.0.1:{rendezvous_port}",
            "--fabric-transports=tcp",
            "--fabric-devices=lo",
            f"--fabric-heartbeat-ms={options.heartbeat_ms}",
            f"--fabric-max-nodes={options.max_nodes}",
            f"--engine-spin-us={options.spin_us}",
        ]
        environment = dict(os.environ, NOTIFY_SOCKET=str(directory / "notify"))
        with open(self.log_path, "wb") as log:
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, preexec_fn=end_with_parent
            )

    @property
    def attach_socket(self):
        return self.directory / "attach.sock"

    def log(self):
        return self.log_path.read_text(errors="replace")

    def take_notice(self):
        """Reads one message of the daemon's; READY=1 ends its start."""
        if b"READY=1" in self.notify.recv(4096) and self.start_s is None:
            self.start_s = time.monotonic() - self.started

    def memory(self):
        """Kilobytes by kind, and threads, from /proc; empty when the daemon is gone."""
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return {}
        return {name: int(value) for name, value in re.findall(r"^(VmRSS|RssAnon|RssShmem|Threads):\s+(\d+)", text, re.M)}

    def fabric_counters(self):
        """Sums of the fabric's metrics, or None where the daemon has none: {"messages": n, "bytes": n}."""
        address = re.search(r"\bmetrics=(\S+)", self.log())
        if address is None:
            return None
        try:
            with urllib.request.urlopen(f"http://{address.group(1)}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except (OSError, urllib.error.URLError):
            return None
        sums = {}
        for what in ("messages", "bytes"):
            values = re.findall(rf"^expertd_fabric_{what}_total(?:{{([^}}]*)}})? (\S+)", text, re.M)
            # Where both directions are told, what was sent counts.
            sent = [float(value) for labels, value in values if 'direction="received"' not in labels]
            if not sent:
                return None
            sums[what] = sum(sent)
        return sums


class Cluster:
    """As a context: all daemons ready when it begins, all gone when it ends."""

    def __init__(self, nodes, options, start_seconds=60):
        self.nodes = nodes
        self.options = options
        self.start_seconds = start_seconds
        self.daemons = []
        self.folder = None

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="expertd-scale-")
        try:
            ports = free_ports(self.nodes)
            for index, port in enumerate(ports):
                path = Path(self.folder.name) / f"n{index}"
                self.daemons.append(Daemon(index, port, ports[0], self.options, path))
            self.wait_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_):
        self.end()

    def wait_ready(self):
        deadline = time.monotonic() + self.start_seconds
        waiting = {daemon.notify: daemon for daemon in self.daemons}
        while waiting:
            left = deadline - time.monotonic()
            readable = select.select(list(waiting), [], [], max(0, min(left, 1)))[0]
            for ready in readable:
                waiting[ready].take_notice()
                if waiting[ready].start_s is not None:
                    del waiting[ready]
            gone = [daemon for daemon in self.daemons if daemon.process.poll() is not None]
            if gone:
                raise Failed(f"daemon {gone[0].index} ended with {gone[0].process.returncode}: {gone[0].log()[-600:]}")
            if left <= 0 and waiting:
                names = ", ".join(str(daemon.index) for daemon in waiting.values())
                raise Failed(f"not ready after {self.start_seconds} s: daemons {names}")

    def devices(self):
        """What `expertctl bench --devices` takes: all ranks, node by node."""
        return ",".join(
            f"host:{device}@{daemon.attach_socket}"
            for daemon in self.daemons
            for device in range(self.options.ranks_per_node)
        )

    def end(self):
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for daemon in self.daemons:
            try:
                daemon.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                daemon.process.kill()
                daemon.process.wait()
            daemon.notify.close()
        self.daemons = []
        self.folder.cleanup()


def connections(daemons):
    """Established connections of the daemons as the kernel counts them: {index: {"fabric": n, "bootstrap": n, "sent":
    bytes}}, `sent` over the fabric's alone. None where `ss` of iproute2 is missing."""
    by_pid = {daemon.process.pid: daemon.index for daemon in daemons}
    bootstrap = {str(daemon.port) for daemon in daemons}
    found = {daemon.index: {"fabric": 0, "bootstrap": 0, "sent": 0} for daemon in daemons}
    try:
        lines = subprocess.run(["ss", "-tinpOH", "state", "established"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    for line in lines.stdout.splitlines():
        owner = re.search(r"pid=(\d+)", line)
        if owner is None or int(owner.group(1)) not in by_pid:
            continue
        entry = found[by_pid[int(owner.group(1))]]
        local, peer = line.split()[2:4]
        if local.rsplit(":", 1)[1] in bootstrap or peer.rsplit(":", 1)[1] in bootstrap:
            entry["bootstrap"] += 1
            continue
        entry["fabric"] += 1
        sent = re.search(r"bytes_sent:(\d+)", line)
        entry["sent"] += int(sent.group(1)) if sent else 0
    return found
