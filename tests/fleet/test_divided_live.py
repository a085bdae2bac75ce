"""Layouts in the live loop: a node is drained, divided and filled; what is denied or unsupported is told once."""

from __future__ import annotations

import pytest

from llmbuild.fleet.actuators.interface import SetPartition, Start, slots_of
from llmbuild.spec.fleet import Fleet
from tests.fleet.test_divided import asked
from tests.fleet.test_divided_simulated import on
from tests.fleet.test_loop import Steered
from tests.support.fleets import divided_node
from tests.support.live_fleets import FakeBackend


def steered(made: Fleet, divides: bool) -> Steered:
    """Return a loop that wants one undivided GPU at first, and three halves after 20 s."""
    whole, half = on(made, "7g.80gb"), on(made, "3g.40gb")
    at = Steered(made, (0.0, {(0, whole): 1}), (20.0, {(0, half): 3}))
    at.backend.divides = divides
    return at


def test_a_node_is_drained_divided_and_filled_and_its_service_is_never_without_a_replica() -> None:
    made, _ = asked(1.0, kind=divided_node(count=2))
    at = steered(made, divides=True)
    at.run(80.0, {(0, 0): 0.5})
    assert [one.point.part.name for one in at.serving if one.point.part] == ["3g.40gb"] * 3
    done = [one for one in at.backend.actions if isinstance(one, SetPartition)]
    assert [(one.node, one.layout[:1]) for one in done] == [("gpu-1", ("4g.40gb@0",)), ("gpu-0", ("3g.40gb@0",))]
    assert any("4g.40gb + 3g.40gb in place of 7g.80gb" in line for line in at.lines)


def test_nothing_starts_on_a_node_before_its_layout_is_there() -> None:
    made, _ = asked(1.0, kind=divided_node(count=2, change="operator"))
    at = steered(made, divides=True)
    at.run(84.0, {(0, 0): 0.5})
    assert [one.slot.node for one in at.backend.actions if isinstance(one, Start)] == ["gpu-0"]
    at.run(90.0, {(0, 0): 0.5})
    assert "gpu-1" in [one.slot.node for one in at.backend.actions if isinstance(one, Start)]


@pytest.mark.parametrize(
    ("allowed", "outcome", "told"),
    [(False, "denied", "add `actuators: [set_partition]`"), (True, "unsupported", "it does not")],
)
def test_what_must_or_can_not_be_divided_stays_and_is_told_once(allowed: bool, outcome: str, told: str) -> None:
    made, _ = asked(1.0, kind=divided_node(count=2), allowed=allowed)
    at = steered(made, divides=False)
    at.run(60.0)
    assert [one.point.part.name for one in at.serving if one.point.part] == ["7g.80gb"]
    lines = [line for line in at.lines if line.startswith("set_partition")]
    (line,) = lines
    assert f"-> {outcome} (" in line
    assert told in line


def test_the_slots_of_a_node_are_the_slices_of_its_layout() -> None:
    made, _ = asked(1.0, kind=divided_node(count=1, now=("4g.40gb", "3g.40gb")))
    assert [(slot.name, slot.part.name if slot.part else "") for slot in slots_of(made)] == [
        ("gpu-0/0", "4g.40gb"),
        ("gpu-0/1", "3g.40gb"),
    ]
    assert FakeBackend().divides is False
