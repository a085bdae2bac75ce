from __future__ import annotations

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild import digest
from llmbuild.build.freshness import Freshness, build_key, recognized
from llmbuild.build.job import Job
from llmbuild.build.jobs import jobs_of
from llmbuild.build.plan import changes, explained
from llmbuild.build.request import BuildRequest
from llmbuild.catalog.known import Known
from llmbuild.catalog.names import Owner
from llmbuild.catalog.place import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.runtime import host, machines, ranking, reader
from llmbuild.runtime.choose import choose
from llmbuild.runtime.model import host_facts
from llmbuild.spec.machine import Conditions, machine_from, memory_class
from llmbuild.spec.recipe import Budget
from llmbuild.spec.slo import parse_slo
from scripts.bench import synthetic
from tests.conftest import Project

EARLIER: dict[str, Any] = {
    "chip": "NVIDIA H200, driver 550.54.15; AMD EPYC 9354 (family 25 model 17)",
    "arch": "x86_64",
    "cores": 32,
    "memory_gib": 252,
    "system": "Linux 6.8.0-45-generic",
    "hypervisor": "",
    "governor": "performance",
    "runtime": "3.13.0",
    "features": ["avx2", "fma", "constant_tsc", "ibrs"],
}
"""A record as earlier versions wrote it."""


@pytest.mark.parametrize(
    "change",
    [
        {"system": "Linux 6.8.0-47-generic"},
        {"governor": "powersave"},
        {"chip": EARLIER["chip"].replace("550.54.15", "550.90.07")},
        {"memory_gib": 251},
        {"features": ["fma", "avx2", "its_no", "bhi_ctrl"]},
    ],
)
def test_what_changes_no_speed_is_the_same_machine(change: dict[str, Any]) -> None:
    assert machine_from({**EARLIER, **change}) == machine_from(EARLIER)


@pytest.mark.parametrize(
    "change",
    [
        {"chip": "AMD EPYC 9354 (family 25 model 17)"},
        {"chip": EARLIER["chip"].replace("550.54.15", "570.86.15")},
        {"cores": 16},
        {"memory_gib": 124},
        {"system": "Linux 6.11.0"},
        {"hypervisor": "QEMU"},
        {"runtime": "3.14.0"},
        {"features": ["avx2", "fma", "avx512f"]},
    ],
)
def test_what_changes_speed_is_another_machine(change: dict[str, Any]) -> None:
    assert digest.of(machine_from({**EARLIER, **change})) != digest.of(machine_from(EARLIER))


def test_a_record_of_now_is_its_own_form() -> None:
    here = host.machine()
    assert machine_from(digest.plain(here)) == here


@given(st.integers(0, 1 << 16))
def test_a_class_of_memory_is_a_size_and_is_its_own_class(gib: int) -> None:
    found = memory_class(gib)
    assert memory_class(found) == found
    assert found <= memory_class(gib + 1)
    assert found == 0 if gib == 0 else gib / 1.12 <= found <= max(1, 2 * gib)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536])
def test_a_kernels_share_leaves_memory_in_its_class(size: int) -> None:
    assert {memory_class(round(size * share)) for share in (0.96, 0.98, 1.0)} == {size}


def test_a_pinned_process_is_the_same_machine_and_its_readings_are_marked() -> None:
    free = Conditions("Linux 6.8.0", "", 1 << 30, "performance", 8, "")
    held = replace(free, pinned="0,1", governor="powersave")
    assert free.notes() == {"conditions": "Linux 6.8.0, 1048576 kB of memory, governor performance"}
    assert held.notes() == {
        "conditions": "Linux 6.8.0, 1048576 kB of memory, governor powersave, pinned to CPU 0,1 of 8",
        "held back": "pinned to CPU 0,1 of 8, the clock follows the governor powersave",
    }


