from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import JSON, String

from llmbuild.catalog import garbage, verify
from llmbuild.catalog.exchange import merge
from llmbuild.catalog.exchange.diff import Ruler, bytes_changed, compare
from llmbuild.catalog.references import references
from llmbuild.catalog.schema import FILE
from llmbuild.catalog.store import SEALED_NS
from llmbuild.catalog.tables import Base
from llmbuild.catalog.writer import IMPORTS, Catalog
from llmbuild.cli.maintenance import collect
from llmbuild.cli.sizes import size_of
from llmbuild.errors import CatalogError, InputError
from llmbuild.runtime import reader
from tests.conftest import llmbuild
from tests.support.synthetic import THREE, Made, fill, slower, toolchain

LOST = Made("lost", "dominated", 0.05, 0.5, parameters=b"other weights")


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    fill(tmp_path / "shelf", [*THREE, LOST])
    return tmp_path / "shelf"


def rows(folder: Path) -> dict[str, dict]:
    return {r["point"]["name"]: r for r in reader.variants(folder, everything=True)}


def problems(folder: Path) -> list[tuple[str, bool]]:
    catalog = Catalog(folder)
    try:
        return [(f.problem, f.wrong) for f in verify.verify(catalog)]
    finally:
        catalog.close()


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def collected(folder: Path, budget: int | None = None, dry_run: bool = False) -> garbage.Swept:
    catalog = Catalog(folder, alone=True)
    try:
        return garbage.collect(catalog, budget, dry_run)
    finally:
        catalog.close()


# --- verify ------------------------------------------------------------------------------------------------------


def test_a_sound_catalog_has_nothing_to_tell(shelf: Path) -> None:
    assert problems(shelf) == []


@pytest.mark.parametrize("kind", ["artifact", "parameters", "tokenizer"])
def test_a_flipped_byte_of_any_blob_is_found(shelf: Path, kind: str) -> None:
    spoil(reader.blob_path(shelf, rows(shelf)["fast"][kind]))
    assert ("corrupt", True) in problems(shelf)


def test_a_missing_blob_an_orphan_and_a_leftover_are_told_apart(shelf: Path) -> None:
    path = reader.blob_path(shelf, rows(shelf)["fast"]["artifact"])
    path.unlink()
    (path.parent / ".put-killed").write_bytes(b"half")
    Catalog(shelf).blobs.put_bytes(b"nobody's")
    assert sorted(problems(shelf)) == [("leftover", False), ("missing", True), ("orphan", False)]


def test_a_row_that_names_no_row_is_found(shelf: Path) -> None:
    with sqlite3.connect(shelf / FILE) as connection:
        connection.execute("DELETE FROM machine")
    assert ("dangling", True) in problems(shelf)


def test_verify_ends_with_1_and_the_remedy_when_something_is_wrong(shelf: Path) -> None:
    good = llmbuild("verify", "-C", shelf)
    spoil(reader.blob_path(shelf, rows(shelf)["fast"]["artifact"]))
    bad = llmbuild("verify", "--json", "-C", shelf)
    told = json.loads(bad.stdout)
    assert (good.returncode, "all is as it should be" in good.stderr) == (0, True)
    assert (bad.returncode, told[0]["problem"], "rm -f" in told[0]["remedy"]) == (1, "corrupt", True)


def test_writing_to_a_blob_is_noticed_without_reading_the_others(shelf: Path) -> None:
    store = Catalog(shelf).blobs
    name = rows(shelf)["fast"]["artifact"]
    assert store.intact(name)
    os.utime(store.path(name))  # a copy or a touch: read once, then sealed again
    assert store.intact(name)
    assert store.path(name).stat().st_mtime_ns == SEALED_NS
    spoil(store.path(name))
    assert not store.intact(name)


# --- gc ----------------------------------------------------------------------------------------------------------


def test_gc_keeps_fronts_and_defaults_and_frees_the_rest(shelf: Path) -> None:
    before = rows(shelf)
    swept = collected(shelf)
    there = {name for name, row in before.items() if reader.blob_path(shelf, row["artifact"]).exists()}
    assert there == {"default", "fast", "small"}
    assert before["lost"]["parameters"] in {r.digest for r in swept.removed}
    assert (problems(shelf), rows(shelf)) == ([], before)


def test_a_dry_gc_removes_nothing_and_foretells_the_real_one(shelf: Path) -> None:
    foretold = collected(shelf, dry_run=True)
    there = sorted(p for p in shelf.rglob("blobs/**/*") if p.is_file())
    assert foretold.removed
    assert sorted(p for p in shelf.rglob("blobs/**/*") if p.is_file()) == there
    assert collected(shelf) == foretold


def test_gc_with_a_budget_frees_no_more_than_it_must(shelf: Path) -> None:
    everything = collected(shelf, dry_run=True)
    one = collected(shelf, budget=everything.freed_bytes + everything.kept_bytes - 1)
    assert len(one.removed) == 1
    assert one.over == 0


