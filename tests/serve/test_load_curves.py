"""Load curves as they are used: measured by the command, shown by `explain`, and what `pick` and `serve` do by them."""

from __future__ import annotations

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from llmbuild.catalog.exchange.merge import merge
from llmbuild.catalog.schema import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import NoVariant, UnknownLoad
from llmbuild.runtime import reader
from llmbuild.runtime.model import host_facts
from llmbuild.serve.capacity import Lengths
from llmbuild.serve.pick_load import Wanted, pick_load
from llmbuild.spec.load_curve import LoadCurve
from llmbuild.spec.slo import Bound
from tests.conftest import llmbuild
from tests.serve.test_ragged import catalog, pytestmark  # noqa: F401
from tests.support.curves import curve
from tests.support.server import command

SLO = ("--slo", "ttft_s_p99<=2", "--slo", "tpot_s_p99<=1", "--lengths", "8:8")

ONE: Any = {"lengths": Lengths(8, 8), "sequences": 4, "scheduler": "fcfs"}
"""One way to serve, so that no others are tried."""


@pytest.fixture(scope="module")
def measured(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A copy of the catalog in which one of two variants has a load curve."""
    folder = tmp_path_factory.mktemp("measured") / "catalog"
    shutil.copytree(catalog, folder)
    done = llmbuild("profile", _variant(folder, "int8"), "--load", "--budget", "2s", "--sequences", "4", "-C", folder)
    assert done.returncode == 0, done.stderr
    return folder


def _variant(folder: Path, form: str) -> str:
    rows = reader.variants(folder, "tiny", everything=True)
    return next(r["variant"] for r in rows if r["point"]["weight_format"] == form and r["point"]["kernel"] == "own")


def _curve(folder: Path) -> LoadCurve:
    (found,) = reader.load_curves(folder, [_variant(folder, "int8")])
    return found


def test_a_measured_curve_covers_what_was_asked_for_and_has_its_error(measured: Path) -> None:
    found = _curve(measured)
    assert (found.decodes_most, found.prompt_most, found.context, found.fit.shared) == (4, 112, 112, True)
    assert 0 <= found.error_p95 < 10 and found.held_out == 20
    assert all(0 < cell.low <= cell.seconds <= cell.high and cell.visits >= 3 for cell in found.cells)
    assert 0 < found.turn_s + found.row_s < 0.01
    assert (found.energy_source, found.watts) == (None, None) or found.watts is not None
    with sqlite3.connect(measured / FILE) as connection:
        row = connection.execute(
            "SELECT model, decode_s, decode_j, energy_source, held_out FROM load_curves"
        ).fetchone()
    assert row[0] == "tiny" and row[1] > 0 and row[4] == 20
    assert (row[2] is None) == (row[3] is None)


def test_a_variant_with_a_call_for_each_sequence_has_a_curve_of_calls(measured: Path) -> None:
    rows = reader.variants(measured, "tiny", everything=True)
    name = next(row["variant"] for row in rows if row["point"]["kernel"] == "compiler" and row["artifact"])
    done = llmbuild("profile", name, "--load", "--budget", "2s", "--sequences", "4", "-C", measured, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = reader.load_curves(measured, [name])
    assert (found.fit.shared, found.fit.read_s, found.fit.table.at[0]) == (False, 0.0, 1)
    assert json.loads(done.stdout)[0]["decode_s"] > 0
    with Catalog(measured).session(write=True) as session:  # the other tests are of the other variant
        session.execute(text("DELETE FROM load_curve WHERE variant = :name"), {"name": name})


def test_explain_shows_the_curve(measured: Path) -> None:
    name = _variant(measured, "int8")
    told = json.loads(llmbuild("explain", name, "--json", "-C", measured).stdout)
    assert told[0]["load_curves"][0]["key"] == _curve(measured).key
    assert "4 sequences decode" in llmbuild("explain", name, "-C", measured).stdout


def test_pick_names_the_rate_and_says_when_it_is_not_held_or_not_known(measured: Path) -> None:
    done = llmbuild("pick", "-m", "tiny", "--rate", "1/s", *SLO, "--json", "-C", measured)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["variant"] == _variant(measured, "int8")
    assert told["rate_per_s"] == 1.0 < told["highest_rate_per_s"] and told["ttft_s_p99"] <= 2
    assert "has no load curve of this machine" in done.stderr and "8 and answers of 8 tokens" in done.stderr
    with pytest.raises(NoVariant, match=r"no variant of tiny holds 1e\+06/s here: the nearest, \w+, holds"):
        pick_load(measured, "tiny", [], None, Wanted((), 1e6, **ONE))
    with pytest.raises(NoVariant, match="holds no rate at all"):
        pick_load(measured, "tiny", [], None, Wanted((Bound("ttft_s_p99", "<=", 1e-9),), **ONE))


def test_without_a_curve_of_this_machine_nothing_is_promised(catalog: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "catalog"
    shutil.copytree(catalog, folder)
    with pytest.raises(UnknownLoad, match=r"no load curve of tiny on this machine.*profile \w+ --load"):
        pick_load(folder, "tiny", [], None, Wanted((), 1.0))
    writer = Catalog(folder)
    row = reader.find_variant(folder, _variant(folder, "int8"))[0]
    writer.record_load_curve(curve(row["variant"], row["machine_digest"], artifact=row["artifact"]))
    writer.close()
    assert len(reader.load_curves(folder, [row["variant"]])) == 1
    with pytest.raises(UnknownLoad):
        pick_load(folder, "tiny", [], None, Wanted((), 1.0))


def test_the_best_variant_depends_on_the_load(measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "catalog"
    shutil.copytree(measured, folder)
    first, machine = _curve(measured), host_facts().machine
    row = reader.find_variant(folder, _variant(folder, "f16"))[0]
    steady = curve(row["variant"], machine, artifact=row["artifact"], key="f" * 64, context=112, prompt_most=112)
    fit = replace(steady.fit, table=replace(steady.fit.table, values=tuple(1e-4 for _ in steady.fit.table.at)))
    writer = Catalog(folder)
    writer.record_load_curve(replace(steady, fit=replace(fit, read_s=0, context_s=0, seen_s=0)))
    writer.record_load_curve(replace(first, fit=replace(first.fit, read_s=0.01)))
    writer.close()
    made = pick_load(folder, "tiny", [], None, Wanted((Bound("tpot_s_p99", "<=", 0.05),), **ONE))
    assert made.row["variant"] == row["variant"]
    assert [other["variant"] for other, _ in made.others] == [first.variant]


def test_merged_catalogs_keep_the_later_curve(measured: Path, tmp_path: Path) -> None:
    source, into = Catalog(measured), Catalog(tmp_path / "into")
    assert merge(source, into).rows["load_curve"] == 1
    assert merge(source, into).rows.get("load_curve", 0) == 0
    source.close()
    into.close()
    assert _curve(tmp_path / "into") == _curve(measured)


def test_serve_takes_what_holds_the_most_and_says_what_it_does_not_know(measured: Path, catalog: Path) -> None:  # noqa: F811
    with command("tiny", "-C", measured, "--memory", "1GB", *SLO) as found:
        found.stop()
        assert any("chosen   " in line and "with up to 4 at a time: holds" in line for line in found.log)
        assert any("up to 4 sequences at a time" in line for line in found.log)
    with command("tiny", "-C", catalog, "--memory", "1GB", *SLO) as found:
        found.stop()
        assert any("whether ttft_s_p99<=2, tpot_s_p99<=1 holds is not known" in line for line in found.log)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("profile", "abcd", "--budget", "3s"), "are for --load"),
        (("profile", "abcd", "--load", "--on", "ssh://host"), "--load measures on this machine alone"),
        (("query", "--slo", "ttft_s_p99<=1"), "only `llmbuild pick --rate` and `llmbuild serve` take it"),
        (("pick", "--slo", "ttft_s_p99>=1"), "is better where it is less"),
        (("pick", "--rate", "x"), "cannot read --rate 'x'"),
        (("pick", "--rate", "1/s", "--as", "haswell"), "goes with neither --lock nor --as"),
        (
            ("serve", "tiny", "--scheduler", "fairbatching"),
            "needs the load curve of the variant of tiny on this machine",
        ),
        (("serve", "tiny", "--slo-class", "chat=1"), "cannot read --slo-class 'chat=1'"),
    ],
)
def test_what_cannot_be_asked_is_told(words: tuple[str, ...], told: str, catalog: Path) -> None:  # noqa: F811
    done = llmbuild(*words, "-C", catalog)
    assert done.returncode == 2
    assert told in done.stderr
