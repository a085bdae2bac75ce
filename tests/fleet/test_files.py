"""The fleet file: what ships is read, and every mistake is told with file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmbuild.errors import CatalogError, InputError
from llmbuild.fleet.policies.named import POLICIES
from llmbuild.fleet.profiles.gather import profiles_of
from llmbuild.spec.files.fleet import read_fleet
from llmbuild.spec.fleet import Fleet

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "fleets").glob("*.yaml"))
TEXT = """\
nodes:
  - class: a
    device: H100-SXM-80GB
    count: 2
    memory: 80GB
    watts: {bare: 75, parked: 113, basis: published, source: here}
services:
  - model: llama-3-8b
    rate: 2
    classes:
      - {name: chat, prompt: 500, output: 100, slo: [ttft_s_p99<=1, tpot_s<=0.05]}
"""


def read(folder: Path, text: str) -> Fleet:
    path = folder / "fleet.yaml"
    path.write_text(text)
    return read_fleet(path, tuple(POLICIES))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_fleet_that_ships_is_read_and_has_profiles(path: Path, tmp_path: Path) -> None:
    made = read_fleet(path, tuple(POLICIES))
    if any(node.machine for node in made.nodes):
        with pytest.raises(CatalogError, match="build one with `llmbuild build`"):
            profiles_of(made, tmp_path)
        return
    found = profiles_of(made, tmp_path)
    assert {p.model for p in found} == {s.model for s in made.services}
    assert all(p.source for p in found)


def test_a_short_fleet_has_its_defaults(tmp_path: Path) -> None:
    made = read(tmp_path, TEXT)
    assert (made.name, made.objective, made.policy, made.period_s) == ("fleet", "energy", "adaptive", 10.0)
    assert (made.nodes[0].slots, made.nodes[0].memory_bytes, made.nodes[0].nodes) == (1, 80e9, ("a-0", "a-1"))
    kind = made.services[0].classes[0]
    assert (kind.ttft_s, kind.tpot_s, made.services[0].attainment) == (1.0, 0.05, 0.99)


def test_electricity_has_series_by_hours_of_the_day(tmp_path: Path) -> None:
    text = "electricity: {carbon: {0: 400, 11: 180.5, 17: 390}, begins: 8, basis: published, source: here}\n"
    tariff = read(tmp_path, TEXT + text).tariff
    assert tariff is not None and tariff.carbon is not None and tariff.price is None
    assert (tariff.carbon.hours, tariff.carbon.values) == ((0, 11, 17), (400, 180.5, 390))
    assert (tariff.begins_s, tariff.basis, tariff.source) == (8 * 3600, "published", "here")
    assert read(tmp_path, TEXT).tariff is None


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            "price: {7: 0.3, 21: 0.2}, basis: published, source: here",
            "price begins at hour 7: say what holds from hour 0",
        ),
        ("basis: published, source: here", "give `carbon`, grams for a kWh, or `price` of a kWh"),
        ("price: {0: 0.3, 24: 0.2}, basis: published, source: here", "less than 24"),
        ("carbon: {0: -1}, basis: published, source: here", "greater than or equal to 0"),
        ("carbon: {0: 100}, source: here", "basis"),
    ],
)
def test_electricity_that_says_too_little_is_refused(tmp_path: Path, keys: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read(tmp_path, f"{TEXT}electricity: {{{keys}}}\n")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("count: 2", "count: 0", r"fleet.yaml:4 \$.nodes\[0\].count: "),
        ("count: 2", "number: 2", r"\$.nodes\[0\].number: unknown key"),
        ("memory: 80GB", "memory: 80", r":5 \$.nodes\[0\].memory: 80 is no size: write 640kB, 16GB"),
        ("parked: 113", "parked: 50", r":6 .*parked, 50 W, is below bare, 75 W"),
        ("basis: published", "basis: guessed", r"watts.basis: .*'measured', 'published' or 'estimated'"),
        ("device: H100-SXM-80GB", "memory: 80GB", r"fleet.yaml:5 duplicate key 'memory'"),
        ("device: H100-SXM-80GB", "slots: 2", r"name either `device`, .*or `machine`"),
        ("ttft_s_p99<=1", "ttft_s_p95<=1", r"asks for 95 % of the requests, attainment for 0.99: they must agree"),
        ("ttft_s_p99<=1", "quality_kl<=1", r":11 .*is no SLO of a request"),
        ("ttft_s_p99<=1", "tpot_s<=1", r"a metric has two limits"),
        ("name: chat,", "name: chat, share: 0.5,", r"the shares of its classes are 0.5 together: they must be 1"),
        ("rate: 2", "rate: -2", r":9 \$.services\[0\].rate: "),
        ("services:", "policy: clever\nservices:", r":7 \$.policy: no policy 'clever': there are static-peak"),
        ("services:", "objective: cost\nservices:", r"objective cost needs the price_per_h"),
        ("services:", "workloads: []\nservices:", r"a recipe, not a fleet"),
    ],
)
def test_a_mistake_is_told_with_its_place(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert old in TEXT
    with pytest.raises(InputError, match=told):
        read(tmp_path, TEXT.replace(old, new))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as told:
        read(tmp_path, TEXT.replace("count: 2", "count: 0").replace("rate: 2", "rate: none"))
    assert len(str(told.value).splitlines()) == 2


LOCAL = TEXT.replace("device: H100-SXM-80GB", "machine: host").replace(
    "memory: 80GB", "memory: 80GB\n    cores: [[0], [1, 2]]"
)


def test_parts_of_this_machine_have_cores_and_profiles_of_their_own(tmp_path: Path) -> None:
    made = read(tmp_path, LOCAL.replace("[1, 2]", "[1]") + "actuators: [set_clock, set_clock]\n")
    kind = made.nodes[0]
    assert (kind.device, kind.machine, kind.cores, made.actuators) == ("host/1", True, ((0,), (1,)), ("set_clock",))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LOCAL, "the slots of a class are equal"),
        (LOCAL.replace("[[0], [1, 2]]", "[[0]]"), "cores has 1 lists, and there are 2 nodes with slots: 1"),
        (LOCAL.replace("[1, 2]", "[0]"), "core 0 is in two slots"),
        (LOCAL.replace("[1, 2]", "[-1]"), r"cores\[1\]\[0\]: "),
        (LOCAL.replace("[1, 2]", "[1]") + "actuators: [reboot]\n", "'set_clock', 'set_power' or 'set_partition'"),
    ],
)
def test_a_mistake_in_the_parts_of_a_machine_is_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read(tmp_path, text)


DIVIDED = TEXT.replace("memory: 80GB", "memory: 80GB\n    partitions: {gpu: H100-80GB, change: operator}")


def test_a_class_with_partitions_has_the_layouts_of_its_gpu_and_is_undivided_at_first(tmp_path: Path) -> None:
    made = read(tmp_path, DIVIDED)
    found = made.nodes[0].partitions
    assert found is not None
    assert (len(found.layouts), found.now.name, round(found.change.seconds)) == (28, "7g.80gb", 66)
    assert made.layouts(made.nodes[0]) == (found.now,)
    allowed = read(tmp_path, DIVIDED + "actuators: [set_partition]\n")
    assert allowed.layouts(allowed.nodes[0]) == found.layouts


def test_layouts_may_be_listed_in_any_order(tmp_path: Path) -> None:
    listed = "layouts: [[2g.20gb, 4g.40gb], [3g.40gb, 3g.40gb]], now: [3g.40gb, 3g.40gb]"
    found = read(tmp_path, DIVIDED.replace("gpu: H100-80GB", f"gpu: H100-80GB, {listed}")).nodes[0].partitions
    assert found is not None
    assert [each.name for each in found.layouts] == ["4g.40gb + 2g.20gb", "2x 3g.40gb"]
    assert found.now == found.layouts[1]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("change: operator", "change: soon", r":6 \$.nodes\[0\].partitions.change: .*'direct' or 'operator'"),
        ("H100-80GB,", "H100,", r"partitions.gpu: .*'H100-80GB' or 'H200-141GB'"),
        ("H100-80GB,", "H100-80GB, now: [9g.90gb],", r"it has no slice 9g.90gb, there are 7g.80gb, 4g.40gb"),
        (
            "H100-80GB,",
            "H100-80GB, layouts: [[3g.40gb, 4g.40gb, 1g.10gb]],",
            r":6 .*\[3g.40gb, 4g.40gb, 1g.10gb\] is no layout of H100-80GB: it takes 8 compute slices, there are 7",
        ),
        (
            "H100-80GB,",
            "H100-80GB, layouts: [[1g.20gb, 1g.20gb, 1g.20gb, 1g.20gb, 1g.20gb]],",
            "it takes 10 memory slices, there are 8",
        ),
        ("H100-80GB,", "H100-80GB, layouts: [[3g.40gb, 2g.20gb, 1g.20gb, 1g.20gb]],", "10 memory slices, there are 8"),
        ("H100-80GB,", "A100-40GB,", "memory is 80GB, and A100-40GB has 42.14GB"),
        (
            "count: 2",
            "count: 2\n    clocks: [{mhz: 8, decode_time: 1, prompt_time: 1, power: 1, basis: measured, source: x}]",
            "share one clock",
        ),
    ],
)
def test_a_mistake_in_partitions_is_told_with_what_is_wrong(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert old in DIVIDED
    with pytest.raises(InputError, match=told):
        read(tmp_path, DIVIDED.replace(old, new))
