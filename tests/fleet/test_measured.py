"""Profiles from the rows of a catalog that was built here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmbuild.errors import InputError
from llmbuild.fleet.profiles.gather import profiles_of
from llmbuild.fleet.profiles.measured import measured
from llmbuild.runtime import reader
from llmbuild.spec.fleet import Fleet
from tests.conftest import Project
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


def test_energy_without_watts_is_refused_with_what_to_give(built: Project) -> None:
    with pytest.raises(InputError, match="`active` watts"):
        profiles_of(of_machine(built.catalog, 0.0), built.catalog)
