"""The objects of a fleet: valid by Kubernetes' own schemas, named by its rules, and what an orchestrator adopts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from llmbuild.cli.fleet import orchestrate
from llmbuild.errors import InputError
from llmbuild.fleet.actuators.interface import Slot, Start
from llmbuild.fleet.kubernetes.manifests import SETTLE_S, Asked, Noted, all_objects, cluster_of, pools, replica
from llmbuild.fleet.kubernetes.names import label_value, object_name
from llmbuild.fleet.kubernetes.states import seen
from llmbuild.system.strict_json import loads
from tests.support.cluster_fleets import SAID, SMALL, batch
from tests.support.schemas import NEWEST, OLDEST, faults

TEXT = """\
name: example
kubernetes: {image: "registry.example/llmbuild:0.9", namespace: llm, claim: catalog, service_account: orchestrator}
nodes:
  - class: h100
    device: H100-SXM-80GB
    count: 2
    slots: 4
    memory: 20GB
    watts: {bare: 20, parked: 30, basis: estimated, source: here}
    kubernetes:
      cpus: 4
      memory: 32GB
      labels: {nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}
      resources: {nvidia.com/mig-2g.20gb: 1}
      tolerates: [nvidia.com/gpu]
services:
  - model: llama-3-8b
    rate: 0.5
    classes:
      - {name: chat, prompt: 500, output: 100, slo: [ttft_s_p99<=2, tpot_s<=0.1]}
