# SPDX-License-Identifier: Apache-2.0
"""The Helm chart: what each switch changes in the rendered manifests, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from support.tools import tool

from weir.agent import config as agent_config
from weir.operator import config as operator_config
from weir.operator import pools, wire
from weir.operator.kinds import BLOCK_LIST, CLUSTER_POLICY, LOAD_BALANCER_POOL, NODE_LEASE

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "weir"
Manifest = dict[str, Any]


def template(*settings: str, version: str = "1.36.1") -> subprocess.CompletedProcess[str]:
    command = [tool("helm"), "template", "weir", str(CHART), "--namespace=weir-system"]
    command += [f"--kube-version={version}", *(f"--set-json={setting}" for setting in settings)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def render(*settings: str, version: str = "1.36.1") -> dict[tuple[str, str], Manifest]:
    """The manifests by kind and name."""
    done = template(*settings, version=version)
    assert done.returncode == 0, done.stderr
    documents = [d for d in yaml.safe_load_all(done.stdout) if d]
    found = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    assert len(found) == len(documents), "two manifests of one kind and name"
    return found


def agent_of(manifests: dict[tuple[str, str], Manifest]) -> Manifest:
    template: Manifest = manifests["DaemonSet", "weir-agent"]["spec"]["template"]
    return template


def operator_of(manifests: dict[tuple[str, str], Manifest]) -> Manifest:
    template: Manifest = manifests["Deployment", "weir-operator"]["spec"]["template"]
    return template


def container(template: Manifest) -> Manifest:
    (only,) = template["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def config(manifests: dict[tuple[str, str], Manifest], name: str) -> Manifest:
    parsed = yaml.safe_load(manifests["ConfigMap", name]["data"]["config.yaml"])
    assert isinstance(parsed, dict)
    return parsed


def test_lint() -> None:
    done = subprocess.run(
        [tool("helm"), "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_current() -> None:
    command = [sys.executable, str(ROOT / "hack" / "chart_readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_value_has_a_schema() -> None:
    """additionalProperties is false wherever the schema lists properties, and all are listed."""

    def walk(values: Manifest, schema: Manifest, path: str) -> None:
        if "properties" not in schema:
            return
        assert schema["additionalProperties"] is False, path
        assert set(values) <= set(schema["properties"]), path
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, schema["properties"][name], f"{path}.{name}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    walk(values, json.loads((CHART / "values.schema.json").read_text()), "values")


def test_nothing_is_privileged() -> None:
    manifests = render()
    for pod in (agent_of(manifests), operator_of(manifests)):
        security = container(pod)["securityContext"]
        assert not security.get("privileged", False)
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"]["drop"] == ["ALL"]
        assert not pod["spec"].get("hostPID", False)
    agent = container(agent_of(manifests))["securityContext"]["capabilities"]
    assert agent["add"] == ["BPF", "PERFMON", "NET_ADMIN", "SYS_ADMIN", "NET_RAW"]
    assert "add" not in container(operator_of(manifests))["securityContext"]["capabilities"]


def test_no_mount_propagates_to_the_host() -> None:
    """Bidirectional propagation would need a privileged container."""
    mounts = container(agent_of(render()))["volumeMounts"]
    assert {m.get("mountPropagation", "None") for m in mounts} == {"None", "HostToContainer"}


def test_each_volume_is_mounted_and_each_mount_has_a_volume() -> None:
    for settings in ([], ['apiServer="https://192.0.2.1:6443"'], ["uninstall=true"]):
        manifests = render(*settings)
        for pod in (agent_of(manifests), operator_of(manifests)):
            volumes = [v["name"] for v in pod["spec"]["volumes"]]
            mounts = [m["name"] for m in container(pod)["volumeMounts"]]
            assert sorted(volumes) == sorted(mounts)


def test_rbac_names_no_wildcard_and_reads_no_secret_but_its_own() -> None:
    for (kind, name), manifest in render().items():
        if kind not in {"Role", "ClusterRole"}:
            continue
        for rule in manifest["rules"]:
            assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}, name
            if "secrets" in rule["resources"] and rule["verbs"] != ["create"]:
                assert rule["resourceNames"] == ["weir-operator-tls"]


def test_image_tag_defaults_to_the_chart_s_app_version() -> None:
    app = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert container(agent_of(render()))["image"] == f"localhost/weir:{app}"
    changed = render('image={"repository":"example.org/weir","tag":"x","pullPolicy":"Never"}')
    for pod in (agent_of(changed), operator_of(changed)):
        assert container(pod)["image"] == "example.org/weir:x"
        assert container(pod)["imagePullPolicy"] == "Never"


@pytest.mark.parametrize(
    ("setting", "key", "expected"),
    [
        pytest.param('routing="native"', "routing", "native", id="routing"),
        pytest.param("mtu=1400", "mtu", 1400, id="mtu"),
        pytest.param('uplinks=["eth1"]', "uplinks", ["eth1"], id="uplinks"),
        pytest.param('masquerade={"enabled":false}', "masquerade", False, id="masquerade"),
        pytest.param(
            'masquerade={"excludeCIDRs":["10.0.0.0/8","fd00::/8"]}',
            "masqueradeExcludeCIDRs",
            ["10.0.0.0/8", "fd00::/8"],
            id="exclude",
        ),
        pytest.param('apiServer="https://[fd::1]:1"', "apiServer", "https://[fd::1]:1", id="api"),
        pytest.param("agent.metricsPort=9999", "metricsPort", 9999, id="metrics"),
        pytest.param(
            'agent.metricsAddress="::"', "metricsAddress", "::", id="metrics-address"
        ),
        pytest.param("agent.proxyHealthPort=0", "proxyHealthPort", 0, id="proxy-health"),
        pytest.param(
            'nodePortAddresses=["primary"]', "nodePortAddresses", ["primary"], id="node-ports"
        ),
        pytest.param(
            'loadBalancer={"algorithm":"maglev","maglevTableSize":251,"mode":"dsr"}',
            "loadBalancer",
            {"algorithm": "maglev", "maglevTableSize": 251, "mode": "dsr"},
            id="maglev",
        ),
        pytest.param("policy.audit=true", "policy", {"audit": True}, id="audit"),
        pytest.param("agent.resyncSeconds=7", "resyncSeconds", 7, id="resync"),
        pytest.param('logLevel="debug"', "logLevel", "debug", id="log"),
        pytest.param('cni={"confName":"00-w.conflist"}', "cniConfName", "00-w.conflist", id="conf"),
    ],
)  # fmt: skip
def test_agent_setting_reaches_its_config_and_rolls_it(
    setting: str, key: str, expected: object
) -> None:
    before, after = render(), render(setting)
    assert config(before, "weir-agent")[key] != expected
    assert config(after, "weir-agent")[key] == expected
    name = "checksum/config"
    sums = [agent_of(m)["metadata"]["annotations"][name] for m in (before, after)]
    assert sums[0] != sums[1]


def test_map_sizes_reach_the_agent_as_whole_numbers() -> None:
    sizes = config(render("maps.conntrack=4194304"), "weir-agent")["maps"]
    assert sizes["conntrack"] == 4194304
    assert all(isinstance(size, int) for size in sizes.values())


@pytest.mark.parametrize(
    ("setting", "key", "expected"),
    [
        pytest.param("operator.port=9899", "listen", "[::]:9899", id="port"),
        pytest.param("operator.healthPort=9898", "healthListen", "127.0.0.1:9898", id="health"),
        pytest.param("operator.metricsPort=9897", "metricsListen", "[::]:9897", id="metrics"),
        pytest.param('apiServer="https://h:6443"', "apiServer", "https://h:6443", id="api"),
        pytest.param('logLevel="error"', "logLevel", "error", id="log"),
    ],
)
def test_operator_setting_reaches_its_config_and_rolls_it(
    setting: str, key: str, expected: object
) -> None:
    before, after = render(), render(setting)
    assert config(before, "weir-operator").get(key) != expected
    assert config(after, "weir-operator")[key] == expected
    name = "checksum/config"
    sums = [operator_of(m)["metadata"]["annotations"][name] for m in (before, after)]
    assert sums[0] != sums[1]


def test_operator_port_is_one_everywhere() -> None:
    manifests = render("operator.port=9899")
    ports = {p["name"]: p["containerPort"] for p in container(operator_of(manifests))["ports"]}
    (service,) = manifests["Service", "weir-operator"]["spec"]["ports"]
    assert (ports["grpc"], service["port"], service["name"]) == (9899, 9899, "grpc")


def test_the_programs_accept_their_settings(tmp_path: Path) -> None:
    """Agent and operator refuse what they do not know: no value is without a reader."""
    environment = {"NODE_NAME": "n", "POD_NAME": "p", "POD_NAMESPACE": "s", "HOST_IP": "192.0.2.1"}
    manifests = render("operator.metricsPort=9897", 'masquerade.excludeCIDRs=["10.0.0.0/8"]')
    for name, load in ("weir-agent", agent_config.load), ("weir-operator", operator_config.load):
        path = tmp_path / name
        path.write_text(manifests["ConfigMap", name]["data"]["config.yaml"])
        load(path, environment)


def test_operators_start_before_nodes_have_a_network() -> None:
    manifests = render()
    tolerated = {t["key"] for t in operator_of(manifests)["spec"]["tolerations"]}
    assert {"node.kubernetes.io/not-ready", "node.weir.dev/agent-not-ready"} <= tolerated
    assert operator_of(manifests)["spec"]["hostNetwork"] is True
    strategy = manifests["Deployment", "weir-operator"]["spec"]["strategy"]["rollingUpdate"]
    assert strategy["maxSurge"] == 0, "a second one would wait for the first one's port forever"


def test_agents_tolerate_everything() -> None:
    assert agent_of(render())["spec"]["tolerations"] == [{"operator": "Exists"}]


def test_api_server_value_replaces_the_kubeconfig_mount() -> None:
    for settings, mounted in ([], True), (['apiServer="https://192.0.2.1:6443"'], False):
        manifests = render(*settings)
        for pod in (agent_of(manifests), operator_of(manifests)):
            names = {v["name"] for v in pod["spec"]["volumes"]}
            assert ("kubeconfig" in names) is mounted


def test_host_folders_of_the_runtime() -> None:
    spec = agent_of(render('cni={"binDir":"/a","confDir":"/b"}'))["spec"]
    paths = {v["name"]: v["hostPath"]["path"] for v in spec["volumes"] if "hostPath" in v}
    assert (paths["cni-bin"], paths["cni-conf"]) == ("/a", "/b")


def test_pull_secrets_and_extra_capabilities() -> None:
    manifests = render('imagePullSecrets=["r"]', 'agent.extraCapabilities=["SYS_RESOURCE"]')
    for pod in (agent_of(manifests), operator_of(manifests)):
        assert pod["spec"]["imagePullSecrets"] == [{"name": "r"}]
    capabilities = container(agent_of(manifests))["securityContext"]["capabilities"]
    assert capabilities["add"][-1] == "SYS_RESOURCE"


def test_a_single_operator_has_no_disruption_budget() -> None:
    assert ("PodDisruptionBudget", "weir-operator") in render()
    assert ("PodDisruptionBudget", "weir-operator") not in render("operator.replicas=1")


def test_uninstall_stops_operators_and_cleans_nodes() -> None:
    manifests = render("uninstall=true")
    assert manifests["Deployment", "weir-operator"]["spec"]["replicas"] == 0
    cleanup = container(agent_of(manifests))
    assert cleanup["args"][:2] == ["-m", "weir.agent.uninstall"]
    assert "exec" in cleanup["readinessProbe"]
    assert "livenessProbe" not in cleanup


def test_apparmor_may_not_deny_writing_to_bpffs() -> None:
    security = agent_of(render())["spec"]["securityContext"]
    assert security["appArmorProfile"] == {"type": "Unconfined"}


def test_versions_without_node_names_in_tokens_are_refused() -> None:
    done = template(version="1.29.0")
    assert done.returncode != 0
    assert "kubeVersion" in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(["mtuu=1400"], "mtuu", id="typo"),
        pytest.param(['routing="geneve"'], "routing", id="routing"),
        pytest.param(["mtu=1000"], "set mtu to 0", id="mtu"),
        pytest.param(['apiServer="10.0.0.1"'], "apiServer", id="api-server"),
        pytest.param(["operator.metricsPort=9880"], "to another port", id="ports"),
        pytest.param(['kubelet.kubeconfig=""'], "set apiServer or kubelet.kubeconfig", id="no-api"),
        pytest.param(
            ['masquerade={"enabled":false,"excludeCIDRs":["10.0.0.0/8"]}'],
            "set masquerade.enabled",
            id="masquerade",
        ),
        pytest.param(['nodePortAddresses=["primary","10.0.0.0/8"]'], "alone", id="primary"),
        pytest.param(["operator.replicas=0"], "replicas", id="replicas"),
        pytest.param(['cni.confName="05-weir.conf"'], "confName", id="conf-name"),
    ],
)
def test_bad_values_are_refused_by_name(settings: list[str], message: str) -> None:
    done = template(*settings)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    ("setting", "mode"),
    [("xdp={}", "off"), ("xdp.mode=false", "off"), ('xdp.mode="auto"', "auto")],
)
def test_xdp_mode(setting: str, mode: str, tmp_path: Path) -> None:
    """A bare `off` is false to YAML."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(render(setting), "weir-agent")))
    environment = {"NODE_NAME": "n", "POD_NAMESPACE": "ns"}
    assert agent_config.load(path, environment).xdp == mode


