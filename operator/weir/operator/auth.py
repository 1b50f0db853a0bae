# SPDX-License-Identifier: Apache-2.0
"""Who calls: a ServiceAccount token by TokenReview, and the node that it was issued for.

A review is good for `FRESH_SECONDS`. If the API server then does not answer, a token that was
found good before stays so until it expires by its own claim: an outage of the API throws no
agent off. A token that was never reviewed is not let in.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from weir.operator.api import Api, ApiError

logger = logging.getLogger(__name__)

AUDIENCE = "weir-operator"
FRESH_SECONDS = 120.0
NODE_NAME = "authentication.kubernetes.io/node-name"
MAX_TOKEN = 16 * 1024
MAX_KNOWN = 10_000


class AuthError(Exception):
    """The token is no good, or not for this. Trying again with it does not help."""


class Unavailable(Exception):
    """The token cannot be judged now: the API server does not answer."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An agent: the node that its token is bound to."""

    node: str


class _User(msgspec.Struct):
    username: str = ""
    extra: dict[str, list[str]] = msgspec.field(default_factory=dict)


class _ReviewStatus(msgspec.Struct):
    authenticated: bool = False
    user: _User = msgspec.field(default_factory=_User)
    audiences: list[str] = msgspec.field(default_factory=list)
    error: str = ""


class _Review(msgspec.Struct):
    status: _ReviewStatus = msgspec.field(default_factory=_ReviewStatus)


class _Claims(msgspec.Struct):
    exp: float = 0.0


@dataclass(slots=True)
class _Known:
    identity: Identity
    reviewed: float
    expires: float

    def fresh(self, now: float) -> bool:
        """A clock that was set back makes nothing fresh."""
        return self.reviewed <= now < min(self.expires, self.reviewed + FRESH_SECONDS)


class Authenticator:
    """Reviews and remembers tokens, by their hash."""

    def __init__(self, api: Api, namespace: str, clock: Callable[[], float] = time.time) -> None:
        self._api = api
        self._username = f"system:serviceaccount:{namespace}:weir-agent"
        self._clock = clock
        self._known: dict[bytes, _Known] = {}

    async def __call__(self, token: str) -> Identity:
        if len(token) > MAX_TOKEN:
            raise AuthError("the token is too long")
        digest = hashlib.sha256(token.encode()).digest()
        known = self._known.get(digest)
        now = self._clock()
        if known is not None and known.fresh(now):
            return known.identity
        try:
            identity = await self._review(token)
        except ApiError as error:
            if known is not None and now < known.expires:
                logger.warning("%s: token not reviewed again: %s", known.identity.node, error)
                return known.identity
            raise Unavailable(f"the token cannot be reviewed: {error}") from error
        except AuthError:
            self._known.pop(digest, None)
            raise
        self._remember(digest, _Known(identity, now, _expiry(token)))
        return identity

    async def _review(self, token: str) -> Identity:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        }
        answer = await self._api.post("/apis/authentication.k8s.io/v1/tokenreviews", body)
        try:
            status = msgspec.json.decode(answer, type=_Review).status
        except msgspec.DecodeError as error:
            raise AuthError(f"the review of the token cannot be read: {error}") from error
        if not status.authenticated:
            raise AuthError(f"not authenticated: {status.error or 'no reason given'}")
        if AUDIENCE not in status.audiences:
            raise AuthError(f"the token is not for audience {AUDIENCE}")
        if status.user.username != self._username:
            raise AuthError(f"{status.user.username} is not {self._username}")
        nodes = status.user.extra.get(NODE_NAME, [])
        if len(nodes) != 1:
            raise AuthError("the token names no node: it must be a pod's own, of Kubernetes 1.30+")
        return Identity(nodes[0])

    def _remember(self, digest: bytes, known: _Known) -> None:
        now = self._clock()
        if len(self._known) >= MAX_KNOWN:
            self._known = {d: k for d, k in self._known.items() if k.expires > now}
        self._known[digest] = known


def _expiry(token: str) -> float:
    """The token's own claim, which the review vouched for; 0 if it has none: never kept over."""
    try:
        payload = token.split(".")[1]
        raw = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
        return msgspec.json.decode(raw, type=_Claims).exp
    except (IndexError, ValueError, msgspec.DecodeError):
        return 0.0
