# SPDX-License-Identifier: Apache-2.0
"""What the operator keeps in the API server: the Lease, certificates; and who may connect."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.apiserver import FakeApi

from weir.operator import tls
from weir.operator.api import Api
from weir.operator.auth import AUDIENCE, NODE_NAME, Authenticator, AuthError, Unavailable
from weir.operator.kubeconfig import Access
from weir.operator.leader import LEASE_SECONDS, RENEW_SECONDS, Leader

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"


@asynccontextmanager
async def client(api: FakeApi) -> AsyncIterator[Api]:
    async with api.serve() as server, Api(Access((server,))) as made:
        yield made


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_one_leads_and_the_other_follows_when_it_is_silent() -> None:
    async with client(FakeApi()) as api:
        clock, told = Clock(), list[tuple[str, bool]]()
        a, b = (
            Leader(api, "ns", name, lambda on, name=name: told.append((name, on)), clock)  # type: ignore[misc]
            for name in "ab"
        )
        await a.step()
        await b.step()
        assert (a.leading, b.leading) == (True, False)
        clock.now += LEASE_SECONDS - 1
        await a.step()  # renews
        await b.step()
        clock.now += LEASE_SECONDS - 1
        await b.step()
        # a is not silent for long enough since the renewal
        assert (a.leading, b.leading) == (True, False)
        clock.now += 2
        await b.step()
        await a.step()
        assert (a.leading, b.leading) == (False, True)
        assert told == [("a", True), ("b", True), ("a", False)]


async def test_a_released_lease_is_taken_at_once() -> None:
    async with client(FakeApi()) as api:
        a, b = (Leader(api, "ns", name, lambda _: None) for name in "ab")
        await a.step()
        await a.release()
        await b.step()
        assert (a.leading, b.leading) == (False, True)


async def test_who_cannot_renew_steps_down() -> None:
    fake, clock = FakeApi(), Clock()
    async with client(fake) as api:
        leader = Leader(api, "ns", "a", lambda _: None, clock)
        await leader.step()
        fake.tokens = set()  # every request is refused from now on
        await leader.step()
        clock.now += RENEW_SECONDS + 1
        told = leader.leading
        await leader.step()
        assert (told, leader.leading) == (True, False)


async def test_two_replicas_that_start_at_once_share_one_ca() -> None:
    fake = FakeApi()
    async with client(fake) as api:
        made = [tls.Certificates(api, "ns") for _ in range(4)]
        await asyncio.gather(*(certificates.refresh() for certificates in made))
        bundles = {certificates.bundle for certificates in made}
        assert len(bundles) == 1
        published = fake.stored["/api/v1/namespaces/ns/configmaps/weir-ca"]["data"]["ca.crt"]
        assert made[0].bundle is not None
        assert published.encode() == made[0].bundle.ca_cert


async def test_the_certificate_is_renewed_under_the_same_ca() -> None:
    bundle = tls.make(NOW)
    assert tls.renew(bundle, NOW + tls.CERT_LIFE / 2) == bundle
    later = tls.renew(bundle, NOW + tls.CERT_LIFE * 0.7)
    assert later.cert != bundle.cert
    assert later.ca_cert == bundle.ca_cert
    new_ca = tls.renew(bundle, NOW + tls.CA_LIFE * 0.7)
    assert new_ca.ca_cert != bundle.ca_cert
    assert new_ca.ca_key == bundle.ca_key


async def test_a_damaged_secret_is_made_anew() -> None:
    fake = FakeApi()
    path = "/api/v1/namespaces/ns/secrets/weir-operator-tls"
    fake.stored[path] = {"metadata": {"resourceVersion": "1"}, "data": {"ca.crt": "AAAA"}}
    async with client(fake) as api:
        certificates = tls.Certificates(api, "ns")
        await certificates.refresh()
        assert certificates.bundle is not None
        assert fake.stored[path]["data"] == certificates.bundle.data()


def token(expires: float) -> str:
    claims = base64.urlsafe_b64encode(json.dumps({"exp": expires}).encode()).decode().rstrip("=")
    return f"h.{claims}.s"


def review(
    authenticated: bool = True,
    username: str = "system:serviceaccount:ns:weir-agent",
    audience: str = AUDIENCE,
    nodes: tuple[str, ...] = ("n1",),
) -> dict[str, object]:
    return {
        "status": {
            "authenticated": authenticated,
            "audiences": [audience],
            "user": {"username": username, "extra": {NODE_NAME: list(nodes)}},
        }
    }


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(review(authenticated=False), id="not authenticated"),
        pytest.param(review(username="system:serviceaccount:ns:default"), id="another account"),
        pytest.param(review(username="system:serviceaccount:x:weir-agent"), id="other namespace"),
        pytest.param(review(audience="kubernetes"), id="another audience"),
        pytest.param(review(nodes=()), id="bound to no node"),
        pytest.param({"status": "no"}, id="unreadable"),
    ],
)
async def test_tokens_that_are_refused(answer: dict[str, object]) -> None:
    fake = FakeApi()
    fake.answers[REVIEWS] = answer
    async with client(fake) as api:
        with pytest.raises(AuthError):
            await Authenticator(api, "ns")(token(9e9))


async def test_an_outage_of_the_api_throws_no_agent_off() -> None:
    fake, clock = FakeApi(), Clock()
    fake.answers[REVIEWS] = review()
    async with client(fake) as api:
        authenticate = Authenticator(api, "ns", clock)
        known = token(clock.now + 3600)
        assert (await authenticate(known)).node == "n1"
        asked = len(fake.requests)
        assert (await authenticate(known)).node == "n1"
        assert len(fake.requests) == asked  # it is fresh
        fake.tokens = set()  # the API refuses everything
        clock.now += 1800
        assert (await authenticate(known)).node == "n1"
        with pytest.raises(Unavailable):
            await authenticate(token(clock.now + 9999))
        clock.now += 1801
        with pytest.raises(Unavailable):
            await authenticate(known)
