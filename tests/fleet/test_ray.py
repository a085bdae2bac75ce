"""The Ray backend under the loop that runs live, on a simulated cluster; its agents with real processes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import llmbuild
from llmbuild.errors import InputError
from llmbuild.fleet.actuators.interface import (
    KeysFile,
    Route,
    SetClock,
    SetPartition,
    SetPower,
    Slot,
    Start,
    Stop,
    Switch,
)
from llmbuild.fleet.ray.agent import Agent
from llmbuild.fleet.ray.backend import LOCK_S, PLACED_S, SILENT_S, Dry
from llmbuild.fleet.ray.cluster import Host, Needs, Noted, Order
from llmbuild.fleet.ray.placing import checked, needs_of, placed
from tests.support.cluster_fleets import states
from tests.support.fleets import divided_node, fleet, node, point, service
from tests.support.ray_clusters import KNOWN, Driver, Nodes, Steered, three_nodes, with_slots

MADE = fleet(service(), nodes=(node("fast", 2),))
OLD, NEW = point(MADE, KNOWN, 8), point(MADE, KNOWN, 16)
NOTHING = ((0.0, {}),)
TWO = ((0.0, {(0, OLD): 2}),)
FIRST = Start(0, OLD, Slot("fast", "fast-0", 0), "")


@pytest.fixture
def nodes() -> Nodes:
    return three_nodes()


@pytest.fixture
def steered(nodes: Nodes, tmp_path: Path) -> Callable[..., Steered]:
    return lambda targets=TWO, made=MADE, **more: Steered(nodes, made, tmp_path, targets, **more)


def test_the_target_comes_to_run_each_replica_on_a_node_of_its_own(
    nodes: Nodes, steered: Callable[..., Steered]
) -> None:
    one = steered()
    assert one.adopt() == []
    assert states(one.run(2)) == [("fast-0/0", "starting", 8), ("fast-1/0", "starting", 8)]
    found = one.run(4)
    assert states(found) == [("fast-0/0", "ready", 8), ("fast-1/0", "ready", 8)]
    assert {live.url for live in found} == {"http://10.0.0.1:1", "http://10.0.0.2:1"}
    assert [order.noted.host for order in nodes.launched] == ["a", "b"]
    assert [order.words[order.words.index("--host") + 1] for order in nodes.launched] == ["10.0.0.1", "10.0.0.2"]


def test_a_lost_node_s_replica_is_dead_at_once_and_another_node_takes_its_place(
    nodes: Nodes, steered: Callable[..., Steered]
) -> None:
    one = steered()
    one.adopt()
    one.run(6)
    nodes.remove("b")
    assert states(one.run(2))[0] == ("fast-0/0", "ready", 8), "the other one serves on"
    assert states(one.run(6)) == [("fast-0/0", "ready", 8), ("fast-1/0", "ready", 8)]
    assert one.said("node b of Ray is lost")
    assert sorted(each.order.noted.host for each in nodes.agents.values()) == ["a", "c"]


def test_a_node_without_a_successor_is_told_and_taken_when_one_joins(
    nodes: Nodes, steered: Callable[..., Steered]
) -> None:
    nodes.remove("c")
    one = steered()
    one.adopt()
    one.run(6)
    nodes.remove("b")
    one.run(4)
    assert one.said("no free node of Ray has the resource llmbuild_fast: 1")
    assert not one.said("starts failed in a row, the next in 60"), "a missing node is no failed start"
    nodes.node("d")
    assert states(one.run(6)) == [("fast-0/0", "ready", 8), ("fast-1/0", "ready", 8)]


def test_an_orchestrator_after_a_killed_one_takes_over_what_runs(nodes: Nodes, steered: Callable[..., Steered]) -> None:
    first = steered()
    with first.backend.held():
        first.adopt()
        first.run(6)
        names = sorted(nodes.agents)
        first.backend.stop(Stop(names[1], "the test"))
        nodes.holder = None  # as the cluster does when its driver is killed
        second = steered()
        with second.backend.held():  # while the first one still believes that it has the fleet
            told = dict(second.adopt())
            assert (told[names[0]], told[names[1]]) == (
                "adopted: v on fast, batch 8 on fast-0/0, node a of Ray",
                "drains",
            )
            assert [live.state for live in second.run(8)] == ["ready", "ready"]
            with pytest.raises(InputError, match="another orchestrator has taken over"):
                first.backend.live()
    assert len(nodes.launched) == 3, "the one that had drained was started again"


def test_one_orchestrator_runs_a_fleet_at_a_time(nodes: Nodes, steered: Callable[..., Steered]) -> None:
    first, second = steered(), steered()
    with first.backend.held():
        with pytest.raises(InputError, match="another orchestrator runs fleet small"), second.backend.held():
            pass
        assert nodes.now >= LOCK_S
    with second.backend.held():
        pass
    assert nodes.holder is None


def test_a_lock_that_was_lost_with_its_node_is_taken_again(nodes: Nodes, steered: Callable[..., Steered]) -> None:
    one = steered()
    with one.backend.held():
        one.adopt()
        one.run(6)
        nodes.holder = None
        assert [live.state for live in one.run(2)] == ["ready", "ready"]
        assert one.driver.locked()


def test_a_new_target_is_ready_before_the_old_one_drains(nodes: Nodes, steered: Callable[..., Steered]) -> None:
    one = steered(((0.0, {(0, OLD): 1}), (10.0, {(0, NEW): 1})))
    one.adopt()
    one.run(8)
    seen = []
    for _ in range(14):
        ready = [live for live in one.run(1) if live.state == "ready"]
        seen.append([live.point.batch for live in ready])
        assert ready, one.lines
    assert (seen[0], seen[-1]) == ([8], [16])
    assert [each.order.noted.batch for each in nodes.agents.values()] == [16]


def test_a_server_that_ends_is_dead_once_with_its_last_line_and_tried_again(
    nodes: Nodes, steered: Callable[..., Steered]
) -> None:
    nodes.broken = "exit code 2: error: no catalog"
    one = steered(((0.0, {(0, OLD): 1}),))
    one.adopt()
    one.run(3)
    assert one.said("exit code 2: error: no catalog"), one.lines
    assert one.said("starts failed in a row")
    nodes.broken = ""
    assert [live.state for live in one.run(12)] == ["ready"]
    assert len(nodes.agents) == 1, "agents of ended servers are gone"


def test_an_agent_that_says_nothing_is_waited_for_and_then_killed(
    nodes: Nodes, steered: Callable[..., Steered]
) -> None:
    one = steered(((0.0, {(0, OLD): 1}),))
    one.adopt()
    one.run(6)
    (name,) = nodes.agents
    nodes.silent.add("a")
    assert [live.state for live in one.run(SILENT_S - 2)] == ["ready"]
    one.run(4)
    assert one.said("its agent has said nothing for 20 s")
    assert name not in nodes.agents
    nodes.silent.clear()
    assert [live.state for live in one.run(6)] == ["ready"]


def test_an_agent_that_no_node_takes_is_given_up(nodes: Nodes, steered: Callable[..., Steered]) -> None:
    nodes.silent |= {"a", "b", "c"}
    one = steered(((0.0, {(0, OLD): 1}),))
    one.adopt()
    one.run(PLACED_S + OLD.node.boot_s - 2)
    assert len(nodes.launched) == 1
    one.run(6)
    assert one.said("no agent after 80 s")


def test_what_fits_no_slot_or_takes_other_keys_is_ended(
    nodes: Nodes, steered: Callable[..., Steered], tmp_path: Path
) -> None:
    one = steered()
    one.adopt()
    one.run(5)
    keyed = steered(NOTHING, keys=KeysFile(tmp_path / "keys", "digest"))
    assert [told.startswith("ended: of no service") for _, told in keyed.adopt()] == [True, True]
    keyed.run(4)
    assert nodes.agents == {}
    assert "--api-keys" in keyed.backend._order("x", FIRST, nodes.hosts["a"]).words


def test_replicas_on_other_cores_than_the_file_s_are_ended(nodes: Nodes, steered: Callable[..., Steered]) -> None:
    one = steered()
    one.adopt()
    one.run(5)
    other = steered(NOTHING, with_slots(MADE, 1, ((0,), (1,))))
    assert [told.startswith("ended: of no service, variant, slot, cores") for _, told in other.adopt()] == [True, True]


def test_a_dry_run_finds_replicas_and_starts_and_ends_none(
    nodes: Nodes, steered: Callable[..., Steered], tmp_path: Path
) -> None:
    one = steered()
    one.adopt()
    one.run(5)
    dry = Dry(with_slots(MADE, 1, ((0,), (1,))), tmp_path, Driver(nodes))
    assert [told.partition(":")[0] for _, told in dry.adopt((KNOWN,), dry=True)] == ["ended", "ended"]
    dry = Dry(MADE, tmp_path, Driver(nodes))
    dry.adopt((KNOWN,), dry=True)
    assert [live.state for live in dry.live()] == ["ready", "ready"]
    assert dry.stop(Stop(dry.live()[0].name, "")).outcome == dry.start(FIRST).outcome == "applied"
    assert (len(nodes.launched), len(nodes.agents)) == (2, 2)
    nodes.hosts.clear()
    assert Dry(MADE, tmp_path, Driver(nodes)).start(FIRST).outcome == "unsupported"


def test_a_cluster_that_does_not_answer_is_told_and_what_runs_is_kept(
    nodes: Nodes, steered: Callable[..., Steered]
) -> None:
    one = steered()
    one.adopt()
    found = one.run(6)
    nodes.down = True
    one.run(3)
    assert one.errors == ["the cluster does not answer"] * 3
    answer = one.backend.stop(Stop(found[0].name, ""))
    assert (answer.outcome, answer.reason) == ("unsupported", "the cluster does not answer")
    nodes.down = False
    assert [live.state for live in one.run(2)] == ["ready", "ready"]


@pytest.mark.parametrize("now", [False, True])
def test_replicas_end_with_their_orchestrator(nodes: Nodes, steered: Callable[..., Steered], now: bool) -> None:
    one = steered()
    one.adopt()
    one.run(6)
    began = nodes.now
    one.backend.close(one.passes, now)
    assert nodes.agents == {}
    assert (nodes.now - began >= 2) is not now, "requests have their time"


def test_a_close_without_a_cluster_comes_to_an_end(nodes: Nodes, steered: Callable[..., Steered]) -> None:
    one = steered()
    one.adopt()
    one.run(6)
    nodes.down = True
    one.backend.close(one.passes)
    assert len(nodes.agents) == 2, "the next orchestrator finds them"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_happens_the_target_runs_once_it_is_calm(
    nodes: Nodes, steered: Callable[..., Steered], seed: int
) -> None:
    draw = random.Random(seed)
    events: list[Callable[[], object]] = [
        lambda: nodes.remove(draw.choice(sorted(nodes.hosts))) if len(nodes.hosts) > 1 else None,
        lambda: nodes.node(f"n{len(nodes.launched)}-{nodes.now:.0f}"),
        lambda: setattr(nodes, "broken", draw.choice(["", "exit code 1"])),
        lambda: nodes.silent.add(draw.choice(sorted(nodes.hosts))),
        nodes.silent.clear,
        lambda: nodes.agents.pop(draw.choice([*nodes.agents, ""]), None),
        lambda: setattr(nodes, "down", not nodes.down),
    ]
    one = steered()
    one.adopt()
    for _ in range(40):
        draw.choice(events)()
        if draw.random() < 0.1 and not nodes.down:  # it is killed
            one = steered()
            one.adopt()
        one.run(1)
        taken = [each.order.noted.host for each in nodes.agents.values() if each.began_s <= nodes.now]
        assert len(taken) == len(set(taken)), "no node holds two"
    nodes.down, nodes.broken = False, ""
    nodes.silent.clear()
    nodes.node("x")
    nodes.node("y")
    nodes.now += 100  # the longest wait after failed starts, and for what no node took
    one = steered()
    one.adopt()
    assert states(one.run(16)) == [("fast-0/0", "ready", 8), ("fast-1/0", "ready", 8)], one.lines
    assert len(nodes.agents) == 2


def test_what_ray_cannot_is_unsupported_with_its_reason(steered: Callable[..., Steered]) -> None:
    backend = steered().backend
    answers = [
        backend.switch(Switch("r", OLD, "")),
        backend.set_clock(SetClock("fast-0", 1000, "")),
        backend.set_power(SetPower("fast-0", 100, "")),
        backend.set_partition(SetPartition("fast-0", ("1g.10gb",), "")),
        backend.stop(Stop("none", "")),
        backend.route(Route("none", True, "")),
        backend.start(FIRST),
    ]
    assert all(one.outcome == "unsupported" and one.reason for one in answers)
    with pytest.raises(InputError, match="class gpu has partitions"):
        checked(fleet(service(), nodes=(divided_node(),)))


# --- places ----------------------------------------------------------------------------------------------------------


def test_a_node_keeps_its_host_while_that_lives() -> None:
    hosts = [Host(name, name, {"llmbuild_fast": 1.0}) for name in "abc"]
    assert placed(MADE, hosts, {}) == {"fast-0": "a", "fast-1": "b"}
    assert placed(MADE, hosts, {"fast-1": "a"}) == {"fast-1": "a", "fast-0": "b"}
    assert placed(MADE, hosts[1:], {"fast-0": "a", "fast-1": "b"}) == {"fast-1": "b", "fast-0": "c"}
    assert placed(with_slots(MADE, 2), hosts, {}) == {}, "too few slots"
    assert placed(MADE, [Host("a", "a", {"llmbuild_slow": 9.0})], {}) == {}


def test_a_slot_takes_its_cores_or_its_share_of_the_gpus() -> None:
    kind, plain, gpus = MADE.nodes[0], Host("a", "a", {}), Host("b", "b", {"GPU": 4.0})
    assert needs_of(kind, plain) == Needs("llmbuild_fast")
    assert needs_of(replace(kind, cores=((0, 1), (2, 3))), plain) == Needs("llmbuild_fast", cpus=2)
    assert [needs_of(replace(kind, slots=n), gpus) for n in (1, 2, 8)] == [
        Needs("llmbuild_fast", gpus=4),
        Needs("llmbuild_fast", gpus=2),
        Needs("llmbuild_fast", gpus=0.5),
    ]
    assert needs_of(replace(kind, slots=2), plain) == (
        "class fast has 2 slots and no cores, and node a no GPUs to divide"
    )


# --- agents ----------------------------------------------------------------------------------------------------------

NOTED = Noted("s", "v", 8, 0, "fast-0", 0, "", "a")


class Stub(Agent):
    """Runs a stub in place of `llmbuild`."""

    def _words(self) -> list[str]:
        return [sys.executable, *self._order.words]


def order(*words: str, version: str = llmbuild.__version__) -> Order:
    return Order("r", words, NOTED, 5.0, 60.0, version)


def until_state(agent: Agent, *wanted: str) -> str:
    until = time.monotonic() + 20
    while agent.told().state not in wanted and time.monotonic() < until:
        time.sleep(0.02)
    return agent.told().state


def test_an_agent_tells_when_its_server_is_ready_and_goes_when_it_has_drained() -> None:
    gone = threading.Event()
    agent = Stub(order(str(Path(__file__).parents[1] / "support/stub_server.py")), gone.set)
    assert until_state(agent, "ready", "dead") == "ready", agent.told()
    told = agent.told()
    assert (told.noted, told.url.startswith("http://127.0.0.1:")) == (NOTED, True)
    agent.stop()
    assert agent.told().state == "draining"
    assert gone.wait(10)
    with pytest.raises(ProcessLookupError):
        os.kill(told.pid, 0)


def test_an_agent_tells_how_its_server_ended() -> None:
    agent = Stub(order("-c", "import sys; print('no catalog', file=sys.stderr); sys.exit(2)"))
    assert until_state(agent, "dead") == "dead"
    assert agent.told().told == "exit code 2: no catalog"


def test_an_agent_of_another_version_does_not_start() -> None:
    with pytest.raises(InputError, match="install the same on all"):
        Agent(order(version="0.0.1"))


def test_an_agent_runs_llmbuild_on_the_cores_of_its_slot() -> None:
    agent = object.__new__(Agent)
    agent._order = replace(order("serve", "m"), noted=replace(NOTED, cores=(0, 3)))
    pinned, cores, *words = agent._words()[-5:]
    assert (Path(pinned).name, cores, words) == ("pinned.py", "0,3", ["llmbuild", "serve", "m"])
    agent._order = order("serve", "m")
    assert agent._words()[-3:] == ["llmbuild", "serve", "m"]


def test_the_seam_needs_no_ray() -> None:
    code = "import sys; from llmbuild.fleet.ray import agent, backend, client; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
