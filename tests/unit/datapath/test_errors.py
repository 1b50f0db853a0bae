# SPDX-License-Identifier: Apache-2.0
"""What an operator gets to read when the kernel refuses."""

from __future__ import annotations

import errno

from weir.datapath.errors import DatapathError, TableFull, VerifierRejected
from weir.datapath.pins import escape, unescape


def test_a_verifier_log_is_cut_to_its_end() -> None:
    lines = [f"{n}: (bf) r1 = r2" for n in range(100_000)]
    log = "\n".join(
        [
            "libbpf: prog 'from_pod': -- BEGIN PROG LOAD LOG --",
            *lines,
            "R1 invalid mem access 'scalar'",
            "processed 100000 insns (limit 1000000) max_states_per_insn 4",
            "-- END PROG LOAD LOG --",
            "libbpf: failed to load object",
        ]
    )
    error = VerifierRejected("from_pod", errno.EACCES, log)
    text = str(error).splitlines()
    assert text[0].startswith("load from_pod: Permission denied; kernel ")
    assert text[-1] == "R1 invalid mem access 'scalar'"
    assert len(text) == 26


def test_messages() -> None:
    assert str(DatapathError("pin", "x", errno.ENOENT)) == "pin x: No such file or directory"
    assert "524" in str(DatapathError("pin", "x", 524))
    full = TableFull("policy", 10, errno.E2BIG)
    assert (full.table, full.max_entries) == ("policy", 10)
    assert "the table is full at 10 entries" in str(full)


def test_interface_names_as_bpffs_names() -> None:
    for name in ("eth0", "eth0.100", "a%2Eb", "%.%"):
        assert "." not in escape(name)
        assert unescape(escape(name)) == name
