from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from llmbuild.catalog import schema
from llmbuild.catalog.known import looked_at
from llmbuild.catalog.schema import FILE, MIGRATIONS, SCHEMA_VERSION, open_engine
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import NoVariant
from llmbuild.runtime import ranking, reader
from llmbuild.runtime.host import runtime_version
from llmbuild.runtime.model import pick
from llmbuild.spec.slo import parse_slo

KEPT = Path(__file__).parents[1] / "databases"
VERSIONS = sorted(int(p.name[:4]) for p in MIGRATIONS.glob("[0-9]*.py"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_kept_database_of_every_schema_opens_and_keeps_its_rows(version: int, tmp_path: Path) -> None:
    kept = KEPT / f"schema-{version}.sql"
    assert kept.is_file(), f"keep one: python scripts/keep_database.py {version}"
    connection = sqlite3.connect(tmp_path / FILE)
    connection.executescript(kept.read_text())
    found = connection.execute("SELECT schema_version FROM info").fetchone()
    before = connection.execute("SELECT variant, status, tpot_s FROM variants ORDER BY variant").fetchall()
    connection.close()
    catalog = Catalog(tmp_path)
    scopes = sorted({t.scope for t in catalog.trials(before_scope(tmp_path))})
    catalog.close()
    after = [(r["variant"], r["status"], r["tpot_s"]) for r in reader.variants(tmp_path, everything=True)]
    checked = sqlite3.connect(tmp_path / FILE)
    assert (found, sorted(after), len(scopes)) == ((version,), before, 1)
    assert {r["chat"] for r in reader.variants(tmp_path, everything=True)} == {None}
    assert len(before) == 3
    assert checked.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert checked.execute("PRAGMA foreign_key_check").fetchall() == []
    assert checked.execute("SELECT schema_version FROM info").fetchone() == (SCHEMA_VERSION,)
    checked.close()


def before_scope(folder: Path) -> str:
    connection = sqlite3.connect(folder / FILE)
    scope = connection.execute("SELECT scope FROM trial LIMIT 1").fetchone()[0]
    connection.close()
    return str(scope)


def test_the_schema_version_is_that_of_the_newest_migration_and_the_loader_reads_it() -> None:
    assert max(VERSIONS) == SCHEMA_VERSION
    assert SCHEMA_VERSION in reader.SCHEMA_VERSIONS


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = sqlite3.connect(tmp_path / FILE)
    connection.executescript((KEPT / "schema-1.sql").read_text())
    connection.close()
    broken = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, broken)
    newest = sorted(broken.glob("[0-9]*.py"))[-1]
    newest.write_text(
        newest.read_text().replace("def upgrade() -> None:", "def upgrade() -> None:\n    raise OSError(5, 'killed')")
    )
    monkeypatch.setattr(schema, "MIGRATIONS", broken)
    with pytest.raises(Exception, match="killed"):
        open_engine(tmp_path)
    connection = sqlite3.connect(tmp_path / FILE)
    assert connection.execute("SELECT schema_version FROM info").fetchone() == (1,)
    assert connection.execute("SELECT count(*) FROM variants").fetchone() == (3,)
    connection.close()
    monkeypatch.undo()
    open_engine(tmp_path).dispose()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_loader_picks_from_a_catalog_of_an_earlier_schema_as_it_is(version: int, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / FILE)
    connection.executescript((KEPT / f"schema-{version}.sql").read_text())
    connection.execute("UPDATE artifact SET runtime = ?", (runtime_version(),))
    connection.commit()
    connection.close()
    made = pick(tmp_path, "m", ["tpot_s<=1"], "tpot_s")
    assert made.chosen is not None
    assert (made.chosen["point"]["name"], len(made.candidates)) == ("fast", 3)
    with pytest.raises(NoVariant):
        pick(tmp_path, "m", ["itl_p99_s<=1e-9"])


@pytest.mark.parametrize("version", VERSIONS[:-1])
def test_a_dry_run_migrates_nothing(version: int, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.executescript((KEPT / f"schema-{version}.sql").read_text())
    connection.close()
    before = (tmp_path / FILE).read_bytes()
    with looked_at(tmp_path) as known:
        assert known is not None
        assert known.last_inputs("m")
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize("version", VERSIONS)
def test_the_loader_reads_a_database_of_every_schema_without_migrating_it(version: int, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.executescript((KEPT / f"schema-{version}.sql").read_text())
        model, machine = connection.execute("SELECT model, machine FROM standing LIMIT 1").fetchone()
    every = reader.candidates(tmp_path, model)
    assert len(every) == 3
    assert [row.get("chat") for row in every] == [None] * 3
    assert [row.get("itl_p99_s") for row in every] == [None] * 3
    late, quick = parse_slo(["itl_p99_s<=1"], None), parse_slo(["tpot_s<=1e9"], None)
    assert ranking.leaders(tmp_path, model, None, None, late, machine, 9) == []
    assert ranking.leaders(tmp_path, model, None, None, quick, machine, 9)
    assert reader.variants(tmp_path, slo=late) == []


def test_an_estimate_of_energy_is_inside_no_bound_and_leads_nothing(tmp_path: Path) -> None:
    for source, inside in (("rapl", True), ("model", False)):
        folder = tmp_path / source
        folder.mkdir()
        with sqlite3.connect(folder / FILE) as connection:
            connection.executescript((KEPT / "schema-1.sql").read_text())
            model, machine = connection.execute("SELECT model, machine FROM standing LIMIT 1").fetchone()
            connection.execute("UPDATE measurement SET energy_j_per_token = 0.5, energy_source = ?", (source,))
        bounded, led = parse_slo(["energy_j_per_token<=1"], "tpot_s"), parse_slo([], "energy_j_per_token")
        assert bool(reader.variants(folder, slo=bounded)) is inside
        for slo in (bounded, led):
            assert bool(ranking.leaders(folder, model, None, None, slo, machine, 9)) is inside
