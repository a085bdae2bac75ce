"""The Kubernetes backend through the real client against a simulated cluster, under the loop that runs live."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild.cli.clusters import on_cluster
from llmbuild.errors import InputError
from llmbuild.fleet.actuators.interface import Route, SetClock, SetPartition, SetPower, Slot, Start, Stop, Switch
from llmbuild.fleet.kubernetes import api
from llmbuild.fleet.kubernetes.backend import PLACED_S, Kubernetes
from llmbuild.fleet.kubernetes.lease import LEASE_S
from llmbuild.fleet.kubernetes.manifests import Asked, access, replica, replica_name
from llmbuild.fleet.orchestrate import Setup, orchestrate
from llmbuild.serve.api.server import Place
from tests.support.cluster_fleets import KNOWN, SAID, SMALL, Steered, batch, cluster_fleet, states, two_nodes
from tests.support.clusters import Cluster, served

OLD, NEW = batch(SMALL, 8), batch(SMALL, 16)
TWO = ((0.0, {(0, OLD): 2}),)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = two_nodes()
    with served(made):
        yield made


@pytest.fixture
def steered(cluster: Cluster, tmp_path: Path) -> Callable[..., Steered]:
    return lambda targets=TWO, made=SMALL, keys="": Steered(cluster, made, tmp_path, targets, keys)


def test_the_target_comes_to_run_and_is_seen_until_it_is_ready(
    cluster: Cluster, steered: Callable[..., Steered]
) -> None:
    one = steered()
    assert one.adopt() == []
    assert states(one.run(2)) == [("fast-0/0", "starting", 8), ("fast-1/0", "starting", 8)]
    assert states(one.run(5)) == [("fast-0/0", "ready", 8), ("fast-1/0", "ready", 8)]
    pods = {pod["metadata"]["labels"]["llmbuild/replica"]: pod for pod in cluster.all("pods")}
    assert [one.name for one in one.run(1)] == sorted(pods)
    assert {each.url for each in one.run(1)} == {f"http://{pod['status']['podIP']}:8000" for pod in pods.values()}
    assert len(cluster.created) == 2
    assert one.errors == []


def test_a_node_that_is_removed_or_silent_loses_its_replica_to_another(
    cluster: Cluster, steered: Callable[..., Steered]
) -> None:
    for lose in (cluster.silence, cluster.remove):
        cluster.node("c", 4, labels={"pool": "fast"})
        cluster.node("d", 4, labels={"pool": "fast"})
        cluster.objects.pop(("nodes", "", "a"), None)
        cluster.objects.pop(("nodes", "", "b"), None)
        one = steered()
        one.adopt()
        one.run(5)
        cluster.node("e", 4, labels={"pool": "fast"})
        lose("c")
        assert "ready" in [live.state for live in one.run(2)], "the other one serves on"
        assert [live.state for live in one.run(15)] == ["ready", "ready"]
        assert one.said("node c is lost") or lose == cluster.remove
        assert {pod["spec"]["nodeName"] for pod in cluster.all("pods")} == {"d", "e"}, "nothing hangs on the lost one"
        cluster.objects.clear()


def test_an_orchestrator_after_a_killed_one_takes_over_what_runs(
    cluster: Cluster, steered: Callable[..., Steered]
) -> None:
    first = steered()
    with first.backend.held():
        first.run(3)
        first.backend.stop(Stop(replica_name(SMALL, Slot("fast", "fast-1", 0)), "the test"))
        lease = dict(cluster.all("leases")[0])
    cluster.objects["leases", "llm", lease["metadata"]["name"]] = lease  # as a kill -9 would leave it
    second = steered()
    began = cluster.now
    with second.backend.held():
        assert cluster.now - began == LEASE_S
        assert second.adopt() == [
            (replica_name(SMALL, Slot("fast", "fast-0", 0)), "adopted: v on fast, batch 8 on fast-0/0")
        ]
        assert states(second.run(8)) == [("fast-0/0", "ready", 8), ("fast-1/0", "ready", 8)]
    assert [
        one["metadata"]["annotations"]["llmbuild/slot"] for one in cluster.created if one["kind"] == "Deployment"
    ] == [
        "0",
        "0",
        "0",
    ]
    assert len([line for line in second.lines if line.startswith("start ")]) == 1, "the one that had drained"


def test_what_is_not_of_the_fleet_is_not_touched(cluster: Cluster, steered: Callable[..., Steered]) -> None:
    start = Start(0, OLD, Slot("fast", "fast-0", 0), "")
    elsewhere = replace(SMALL, cluster=replace(SAID, namespace="other"))
    others = [cluster_fleet(name="small-2"), elsewhere]
    kept = [cluster.put(replica(made, start, Asked(5.0)))["metadata"] for made in others]
    bare = replica(cluster_fleet(name="mine"), start, Asked(5.0))
    bare["metadata"]["labels"].pop("app.kubernetes.io/managed-by")
    kept.append(cluster.put(bare)["metadata"])
    one = steered(((0.0, {(0, OLD): 1}), (10.0, {})))
    assert one.adopt() == []
    one.run(16)
    left = {one["metadata"]["uid"] for space in ("llm", "other") for one in cluster.all("deployments", space)}
    assert left == {one["uid"] for one in kept}


def test_a_new_target_is_ready_before_the_old_one_drains(cluster: Cluster, steered: Callable[..., Steered]) -> None:
    one = steered(((0.0, {(0, OLD): 1}), (10.0, {(0, NEW): 1})))
    one.adopt()
    one.run(8)
    seen = []
    for _ in range(12):
        ready = [live for live in one.run(1) if live.state == "ready"]
        seen.append([live.point.batch for live in ready])
        assert ready, one.lines
    assert seen[0] == [8]
    assert seen[-1] == [16]
    assert [d["metadata"]["annotations"]["llmbuild/batch"] for d in cluster.all("deployments")] == ["16"]


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (
            {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}},
            "ImagePullBackOff: no such",
        ),
        (
            {
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
                "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
            },
            "CrashLoopBackOff: OOMKilled, exit code 137",
        ),
    ],
)
def test_a_replica_that_cannot_run_is_dead_with_the_reason_and_its_slot_is_tried_later(
    cluster: Cluster, steered: Callable[..., Steered], state: dict[str, object], told: str
) -> None:
    cluster.broken["v"] = state
    one = steered(((0.0, {(0, OLD): 1}),))
    one.adopt()
    one.run(6)
    assert one.said(f"died     {replica_name(SMALL, Slot('fast', 'fast-0', 0))}: {told}"), one.lines
    assert one.said("starts failed in a row")
    cluster.broken.clear()
    assert [live.state for live in one.run(11)] == ["ready"]


def test_a_pod_that_no_node_takes_is_waited_for_and_then_given_up(
    cluster: Cluster, steered: Callable[..., Steered]
) -> None:
    for name in ("a", "b"):
        cluster.remove(name)
    one = steered(((0.0, {(0, OLD): 1}),))
    one.adopt()
    assert [live.state for live in one.run(2)] == ["starting"]
    cluster.now += PLACED_S + OLD.node.boot_s - 2
    assert [live.state for live in one.run(1)] == ["starting"]
    one.run(2)
    assert one.said("Unschedulable: 0 nodes are available")


def test_a_changed_image_replaces_replicas_without_an_outage(cluster: Cluster, steered: Callable[..., Steered]) -> None:
    first = steered(((0.0, {(0, OLD): 1}),))
    first.adopt()
    first.run(6)
    newer = cluster_fleet(image="registry.example/llmbuild:2")
    second = steered(((0.0, {(0, batch(newer, 8)): 1}),), newer)
    assert [told.endswith("to be replaced") for _, told in second.adopt()] == [True]
    for _ in range(15):
        assert "ready" in [live.state for live in second.run(1)], second.lines
    images = [d["spec"]["template"]["spec"]["containers"][0]["image"] for d in cluster.all("deployments")]
    assert images == ["registry.example/llmbuild:2"]


def test_objects_that_were_applied_are_adopted_as_they_are(cluster: Cluster, steered: Callable[..., Steered]) -> None:
    one = steered()
    for slot in ("fast-0", "fast-1"):
        cluster.put(replica(SMALL, Start(0, OLD, Slot("fast", slot, 0), "why"), Asked(5.0)))
    assert one.backend.live() == [], "nothing is known, and nothing ended, before it is adopted"
    assert [told for _, told in one.adopt()] == [f"adopted: v on fast, batch 8 on fast-{i}/0" for i in (0, 1)]
    one.run(6)
    assert len(cluster.created) == 2


def test_what_fits_no_slot_or_takes_other_keys_is_ended(cluster: Cluster, steered: Callable[..., Steered]) -> None:
    one = steered()
    one.adopt()
    one.run(5)
    keyed = replace(SMALL, cluster=replace(SAID, api_keys="keys"))
    assert [told.startswith("ended: ") for _, told in steered((), keyed, "digest").adopt()] == [True, True]
    assert steered().adopt() == [], "they drain"
    cluster.now += 10
    assert cluster.all("deployments") == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_of_the_server_are_answers_or_waited_out(
    cluster: Cluster, steered: Callable[..., Steered], status: int
) -> None:
    one = steered(((0.0, {(0, OLD): 1}), (10.0, {})))
    cluster.refusals.append(("list", "deployments", status))
    assert one.adopt() == [("later", f"the API server answers {status}: try again later")]
    cluster.refusals += [("create", "deployments", status), ("list", "pods", status), ("delete", "deployments", status)]
    assert [live.state for live in one.run(9)] == ["ready"]
    assert one.errors == [f"the API server answers {status}: try again later"]
    one.run(6)
    assert [one.outcome for one in one.answers].count("unsupported") == 2
    assert cluster.all("deployments") == []


def test_a_name_that_is_taken_and_one_that_is_gone_are_answers(
    cluster: Cluster, steered: Callable[..., Steered]
) -> None:
    one = steered()
    one.adopt()
    start = Start(0, OLD, Slot("fast", "fast-0", 0), "")
    name = replica_name(SMALL, start.slot)
    cluster.put(replica(SMALL, start, Asked(9.0)))
    answer = one.backend.start(start)
    assert (answer.outcome, "is there still" in answer.reason) == ("unsupported", True)
    assert [live.name for live in one.backend.live()] == [name], "the next look takes it over"
    del cluster.objects["deployments", "llm", name]
    assert one.backend.stop(Stop(name, "")).outcome == "applied"
    cluster.now += 1
    assert [(live.state, live.told) for live in one.backend.live()] == [("dead", "")]
    assert one.backend.stop(Stop(name, "")).outcome == one.backend.route(Route(name, True, "")).outcome == "unsupported"


def test_a_server_that_is_gone_is_told_and_what_runs_is_kept(tmp_path: Path) -> None:
    cluster = two_nodes()
    with served(cluster) as end:
        one = Steered(cluster, SMALL, tmp_path, TWO)
        one.adopt()
        one.run(6)
        end()
        one.run(2)
        assert all("does not answer" in error for error in one.errors)
        assert len(one.errors) == 2
        answer = one.backend.stop(Stop(replica_name(SMALL, Slot("fast", "fast-0", 0)), ""))
        assert (answer.outcome, "does not answer" in answer.reason) == ("unsupported", True)
    with served(cluster):
        again = Steered(cluster, SMALL, tmp_path, TWO)
        assert len(again.adopt()) == 2


def test_one_orchestrator_runs_a_fleet_at_a_time(cluster: Cluster, steered: Callable[..., Steered]) -> None:
    first, second = steered(), steered()
    with first.backend.held():
        second.backend._lease._clock = first.backend._lease._clock

        def lives(seconds: float) -> None:
            cluster.now += 3 * seconds
            first.backend._lease.renew()

        second.backend._wait = lives
        with pytest.raises(InputError, match="another orchestrator runs this fleet"), second.backend.held():
            pass
        cluster.objects.popitem()
        cluster.now += 10
        with second.backend.held():
            cluster.now += 10
            with pytest.raises(InputError, match="has taken over this fleet"):
                first.backend.live()
    assert [lease["spec"]["holderIdentity"] for lease in cluster.all("leases")] == [""]


def test_an_orchestrator_that_ends_leaves_its_replicas_to_the_next(cluster: Cluster, tmp_path: Path) -> None:
    cluster.ready_s = 0
    setup = Setup(SMALL, (KNOWN,), tmp_path, tmp_path / "state", "static-peak", Place(port=0, drain_s=5.0))
    make = on_cluster({"kubeconfig": cluster.kubeconfig(tmp_path), "context": None})
    runs = []
    for _ in range(2):
        lines: list[str] = []
        assert orchestrate(setup, lines.append, lambda url: os.kill(os.getpid(), signal.SIGTERM), make)
        runs.append(lines)
    first, second = ([line.split()[0] for line in lines] for lines in runs)
    assert first.count("start") == first.count("ready") == second.count("finds") == second.count("ready") > 0
    assert "start" not in second
    assert (
        "kubectl -n llm delete deployments -l app.kubernetes.io/managed-by=llmbuild,llmbuild/fleet=small" in runs[0][-1]
    )
    assert len(cluster.all("pods")) == first.count("start")
    assert not (tmp_path / "state").exists(), "nothing is kept on disk"


def test_nodes_that_may_not_be_listed_are_told_and_replicas_run_all_the_same(
    cluster: Cluster, steered: Callable[..., Steered]
) -> None:
    cluster.forbidden.add(("list", "nodes"))
    one = steered()
    assert [name for name, _ in one.adopt()] == ["nodes"]
    assert [live.state for live in one.run(6)] == ["ready", "ready"]


def test_the_printed_rights_are_those_that_are_used(cluster: Cluster, steered: Callable[..., Steered]) -> None:
    made = replace(SMALL, cluster=replace(SAID, service_account="orchestrator"))
    one = steered(((0.0, {(0, OLD): 1}), (8.0, {})), made)
    with one.backend.held():
        one.adopt()
        one.run(7)
        cluster.silence(cluster.all("pods")[0]["spec"]["nodeName"])
        one.run(6)
    rules = [rule for each in access(made) for rule in each.get("rules", ())]
    given = {(verb, name) for rule in rules for name in rule["resources"] for verb in rule["verbs"]}
    assert set(cluster.asked) == given


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_happens_the_target_runs_once_it_is_calm(
    cluster: Cluster, steered: Callable[..., Steered], seed: int
) -> None:
    draw = random.Random(seed)
    crash = {"state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}}
    events = [
        lambda: cluster.silence("a"),
        lambda: cluster.remove("a") if ("nodes", "", "a") in cluster.objects else None,
        lambda: cluster.node("a", labels={"pool": "fast"}),
        lambda: cluster.broken.update(v=crash),
        cluster.broken.clear,
        lambda: cluster.refusals.append((draw.choice(["list", "create", "delete"]), "deployments", 503)),
        lambda: cluster.objects.pop(next((key for key in cluster.objects if key[0] == "pods"), ("", "", "")), None),
        lambda: cluster.objects.pop(next((key for key in cluster.objects if key[0] == "deployments"), ("",) * 3), None),
    ]
    one = steered()
    one.adopt()
    for _ in range(20):
        cluster.node("a", labels={"pool": "fast"}) if ("nodes", "", "a") not in cluster.objects else None
        draw.choice(events)()
        if draw.random() < 0.1:  # it is killed
            one = steered()
            one.adopt()
        one.run(1)
    cluster.node("a", labels={"pool": "fast"})
    cluster.broken.clear()
    cluster.refusals.clear()
    cluster.now += 60  # the longest wait after failed starts
    one = steered()
    one.adopt()
    assert states(one.run(14)) == [("fast-0/0", "ready", 8), ("fast-1/0", "ready", 8)], one.lines
    pods = cluster.all("pods")
    assert sorted(pod["metadata"]["labels"]["llmbuild/replica"] for pod in pods) == sorted(
        deployment["metadata"]["name"] for deployment in cluster.all("deployments")
    )


def test_lists_are_read_page_by_page(
    cluster: Cluster, steered: Callable[..., Steered], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "PAGE", 1)
    one = steered()
    one.adopt()
    assert [live.state for live in one.run(6)] == ["ready", "ready"]


def test_what_kubernetes_cannot_is_unsupported(cluster: Cluster, steered: Callable[..., Steered]) -> None:
    backend: Kubernetes = steered().backend
    answers = [
        backend.switch(Switch("r", OLD, "")),
        backend.set_clock(SetClock("fast-0", 1000, "")),
        backend.set_power(SetPower("fast-0", 100, "")),
        backend.set_partition(SetPartition("fast-0", ("1g.10gb",), "")),
    ]
    assert [answer.outcome for answer in answers] == ["unsupported"] * 4
    assert KNOWN.variant == "v"


def test_a_file_without_access_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    (tmp_path / "odd").write_text("{a: [}")
    (tmp_path / "list").write_text("[1]")
    for kubeconfig, context in (
        (tmp_path / "none", None),
        (tmp_path / "odd", None),
        (tmp_path / "list", None),
        (None, None),
    ):
        with pytest.raises(InputError, match="give --kubeconfig FILE and --context NAME"):
            api.connected("llm", kubeconfig, context)
    with pytest.raises(InputError, match="no access to a cluster"):
        api.connected("llm", Cluster(url="http://127.0.0.1:1").kubeconfig(tmp_path), "another")