def test_xdp_mode_that_is_none() -> None:
    assert template('xdp.mode="fast"').returncode


def test_the_operator_may_read_and_mark_blocklists() -> None:
    manifests = render()
    crd = manifests["CustomResourceDefinition", "blocklists.weir.dev"]
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    [version] = crd["spec"]["versions"]
    path = f"/apis/{crd['spec']['group']}/{version['name']}/{crd['spec']['names']['plural']}"
    assert path == BLOCK_LIST.path
    rules = manifests["ClusterRole", "weir-operator"]["rules"]
    allowed = {
        (resource, verb)
        for rule in rules
        if crd["spec"]["group"] in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert {
        ("blocklists", "list"),
        ("blocklists", "watch"),
        ("blocklists/status", "patch"),
    } <= allowed


CLUSTER_POLICIES = "clusternetworkpolicies.policy.networking.k8s.io"


def test_the_cluster_may_have_the_kind_of_clusternetworkpolicies_from_elsewhere() -> None:
    crd = render()["CustomResourceDefinition", CLUSTER_POLICIES]
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "api-approved.kubernetes.io" in crd["metadata"]["annotations"]
    [version] = crd["spec"]["versions"]
    path = f"/apis/{crd['spec']['group']}/{version['name']}/{crd['spec']['names']['plural']}"
    assert path == CLUSTER_POLICY.path
    without = render("crds.clusterNetworkPolicies=false")
    assert ("CustomResourceDefinition", CLUSTER_POLICIES) not in without
    # The role is the same, for a kind from elsewhere.
    for manifests in (render(), without):
        allowed = {
            (resource, verb)
            for rule in manifests["ClusterRole", "weir-operator"]["rules"]
            if crd["spec"]["group"] in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        assert allowed == {
            *(("clusternetworkpolicies", verb) for verb in ("get", "list", "watch")),
            ("clusternetworkpolicies/status", "patch"),
        }


def test_what_the_api_takes_of_clusternetworkpolicies_is_what_the_operator_reads() -> None:
    crd = render()["CustomResourceDefinition", CLUSTER_POLICIES]
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]

    def fields(at: Manifest, *path: str) -> set[str]:
        for name in path:
            at = at["items"] if name == "[]" else at["properties"][name]
        return set(at["properties"])

    def read(struct: type[msgspec.Struct]) -> set[str]:
        return {field.encode_name for field in msgspec.structs.fields(struct)}

    assert fields(schema) == read(wire.ClusterPolicySpec)
    assert fields(schema, "subject") == read(wire.ClusterSubject)
    for side, peers, rule, peer in (
        ("ingress", "from", wire.ClusterIngressRule, wire.ClusterSubject),
        ("egress", "to", wire.ClusterEgressRule, wire.ClusterEgressPeer),
    ):
        assert fields(schema, side, "[]") == read(rule) | {"name"}
        assert fields(schema, side, "[]", peers, "[]") == read(peer)
        assert fields(schema, side, "[]", peers, "[]", "pods") == read(wire.NamespacedPod)
        protocols = (side, "[]", "protocols", "[]")
        assert fields(schema, *protocols) == read(wire.ClusterProtocol)
        for name in ("tcp", "udp", "sctp"):
            port = (*protocols, name, "destinationPort")
            assert fields(schema, *port) == read(wire.DestinationPort)
            assert fields(schema, *port, "range") == read(wire.DestinationRange)


@pytest.mark.parametrize(("version", "checked"), [("1.30.0", False), ("1.31.2", True)])
def test_cidrs_are_checked_where_the_api_server_can(version: str, checked: bool) -> None:
    crd = render(version=version)["CustomResourceDefinition", CLUSTER_POLICIES]
    assert ("isCIDR" in json.dumps(crd)) is checked


def test_the_operator_may_give_addresses() -> None:
    manifests = render()
    crd = manifests["CustomResourceDefinition", "loadbalancerpools.weir.dev"]
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    [version] = crd["spec"]["versions"]
    assert LOAD_BALANCER_POOL.path == f"/apis/weir.dev/{version['name']}/loadbalancerpools"
    fields = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    assert fields["serviceSelector"]["properties"].keys() == {"matchLabels", "matchExpressions"}
    read = msgspec.structs.fields(pools.Spec)
    assert fields.keys() == {field.encode_name for field in read}
    allowed = {
        (resource, verb)
        for rule in manifests["ClusterRole", "weir-operator"]["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert {
        ("loadbalancerpools", "list"),
        ("loadbalancerpools", "watch"),
        ("loadbalancerpools/status", "patch"),
        ("servicecidrs", "list"),
        ("servicecidrs", "watch"),
        ("services/status", "patch"),
    } <= allowed


def test_the_operator_may_watch_kubelets_leases_and_no_others() -> None:
    role = render()["Role", "weir-operator-leases"]
    assert role["metadata"]["namespace"] == NODE_LEASE.path.split("/")[-2]
    assert role["rules"] == [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["list", "watch"]}
    ]


def test_which_services_get_addresses() -> None:
    settings = ('loadBalancer.class="example.org/lb"', "loadBalancer.withoutClass=false")
    made = config(render(*settings), "weir-operator")
    assert (made["loadBalancerClass"], made["classlessLoadBalancers"]) == ("example.org/lb", False)
    assert template('loadBalancer.class="no class"').returncode
