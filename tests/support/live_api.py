# SPDX-License-Identifier: Apache-2.0
"""The fake API server, where a PATCH of what is listed changes it and reaches the watches."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from support.apiserver import FakeApi, Json

SERVICES = "/api/v1/services"
POOLS = "/apis/weir.dev/v1alpha1/loadbalancerpools"
NODES = "/api/v1/nodes"
NAMESPACES = "/api/v1/namespaces"


class LiveApi(FakeApi):
    """`written` are the bodies of PATCH requests that were taken, by path."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[str, Json]] = []
        for path in (SERVICES, POOLS, NODES, NAMESPACES):
            self.collection(path)

    def pool(self, name: str, *cidrs: str, created: int = 1, **spec: Any) -> None:
        known = self.collection(POOLS).objects.get(f"/{name}", {})
        self.put(POOLS, {
            "metadata": {"name": name, "uid": name, "generation": 1,
                         "creationTimestamp": f"2030-01-01T00:00:0{created}Z"},
            "spec": {"blocks": [{"cidr": cidr} for cidr in cidrs]} | spec,
            "status": known.get("status", {}),
        })  # fmt: skip

    def service(self, name: str, **spec: Any) -> None:
        known = self.collection(SERVICES).objects.get(f"shop/{name}", {})
        self.put(SERVICES, {
            "metadata": {"name": name, "namespace": "shop", "uid": name,
                         "creationTimestamp": "2030-01-01T00:00:00Z"},
            "spec": {"type": "LoadBalancer", "ports": [{"port": 80}], "ipFamilies": ["IPv4"]}
            | spec,
            "status": known.get("status", {}),
        })  # fmt: skip

    def ingress(self, name: str) -> list[str]:
        status = self.collection(SERVICES).objects[f"shop/{name}"]["status"]
        found = (status.get("loadBalancer") or {}).get("ingress") or []
        return [entry["ip"] for entry in found]

    def _patch(self, path: str, body: Json) -> web.Response:
        found = self._listed(path)
        if found is None:
            return super()._patch(path, body)
        collection, known = found
        version = body.get("metadata", {}).get("resourceVersion", "")
        if version and version != known["metadata"]["resourceVersion"]:
            return self._status(409, "Conflict")
        self.written.append((path, body))
        changed = json.loads(json.dumps(known))
        status = changed.setdefault("status", {})
        patch = dict(body["status"])
        types = {condition["type"] for condition in patch.get("conditions", [])}
        kept = [c for c in status.get("conditions", []) if c["type"] not in types]
        kept += [c for c in patch.get("conditions", []) if c.get("$patch") != "delete"]
        status.update(patch | {"conditions": kept})
        if changed != known:
            self.put(collection, changed)
        return web.json_response(changed)

    def _listed(self, path: str) -> tuple[str, Json] | None:
        parts = path.removesuffix("/status").split("/")
        for collection in (SERVICES, POOLS):
            if parts[-2] == collection.split("/")[-1] and path.endswith("/status"):
                namespace = parts[-3] if collection == SERVICES else ""
                known = self.collection(collection).objects.get(f"{namespace}/{parts[-1]}")
                return (collection, known) if known is not None else None
        return None
