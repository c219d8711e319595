# SPDX-License-Identifier: Apache-2.0
"""The control socket by ordinary grpcio, and the client library loaded beside grpcio and torch.

Run with the interpreter that has grpcio: python3 control_test.py. EXPERTD_BIN_DIR names the folder of the daemon's
binary and EXPERTD_CLIENT_LIBRARY the client library; without them build/ of the source tree is searched. What is not
installed is skipped by name.
"""

import ctypes
import glob
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

try:
    import grpc
except ImportError:
    grpc = None

SOURCE = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("EXPERTD_BINARY_DIR", SOURCE / "build"))
BIN = pathlib.Path(os.environ.get("EXPERTD_BIN_DIR", BUILD / "bin"))
DEADLINE_S = 10


def client_library():
    """Path of the client library, or None."""
    given = os.environ.get("EXPERTD_CLIENT_LIBRARY")
    if given:
        return given
    found = sorted(glob.glob(str(BUILD / "**" / "libexpertd_client.so*"), recursive=True), key=len)
    return found[0] if found else None


def generate_messages(folder):
    """Message classes of control, session and error from the .proto files, compiled here and now."""
    files = [str(SOURCE / "proto" / "expertd" / "v1" / (name + ".proto")) for name in ("control", "session", "error")]
    arguments = ["-I", str(SOURCE / "proto"), "--python_out", folder] + files
    compiler = [sys.executable, "-m", "grpc_tools.protoc"]
    if subprocess.run(compiler + arguments, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        subprocess.run([shutil.which("protoc") or "protoc"] + arguments, check=True)
    sys.path.insert(0, folder)
    from expertd.v1 import control_pb2, error_pb2, session_pb2  # pylint: disable=import-outside-toplevel,import-error
    return control_pb2, session_pb2, error_pb2


class Daemon:
    """The daemon as a child process in a fresh directory."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="expertd-")
        self.log = open(os.path.join(self.folder, "stderr"), "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [str(BIN / "expertd"), "--runtime-directory=" + self.folder, "--metrics-port=0", "--device-gpus=none",
             "--device-hosts=2"], stderr=self.log)
        end = time.monotonic() + 20
        while "msg=ready" not in self.text() and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.002)
        if "msg=ready" not in self.text():
            raise RuntimeError("the daemon did not start: " + self.text())

    def text(self):
        with open(self.log.name, encoding="utf-8") as file:
            return file.read()

    def path(self, name):
        return os.path.join(self.folder, name)

    def stop(self):
        self.process.terminate()
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder)
        return code


@unittest.skipIf(grpc is None, "grpcio is not installed")
class ControlTest(unittest.TestCase):
    """One daemon for all tests."""

    @classmethod
    def setUpClass(cls):
        cls.generated = tempfile.mkdtemp(prefix="expertd-pb-")
        cls.control, cls.session, cls.error = generate_messages(cls.generated)
        cls.daemon = Daemon()
        cls.channel = grpc.insecure_channel("unix:" + cls.daemon.path("control.sock"))

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        cls.daemon.stop()
        shutil.rmtree(cls.generated)

    def call(self, method, request, response, deadline=DEADLINE_S):
        invoke = self.channel.unary_unary(method, request_serializer=lambda message: message.SerializeToString(),
                                          response_deserializer=response.FromString)
        return invoke(request, timeout=deadline)

    def ask(self, name, **fields):
        """A call of the Control service."""
        request = getattr(self.control, name + "Request")(**fields)
        return self.call("/expertd.v1.Control/" + name, request, getattr(self.control, name + "Response"))

    def failure(self, method, request, response, deadline=DEADLINE_S):
        """The error of a call and its ErrorInfo."""
        with self.assertRaises(grpc.RpcError) as caught:
            self.call(method, request, response, deadline)
        details = dict(caught.exception.trailing_metadata()).get("grpc-status-details-bin", b"")
        info = self.error.ErrorInfo()
        kind = b"expertd.v1.ErrorInfo"
        if kind in details:  # behind the type: the key of the value, its length (below 128), the value
            begin = details.index(kind) + len(kind) + 2
            info.ParseFromString(details[begin:begin + details[begin - 1]])
        return caught.exception, info

    def health(self, service):
        """The raw answer of grpc.health.v1, whose messages have one field each."""
        name = service.encode()
        check = self.channel.unary_unary("/grpc.health.v1.Health/Check")
        return check(b"\x0a" + bytes([len(name)]) + name if name else b"", timeout=DEADLINE_S)

    def test_status_tells_what_runs(self):
        status = self.ask("GetStatus")
        self.assertEqual(status.state, "ready")
        self.assertEqual((status.abi_major, status.abi_minor), (1, 4))
        self.assertEqual(status.pid, self.daemon.process.pid)
        self.assertEqual([device.uuid for device in status.devices], ["host:0", "host:1"])
        self.assertTrue(all(device.kind == "host" and device.healthy for device in status.devices))
        self.assertGreater(status.resident_bytes, 1 << 20)
        self.assertIn(":", status.metrics_address)
        self.assertRegex(status.version, r"^\d+\.\d+\.\d+")

    def test_counters_name_every_operation(self):
        names = {counter.op for counter in self.ask("GetCounters").ops}
        self.assertEqual(names, {"barrier", "layout", "dispatch", "combine", "ll_dispatch", "ll_combine"})

    def test_health_serves(self):
        for service in ("", "expertd.ready"):
            self.assertEqual(self.health(service), b"\x08\x01", service)

    def test_health_of_an_unknown_service_is_not_found(self):
        with self.assertRaises(grpc.RpcError) as caught:
            self.health("nobody")
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_a_call_without_a_deadline_is_refused(self):
        error, info = self.failure("/expertd.v1.Control/GetStatus", self.control.GetStatusRequest(),
                                   self.control.GetStatusResponse, None)
        self.assertEqual(error.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertEqual(info.reason_name, "DEADLINE_MISSING")

    def test_a_session_call_is_refused_here(self):
        error, info = self.failure("/expertd.v1.Session/OpenSession",
                                   self.session.OpenSessionRequest(client_id="stranger"),
                                   self.session.OpenSessionResponse)
        self.assertNotEqual(error.code(), grpc.StatusCode.OK)
        self.assertIn(info.reason_name, ("NO_SUCH_SESSION", "PERMISSION"), error.details())

    def test_an_unknown_method_is_unimplemented(self):
        error, _ = self.failure("/expertd.v1.Control/Nothing", self.control.GetStatusRequest(),
                                self.control.GetStatusResponse)
        self.assertEqual(error.code(), grpc.StatusCode.UNIMPLEMENTED)

    def test_bytes_that_are_no_message_are_refused(self):
        with self.assertRaises(grpc.RpcError):
            self.channel.unary_unary("/expertd.v1.Control/SetLogLevel")(b"\xff\xff\xff\xff", timeout=DEADLINE_S)
        self.assertEqual(self.ask("GetStatus").state, "ready")

    def test_a_message_that_is_too_large_is_refused(self):
        request = self.control.SetLogLevelRequest(level="x" * (1 << 20))
        error, _ = self.failure("/expertd.v1.Control/SetLogLevel", request, self.control.SetLogLevelResponse)
        self.assertEqual(error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)

    def test_the_log_level_changes_and_changes_back(self):
        self.assertEqual(self.ask("SetLogLevel", level="debug").previous, "info")
        self.assertEqual(self.ask("SetLogLevel", level="info").previous, "debug")

    def test_reflection_is_off_unless_asked_for(self):
        stream = self.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with self.assertRaises(grpc.RpcError) as caught:
            list(stream(iter([b""]), timeout=DEADLINE_S))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNIMPLEMENTED)

    def test_the_client_library_works_beside_grpcio(self):
        with Client(self.daemon.path("attach.sock")) as client:
            sessions = self.ask("ListSessions").sessions
            self.assertEqual([session.name for session in sessions], ["python"])
            self.assertEqual(sessions[0].device, "host:0")
            client.join()
            for _ in range(10):
                client.barrier()
            counted = [counter.ok for counter in self.ask("GetCounters").ops if counter.op == "barrier"]
            self.assertGreaterEqual(sum(counted), 10)
            groups = self.ask("GetStatus").groups
            self.assertEqual([(group.name, group.expert_parallel_size) for group in groups], [("python", 1)])

    def test_the_client_library_works_beside_torch(self):
        try:
            import torch  # pylint: disable=import-outside-toplevel
        except ImportError:
            self.skipTest("torch is not installed")
        ids = torch.randint(0, 8, (64, 4), dtype=torch.int64)
        counts = torch.zeros(8, dtype=torch.int32)
        with Client(self.daemon.path("attach.sock")) as client:
            client.layout(ids.data_ptr(), counts.data_ptr(), 64, 4, 8, 2)
        self.assertEqual(counts.tolist(), torch.bincount(ids.flatten(), minlength=8).tolist())
        # grpcio of the same process goes on.
        self.assertEqual(self.ask("GetStatus").state, "ready")


class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int32), ("reason", ctypes.c_int32)]


class AttachOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("socket_path", ctypes.c_char_p), ("device", ctypes.c_char_p),
                ("name", ctypes.c_char_p), ("traceparent", ctypes.c_char_p), ("timeout_ns", ctypes.c_uint64)]


class GroupOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("name", ctypes.c_char_p)] + [
        (name, ctypes.c_uint32) for name in ("rank", "expert_parallel_size", "num_experts", "hidden", "top_k",
                                             "max_tokens", "mode", "on_rank_loss")] + [
        (name, ctypes.c_uint64) for name in ("op_timeout_ns", "first_op_timeout_ns", "join_timeout_ns")]


class LayoutArgs(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("topk_idx", ctypes.c_void_p), ("idx_type", ctypes.c_int)] + [
        (name, ctypes.c_uint32) for name in ("tokens", "top_k", "num_experts", "num_ranks")] + [
        (name, ctypes.c_void_p) for name in ("tokens_per_rank", "tokens_per_node", "tokens_per_expert",
                                             "token_rank_mask")] + [
        ("flags", ctypes.c_uint32), ("timeout_ns", ctypes.c_uint64)]


class Event(ctypes.Structure):
    _fields_ = [("session", ctypes.c_void_p), ("seq", ctypes.c_uint64)]


class Client:
    """One session of the client library by ctypes; attached between enter and exit."""

    I64 = 6

    def __init__(self, socket):
        path = client_library()
        if path is None:
            raise unittest.SkipTest("the client library is not built; set EXPERTD_CLIENT_LIBRARY")
        self.client = ctypes.CDLL(path)
        self.client.expertd_last_message.restype = ctypes.c_char_p
        for name in ("attach", "detach", "group_join", "barrier", "layout", "event_wait"):
            getattr(self.client, "expertd_" + name).restype = Status
        self.socket = socket
        self.session = ctypes.c_void_p()
        self.group = ctypes.c_void_p()

    def check(self, status):
        if status.reason != 0:
            raise AssertionError(self.client.expertd_last_message().decode())

    def __enter__(self):
        options = AttachOptions(ctypes.sizeof(AttachOptions), self.socket.encode(), b"host:0", b"python", None, 0)
        self.check(self.client.expertd_attach(ctypes.byref(options), ctypes.byref(self.session)))
        return self

    def __exit__(self, *_):
        self.check(self.client.expertd_detach(self.session))

    def join(self):
        options = GroupOptions(ctypes.sizeof(GroupOptions), b"python", 0, 1, 4, 128, 2, 16, 0, 0, 0, 0, 0)
        self.check(self.client.expertd_group_join(self.session, ctypes.byref(options), ctypes.byref(self.group)))

    def wait(self, event):
        self.check(self.client.expertd_event_wait(event, ctypes.c_uint64(0), None))

    def barrier(self):
        event = Event()
        self.check(self.client.expertd_barrier(self.group, None, ctypes.c_uint32(0), ctypes.c_uint64(0),
                                                ctypes.byref(event)))
        self.wait(event)

    def layout(self, ids, counts, tokens, top_k, experts, ranks):
        args = LayoutArgs(ctypes.sizeof(LayoutArgs), ids, self.I64, tokens, top_k, experts, ranks, None, None, counts,
                          None, 0, 0)
        event = Event()
        self.check(self.client.expertd_layout(self.session, ctypes.byref(args), None, ctypes.byref(event)))
        self.wait(event)


if __name__ == "__main__":
    unittest.main(verbosity=2)
