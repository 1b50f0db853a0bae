# SPDX-License-Identifier: Apache-2.0
"""Services by the ten thousand, written where the API server keeps them.

Through the API a Service costs more the more there are: for each ClusterIP that it gives out, the
allocator counts all that it has given out, twice, for two gauges. Written into the local
cluster's etcd, with the IPAddress objects that the allocator would have made, 30,000 Services
take seconds, and who watches sees the same events.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.errors import BenchError
from bench.namespaces import CLONE_NEWNET, checked, libc
from e2e.cluster import host
from e2e.cluster.settings import CONTROL_PLANE, IPV4

PORT = 2379
OPERATIONS = 126  # of a transaction; etcd allows 128, and a Service has three
CREATED = "2026-01-01T00:00:00Z"
# The API server gives out addresses of the range at random and skips what is taken.
FIRST_ADDRESS = ipaddress.ip_network(IPV4.service_cidr)[0x4000]
SERVICES, SLICES = "/registry/services/specs", "/registry/endpointslices"
ADDRESSES = "/registry/ipaddresses"


def address(number: int) -> str:
    """The ClusterIP of the Service with that number."""
    return str(FIRST_ADDRESS + number)


def metadata(name: str, namespace: str = "", **labels: str) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "uid": str(uuid.uuid4()), "creationTimestamp": CREATED}
    if namespace:
        made["namespace"] = namespace
    return made | ({"labels": labels} if labels else {})


def service_object(namespace: str, name: str, ip: str, ports: Sequence[Any]) -> dict[str, Any]:
    spec = {
        "type": "ClusterIP",
        "clusterIP": ip,
        "clusterIPs": [ip],
        "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack",
        "internalTrafficPolicy": "Cluster",
        "sessionAffinity": "None",
        "ports": ports,
    }
    meta = metadata(name, namespace)
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec, "status": {}}


def address_object(namespace: str, name: str, ip: str) -> dict[str, Any]:
    labels = {
        "ipaddress.kubernetes.io/ip-family": "IPv4",
        "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
    }
    parent = {"resource": "services", "namespace": namespace, "name": name, "group": ""}
    kind = {"apiVersion": "networking.k8s.io/v1", "kind": "IPAddress"}
    return kind | {"metadata": metadata(ip, **labels), "spec": {"parentRef": parent}}


class Etcd:
    """The local cluster's, over a connection that was made in the control plane's network."""

    def __init__(self) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
        opener = threading.Thread(target=self._open)
        opener.start()
        opener.join()
        if self._connection.sock is None:
            raise BenchError("no connection to the local cluster's etcd")

    def _open(self) -> None:
        """In a thread of its own: it moves to the control plane and ends there."""
        pid = host.init_process(CONTROL_PLANE)
        if pid is None:
            return
        fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        checked(libc.setns(fd, CLONE_NEWNET), "setns")
        os.close(fd)
        self._connection.sock = socket.create_connection(("127.0.0.1", PORT), timeout=60)

    def _post(self, path: str, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self._connection.request("POST", path, data, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise BenchError(f"etcd, {path}: {answer.status} {text.decode()[:200]}")

    def _transactions(self, operations: Sequence[dict[str, Any]]) -> None:
        for at in range(0, len(operations), OPERATIONS):
            self._post("/v3/kv/txn", {"success": operations[at : at + OPERATIONS]})

    def put(self, objects: dict[str, dict[str, Any]]) -> None:
        """Objects by their keys, in order."""
        self._transactions([
            {"requestPut": {"key": encoded(key), "value": encoded(json.dumps(value))}}
            for key, value in objects.items()
        ])  # fmt: skip

    def delete(self, keys: Sequence[str]) -> None:
        self._transactions([{"requestDeleteRange": {"key": encoded(key)}} for key in keys])

    def close(self) -> None:
        self._connection.close()


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@contextmanager
def connected() -> Iterator[Etcd]:
    etcd = Etcd()
    try:
        yield etcd
    finally:
        etcd.close()


def keys(namespace: str, name: str, ip: str) -> tuple[str, str, str]:
    """Of a Service's three objects."""
    return f"{ADDRESSES}/{ip}", f"{SERVICES}/{namespace}/{name}", f"{SLICES}/{namespace}/{name}"


def create(
    namespace: str, numbers: range, ports: Sequence[Any], slice_of: dict[str, Any]
) -> list[str]:
    """Services fill-N with a slice like `slice_of` each. Returns their names."""
    objects: dict[str, dict[str, Any]] = {}
    for number in numbers:
        name, ip = f"fill-{number}", address(number)
        ip_key, service_key, slice_key = keys(namespace, name, ip)
        label = {"kubernetes.io/service-name": name}
        objects[ip_key] = address_object(namespace, name, ip)
        objects[service_key] = service_object(namespace, name, ip, ports)
        objects[slice_key] = slice_of | {"metadata": metadata(name, namespace, **label)}
    with connected() as etcd:
        etcd.put(objects)
    return [f"fill-{number}" for number in numbers]


def remove(namespace: str, numbers: range) -> None:
    with connected() as etcd:
        etcd.delete([
            key
            for number in numbers
            for key in reversed(keys(namespace, f"fill-{number}", address(number)))
        ])  # fmt: skip
