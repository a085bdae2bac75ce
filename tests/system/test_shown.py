"""Text from outside is data: whatever it holds, a terminal is given no character that steers it."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmbuild.catalog.exchange.publish import publish
from llmbuild.catalog.schema import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.cli.main import main
from llmbuild.runtime import reader
from llmbuild.system.terminal import cell, data, guarded, shown
from tests.support.synthetic import THREE, Made, fill

STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
NASTY = st.sampled_from(list("\x00\x07\x1b\r\n\t\x7f\x85\x9b\u200b\u202e\u2066\u2028\U000e0041")) | st.characters(
    exclude_categories=("Cs",)
)
TEXTS = st.text(NASTY, min_size=1, max_size=12) | st.sampled_from(
    ["\x1b]52;c;cm0gLXJm\x07", "\x1b[2J", "\x9b2J", "a\nchosen   0123", "\u202egpj.exe", "a\x7fb"]
)


def steering(text: str, kept: str = "\n") -> set[str]:
    return {one for one in text if one not in kept and unicodedata.category(one) in STEERING}


class Told:
    """What a command wrote, in this process: its code, and both streams to the last byte."""

    def __init__(self, *arguments: str | Path) -> None:
        before, files = (sys.stdout, sys.stderr), (io.BytesIO(), io.BytesIO())
        streams = [io.TextIOWrapper(file, encoding="utf-8") for file in files]
        sys.stdout, sys.stderr = streams
        try:
            main([str(a) for a in arguments], prog_name="llmbuild")
        except SystemExit as done:
            self.code = done.code
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = before
        self.out, self.err = (file.getvalue().decode() for file in files)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "shelf"
    fill(folder, [*THREE, Made("lost", "dominated", 0.05)])
    return folder


def told_by(shelf: Path, folder: Path, text: str) -> Iterator[tuple[str, Told]]:
    """Run what reads catalogs on one whose every name and note is `text`."""
    shutil.copytree(shelf, folder / "c")
    with closing(sqlite3.connect(folder / "c" / FILE)) as connection:
        connection.execute("UPDATE standing SET model = ?, reason = ?, workload = ?", (text, text, text))
        connection.execute("UPDATE machine SET name = ?", (text,))
        connection.execute("UPDATE target SET name = ?", (text,))
        connection.execute("UPDATE artifact SET runtime = runtime || ? WHERE rowid = 2", (text,))
        connection.execute("UPDATE variant SET point = json_set(point, '$.name', ?)", (text,))
        connection.execute("UPDATE measurement SET notes = json_object('energy', ?, ?, ?)", (text, text, text))
        connection.execute("UPDATE measurement SET energy_source = ?", (text,))
        variant = connection.execute("SELECT digest FROM variant").fetchone()[0]
        connection.commit()
    catalog = Catalog(folder / "c")
    publish(catalog, (), str(folder / "p"), None)
    catalog.close()
    here = ("-C", folder / "c")
    for line in (
        ("query", "--all", *here),
        ("pick", *here),
        ("pick", "-m", text, "--slo", "tpot_s<=1e-9", *here),
        ("pick", "-m", f"no{text}", *here),
        ("explain", variant, *here),
        ("explain", text, *here),
        ("doctor", *here),
        ("diff", folder / "c", shelf),
        ("merge", folder / "c", "-C", folder / "m"),
        ("pull", folder / "p", "-C", folder / "got"),
        ("pull", folder / "p", "-m", text + "x", "-C", folder / "no"),
        ("verify", "-C", folder / text.replace("\x00", "").replace("/", "")[:40]),
        ("build", f"{folder}/{text}.yaml"),
        ("query", "--slo", text),
        (text,),
    ):
        if not any("\x00" in str(word) for word in line):  # no argument of a program holds one
            yield " ".join(map(str, line[:1])), Told(*line)


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("\x1b]52;c;cm0gLXJm\x07\x9b2J\x7f\r\na\tb\u202egpj.exe\u2028\u200b\U000e0041")
@given(text=TEXTS)
def test_no_command_gives_a_terminal_what_steers_it(
    shelf: Path, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    for command, told in told_by(shelf, tmp_path_factory.mktemp("text"), text):
        assert (command, steering(told.out), steering(told.err)) == (command, set(), set())
        assert "internal error" not in told.err


def test_a_value_with_ends_of_lines_stays_in_its_line(shelf: Path, tmp_path: Path) -> None:
    told = list(told_by(shelf, tmp_path, "a\nchosen   0123"))
    (rows,) = [each.out.splitlines() for command, each in told if command == "query" and each.code == 0]
    assert len(rows) == 1 + 4
    assert not [line for _, each in told for line in each.out.splitlines() if line.startswith("chosen   0123")]


def test_documents_for_programs_are_what_the_rows_hold(shelf: Path, tmp_path: Path) -> None:
    text = "\x1b[2J\x7f\u202e"
    list(told_by(shelf, tmp_path, text))
    as_json = Told("query", "--json", "-C", tmp_path / "c").out
    assert {row["model"] for row in json.loads(as_json)} == {text}
    assert steering(as_json) == set()
    assert text in Told("query", "--csv", "-C", tmp_path / "c").out


@given(st.text(st.characters(), max_size=30))
def test_what_is_shown_steers_nothing_and_plain_text_stays(text: str) -> None:
    assert (steering(shown(text)), steering(cell(text), "")) == (set(), set())
    assert shown(cell(text)) == cell(text)
    if not steering(text):
        assert shown(text) == text


@pytest.mark.parametrize(("terminal", "told"), [(True, "a\\x1b[2J\n\tb\\r"), (False, "a\x1b[2J\n\tb\r")])
def test_an_answer_of_a_model_is_escaped_on_a_terminal_and_whole_in_a_pipe(
    terminal: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    stream = io.TextIOWrapper(_Terminal(file) if terminal else file, encoding="utf-8", newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    with guarded():
        data("a\x1b[2J\n\tb\r")
    assert file.getvalue().decode() == told


class _Terminal(io.BufferedWriter):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(_Raw(file))

    def isatty(self) -> bool:
        return True


class _Raw(io.RawIOBase):
    def __init__(self, file: io.BytesIO) -> None:
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        return self.file.write(data)


def test_a_reading_that_is_not_finite_meets_no_bound_and_is_null_in_json(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf, tmp_path / "c")
    with closing(sqlite3.connect(tmp_path / "c" / FILE)) as connection:
        connection.execute("UPDATE measurement SET output_tokens_per_s = 9e999, tpot_s = -9e999")
        connection.commit()
    here = ("-C", tmp_path / "c")
    for bound in ("output_tokens_per_s>=1", "tpot_s<=1"):
        assert json.loads(Told("query", "--json", "--all", "--slo", bound, *here).out) == []
        assert Told("pick", "--slo", bound, *here).code == 3
        assert Told("pick", "--objective", bound.split(">")[0].split("<")[0], *here).code == 3
    rows = json.loads(Told("query", "--json", *here).out, parse_constant=lambda name: pytest.fail(name))
    assert {row["tpot_s"] for row in rows} == {None}
    nearest = Told("pick", "--json", "--slo", "tpot_s<=1", *here).out
    assert json.loads(nearest, parse_constant=pytest.fail)["distance"] is None


def test_json_in_a_catalog_that_is_no_json_is_a_damaged_cell(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf, tmp_path / "c")
    with closing(sqlite3.connect(tmp_path / "c" / FILE)) as connection:
        connection.execute("UPDATE measurement SET ratios = '{\"tpot_s\": [NaN, 1, 1e999]}'")
        connection.commit()
    told = Told("query", "-C", tmp_path / "c")
    assert (told.code, "its ratios is damaged" in told.err) == (2, True)


@pytest.mark.parametrize("bound", ["quality_perplexity<=1e999", "tpot_s<=-1e999", "tpot_s<1e400"])
def test_a_bound_that_is_not_finite_is_refused(bound: str, shelf: Path) -> None:
    told = Told("query", "--slo", bound, "-C", shelf)
    assert (told.code, "too large for a number" in told.err) == (2, True)
    assert reader.models(shelf) == ["m"]
