"""What placing operators apart would save for the services of a fleet, and why it may not be known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmbuild.cli.fleet import plan
from llmbuild.fleet.operators.services import Compared, Unknown, by_services
from llmbuild.report.operators import operators_json, operators_table
from llmbuild.spec.fleet import Fleet, NodeClass, RequestClass, Service
from tests.fleet.test_files import TEXT

H100, A100 = "H100-SXM-80GB", "A100-SXM-80GB"
CHAT = RequestClass("chat", 1.0, 1155, 211, 1.0, ttft_s=2.0, tpot_s=0.1)


def node(name: str, device: str = H100, count: int = 6, slots: int = 2) -> NodeClass:
    return NodeClass(name, count, device, False, slots, 80e9, 300.0, 75.0, 113.0, 0.0, 410.0, "estimated")


def fleet(model: str, *nodes: NodeClass, rate: float = 20.0) -> Fleet:
    return Fleet("f", nodes, (Service("s", model, rate, (CHAT,)),))


def test_a_model_that_fits_on_no_device_saves_against_divided_matrices_alone() -> None:
    (found,) = by_services(fleet("qwen3-32b", node("a")))
    assert isinstance(found, Compared)
    assert (found.replicas.feasible, found.models.feasible, found.link.name, found.within) == (False, True, "NVLink", 2)
    assert found.operators.devices <= found.models.devices
    assert {choice.devices for choice, _ in (*found.models.cells, *found.operators.cells)} == {2}
    assert found.saved_devices == 1 - found.operators.devices / found.models.devices
    assert found.saved_joules is not None and 0 < found.saved_joules < 0.2  # of equally many devices
    assert found.joules(found.operators) == pytest.approx(found.operators.watts / (20.0 * 211))
    assert found.joules(found.replicas) is None
    told = operators_table([found])
    assert "published, norms and activations estimated; watts estimated" in told
    assert "nothing here serves them apart" in told
    (body,) = operators_json([found])
    assert (body["known"], body["replicas"], body["basis"]) == (True, None, found.basis)
    assert body["joules_saved"] == found.saved_joules


def test_a_small_model_saves_nothing() -> None:
    (found,) = by_services(fleet("llama-3-8b", node("a")))
    assert isinstance(found, Compared)
    assert (found.saved_devices, found.saved_joules) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (fleet("gpt-9", node("a")), "no operator table of model gpt-9: there are llama-3-8b, qwen3-14b,"),
        (
            fleet("llama-3-8b", node("a", "L40S-48GB")),
            f"no operator table of device L40S-48GB: there are {A100}, {H100}",
        ),
        (fleet("llama-3-8b", node("a", count=0)), "the fleet has no node of this class"),
        (fleet("llama-3-8b", node("a"), rate=0.0), "it has no requests"),
        (
            fleet("llama-3-8b", node("a", count=1), rate=1e3),
            "its 2 devices do not take 1e+03 requests/s within the SLOs",
        ),
    ],
)
def test_what_is_not_known_is_told_with_its_reason(made: Fleet, why: str) -> None:
    (found,) = by_services(made)
    assert isinstance(found, Unknown)
    assert found.reason.startswith(why)
    assert operators_table([found]) == f"operators of s on a: not known: {found.reason}"
    assert operators_json([found]) == [{"service": "s", "node": "a", "known": False, "reason": found.reason}]


def test_a_cell_stays_within_a_node_unless_nodes_have_one_device_each() -> None:
    alone, several = by_services(fleet("llama-3-8b", node("one", count=2, slots=1), node("two", count=1, slots=2)))
    assert isinstance(alone, Compared) and isinstance(several, Compared)
    assert (alone.link.name, alone.within) == ("400 Gb/s", 2)
    assert (several.link.name, several.within) == ("NVLink", 2)


def test_a_plan_tells_operators_where_it_is_asked_for_them(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    plain, asked = (
        CliRunner().invoke(plan, [str(path), "--json", *more], catch_exceptions=False)
        for more in ((), ("--operators",))
    )
    assert "operators" not in json.loads(plain.stdout)
    (found,) = json.loads(asked.stdout)["operators"]
    assert (found["service"], found["node"], found["devices_saved"]) == ("llama-3-8b", "a", 0.0)
    text = CliRunner().invoke(plan, [str(path), "--operators"]).stdout
    assert "devices saved" in text
