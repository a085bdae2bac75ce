"""Profiles from the rows of a catalog that was built here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild.errors import InputError
from llmbuild.fleet.profiles.gather import profiles_of
from llmbuild.fleet.profiles.measured import absent, machine_of, measured
from llmbuild.runtime import host, reader
from llmbuild.spec.fleet import Fleet
from llmbuild.spec.load_curve import Work
from tests.conftest import Project
from tests.support.curves import curve
from tests.support.fleets import fleet, node, service


def of_machine(catalog: Path, active_w: float) -> Fleet:
    row = reader.variants(catalog, model="tiny")[0]
    kind = replace(node("here", 2), device=row["machine_digest"][:12], machine=True, active_w=active_w)
    return fleet(service("s", 1.0, model="tiny"), nodes=(kind,))


def test_rows_of_a_catalog_are_measured_profiles_up_to_their_batch(built: Project) -> None:
    made = of_machine(built.catalog, 30.0)
    found = measured(built.catalog, made.nodes, ["tiny"])
    rows = {row["variant"][:12]: row for row in reader.variants(built.catalog, model="tiny")}
    assert {p.variant for p in found} == set(rows)
    for each in found:
        row = rows[each.variant]
        assert (each.max_rows, each.decode_basis, each.power_basis) == (1, "measured", "measured")
        assert each.step.seconds(1, 0, 0) == pytest.approx(row["tpot_s"])
        assert each.step.seconds(0, 0, 8) == pytest.approx(row["ttft_s"])
        assert each.power is not None and each.power.rows_w(1.0) == 30.0


def test_what_a_catalog_does_not_have_is_absent(built: Project, tmp_path: Path) -> None:
    found = measured(built.catalog, of_machine(built.catalog, 30.0).nodes, ["tiny"])
    other = replace(found[0], variant="fp16")
    assert absent(built.catalog, [*found, other, replace(found[0], model="none")]) == [
        other,
        replace(found[0], model="none"),
    ]
    assert absent(tmp_path / "nowhere", found) == found


def test_energy_without_watts_is_refused_with_what_to_give(built: Project) -> None:
    with pytest.raises(InputError, match="`active` watts"):
        profiles_of(of_machine(built.catalog, 0.0), built.catalog)


def test_a_load_curve_makes_a_profile_of_many_rows(built: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    made = of_machine(built.catalog, 30.0)
    rows = reader.variants(built.catalog, model="tiny")
    known = curve(rows[0]["variant"], rows[0]["machine_digest"])
    monkeypatch.setattr(reader, "load_curves", lambda catalog, variants: [known])
    found = {p.variant: p for p in measured(built.catalog, made.nodes, ["tiny"])}
    mine = found.pop(rows[0]["variant"][:12])
    assert (mine.max_rows, mine.decode_basis, mine.error) == (16, "measured", 0.1)
    assert "load curve" in mine.source
    for work in (Work.of([(512, 1)]), Work.of([(512, 1)] * 16)):
        assert mine.step.seconds(work.decodes, work.context, 0) == pytest.approx(known.step_s(work), rel=1e-6)
    assert mine.step.seconds(0, 0, 512) == pytest.approx(known.step_s(Work.of([(0, 512)])), rel=1e-6)
    assert mine.kv_bytes_per_token > 0
    assert {each.max_rows for each in found.values()} <= {1}
    alone = {row["variant"][:12]: row["tpot_s"] for row in rows}
    for each in found.values():  # what was not measured under load is not the faster for it
        assert each.step.seconds(1, 0, 0) == pytest.approx(alone[each.variant] + known.turn_s)
        assert (each.decode_basis, "has none" in each.source) == ("estimated", True)


def test_a_slot_of_fewer_cores_has_times_that_are_scaled_and_no_measurement(built: Project) -> None:
    whole = of_machine(built.catalog, 30.0)
    kind = replace(whole.nodes[0], device=f"{whole.nodes[0].device}/1", cores=((0,), (1,)))
    full, part = (measured(built.catalog, [each], ["tiny"]) for each in (whole.nodes[0], kind))
    rows = {row["variant"][:12]: row["point"] for row in reader.variants(built.catalog, model="tiny")}
    for one, other in zip(full, part, strict=True):
        point = rows[one.variant]
        sync = point["driver"] == "local-sync"
        used = 1 if sync else int(point["workers"]) or host.machine_cores()
        assert other.step.seconds(1, 0, 0) == pytest.approx(one.step.seconds(1, 0, 0) * used)
        assert other.decode_basis == ("measured" if used == 1 else "estimated")
        assert (used > 1) == (f"measured on {used} cores, a slot has 1" in other.source)
    assert profiles_of(replace(whole, nodes=(kind,)), built.catalog) == tuple(part)


def test_this_machine_is_called_host(built: Project) -> None:
    kind = replace(of_machine(built.catalog, 30.0).nodes[0], device="host")
    assert machine_of(kind) == reader.variants(built.catalog, model="tiny")[0]["machine_digest"]
    assert {each.device for each in measured(built.catalog, [kind], ["tiny"])} == {"host"}