def test_conditions_tell_the_governor_of_every_cpu(tmp_path: Path) -> None:
    for cpu, name in enumerate(("schedutil", "performance", "schedutil")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(f"{name}\n")
    assert host.conditions(tmp_path).governor == "performance schedutil"


# --- catalogs of earlier versions --------------------------------------------------------------------------------

KEPT = Path(__file__).parents[1] / "databases"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A catalog whose rows were measured on this machine, which it knows by a record of an earlier version."""
    here = host.machine()
    body = {**digest.plain(here), "system": f"{here.system}.1-old", "governor": "performance"}
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.executescript((KEPT / "schema-5.sql").read_text())
        connection.execute("PRAGMA foreign_keys=OFF")
        (old,) = connection.execute("SELECT digest FROM machine").fetchone()
        connection.execute("UPDATE machine SET digest = ?, body = ?", (digest.of(body), json.dumps(body)))
        for table in ("measurement", "standing"):
            connection.execute(f"UPDATE {table} SET machine = ? WHERE machine = ?", (digest.of(body), old))
    return tmp_path


def job_of(project: Project) -> Job:
    (make,) = jobs_of(BuildRequest(recipes=(project.recipe,)))
    return make()


def model_of(catalog: Path) -> str:
    return reader.models(catalog)[0]


def test_rows_of_an_earlier_version_are_this_machines(earlier: Path) -> None:
    rows = reader.variants(earlier, everything=True)
    assert {row["machine_digest"] for row in rows} == {digest.of(host.machine())}
    assert {row[machines.STORED] for row in rows} != {digest.of(host.machine())}
    slo, facts = parse_slo([], "tpot_s"), host_facts()
    assert ranking.leaders(earlier, model_of(earlier), None, None, slo, facts.machine, 9)
    told = [c.reason for c in choose(rows, facts, slo).candidates]
    assert not any("another machine" in reason for reason in told)


def test_rows_of_another_kernel_line_are_another_machines(earlier: Path) -> None:
    with sqlite3.connect(earlier / FILE) as connection:
        connection.execute("UPDATE machine SET body = json_set(body, '$.system', 'Linux 0.1')")
    rows = reader.variants(earlier, everything=True)
    assert digest.of(host.machine()) not in {row["machine_digest"] for row in rows}


def test_a_damaged_record_of_a_machine_is_another_machine(earlier: Path) -> None:
    with sqlite3.connect(earlier / FILE) as connection:
        connection.execute("UPDATE machine SET body = json_set(body, '$.cores', 'many')")
    rows = reader.variants(earlier, everything=True)
    assert {row["machine_digest"] for row in rows} == {row[machines.STORED] for row in rows}


@pytest.fixture
def written_before(project: Project, tmp_path: Path) -> Project:
    """A project whose one trial was made and raced by an earlier version: another digest of the machine, and scope."""
    folder = shutil.copytree(project.folder, tmp_path / "p", ignore=shutil.ignore_patterns("catalog"))
    made = Project(folder, folder / project.recipe.name, folder / "catalog", folder / "model")
    here = host.machine()
    body = {**digest.plain(here), "system": f"{here.system}.1-old", "governor": "performance"}
    job = replace(job_of(made), known_as=digest.of(body))
    catalog = Catalog(made.catalog)
    try:
        catalog.register(job.registered)
        owner = Owner("tiny", job.registered.target_digest, job.registered.toolchain_digest, job.lineage, None)
        one = synthetic.Made("default", default=True)
        standing = synthetic._record(catalog, one, 0, job.scope, owner, job.registered)
        catalog.record_standings("tiny", owner.target, digest.of(body), [standing])
        state = {"seconds": 1e6, "raced": True, "ended": "done"}
        catalog.record_build(build_key(job, 0), "tiny", job.scope, job.scope_inputs, **state)
    finally:
        catalog.close()
    with sqlite3.connect(made.catalog / FILE) as connection:
        connection.execute("UPDATE machine SET body = ?", (json.dumps(body),))
    return made


def test_a_catalog_of_an_earlier_version_has_nothing_to_build_on_the_same_machine(written_before: Project) -> None:
    job, known = job_of(written_before), Known(written_before.catalog)
    assert changes(job, known) == "changed: machine"
    found = recognized(job, known)
    assert changes(found, known) == ""
    assert Freshness(found, known, Budget(trials=1, seconds=60.0), 0).reason() == ""


def test_another_machine_is_told_by_field(written_before: Project) -> None:
    job = job_of(written_before)
    other = replace(job, machine=replace(job.machine, cores=99, features=(*job.machine.features, "sse9")))
    known = Known(written_before.catalog)
    fields = {"machine.cores": [job.machine.cores, 99], "machine.features.sse9": [None, True]}
    assert explained(recognized(other, known), known) == fields
    assert changes(recognized(other, known), known) == "changed: machine.cores, machine.features.sse9"
