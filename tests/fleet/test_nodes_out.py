"""Nodes that are taken out of service while a fleet runs: what is noted, what the loop does, and what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild.errors import InputError
from llmbuild.fleet.actuators.interface import Route, Start
from llmbuild.fleet.loop import Loop, unseen
from llmbuild.fleet.nodes_out import FILE, NodesOut
from tests.conftest import llmbuild
from tests.fleet.test_loop import EACH, OLD, SMALL, Watched
from tests.support.live_fleets import FakeBackend

FLEET = Path("recipes/fleets/local.yaml").resolve()
RATES = {(0, 0): EACH * 0.9}


def test_nodes_are_taken_out_and_given_back(tmp_path: Path) -> None:
    noted = NodesOut(tmp_path / "state")
    assert noted.read() == frozenset()
    assert noted.change(["a-0", "a-1"], []) == {"a-0", "a-1"} == noted.read()
    assert noted.change(["b-0"], ["a-1"]) == {"a-0", "b-0"} == NodesOut(tmp_path / "state").read()
    assert [file.name for file in (tmp_path / "state").iterdir()] == [FILE]


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]"])
def test_a_file_that_names_no_nodes_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(InputError, match="remove it"):
        NodesOut(tmp_path).read()


class Served:
    """A loop over two nodes, of which some are out, and what it tells."""

    def __init__(self, wanted: int = 1) -> None:
        self.backend, self.lines, self.out = FakeBackend(), list[str](), set[str]()
        self.broken = ""
        self.policy = Watched((0.0, {(0, OLD): wanted}))
        self.loop = Loop(SMALL, self.policy, self.backend, self.lines.append, out=self.named)
        self.now = 0.0

    def named(self) -> set[str]:
        if self.broken:
            raise InputError(self.broken)
        return self.out

    def run(self, until: float) -> list[str]:
        """Return the nodes whose replicas take requests at the end; there is always one once there was."""
        nodes: list[str] = []
        while self.now <= until:
            self.backend.now = self.now
            found = self.loop.beat(self.now, replace(unseen(SMALL), rates=RATES))
            serving = [one.slot.node for one in found if one.state == "ready"]
            assert serving or not nodes, f"nobody serves at {self.now}"
            nodes = serving
            self.now += 0.25
        return nodes


def test_what_runs_on_a_node_that_goes_out_is_replaced_before_it_is_drained() -> None:
    at = Served()
    assert at.run(20.0) == ["fast-0"]
    at.out = {"fast-0"}
    assert at.run(60.0) == ["fast-1"]
    assert [type(one).__name__ for one in at.backend.actions] == ["Start", "Start", "Route", "Stop"]
    assert "node     fast-0 is out of service" in at.lines
    (route,) = (one for one in at.backend.actions if isinstance(one, Route))
    assert route.why == "its node is out of service; the others take the load of the moment, 90% of theirs"


def test_nothing_starts_on_a_node_that_is_out_until_it_is_given_back() -> None:
    at = Served(wanted=2)
    at.out = {"fast-0"}
    assert at.run(30.0) == ["fast-1"]
    at.out = set()
    assert sorted(at.run(60.0)) == ["fast-0", "fast-1"]
    assert [one.slot.node for one in at.backend.actions if isinstance(one, Start)] == ["fast-1", "fast-0"]
    assert at.lines.count("node     fast-0 is in service") == 1


def test_without_room_elsewhere_a_node_is_drained_and_it_is_said_what_is_missing() -> None:
    at = Served(wanted=2)
    assert sorted(at.run(20.0)) == ["fast-0", "fast-1"]
    at.out = {"fast-0"}
    assert at.run(40.0) == ["fast-1"]
    (route,) = (one for one in at.backend.actions if isinstance(one, Route))
    assert route.why.startswith("its node is out of service; the others take the load of the moment")


def test_the_policy_is_asked_at_once_and_told_of_a_node_that_is_out() -> None:
    at = Served()
    at.run(20.0)
    before = len(at.policy.seen)
    at.out = {"fast-1"}
    at.run(at.now + 0.5)
    assert [dict(one.failed) for one in at.policy.seen[before:]] == [{"fast": 1}]


def test_a_file_that_cannot_be_read_ends_no_fleet_and_changes_nothing() -> None:
    at = Served()
    at.out = {"fast-0"}
    at.run(20.0)
    at.broken, at.out = "nodes-out.json: remove it", set()
    assert at.run(60.0) == ["fast-1"]
    assert at.lines.count("error    nodes-out.json: remove it") == 1


def test_names_of_no_node_of_the_fleet_are_nothing_to_it() -> None:
    at = Served()
    at.out = {"slow-7"}
    assert at.run(20.0) == ["fast-0"]
    assert not any("slow-7" in line for line in at.lines)


def test_the_command_takes_nodes_out_by_name_and_by_class(tmp_path: Path) -> None:
    words = "nodes", FLEET, "--state", tmp_path
    assert llmbuild(*words, "--out", "core-1").stdout.split() == [
        *("class", "in", "service", "out", "which", "are", "out"),
        *("core", "1", "1", "core-1"),
    ]
    found = json.loads(llmbuild(*words, "--out", "core", "--json").stdout)
    assert found == [{"node": f"core-{i}", "class": "core", "in_service": False} for i in range(2)]
    found = json.loads(llmbuild(*words, "--back", "core-0", "--json").stdout)
    assert [one["in_service"] for one in found] == [True, False]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--out", "core-2"), "--out core-2: no such node or class: there are core-0 to core-1"),
        (("--out", "core", "--back", "core-1"), "core-1 is in --out and in --back"),
    ],
)
def test_a_wrong_node_is_told(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = llmbuild("nodes", FLEET, "--state", tmp_path, *words)
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert not list(tmp_path.iterdir())
