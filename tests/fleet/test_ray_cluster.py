"""What the backend may expect of a cluster, of the simulated one and, where Ray is installed, of a real one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

import llmbuild
from llmbuild.fleet.ray.cluster import Cluster, Lost, Needs, Noted, Order, Told
from tests.support.ray_clusters import Driver, three_nodes

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'llmbuild[ray]'")
NEEDS = Needs("llmbuild_fast")
Passes = Callable[[float], None]


@pytest.fixture(params=["simulated", pytest.param("real", marks=needs_ray)])
def cluster(request: pytest.FixtureRequest) -> Iterator[tuple[Cluster, Passes]]:
    """A cluster with a node that has the resource, and what lets time pass in it."""
    if request.param == "simulated":
        nodes = three_nodes()
        nodes.broken = "exit code 2: error: no catalog"

        def passes(seconds: float) -> None:
            nodes.now += seconds

        yield Driver(nodes), passes
        return
    yield from _real()


def _real() -> Iterator[tuple[Cluster, Passes]]:
    from ray.cluster_utils import Cluster as Started

    from llmbuild.fleet.ray.client import cluster_of

    made: Any = Started(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "object_store_memory": 80 << 20,
            "include_dashboard": False,
            "resources": {"llmbuild_fast": 1},
            "node_ip_address": "127.0.0.2",
        },
    )
    try:
        yield cluster_of(made.address, "test"), time.sleep
    finally:
        import ray

        ray.shutdown()
        made.shutdown()


def ordered(cluster: Cluster, name: str) -> Order:
    noted = Noted("s", "v", 8, 0, "fast-0", 0, "", cluster.hosts()[0].name)
    return Order(name, ("serve", "none", "-C", "/none"), noted, 5.0, 60.0, llmbuild.__version__)


def said(cluster: Cluster, name: str, passes: Passes, *states: str) -> Told | Lost:
    """Return what an agent says as soon as it is one of these states, or lost."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = cluster.look([name], 0.5).get(name)
        if isinstance(found, Lost) or (found is not None and found.state in states):
            return found
        passes(0.2)
    raise AssertionError(f"{name} is not {states}")


def test_one_driver_has_the_lock_until_it_gives_it_back(cluster: tuple[Cluster, Passes]) -> None:
    one, _ = cluster
    assert (one.lock(), one.locked()) == (True, True)
    one.unlock()
    assert (one.locked(), one.lock()) == (False, True)


def test_an_agent_says_how_it_is_until_it_is_killed(cluster: tuple[Cluster, Passes]) -> None:
    one, passes = cluster
    assert "llmbuild_fast" in one.hosts()[0].resources
    order = ordered(one, "r1")
    one.launch(order, NEEDS)
    told = said(one, "r1", passes, "dead")
    assert isinstance(told, Told)
    assert (told.noted, told.told.startswith("exit code 2: error: no catalog")) == (order.noted, True)
    assert list(one.names()) == ["r1"]
    one.kill("r1")
    assert isinstance(said(one, "r1", passes), Lost)
    one.kill("r1")
    assert list(one.names()) == []


def test_an_agent_that_is_told_to_stop_goes_and_leaves_its_place(cluster: tuple[Cluster, Passes]) -> None:
    one, passes = cluster
    for name in ("r1", "r2"):
        one.launch(ordered(one, name), NEEDS)
        said(one, name, passes, "starting", "ready", "dead")
        one.stop(name)
        assert isinstance(said(one, name, passes), Lost)


def test_an_agent_that_was_never_there_is_lost(cluster: tuple[Cluster, Passes]) -> None:
    one, _ = cluster
    assert isinstance(one.look(["none"], 0.5)["none"], Lost)
