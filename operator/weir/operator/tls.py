# SPDX-License-Identifier: Apache-2.0
"""The operator's own CA and serving certificate: made, adopted, renewed, published.

All replicas share Secret `weir-operator-tls`. Whoever creates or updates it first wins; the
others get 409 and adopt what is there. A renewed CA keeps its key and name, so certificates
verify against the old and the new alike and agents that remember the old one go on.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from weir.operator.api import Api, ApiError

logger = logging.getLogger(__name__)

SECRET = "weir-operator-tls"  # noqa: S105 - its name
CONFIG_MAP = "weir-ca"
SERVER_NAME = "weir-operator"
CA_LIFE = datetime.timedelta(days=3650)
CERT_LIFE = datetime.timedelta(days=90)
CHECK_SECONDS = 3600.0
RETRY_SECONDS = 5.0
SKEW = datetime.timedelta(minutes=10)  # clocks of agents may be behind

Clock = Callable[[], datetime.datetime]


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True, slots=True)
class Bundle:
    """What the Secret holds, as PEM."""

    ca_cert: bytes
    ca_key: bytes
    cert: bytes
    key: bytes

    def data(self) -> dict[str, str]:
        items = {"ca.crt": self.ca_cert, "ca.key": self.ca_key}
        items |= {"tls.crt": self.cert, "tls.key": self.key}
        return {name: base64.b64encode(pem).decode() for name, pem in items.items()}


def make(now: datetime.datetime) -> Bundle:
    ca_key = ec.generate_private_key(ec.SECP256R1())
    return _issue(_sign_ca(ca_key, now), ca_key, now)


def renew(bundle: Bundle, now: datetime.datetime) -> Bundle:
    """The same if more than a third of each life is left; ValueError if it is unusable."""
    ca = x509.load_pem_x509_certificate(bundle.ca_cert)
    cert = x509.load_pem_x509_certificate(bundle.cert)
    ca_key = serialization.load_pem_private_key(bundle.ca_key, None)
    key = serialization.load_pem_private_key(bundle.key, None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ValueError("the CA's key is not of the kind that Weir makes")  # noqa: TRY004
    if ca.public_key() != ca_key.public_key() or cert.public_key() != key.public_key():
        raise ValueError("a key does not belong to its certificate")
    cert.verify_directly_issued_by(ca)
    if ca.not_valid_after_utc - now < CA_LIFE / 3:
        return _issue(_sign_ca(ca_key, now), ca_key, now)
    if cert.not_valid_after_utc - now < CERT_LIFE / 3:
        return _issue(ca, ca_key, now)
    return bundle


def _sign_ca(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "weir CA")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(False, False, False, False, False, True, True, False, False),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )


def _issue(
    ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, now: datetime.datetime
) -> Bundle:
    key = ec.generate_private_key(ec.SECP256R1())
    cert = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + CERT_LIFE)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return Bundle(_pem(ca), _key_pem(ca_key), _pem(cert), _key_pem(key))


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class _Meta(msgspec.Struct, rename="camel"):
    resource_version: str = ""


class _Stored(msgspec.Struct):
    """A Secret or ConfigMap."""

    metadata: _Meta
    data: dict[str, str] | None = None


def _bundle(stored: _Stored) -> Bundle:
    """ValueError if the Secret is not what `Bundle.data` made."""
    data = stored.data or {}
    try:
        names = ("ca.crt", "ca.key", "tls.crt", "tls.key")
        return Bundle(*(base64.b64decode(data[name], validate=True) for name in names))
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error


class Certificates:
    """Keeps the bundle current. `server_credentials` follows it without a restart."""

    def __init__(self, api: Api, namespace: str, clock: Clock = utc_now) -> None:
        self._api = api
        self._namespace = namespace
        self._clock = clock
        self.bundle: Bundle | None = None

    async def start(self) -> None:
        """Until there is a bundle, and agents can know its CA."""
        while True:
            try:
                await self.refresh()
            except ApiError as error:
                logger.warning("certificates: %s; again in %.0f s", error, RETRY_SECONDS)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    async def run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                await self.refresh()
            except ApiError as error:
                logger.warning("certificates: %s", error)

    async def refresh(self) -> None:
        self.bundle = await self._secret()
        await self._publish(self.bundle.ca_cert.decode())

    async def _secret(self) -> Bundle:
        path = f"/api/v1/namespaces/{self._namespace}/secrets"
        while True:
            stored = await self._get(f"{path}/{SECRET}")
            now = self._clock()
            try:
                if stored is None:
                    wanted = await asyncio.to_thread(make, now)
                    body = self._object("Secret", SECRET, wanted.data())
                    await self._api.post(path, body)
                    logger.info("certificates: made Secret %s", SECRET)
                    return wanted
                wanted = await asyncio.to_thread(_renewed, stored, now)
                if wanted.data() == stored.data:
                    return wanted
                body = self._object(
                    "Secret", SECRET, wanted.data(), stored.metadata.resource_version
                )
                await self._api.put(f"{path}/{SECRET}", body)
            except ApiError as error:
                if error.status != 409:
                    raise
                # Another replica was first: adopt what it made.
            else:
                logger.info("certificates: renewed Secret %s", SECRET)
                return wanted

    async def _publish(self, ca: str) -> None:
        path = f"/api/v1/namespaces/{self._namespace}/configmaps"
        while True:
            stored = await self._get(f"{path}/{CONFIG_MAP}")
            try:
                if stored is None:
                    await self._api.post(
                        path, self._object("ConfigMap", CONFIG_MAP, {"ca.crt": ca})
                    )
                elif (stored.data or {}).get("ca.crt") != ca:
                    body = self._object(
                        "ConfigMap", CONFIG_MAP, {"ca.crt": ca}, stored.metadata.resource_version
                    )
                    await self._api.put(f"{path}/{CONFIG_MAP}", body)
            except ApiError as error:
                if error.status != 409:
                    raise
            else:
                return

    async def _get(self, path: str) -> _Stored | None:
        try:
            body = await self._api.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        try:
            return msgspec.json.decode(body, type=_Stored)
        except msgspec.DecodeError as error:
            raise ApiError(f"GET {path}", 200, f"cannot be read: {error}") from error

    def _object(
        self, kind: str, name: str, data: dict[str, str], version: str = ""
    ) -> dict[str, object]:
        metadata = {"name": name, "namespace": self._namespace}
        metadata["labels"] = {"app.kubernetes.io/managed-by": "weir-operator"}  # type: ignore[assignment]
        if version:
            metadata["resourceVersion"] = version
        made: dict[str, object] = {"apiVersion": "v1", "kind": kind}
        made |= {"metadata": metadata, "data": data}
        return made

    def ca(self) -> bytes:
        """PEM. Of the serving certificates of all replicas."""
        if self.bundle is None:
            raise RuntimeError("Certificates.start has not finished")
        return self.bundle.ca_cert

    def server_credentials(self) -> grpc.ServerCredentials:
        """Asks for the current certificate at each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=False
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        if self.bundle is None:
            raise RuntimeError("Certificates.start has not finished")
        return grpc.ssl_server_certificate_configuration([(self.bundle.key, self.bundle.cert)])


def _renewed(stored: _Stored, now: datetime.datetime) -> Bundle:
    try:
        return renew(_bundle(stored), now)
    except Exception as error:  # noqa: BLE001 - cryptography raises many kinds for bad input
        logger.warning("certificates: Secret %s cannot be used, making it anew: %s", SECRET, error)
        return make(now)
