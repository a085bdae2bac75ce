from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.build.events import Event
from llmbuild.cli import reading
from llmbuild.compiler import iree
from llmbuild.report.progress import Progress
from llmbuild.report.table import table
from llmbuild.runtime import reader
from llmbuild.system.terminal import clear_line
from tests.support.synthetic import THREE, fill

ROOT = Path(__file__).parents[2]
WORDS = st.text(st.sampled_from("ab -"), max_size=40)


@given(st.lists(st.lists(WORDS, min_size=5, max_size=5), min_size=1, max_size=4), st.integers(40, 200))
def test_a_table_fits_a_width_and_keeps_every_word_of_what_it_shows(rows: list[list[str]], width: int) -> None:
    header = ["one", "two", "three", "four", "five"]
    made = table(header, rows, range(5), width, (3,))
    assert max(map(len, made.splitlines())) <= max(width, max(len(row[0]) for row in rows))
    shown = made.partition("not shown: ")[0]
    hidden = [name for name in header if name not in shown]
    assert all(name in made for name in hidden)
    kept = "".join(row[i] for row in rows for i, name in enumerate(header) if name not in hidden)
    assert sorted(shown.replace(" ", "").replace("\n", "")) == sorted(
        "".join([*(name for name in header if name not in hidden), kept]).replace(" ", "")
    )


@given(st.lists(st.lists(WORDS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_pipe_has_no_width(rows: list[list[str]]) -> None:
    assert len(table(["a", "b", "c"], rows, range(3)).split("\n")) == len(rows) + 1


def on_terminal(columns: int, *words: object) -> str:
    """Return what a command writes to a terminal of so many columns."""
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "llmbuild", *map(str, words)]
    child = subprocess.Popen(command, stdin=far, stdout=far, stderr=far, cwd=ROOT, env=env)
    os.close(far)
    told = b""
    try:
        while piece := os.read(near, 1 << 16):
            told += piece
    except OSError:  # of Linux, where the far end was closed
        pass
    os.close(near)
    child.wait()
    return told.decode().replace("\r\n", "\n")


def test_a_front_fits_the_terminal_and_names_what_is_left_out(tmp_path: Path) -> None:
    fill(tmp_path, THREE)
    wide, narrow = (on_terminal(columns, "query", "-C", tmp_path) for columns in (300, 100))
    assert "not shown" not in wide
    assert max(map(len, narrow.splitlines())) <= 100
    assert "not shown: " in narrow and "load" in narrow.partition("not shown: ")[2]
    assert "choices" in narrow.splitlines()[0]


# --- the line that is replaced -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Looks like one."""

    def isatty(self) -> bool:
        return True


def test_nothing_is_written_behind_a_line_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", "60")
    talk = Progress(stream)
    talk(Event("compile", "x" * 200, 1, 2))
    assert len(stream.getvalue().removeprefix("\r\x1b[K")) < 60
    clear_line()
    stream.write("error: no\n")
    assert stream.getvalue().endswith("\r\x1b[Kerror: no\n")
    clear_line()
    assert stream.getvalue().endswith("error: no\n")


# --- explain -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("installed", [True, False])
def test_a_variant_is_explained_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    fill(tmp_path, THREE)
    if not installed:
        monkeypatch.setattr(iree.importlib.util, "find_spec", lambda _: None)
        monkeypatch.setattr(iree, "compiler_version", lambda: "absent")
        iree.binary.cache_clear()
    name = reader.variants(tmp_path)[0]["variant"]
    try:
        told = reading.explain(name, tmp_path, as_json=False)
    finally:
        monkeypatch.undo()
        iree.binary.cache_clear()
    assert "iree-compile" in told
