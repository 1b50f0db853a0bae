# SPDX-License-Identifier: Apache-2.0
"""The answer of `weir policy why` for people.

Both families of two pods mostly give one and the same answer: then it is told once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

VERDICTS = {True: "ALLOWED", False: "DENIED", None: "NOT KNOWN"}


def text(joined: dict[str, Any], port: str, protocol: str) -> str:
    source, destination = joined["source"], joined["destination"]
    what = f"{port}/{protocol.upper()}" if port else protocol.upper()
    verdict = VERDICTS[joined["allowed"]]
    verdict += ", but let through (audit mode)" if joined["audited"] else ""
    lines = [f"{_end(source)} -> {_end(destination)} {what}: {verdict}"]
    if destination["service"]:
        lines.append(
            f"{destination['given']} is the address of Service {destination['service']}: policies "
            "see the backend that it leads to. Ask about one of its pods."
        )
    if source["blocked"]:
        lines.append(
            f"BlockList {', '.join(source['blocked'])} has {source['given']}: nodes drop its "
            "packets at their uplinks, whatever policies say."
        )
    for name in ("egress", "ingress"):
        found = [one for one in joined["directions"] if one["direction"] == name]
        for alike in _alike(found):
            lines += ["", *_direction(alike)]
    lines += ["", *joined["missing"]] if joined["missing"] else []
    if joined["differ"]:
        lines += [
            "",
            "Maps and policies differ. If they still do in a few seconds, see `weir status` for "
            "what the node cannot write, and report it.",
        ]
    return "\n".join(lines)


def _end(end: dict[str, Any]) -> str:
    name = str(end["pod"] or end["given"])
    known = [word for word in (*end["addresses"], end["node"]) if word and word != name]
    return f"{name} ({', '.join(known)})" if known else name


def _alike(found: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Directions that say the same of several pairs of addresses."""
    by_answer: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        maps = {name: one["maps"][name] for name in ("allowed", "audited", "reason")}
        key = json.dumps([one["node"], one["model"], maps, one["troubles"]])
        by_answer.setdefault(key, []).append(one)
    return list(by_answer.values())


def _direction(alike: Sequence[dict[str, Any]]) -> list[str]:
    one = alike[0]
    model, maps = one["model"], one["maps"]
    verdict = _verdict(model)
    pairs = ", ".join(f"{each['source']} -> {each['destination']}" for each in alike)
    lines = [
        f"{one['direction']} on {one['node']}: {verdict}: {model['because']}",
        f"  of         {pairs}",
    ]
    for policy in model["policies"]:
        tier = "" if policy["tier"] == "network-policy" else f", {_tier(policy)}"
        lines.append(f"  selected   by {policy['policy']}{tier}")
    for near in model["near_misses"]:
        lines += [
            f"  near miss  {near['direction']} rule {near['index']} of {near['policy']} matches "
            f"all but the {near['missed']}",
            f"             it wants {near['wants']}",
            f"             this is  {near['has']}",
        ]
    if model["change"]:
        lines.append(f"  to change  {model['change']}")
    lines += [f"  trouble    {trouble}" for trouble in one["troubles"]]
    does = "let it through" if maps["allowed"] else f"drop it ({maps['reason']})"
    if maps["audited"]:
        does = f"let it through, and report it ({maps['reason']})"
    by = f", by {maps['rule']}" if maps["rule"] else ""
    lines.append(f"  maps       {'' if one['agree'] else 'DIFFER: they '}{does}{by}")
    return lines


def _verdict(model: dict[str, Any]) -> str:
    if model["allowed"]:
        return "allowed"
    return "denied, but in audit mode" if model["audited"] else "denied"


def _tier(policy: dict[str, Any]) -> str:
    return f"{policy['tier']} tier, priority {policy['priority']}"