"""
START = Start(0, batch(SMALL, 8), Slot("fast", "fast-1", 0), "")


def invoked(folder: Path, *words: str) -> Result:
    path = folder / "fleet.yaml"
    path.write_text(TEXT)
    done = CliRunner().invoke(orchestrate, [str(path), "--on", "kubernetes", "-n", "-C", str(folder), *words])
    assert done.exit_code == 0, done.exception
    return done


def printed(folder: Path, *words: str) -> str:
    return str(invoked(folder, *words).stdout)


def test_a_variant_that_no_replica_could_open_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = invoked(tmp_path).stderr + capsys.readouterr().err
    assert f"llama-3-8b fp16 is not in the catalog at {tmp_path}" in told


def test_a_dry_run_prints_objects_that_kubernetes_takes(tmp_path: Path) -> None:
    found = list(YAML(typ="safe").load_all(printed(tmp_path)))
    assert [one["kind"] for one in found] == [
        *("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"),
        *("Service", "PodDisruptionBudget", "Deployment"),
    ]
    assert [faults(one, version) for one in found for version in (OLDEST, NEWEST)] == [[]] * 16
    assert loads(printed(tmp_path, "--json")) == {"apiVersion": "v1", "kind": "List", "items": found}
    pod = found[-1]["spec"]["template"]["spec"]
    server = pod["containers"][0]
    assert server["args"][:6] == ["serve", "llama-3-8b", "-C", "/catalog", "--variant", "fp16"]
    assert server["resources"]["limits"] == {"cpu": "4", "memory": "32000000000", "nvidia.com/mig-2g.20gb": "1"}
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert pod["terminationGracePeriodSeconds"] > 30 + SETTLE_S
    selector = found[5]["spec"]["selector"]
    assert selector.items() <= found[-1]["spec"]["template"]["metadata"]["labels"].items()


def test_a_pool_of_the_gateway_api_has_what_it_must(tmp_path: Path) -> None:
    found = list(YAML(typ="safe").load_all(printed(tmp_path, "--inference-pool", "picker")))
    pool = next(one for one in found if one["kind"] == "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert pool["spec"]["targetPorts"] == [{"number": 8000}]
    assert pool["spec"]["endpointPickerRef"]["name"] == "picker"
    assert pool["spec"]["selector"]["matchLabels"].items() <= found[-1]["metadata"]["labels"].items()
    assert pools(SMALL, "picker")[0]["metadata"]["namespace"] == "llm"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("namespace: llm", "namespace: Llm", r":2 \$.kubernetes.namespace: "),
        ("claim: catalog, ", "", r":2 \$.kubernetes.claim: this key is missing"),
        ("registry.example/llmbuild:0.9", "", r":2 \$.kubernetes.image: "),
        ("claim: catalog", "claim: catalog, user: 0", r"\$.kubernetes.user: "),
        ("nvidia.com/mig-2g.20gb: 1", "gpu: 1", r"'gpu' is no device of a node: write DOMAIN/NAME"),
        ("[nvidia.com/gpu]", '["a b"]', r"'a b' is no key of Kubernetes"),
        ("NVIDIA-H100-80GB-HBM3", '"H100 80GB"', r"'H100 80GB' is no value of a label"),
        ("cpus: 4", "cpus: 0", r"\$.nodes\[0\].kubernetes.cpus: "),
        ("      cpus: 4\n", "", r"kubernetes needs `cpus`"),
        ("      memory: 32GB\n", "", r"kubernetes needs `memory`, that of a pod"),
        ("    slots: 4\n", "    slots: 1\n    cores: [[0], [1]]\n", r"kubernetes.cpus is 4, and each of `cores` has 1"),
        (TEXT.splitlines()[1] + "\n", "", r"give it with image, namespace and claim"),
        (TEXT[TEXT.index("    kubernetes:\n") : TEXT.index("services:")], "", "class h100 says nothing of Kubernetes"),
        ("claim: catalog", "claim: catalog, api_keys: keys", "the gateway asks for none"),
    ],
)
def test_a_mistake_of_a_fleet_file_is_told(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in TEXT
    (tmp_path / "fleet.yaml").write_text(TEXT.replace(old, new))
    done = CliRunner().invoke(
        orchestrate, [str(tmp_path / "fleet.yaml"), "--on", "kubernetes", "-n", "-C", str(tmp_path)]
    )
    assert isinstance(done.exception, InputError), done.output
    assert re.search(told, str(done.exception)), done.exception


def test_replicas_ask_for_the_keys_that_the_gateway_asks_for() -> None:
    keyed = replace(SMALL, cluster=replace(SAID, api_keys="keys"))
    with pytest.raises(InputError, match="names no Secret with the keys"):
        cluster_of(SMALL, "digest")
    with pytest.raises(InputError, match="says nothing of Kubernetes"):
        cluster_of(replace(SMALL, cluster=None))
    made = replica(keyed, START, Asked(5.0, "digest"))
    assert faults(made) == []
    assert made["spec"]["template"]["spec"]["containers"][0]["args"][-2:] == ["--api-keys", "/etc/llmbuild/keys"]


def test_annotations_say_all_that_a_successor_must_know() -> None:
    made = replica(SMALL, START, Asked(5.0))
    noted = Noted.read(made)
    assert noted is not None
    assert (noted.service, noted.variant, noted.batch, noted.node, noted.slot) == ("s", "v", 8, "fast-1", 0)
    assert Noted.read({"metadata": {"annotations": {**noted.annotations(), "llmbuild/batch": "many"}}}) is None
    assert Noted.read({"metadata": {}}) is None
    other = replica(SMALL, replace(START, point=batch(SMALL, 16)), Asked(5.0))
    assert other["metadata"]["name"] == made["metadata"]["name"], "a slot has one name"
    assert Noted.read(other) != noted


WORDS = st.text("aZ09-._/ é", min_size=1, max_size=80)


@settings(max_examples=50)
@given(st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=2, max_size=6, unique_by=str))
def test_names_are_valid_and_others_for_other_parts(all_parts: list[list[str]]) -> None:
    names = [object_name(*parts) for parts in all_parts]
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])", name) for name in names)
    assert len(set(names)) == len(names)
    values = [label_value(parts[0]) for parts in all_parts]
    assert all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value) for value in values)


@pytest.mark.parametrize(
    ("pods", "lost", "state", "told"),
    [
        ((), (), "starting", ""),
        (({"phase": "Failed", "reason": "Evicted", "message": "no memory"},), (), "dead", "Evicted: no memory"),
        (({"conditions": [{"type": "Ready", "status": "True"}], "podIP": "fd00::1"},), (), "ready", ""),
        (({"conditions": [{"type": "Ready", "status": "True"}]},), (), "starting", ""),
        (
            ({"conditions": [{"type": "Ready", "status": "True"}], "podIP": "10.0.0.1"},),
            ("n",),
            "dead",
            "node n is lost",
        ),
    ],
)
def test_states_are_what_the_cluster_says(
    pods: tuple[dict[str, object], ...], lost: tuple[str, ...], state: str, told: str
) -> None:
    early, late = "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"
    stale = {"metadata": {"uid": "0", "creationTimestamp": early}, "spec": {}, "status": {"phase": "Failed"}}
    all_pods = [
        {"metadata": {"uid": "1", "creationTimestamp": late}, "spec": {"nodeName": "n"}, "status": p} for p in pods
    ]
    found = seen({"metadata": {"creationTimestamp": late}}, [stale, *all_pods], lost)
    assert (found.state, found.told) == (state, told)
    assert found.url == ("http://[fd00::1]:8000" if state == "ready" else "")


def test_a_quota_that_refuses_pods_is_told_while_it_is_waited_for() -> None:
    failed = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota"}
    found = seen({"metadata": {}, "status": {"conditions": [failed]}}, [], ())
    assert (found.state, found.told, found.unplaced) == ("starting", "FailedCreate: exceeded quota", True)


def test_all_objects_of_a_fleet_have_its_labels() -> None:
    found = all_objects(replace(SMALL, cluster=replace(SAID, service_account="o")), [START], Asked(5.0), "picker")
    assert {one["metadata"]["labels"]["llmbuild/fleet"] for one in found} == {"small"}
    assert len({(one["kind"], one["metadata"]["name"]) for one in found}) == len(found)
