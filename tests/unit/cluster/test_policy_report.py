# SPDX-License-Identifier: Apache-2.0
"""What the ClusterNetworkPolicy suite without SCTP leaves out, and what is read of its output."""

import pytest

from e2e.cluster.errors import ClusterError
from e2e.cluster.without_sctp import LEFT_OUT, PROBED, without_probes, without_servers
from e2e.conformance.policy_report import LEFT, Report
from e2e.conformance.report import PASSED, Spec

OUTPUT = f"""\
\x16=== RUN   TestProfiles
    suite.go:9: Test Setup: ready
\x16=== RUN   TestProfiles/Tcp
\x16=== RUN   TestProfiles/Tcp/Should_deny
    helper.go:80: {PROBED}
    helper.go:80: {LEFT_OUT}
    helper.go:80: {PROBED}
\x16=== NAME  TestProfiles
    other.go:1: between
\x16        --- PASS: TestProfiles/Tcp/Should_deny (1.50s)
\x16=== RUN   TestProfiles/Tcp/Should_allow
    helper.go:80: {PROBED}
    helper.go:90: it timed out
\x16        --- FAIL: TestProfiles/Tcp/Should_allow (2.00s)
\x16    --- FAIL: TestProfiles/Tcp (3.50s)
\x16=== RUN   TestProfiles/Sctp
\x16=== RUN   TestProfiles/Sctp/Should_deny
    helper.go:80: {LEFT_OUT}
\x16        --- PASS: TestProfiles/Sctp/Should_deny (0.00s)
\x16    --- PASS: TestProfiles/Sctp (0.00s)
\x16=== RUN   TestProfiles/Nodes
    suite.go:5: Skipping Nodes: suite does not support it
\x16    --- SKIP: TestProfiles/Nodes (0.00s)
\x16=== RUN   TestProfiles/Broken
    apply.go:5: cannot create
\x16    --- FAIL: TestProfiles/Broken (0.10s)
\x16--- FAIL: TestProfiles (4.00s)
FAIL
"""
MANIFESTS = """\
kind: Namespace
---
kind: StatefulSet
spec:
  template:
    spec:
      containers:
        - name: client
          image: agnhost
        - name: sctp-1
          image: agnhost
          env:
          - name: SERVE_SCTP_PORT_9003
            value: "foo"
        - name: web
          ports:
            - containerPort: 80
              name: web
        - name: sctp-2
          env:
          - name: SERVE_SCTP_PORT_9005
            value: "foo"
---
kind: Service
"""


def test_each_test_counts_once_and_one_of_sctp_alone_not_at_all() -> None:
    report = Report()
    specs = list(report.read(OUTPUT.splitlines(keepends=True)))
    failed = f"helper.go:80: {PROBED}\n  helper.go:90: it timed out"
    assert specs == [
        Spec("Tcp/Should deny", PASSED, 1.5),
        Spec("Tcp/Should allow", "failed", 2.0, failed),
        Spec("Sctp/Should deny", LEFT, 0.0),
        Spec("Nodes", "skipped", 0.0),
        Spec("Broken", "failed", 0.1, "apply.go:5: cannot create"),
    ]
    assert report.probes_left_out == 1


def test_a_set_up_that_fails_is_a_failed_test() -> None:
    lines = ["\x16=== RUN   TestProfiles", "    no CRD", "\x16--- FAIL: TestProfiles (1.00s)"]
    assert list(Report().read(lines)) == [Spec("TestProfiles", "failed", 1.0, "no CRD")]


def test_only_the_servers_of_sctp_go() -> None:
    kept = without_servers(MANIFESTS)
    assert "sctp" not in kept.lower()
    assert kept.count("        - name: ") == 2
    assert kept.endswith("              name: web\n\n---\nkind: Service\n")


def test_a_probe_by_sctp_is_left_out_and_every_other_is_told() -> None:
    source = "func PokeServer(t *testing.T, ns, protocol, host string) {\n\tpoke()\n}\n"
    changed = without_probes(source)
    first, rest = changed.split("\t\treturn\n\t}\n")
    assert 'protocol == "sctp"' in first
    assert LEFT_OUT in first
    assert rest.startswith(f'\tt.Log("{PROBED}")\n\tpoke()')


@pytest.mark.parametrize("change", [without_servers, without_probes])
def test_an_unknown_form_of_the_suite_is_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(ClusterError):
        change("kind: Namespace\n")
