# SPDX-License-Identifier: Apache-2.0
"""`weir policy why` over scripted agents: how ends are joined and told, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from weir.cli import policy
from weir.cli.errors import CliError
from weir.cli.main import parser, run
from weir.cli.source import Answer, Question, Show

CART = {"given": "shop/cart", "pod": "shop/cart", "addresses": ["10.1.0.5", "fd00:1::5"],
        "node": "n1", "is_pod": True, "service": "", "blocked": []}  # fmt: skip
DB = {"given": "shop/db", "pod": "shop/db", "addresses": ["10.2.0.7", "fd00:2::7"],
      "node": "n2", "is_pod": True, "service": "", "blocked": []}  # fmt: skip
OUTSIDE = {"given": "198.51.100.1", "pod": "", "addresses": ["198.51.100.1"], "node": "",
           "is_pod": False, "service": "", "blocked": []}  # fmt: skip
NEAR = {"policy": "shop/db-only", "direction": "ingress", "index": 0, "missed": "port",
        "wants": "TCP port 5432", "has": "TCP port 80"}  # fmt: skip
FREE = {"allowed": True, "audited": False, "ground": "not-isolated", "policies": [], "policy": "",
        "rule": None, "because": "no policy selects shop/cart for egress", "near_misses": [],
        "change": ""}  # fmt: skip
SHUT = {"allowed": False, "audited": False, "ground": "no-rule", "policy": "", "rule": None,
        "policies": [{"policy": "shop/db-only", "tier": "network-policy", "priority": 0}],
        "because": "shop/db-only isolates shop/db, and it has no rule that matches",
        "near_misses": [NEAR], "change": "shop/db-only needs an ingress rule"}  # fmt: skip
PASSES = {"allowed": True, "audited": False, "reason": "", "rule": "", "rule_set": 0,
          "source_class": 16, "destination_class": 17}  # fmt: skip
DROPS = {**PASSES, "allowed": False, "reason": "policy-ingress", "rule_set": 2}


def direction(name: str, model: Any, maps: Any, family: int = 0) -> dict[str, Any]:
    ends = CART["addresses"][family], DB["addresses"][family]  # type: ignore[index]
    return {"direction": name, "source": ends[0], "destination": ends[1], "protocol": "TCP",
            "port": 80, "model": model, "maps": maps,
            "agree": model["allowed"] == maps["allowed"], "troubles": []}  # fmt: skip


def both(name: str, model: Any, maps: Any) -> list[dict[str, Any]]:
    return [direction(name, model, maps, family) for family in (0, 1)]


def answer(node: str, *directions: Any, source: Any = CART, to: Any = DB) -> Answer:
    return Answer(node, {"source": source, "destination": to, "directions": list(directions)})


class FakeSource:
    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[Question] = []

    def ask(self, question: Question) -> list[Answer]:
        self.asked.append(question)
        return self.answers

    def stream(self, question: Question, show: Show) -> dict[str, str]:
        raise AssertionError

    def follow(self, everything: bool, show: Show) -> None:
        raise AssertionError


def why(source: FakeSource, *words: str) -> int:
    given = words or ("shop/cart", "shop/db", "80/tcp")
    return run(parser().parse_args(["policy", "why", *given]), source)


OPEN = (
    answer("n1", *both("egress", FREE, PASSES)),
    answer("n2", *both("ingress", {**FREE, "because": "no policy"}, PASSES)),
)
DENIED = (OPEN[0], answer("n2", *both("ingress", SHUT, DROPS)))


def test_the_question_in_two_languages() -> None:
    source = FakeSource(*OPEN)
    why(source, "shop/cart", "fd00:2::7", "53/UDP")
    [question] = source.asked
    assert (
        question.path == "/v1/policy/why?from=shop%2Fcart&to=fd00%3A2%3A%3A7&protocol=udp&port=53"
    )
    assert question.words == ("policy", "why", "shop/cart", "fd00:2::7", "53/udp", "--this-node")
    arguments = parser().parse_args([*question.words, "-o", "json"])
    assert (arguments.what, arguments.this_node) == ("53/udp", True)


def test_denied_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert why(FakeSource(*DENIED)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "shop/cart (10.1.0.5, fd00:1::5, n1) -> shop/db (10.2.0.7, fd00:2::7, n2) 80/TCP: DENIED",
        "",
        "egress on n1: allowed: no policy selects shop/cart for egress",
        "  of         10.1.0.5 -> 10.2.0.7, fd00:1::5 -> fd00:2::7",
        "  maps       let it through",
        "",
        "ingress on n2: denied: shop/db-only isolates shop/db, and it has no rule that matches",
        "  of         10.1.0.5 -> 10.2.0.7, fd00:1::5 -> fd00:2::7",
        "  selected   by shop/db-only",
        "  near miss  ingress rule 0 of shop/db-only matches all but the port",
        "             it wants TCP port 5432",
        "             this is  TCP port 80",
        "  to change  shop/db-only needs an ingress rule",
        "  maps       drop it (policy-ingress)",
    ]


def test_families_that_differ_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    ingress = (direction("ingress", FREE, PASSES, 0), direction("ingress", SHUT, DROPS, 1))
    assert why(FakeSource(OPEN[0], answer("n2", *ingress))) == 0
    out = capsys.readouterr().out
    assert out.count("ingress on n2") == 2
    assert out.splitlines()[0].endswith("DENIED")


def test_maps_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    leaky = {**PASSES, "rule": "ingress rule 1 of shop/old"}
    troubled = [{**one, "troubles": ["shop/db-only: no room"]}
                for one in both("ingress", SHUT, leaky)]  # fmt: skip
    assert why(FakeSource(OPEN[0], answer("n2", *troubled))) == 2
    out = capsys.readouterr().out
    assert "  trouble    shop/db-only: no room" in out
    assert "maps       DIFFER: they let it through, by ingress rule 1 of shop/old" in out
    assert "Maps and policies differ" in out


def test_audit_mode(capsys: pytest.CaptureFixture[str]) -> None:
    watched = {**SHUT, "audited": True}, {**DROPS, "audited": True}
    assert why(FakeSource(OPEN[0], answer("n2", *both("ingress", *watched)))) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("80/TCP: DENIED, but let through (audit mode)")
    assert "ingress on n2: denied, but in audit mode: shop/db-only isolates" in out
    assert "maps       let it through, and report it (policy-ingress)" in out


DENIAL = {
    "source": {"address": "10.1.0.5", "port": 0, "pod": "shop/cart"},
    "destination": {"address": "fd00:2::7", "port": 80, "pod": ""},
    "protocol": "TCP", "direction": "ingress", "last_seen": 1000.0, "packets": 3,
    "reason": "policy-ingress", "audited": False, "policies": ["shop/a", "shop/b"], "rule": "",
}  # fmt: skip


def test_denials_of_all_nodes_newest_first(capsys: pytest.CaptureFixture[str]) -> None:
    watched = {**DENIAL, "last_seen": 2000.0, "audited": True, "rule": "egress rule 1 of X y"}
    source = FakeSource(Answer("n1", [DENIAL]), Answer("n2", [watched]), Answer("n3", error="gone"))
    assert run(parser().parse_args(["policy", "denials"]), source) == 1
    said = capsys.readouterr()
    header, first, second = said.out.splitlines()
    assert header.split()[:3] == ["LAST", "SEEN", "NODE"]
    assert first.split()[2:] == [
        *("n2", "3", "audited", "shop/cart", "[fd00:2::7]:80/TCP", "ingress"),
        *("egress", "rule", "1", "of", "X", "y"),
    ]
    assert second.split()[2:5] == ["n1", "3", "policy-ingress"]
    assert second.endswith("shop/a, shop/b")
    assert "n3: gone" in said.err
    assert run(parser().parse_args(["policy", "denials", "-o", "json"]), source) == 1
    assert json.loads(capsys.readouterr().out)[1] == {"node": "n2", "data": [watched]}


@pytest.mark.parametrize(
    ("answers", "allowed", "told"),
    [
        pytest.param(
            [OPEN[0], Answer("n2", error="container not found")],
            *(None, "TO's ingress (shop/db) is not answered: the agent of n2 does not answer: "),
            id="silent",
        ),
        pytest.param([OPEN[0]], None, "the agent of n2 was not asked", id="not asked"),
        pytest.param(
            [DENIED[1]], False, "FROM's egress (shop/cart) is not answered", id="denied anyway"
        ),
        pytest.param(
            [OPEN[0], answer("n2")], None, "n2 has no pod of that address", id="gone by now"
        ),
        pytest.param(
            [answer("n1", source={**CART, "addresses": [], "node": ""})],
            *(None, "shop/cart: no agent knows an address of it"),
            id="nobody",
        ),
        pytest.param(
            [answer("n1", to={**OUTSIDE, "addresses": ["2001:db8::1"]},
                    source={**CART, "addresses": ["10.1.0.5"]})],
            *(None, "no address of the same family"),
            id="families",
        ),
    ],
)  # fmt: skip
def test_an_end_that_nobody_answers_for(
    capsys: pytest.CaptureFixture[str],
    answers: Sequence[Answer],
    allowed: bool | None,
    told: str,
) -> None:
    assert why(FakeSource(*answers)) == 1
    assert told in capsys.readouterr().out
    assert policy.join(answers)["allowed"] is allowed


def test_an_end_outside_is_nobodys_to_answer() -> None:
    [shut, _] = both("ingress", SHUT, DROPS)
    assert why(FakeSource(answer("n1", source=OUTSIDE), answer("n2", shut, source=OUTSIDE))) == 0


def test_a_services_address_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    vip = {**OUTSIDE, "given": "10.96.0.9", "addresses": ["10.96.0.9"], "service": "shop/db"}
    why(FakeSource(answer("n1", direction("egress", FREE, PASSES), to=vip)))
    assert "10.96.0.9 is the address of Service shop/db" in capsys.readouterr().out


def test_a_blocked_source_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    [shut, _] = both("ingress", SHUT, DROPS)
    why(FakeSource(answer("n2", shut, source={**OUTSIDE, "blocked": ["bad"]})))
    assert "BlockList bad has 198.51.100.1: nodes drop its packets" in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert why(FakeSource(*DENIED), "shop/cart", "shop/db", "80/tcp", "-o", "json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["allowed"], told["differ"], told["missing"]) == (False, False, [])
    assert {one["node"] for one in told["directions"]} == {"n1", "n2"}


def test_nobody_answers() -> None:
    with pytest.raises(CliError, match="n1: gone"):
        why(FakeSource(Answer("n1", error="gone")))


@pytest.mark.parametrize(
    "words",
    [
        ("cart", "shop/db", "80/tcp"),
        ("shop/", "shop/db", "80/tcp"),
        ("shop/cart", "shop/db", "80"),
        ("shop/cart", "shop/db", "0/tcp"),
        ("shop/cart", "shop/db", "http/tcp"),
        ("shop/cart", "shop/db", "80/gre"),
        ("shop/cart", "shop/db", "icmp/tcp"),
    ],
    ids=" ".join,
)
def test_bad_words_ask_nobody(words: tuple[str, ...]) -> None:
    source = FakeSource(*OPEN)
    with pytest.raises(CliError):
        why(source, *words)
    assert source.asked == []


def test_icmp() -> None:
    assert policy.parse_asked("a/b", "::1", "ICMP").question().words[4] == "icmp"
