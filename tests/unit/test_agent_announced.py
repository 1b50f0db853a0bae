# SPDX-License-Identifier: Apache-2.0
"""Announced addresses on the agent: rows with the right MAC, and the frames that tell of them."""

from __future__ import annotations

import errno

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from weir.agent.announced import AnnouncedTable, Segment
from weir.agent.herald import RETRY_SECONDS, Herald, frames, solicited_node
from weir.agent.resources import Announced
from weir.agent.routes import RouteFacts
from weir.agent.tables import Projection
from weir.api.address import Addr, parse, parse_cidr, text
from weir.datapath import records
from weir.datapath.records import RuntimeFeature

MAC, OTHER = "02:00:00:00:00:01", "02:00:00:00:00:02"


def raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def segment(device: str, mac: str, *networks: str) -> Segment:
    return Segment(device, 2, raw(mac), tuple(parse_cidr(network) for network in networks))


LAN = segment("eth0", MAC, "192.0.2.0/24", "2001:db8::/64")
STORAGE = segment("eth1", OTHER, "198.51.100.0/24")


@pytest.mark.parametrize(
    ("address", "device"),
    [
        ("192.0.2.9", "eth0"),
        ("198.51.100.9", "eth1"),
        ("203.0.113.9", "eth0"),  # routed: the first of the family
        ("2001:db8::9", "eth0"),
        ("2001:db8:1::9", "eth0"),
    ],
)
@pytest.mark.parametrize("first", ["facts", "address"])
def test_the_uplink_in_the_addresses_network(address: str, device: str, first: str) -> None:
    table = AnnouncedTable()
    if first == "facts":
        table.set_facts("node1", (LAN, STORAGE))
    table.set_address(parse(address), "node1")
    table.set_facts("node1", (LAN, STORAGE))
    mac = raw(MAC if device == "eth0" else OTHER)
    assert table.rows.rows == {parse(address): records.Announced(mac)}
    assert table.announcing[parse(address)].device == device


def test_only_what_is_this_nodes() -> None:
    table = AnnouncedTable()
    table.set_facts("node1", (LAN,))
    addr = parse("192.0.2.9")
    for node, rows in (("node2", 0), ("node1", 1), ("node2", 0), ("node1", 1), (None, 0)):
        table.set_address(addr, node)
        assert (len(table.rows), len(table.announcing)) == (rows, rows)


def test_another_mac_and_no_uplink() -> None:
    table = AnnouncedTable()
    addr = parse("192.0.2.9")
    table.set_facts("node1", (LAN,))
    table.set_address(addr, "node1")
    table.set_facts("node1", (segment("eth0", OTHER, "192.0.2.0/24"),))
    assert table.rows.rows == {addr: records.Announced(raw(OTHER))}
    table.set_facts("node1", ())
    assert (table.rows.rows, table.announcing) == ({}, {})
    table.set_facts("node1", (LAN,))
    assert len(table.rows) == 1


def test_projection_takes_resources_and_turns_the_feature_on_and_off() -> None:
    made = Projection()
    made.set_facts(RouteFacts("node1"), (LAN,))
    addr = parse("192.0.2.9")
    name = f"announced/{addr.hex()}"
    assert not made.features & RuntimeFeature.ANNOUNCES
    made.apply({name: Announced(addr, "node1")})
    assert made.take().announced[addr].new == records.Announced(raw(MAC))
    assert made.features & RuntimeFeature.ANNOUNCES
    made.apply({name: None})
    assert made.take().announced[addr].new is None
    assert not made.features & RuntimeFeature.ANNOUNCES


def test_gratuitous_arp() -> None:
    request, reply = frames(parse("192.0.2.9"), raw(MAC))
    about = {"hwsrc": MAC, "psrc": "192.0.2.9", "pdst": "192.0.2.9"}
    frame = Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff")
    assert request == bytes(frame / ARP(op=1, hwdst="00:00:00:00:00:00", **about))
    assert reply == bytes(frame / ARP(op=2, hwdst=MAC, **about))


@pytest.mark.parametrize("address", ["2001:db8::9", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"])
def test_unsolicited_advertisement(address: str) -> None:
    (frame,) = frames(parse(address), raw(MAC))
    expected = Ether(src=MAC, dst="33:33:00:00:00:01") / IPv6(src=address, dst="ff02::1", hlim=255)
    expected /= ICMPv6ND_NA(tgt=address, R=0, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=MAC)
    assert frame == bytes(expected)


def test_solicited_node_group() -> None:
    assert text(Addr(solicited_node(parse("2001:db8::1:2:3456")))) == "ff02::1:ff02:3456"


def test_without_a_socket_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor left, or no NET_RAW: the agent does everything else."""

    def refuse(*_args: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    addr = parse("192.0.2.9")
    told = Herald(lambda: {addr: LAN})
    with monkeypatch.context() as broken:
        broken.setattr("socket.socket", refuse)
        told.converge(100.0)
    assert told.sent == 0
    made: list[bytes] = []

    class Out:
        def __enter__(self) -> Out:
            return self

        def __exit__(self, *_args: object) -> None:
            pass

        def sendto(self, frame: bytes, _where: object) -> None:
            made.append(frame)

    monkeypatch.setattr("socket.socket", lambda *_args: Out())
    told.converge(101.0)
    assert made == []
    told.converge(100.0 + RETRY_SECONDS)
    assert made == frames(addr, LAN.mac)
