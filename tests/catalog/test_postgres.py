"""A catalog whose rows are in Postgres, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from llmbuild.catalog import garbage, verify
from llmbuild.catalog.exchange import merge
from llmbuild.catalog.exchange.publish import publish
from llmbuild.catalog.schema import folder_of, open_engine
from llmbuild.catalog.tables import Base
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import CatalogError
from llmbuild.runtime import reader
from llmbuild.runtime.model import pick
from tests.conftest import llmbuild
from tests.support import postgres
from tests.support.synthetic import THREE, Made, fill

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres.server() as address:
        yield address


@pytest.fixture(scope="module")
def shelf(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of blobs whose rows are in the server."""
    folder = tmp_path_factory.mktemp("blobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMBUILD_BLOBS", str(folder))
        assert folder_of(url) == folder
    fill(folder, [*THREE, Made("lost", "dominated", 0.05, parameters=b"other")])
    return folder


def names(rows: list[dict]) -> dict[str, tuple]:
    return {r["point"]["name"]: (r["status"], r["tpot_s"], r["default"], r["target_body"]) for r in rows}


def test_migrations_make_exactly_the_tables_of_the_code(shelf: Path) -> None:
    engine = open_engine(shelf)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_rows_are_those_that_sqlite_would_hold(shelf: Path, tmp_path: Path) -> None:
    fill(tmp_path, [*THREE, Made("lost", "dominated", 0.05, parameters=b"other")])
    there, here = reader.variants(shelf, everything=True), reader.variants(tmp_path, everything=True)
    assert names(there) == names(here)
    assert {k for r in there for k in r} == {k for r in here for k in r}


def test_trials_read_back_are_those_recorded(shelf: Path, tmp_path: Path) -> None:
    fill(tmp_path, THREE)
    local, served = Catalog(tmp_path), Catalog(shelf)
    with local.session() as session:
        from llmbuild.catalog.tables import TrialRow

        scope = session.query(TrialRow.scope).first()[0]
    found, expected = served.trials(scope), local.trials(scope)
    served.close()
    local.close()
    assert [t.point for t in found][:3] == [t.point for t in expected]
    assert found[1].measurements[0].readings["tpot_s"].samples == (0.01,) * 10


def test_pick_query_and_verify_by_url(url: str, shelf: Path, tmp_path: Path) -> None:
    made = pick(shelf, "m", ["ttft_s<=1"], "ttft_s")
    done = llmbuild("query", "--json", "-C", url, LLMBUILD_BLOBS=str(shelf))
    sound = llmbuild("verify", "-C", url, LLMBUILD_BLOBS=str(shelf))
    assert made.chosen is not None
    assert (made.chosen["point"]["name"], len(made.candidates)) == ("small", 4)
    assert {r["point"]["name"] for r in json.loads(done.stdout)} == {"fast", "small"}
    assert (sound.returncode, "all is as it should be" in sound.stderr) == (0, True), sound.stderr


def test_publishing_merging_and_gc_work_the_same(shelf: Path, tmp_path: Path) -> None:
    served = Catalog(shelf)
    publish(served, (), str(tmp_path / "pub"), None)
    served.close()
    fill(tmp_path / "local", [Made("one")], model="local")
    into, source = Catalog(shelf), Catalog(tmp_path / "local")
    merge.merge(source, into)
    again = merge.merge(source, into)
    source.close()
    into.close()
    alone = Catalog(shelf, alone=True)
    removed = garbage.collect(alone).removed
    wrong = [f for f in verify.verify(alone) if f.wrong]
    alone.close()
    assert names(reader.variants(tmp_path / "pub")).keys() == {"fast", "small"}
    assert reader.models(shelf) == ["local", "m"]
    assert (again.rows, len(removed) > 0, wrong) == ({}, True, [])


def test_a_folder_belongs_to_one_catalog(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBUILD_BLOBS", str(shelf))
    with pytest.raises(CatalogError, match="holds another catalog"):
        folder_of("postgresql://test@127.0.0.1:1/other")
    with pytest.raises(CatalogError, match="a catalog is a folder or postgresql"):
        folder_of("mysql://x/y")


def test_a_server_that_is_away_is_one_message(tmp_path: Path) -> None:
    for command in (("query",), ("verify",)):
        done = llmbuild(*command, "-C", "postgresql://x@127.0.0.1:1/y", LLMBUILD_BLOBS=str(tmp_path))
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert "server" in done.stderr or "refused" in done.stderr, done.stderr
