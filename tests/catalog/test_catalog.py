from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from llmbuild import digest
from llmbuild.catalog.schema import FILE, SCHEMA_VERSION, open_engine
from llmbuild.catalog.store import BlobStore
from llmbuild.catalog.tables import Base
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import CatalogError
from llmbuild.runtime import reader
from tests.conftest import Project, llmbuild

CONTRACT = (
    "variant model target machine workload status default ttft_s tpot_s output_tokens_per_s energy_j_per_token "
    "energy_source peak_memory_bytes artifact_bytes quality_kl quality_top1 point artifact toolchain"
).split()


def test_migrations_make_exactly_the_tables_of_the_code(tmp_path: Path) -> None:
    with open_engine(tmp_path).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_the_five_views_are_there_for_plain_sqlite(tmp_path: Path) -> None:
    open_engine(tmp_path).dispose()
    connection = sqlite3.connect(tmp_path / FILE)
    views = {r[0] for r in connection.execute("SELECT name FROM sqlite_master WHERE type='view'")}
    columns = [r[1] for r in connection.execute("PRAGMA table_info(variants)")]
    assert views == {"variants", "measurements", "front", "failures", "load_curves"}
    assert [c for c in CONTRACT if c not in columns] == []
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_newer_schema_is_refused_by_writer_and_reader(tmp_path: Path) -> None:
    open_engine(tmp_path).dispose()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE info SET schema_version = ?", (SCHEMA_VERSION + 1,))
    with pytest.raises(CatalogError, match="upgrade llmbuild"):
        open_engine(tmp_path)
    with pytest.raises(CatalogError, match="upgrade llmbuild"):
        reader.variants(tmp_path)


def test_a_file_that_is_no_catalog_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database at all" * 100)
    with pytest.raises(CatalogError, match="not a catalog"):
        open_engine(tmp_path)
    with pytest.raises(CatalogError):
        reader.variants(tmp_path)


def test_a_missing_catalog_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="build one with `llmbuild build`"):
        reader.variants(tmp_path / "none")


def test_a_blob_is_named_by_its_bytes_and_never_half_written(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    name = store.put_bytes(b"payload")
    assert name == digest.of_bytes(b"payload")
    assert store.path(name).read_bytes() == b"payload"
    assert [p.name for p in store.path(name).parent.iterdir()] == [name]


def test_a_file_that_may_be_moved_is_not_copied_but_where_it_has_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, source = BlobStore(tmp_path / "store"), tmp_path / "file"
    source.write_bytes(b"payload")
    inode = source.stat().st_ino
    path = store.path(store.put_file(source, moved=True))
    assert (path.stat().st_ino, source.exists(), path.read_bytes()) == (inode, False, b"payload")
    source.write_bytes(b"another")

    def elsewhere(self: Path, target: Path) -> Path:
        if self == source:
            raise OSError(18, "Invalid cross-device link")
        self.rename(target)
        return target

    monkeypatch.setattr(Path, "replace", elsewhere)
    assert store.path(store.put_file(source, moved=True)).read_bytes() == source.read_bytes() == b"another"


def test_a_flipped_byte_is_found_and_the_blob_made_again(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    name = store.put_bytes(b"payload")
    path = store.path(name)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    path.write_bytes(b"paylaod")
    assert not store.verify(name)
    assert store.put_bytes(b"payload") == name
    assert store.verify(name)


def test_a_full_disk_is_one_message_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    store = BlobStore(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CatalogError, match="No space left on device"):
        store.put_bytes(b"payload")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_an_import_whose_blob_is_gone_is_made_again(built: Project, tmp_path: Path) -> None:
    catalog = Catalog(built.catalog)
    with sqlite3.connect(built.catalog / FILE) as connection:
        key, parameters = connection.execute(
            "SELECT i.key, p.parameters FROM import i JOIN program p ON p.digest = i.program"
        ).fetchone()
    assert catalog.find_import(key) is not None
    path = catalog.blobs.path(parameters)
    path.rename(tmp_path / "away")
    missing = catalog.find_import(key)
    (tmp_path / "away").rename(path)
    assert missing is None


def test_both_doors_read_the_same_rows(built: Project) -> None:
    rows = reader.variants(built.catalog, everything=True)
    with sqlite3.connect(built.catalog / FILE) as connection:
        scopes = [r[0] for r in connection.execute("SELECT DISTINCT scope FROM trial")]
    trials = Catalog(built.catalog).trials(scopes[0])
    assert {r["variant"]: r["tpot_s"] for r in rows} == {
        t.variant: t.measurements[0].readings["tpot_s"].median for t in trials
    }


def test_documented_queries_run(built: Project) -> None:
    text = (Path(__file__).parents[2] / "catalog" / "README.md").read_text()
    queries = [block.split("```")[0] for block in text.split("```sql\n")[1:]]
    connection = sqlite3.connect(built.catalog / FILE)
    results = [connection.execute(query.replace("pystdlib", "tiny")).fetchall() for query in queries]
    assert len(results) >= 3
    assert results[0]
    assert f"FROM info`, now {SCHEMA_VERSION})" in text


def test_integrity_after_a_build(built: Project) -> None:
    connection = sqlite3.connect(built.catalog / FILE)
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_read_only_catalog_is_one_message(built: Project, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    done = llmbuild("build", built.recipe, "-C", folder)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
