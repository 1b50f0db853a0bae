# SPDX-License-Identifier: Apache-2.0
"""A scripted operator: TLS, one stream an agent, resources as a test says them."""

from __future__ import annotations

import datetime
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from weir.api.v1 import weir_pb2 as pb
from weir.api.v1 import weir_pb2_grpc

BATCH = 10  # resources in an update: most snapshots of tests come in several


def certificate(name: str = "weir-operator") -> tuple[bytes, bytes]:
    """(key, certificate) in PEM; self-signed, so it is its own CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem, signed.public_bytes(serialization.Encoding.PEM)


class ScriptedOperator(weir_pb2_grpc.DistributionServicer):
    """`set` and `remove` change the state and reach every stream. What agents say is kept."""

    def __init__(
        self, instance: str = "one", where: AbstractContextManager[object] | None = None
    ) -> None:
        self.instance = instance
        self.key, self.ca = certificate()
        self.resources: dict[str, bytes] = {}
        self.revision = 1
        self.hellos: list[pb.Hello] = []
        self.tokens: list[str] = []
        self.announcements: list[pb.Announcement] = []
        self.troubles: list[pb.Trouble] = []
        self.acknowledged = 0
        self.ready = False
        self.said = threading.Condition()
        self._streams: list[queue.Queue[pb.Update | None]] = []
        self._lock = threading.Lock()
        self._where = where or nullcontext()
        self._server: grpc.Server | None = None
        self.port = 0

    def start(self, port: int = 0) -> int:
        server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
        weir_pb2_grpc.add_DistributionServicer_to_server(self, server)
        credentials = grpc.ssl_server_credentials([(self.key, self.ca)])
        with self._where:
            self.port = server.add_secure_port(f"127.0.0.1:{port}", credentials)
            server.start()
        self._server = server
        return self.port

    def stop(self) -> None:
        with self._lock:
            for stream in self._streams:
                stream.put(None)
            self._streams.clear()
        if self._server is not None:
            self._server.stop(0).wait(5)
            self._server = None

    def set(self, *items: pb.Resource, gone: tuple[str, ...] = ()) -> int:
        """One change. Returns its revision."""
        encoded = [item.SerializeToString() for item in items]
        with self._lock:
            self.revision += 1
            for item, raw in zip(items, encoded, strict=True):
                self.resources[item.name] = raw
            for name in gone:
                self.resources.pop(name, None)
            for stream in self._streams:
                stream.put(
                    pb.Update(
                        instance=self.instance,
                        revision=self.revision,
                        resources=encoded,
                        removed=gone,
                    )
                )
            return self.revision

    def wait_acknowledged(self, revision: int, seconds: float = 20.0) -> None:
        with self.said:
            if not self.said.wait_for(lambda: self.acknowledged >= revision, seconds):
                raise AssertionError(f"revision {self.acknowledged} acknowledged, not {revision}")

    def Sync(  # noqa: N802  the service's name
        self, request_iterator: Iterator[pb.AgentMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.Update]:
        hello = next(request_iterator).hello
        metadata = dict(context.invocation_metadata())
        updates: queue.Queue[pb.Update | None] = queue.Queue()
        with self._lock:
            self.hellos.append(hello)
            self.tokens.append(str(metadata.get("authorization", "")))
            if (hello.instance, hello.revision) != (self.instance, self.revision):
                names = list(self.resources.values())
                for at in range(0, len(names) or 1, BATCH):
                    updates.put(
                        pb.Update(
                            instance=self.instance,
                            revision=self.revision,
                            snapshot_begins=at == 0,
                            snapshot_ends=at + BATCH >= len(names),
                            resources=names[at : at + BATCH],
                        )
                    )
            self._streams.append(updates)
        threading.Thread(target=self._listen, args=(request_iterator,), daemon=True).start()
        context.add_callback(lambda: updates.put(None))
        while (update := updates.get()) is not None:
            yield update

    def _listen(self, requests: Iterator[pb.AgentMessage]) -> None:
        try:
            for message in requests:
                with self.said:
                    if message.HasField("announcement"):
                        self.announcements.append(message.announcement)
                    elif message.HasField("acknowledgement"):
                        self.acknowledged = message.acknowledgement.revision
                        self.ready = message.acknowledgement.ready
                    elif message.HasField("trouble"):
                        self.troubles.append(message.trouble)
                    self.said.notify_all()
        except grpc.RpcError:
            return  # the agent hung up
