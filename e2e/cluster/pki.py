# SPDX-License-Identifier: Apache-2.0
"""Certificates and kubeconfigs of a cluster: one CA, made by openssl, new at each start."""

import base64
import json
import secrets
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import KUBECONFIG, PKI
from e2e.cluster.settings import API_PORT, CLUSTER_DOMAIN, KubeProxy, NetPol, Settings

_DAYS = "3650"


def create(settings: Settings, forwarder_port: int) -> None:
    """Write all keys, certificates and kubeconfigs into the pki folder."""
    PKI.mkdir(parents=True, mode=0o700, exist_ok=True)
    _key("ca")
    _openssl("req", "-x509", "-new", "-key", "ca.key", "-days", _DAYS, "-subj", "/CN=kubernetes-ca",
             "-out", "ca.crt")  # fmt: skip
    _openssl("genrsa", "-out", "sa.key", "2048")
    _openssl("rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")
    underlay = f"https://{settings.api_host}:{API_PORT}"
    api_names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    api_names += [f"kubernetes.default.svc.{CLUSTER_DOMAIN}", "localhost"]
    api_addresses = ["127.0.0.1", "::1"]
    for network in settings.networks:
        api_addresses += [network.gateway, network.api_service]
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(_certificate, "apiserver", "/CN=kube-apiserver", api_names, api_addresses),
            pool.submit(
                _certificate, "apiserver-kubelet", "/O=system:masters/CN=apiserver-kubelet"
            ),
            pool.submit(_certificate, "front-proxy", "/CN=front-proxy"),
            pool.submit(_client, "admin", "/O=system:masters/CN=admin", underlay),
        ]
        components = ["kube-controller-manager", "kube-scheduler"]
        if settings.kube_proxy is not KubeProxy.NONE:
            components.append("kube-proxy")
        jobs += [pool.submit(_client, name, f"/CN=system:{name}", underlay) for name in components]
        if settings.netpol is NetPol.KUBE_ROUTER:  # no role for it comes with Kubernetes
            subject = "/O=system:masters/CN=kube-router"
            jobs.append(pool.submit(_client, "kube-router", subject, underlay))
        for node in settings.node_names:
            subject = f"/O=system:nodes/CN=system:node:{node}"
            addresses = list(settings.node_addresses(node))
            jobs.append(pool.submit(_client, node, subject, underlay))
            jobs.append(pool.submit(_certificate, f"{node}-serving", subject, [node], addresses))
        for job in jobs:
            job.result()
    _kubeconfig(KUBECONFIG, "admin", f"https://127.0.0.1:{forwarder_port}")


def _client(name: str, subject: str, server: str) -> None:
    _certificate(name, subject)
    _kubeconfig(PKI / f"{name}.conf", name, server)


def _certificate(
    name: str, subject: str, dns: list[str] | None = None, addresses: list[str] | None = None
) -> None:
    alternatives = [f"DNS:{entry}" for entry in dns or []]
    alternatives += [f"IP:{entry}" for entry in addresses or []]
    extensions = ["keyUsage=digitalSignature,keyEncipherment"]
    extensions.append("extendedKeyUsage=clientAuth,serverAuth")
    if alternatives:
        extensions.append(f"subjectAltName={','.join(alternatives)}")
    (PKI / f"{name}.ext").write_text("\n".join(extensions) + "\n")
    _key(name)
    _openssl("req", "-new", "-key", f"{name}.key", "-subj", subject, "-out", f"{name}.csr")
    _openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
             "-set_serial", f"0x{secrets.token_hex(8)}", "-days", _DAYS,
             "-extfile", f"{name}.ext", "-out", f"{name}.crt")  # fmt: skip


def _kubeconfig(path: Path, name: str, server: str) -> None:
    cluster = {"server": server, "certificate-authority-data": _encoded("ca.crt")}
    user = {
        "client-certificate-data": _encoded(f"{name}.crt"),
        "client-key-data": _encoded(f"{name}.key"),
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "weir", "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "weir", "context": {"cluster": "weir", "user": name}}],
        "current-context": "weir",
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=2) + "\n")  # JSON is YAML


def _encoded(name: str) -> str:
    return base64.b64encode((PKI / name).read_bytes()).decode()


def _key(name: str) -> None:
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")


def _openssl(*arguments: str) -> None:
    result = subprocess.run(
        ["openssl", *arguments], cwd=PKI, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise ClusterError(f"openssl {arguments[0]} failed in {PKI}: {result.stderr.strip()}")
