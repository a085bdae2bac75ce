"""Limits of this machine for catalogs of tests, whose builds then do not take seconds to measure them."""

from __future__ import annotations

from pathlib import Path

from llmbuild import digest
from llmbuild.catalog import tables as t
from llmbuild.catalog.writer import Catalog
from llmbuild.profiler.roofline import Rates, Roofline
from llmbuild.runtime import host
from llmbuild.spec.measurement import Reading


def give_limits(folder: Path) -> None:
    """Write round limits into a catalog, which is made where it is not there; `test_roofline` measures real ones."""
    machine, reading = host.machine(), Reading(1e11, 1e11, 1e11, ())
    rates = Rates(1, reading, reading, None)
    name = digest.of(machine)
    catalog = Catalog(folder)
    try:
        with catalog.session(write=True) as session:
            session.add(t.MachineRow(digest=name, name=machine.describe(), body=digest.plain(machine)))
        catalog.record_limits(name, Roofline(rates, rates, 1 << 28, ("written by a test",)))
    finally:
        catalog.close()