def test_gc_never_frees_a_front_for_a_budget_and_says_how_much_is_too_much(shelf: Path) -> None:
    swept = collected(shelf, budget=1)
    assert swept.over == swept.kept_bytes - 1
    done = llmbuild("gc", "--size", "1B", "-C", shelf)
    assert (done.returncode, "more than the budget" in done.stderr) == (1, True)


def test_gc_removes_orphans_leftovers_locks_and_imports_under_way(shelf: Path) -> None:
    catalog = Catalog(shelf)
    name = catalog.blobs.put_bytes(b"nobody's")
    (catalog.blobs.path(name).parent / ".put-killed").write_bytes(b"half")
    with catalog.making("0" * 64):
        pass
    (catalog.importing("1" * 64) / "parameters.irpa").write_bytes(b"half of it")
    catalog.close()
    collected(shelf, dry_run=True)
    assert (shelf / IMPORTS).is_dir()
    collected(shelf)
    left = [p.name for p in (shelf / "locks").iterdir()]
    assert (catalog.blobs.has(name), left, problems(shelf)) == (False, [], [])
    assert not (shelf / IMPORTS).exists()


def test_gc_waits_for_builds_and_gives_up_in_the_end(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmbuild.catalog.writer.BUSY_SECONDS", 0.2)
    building = Catalog(shelf)
    with pytest.raises(CatalogError, match="other commands are using it"):
        Catalog(shelf, alone=True)
    assert collect(shelf, None, dry_run=True).rows  # which only looks
    building.close()
    Catalog(shelf, alone=True).close()


def test_a_variant_that_comes_back_to_the_front_is_missed(shelf: Path) -> None:
    lost = rows(shelf)["lost"]["variant"]
    collected(shelf)
    catalog = Catalog(shelf)
    assert catalog.lost() == set()
    with sqlite3.connect(shelf / FILE) as connection:
        connection.execute("UPDATE standing SET status = 'pareto' WHERE variant = ?", (lost,))
    assert catalog.lost() == {lost}
    catalog.close()


@pytest.mark.parametrize("size", ["many", "-1", "2X", "nan", "1e400", ""])
def test_a_size_that_is_none_is_told(size: str) -> None:
    with pytest.raises(InputError, match="not a size"):
        size_of("--size", size)


def test_sizes_are_read() -> None:
    assert [size_of("--size", s) for s in ("500M", "2GB", "1.5k", "7")] == [500_000_000, 2_000_000_000, 1500, 7]


def test_every_table_that_names_a_blob_is_known_to_gc(shelf: Path) -> None:
    catalog = Catalog(shelf)
    names = {}
    with catalog.session(write=True) as session:
        for table in (t for t in Base.metadata.sorted_tables if "blob" in t.c):
            names[table.name] = catalog.blobs.put_bytes(table.name.encode())
            filled = {
                c.name: "k" * 64 if isinstance(c.type, String) else 1.0 for c in table.c if not isinstance(c.type, JSON)
            }
            more = {c.name: {} for c in table.c if isinstance(c.type, JSON)}
            session.execute(table.insert().values({**filled, **more, "blob": names[table.name]}))
    with catalog.session() as session:
        found = {r.kind: r.digest for r in references(session, catalog.blobs)}
    catalog.close()
    assert names
    assert {kind: found[kind] for kind in names} == names
    assert problems(shelf) == []


# --- diff --------------------------------------------------------------------------------------------------------


def changed(a: list[Made], b: list[Made], tmp_path: Path, noise: float = 0.05) -> list[tuple[str, str]]:
    for name, made in (("a", a), ("b", b)):
        fill(tmp_path / name, made)
    found = compare(*(reader.variants(tmp_path / n, everything=True) for n in "ab"), Ruler(noise))
    return [(c.kind, c.what) for c in found]


def test_equal_catalogs_do_not_differ(tmp_path: Path) -> None:
    assert changed(list(THREE), list(THREE), tmp_path) == []


def test_a_slow_down_beyond_noise_is_a_regression_of_each_point(tmp_path: Path) -> None:
    assert changed(list(THREE), slower(THREE, 1.2), tmp_path) == [("regression", "tpot_s")] * 3


def test_a_slow_down_within_noise_or_within_the_intervals_is_none(tmp_path: Path) -> None:
    wide = [replace(one, width=0.2) for one in THREE]
    assert changed(list(THREE), slower(THREE, 1.04), tmp_path / "small") == []
    assert changed(wide, slower(wide, 1.2), tmp_path / "wide") == []


def test_a_speed_up_is_an_improvement(tmp_path: Path) -> None:
    assert set(changed(list(THREE), slower(THREE, 0.5), tmp_path)) == {("improvement", "tpot_s")}


def test_new_lost_and_moved_front_points_are_told(tmp_path: Path) -> None:
    after = [THREE[0], replace(THREE[1], status="undecided"), replace(THREE[2], status="dominated"), Made("fresh")]
    found = changed(list(THREE), after, tmp_path)
    assert [kind for kind, _ in found if kind in ("new", "lost", "moved")] == ["lost", "moved", "new"]


def test_losing_the_fastest_point_is_a_regression_of_the_best(tmp_path: Path) -> None:
    after = [THREE[0], replace(THREE[1], status="infeasible"), THREE[2]]
    assert ("regression", "best tpot_s") in changed(list(THREE), after, tmp_path)


def test_worse_quality_is_a_regression_without_noise(tmp_path: Path) -> None:
    worse = [replace(one, quality_kl=0.01) for one in THREE]
    assert ("regression", "quality_kl") in changed(list(THREE), worse, tmp_path)


def test_a_model_that_is_not_built_any_more_is_gone(tmp_path: Path) -> None:
    fill(tmp_path / "a", THREE)
    fill(tmp_path / "b", THREE, model="other")
    done = llmbuild("diff", tmp_path / "a", tmp_path / "b", "--json", "--fail-on-regression")
    assert done.returncode == 1
    assert {(c["kind"], c["model"]) for c in json.loads(done.stdout)} == {("gone", "m"), ("new", "other")}


def test_the_same_key_with_other_bytes_is_an_alarm(tmp_path: Path) -> None:
    assert [(c.kind, c.before, c.after) for c in bytes_changed({"k": "a", "l": "b"}, {"k": "c", "l": "b"})] == [
        ("bytes", "a", "c")
    ]


def test_diff_fails_on_a_regression_only_when_asked(tmp_path: Path) -> None:
    fill(tmp_path / "a", THREE)
    fill(tmp_path / "b", slower(THREE, 2))
    codes = [
        llmbuild("diff", tmp_path / "a", tmp_path / "b", *more).returncode for more in ((), ("--fail-on-regression",))
    ]
    assert codes == [0, 1]


# --- merge -------------------------------------------------------------------------------------------------------


def merged(source: Path, into: Path) -> merge.Merged:
    a, b = Catalog(source), Catalog(into)
    try:
        return merge.merge(a, b)
    finally:
        a.close()
        b.close()


def test_merging_into_nothing_gives_the_same_rows_and_blobs(shelf: Path, tmp_path: Path) -> None:
    done = merged(shelf, tmp_path / "new")
    assert (rows(tmp_path / "new"), done.conflicts, problems(tmp_path / "new")) == (rows(shelf), [], [])


def test_merging_twice_adds_nothing(shelf: Path, tmp_path: Path) -> None:
    merged(shelf, tmp_path / "new")
    again = merged(shelf, tmp_path / "new")
    assert (again.rows, again.blobs) == ({}, 0)


def test_fronts_ranked_apart_are_undecided_until_the_next_build(tmp_path: Path) -> None:
    fill(tmp_path / "a", [Made("one")])
    fill(tmp_path / "b", [Made("two"), Made("three", "dominated")])
    done = merged(tmp_path / "b", tmp_path / "a")
    status = {name: row["status"] for name, row in rows(tmp_path / "a").items()}
    raced = sqlite3.connect(tmp_path / "a" / FILE).execute("SELECT DISTINCT raced FROM build").fetchall()
    assert status == {"one": "pareto", "two": "undecided", "three": "dominated"}
    assert ("ranked apart" in done.conflicts[0], raced) == (True, [(0,)])


def test_the_later_measurement_stays(tmp_path: Path) -> None:
    fill(tmp_path / "old", THREE)
    fill(tmp_path / "new", slower(THREE, 2))
    merged(tmp_path / "new", tmp_path / "old")
    kept = rows(tmp_path / "old")["fast"]["tpot_s"]
    merged(tmp_path / "old", tmp_path / "new")
    assert (kept, rows(tmp_path / "new")["fast"]["tpot_s"]) == (0.02, 0.02)


def test_other_bytes_of_the_same_key_are_told_and_ours_kept(tmp_path: Path) -> None:
    fill(tmp_path / "a", [Made("one", artifact=b"ours")])
    fill(tmp_path / "b", [Made("one", artifact=b"theirs")])
    done = merged(tmp_path / "b", tmp_path / "a")
    assert "the same inputs should make the same bytes" in done.conflicts[0]
    assert reader.blob_path(tmp_path / "a", rows(tmp_path / "a")["one"]["artifact"]).read_bytes() == b"ours"


def test_a_damaged_blob_is_left_behind_and_told(shelf: Path, tmp_path: Path) -> None:
    spoil(reader.blob_path(shelf, rows(shelf)["fast"]["artifact"]))
    done = merged(shelf, tmp_path / "new")
    assert "left behind" in done.conflicts[0]
    assert ("missing", True) in problems(tmp_path / "new")


def test_rows_of_two_toolchains_live_side_by_side(tmp_path: Path) -> None:
    fill(tmp_path / "a", THREE)
    fill(tmp_path / "b", THREE, tools=toolchain(compiler="3.14.0"))
    merged(tmp_path / "b", tmp_path / "a")
    assert len(reader.variants(tmp_path / "a", everything=True)) == 6


def test_a_copied_catalog_is_sound(shelf: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", shelf, tmp_path / "copy"], check=True)
    assert problems(tmp_path / "copy") == []
