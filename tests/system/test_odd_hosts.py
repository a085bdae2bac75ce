"""Catalogs that may only be read, folders of other users, streams that are closed, full or of another encoding."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmbuild.catalog.place import FILE
from llmbuild.errors import CatalogError, InputError, as_our_errors, sentence
from llmbuild.runtime import reader
from tests.conftest import llmbuild
from tests.support.synthetic import THREE, fill

ROOT = Path(__file__).parents[2]
PLAIN_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
"""What lets root be held to permissions as any other user is."""
needs_plain_user = pytest.mark.skipif(
    bool(PLAIN_USER) and shutil.which("setpriv") is None, reason="root is held to permissions by setpriv alone"
)
READING = (
    ("query",),
    ("verify",),
    ("gc", "-n"),
    ("pick", "-m", "m"),
    ("explain", "VARIANT"),
    ("doctor",),
)


def run(*words: Any, shell: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run llmbuild as a user who is held to permissions; `shell` is what a shell does with it, such as `>&-`."""
    command = [*PLAIN_USER, sys.executable, "-m", "llmbuild", *map(str, words)]
    asked = ["bash", "-c", f'"$@" {shell}', "bash", *command] if shell else command
    return subprocess.run(
        asked, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **(env or {})}, timeout=240
    )


def told_once(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check that a command ended with one sentence that holds these words."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Path]:
    """A catalog with its latest rows in a write-ahead log, copied to where nothing may be written."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    fill(source, THREE)
    writer = sqlite3.connect(source / FILE, isolation_level=None)
    writer.execute("PRAGMA wal_autocheckpoint=0")
    writer.execute("UPDATE standing SET reason = 'the latest'")
    copy.mkdir()
    for name in (FILE, f"{FILE}-wal"):
        shutil.copyfile(source / name, copy / name)
    shutil.copytree(source / "blobs", copy / "blobs")
    writer.close()
    assert (copy / f"{FILE}-wal").stat().st_size
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield copy
    for path in (copy, *(p for p in copy.rglob("*") if p.is_dir())):
        path.chmod(0o755)


# --- read-only ---------------------------------------------------------------------------------------------------


@needs_plain_user
def test_a_copy_with_a_log_that_cannot_be_written_shows_all_rows(sealed: Path) -> None:
    done = run("query", "--all", "--json", "-C", sealed)
    assert (done.returncode, done.stderr) == (0, "")
    assert {row["reason"] for row in json.loads(done.stdout)} == {"the latest"}
    assert sorted(p.name for p in sealed.iterdir()) == ["blobs", FILE, f"{FILE}-wal"]


@needs_plain_user
@pytest.mark.parametrize("words", READING, ids=lambda w: " ".join(w[:2]))
def test_reading_commands_need_not_write(sealed: Path, words: tuple[str, ...]) -> None:
    name = reader.variants(sealed)[0]["variant"][:12] if os.getuid() else ""
    words = tuple(name or _variant(sealed) if word == "VARIANT" else word for word in words)
    done = run(*words, "-C", sealed)
    assert "internal error" not in done.stderr
    assert "cannot" not in done.stderr
    assert done.returncode == 0, done.stderr


def _variant(folder: Path) -> str:
    with sqlite3.connect(f"{(folder / FILE).as_uri()}?mode=ro&immutable=1", uri=True) as connection:
        return str(connection.execute("SELECT digest FROM variant").fetchone()[0])[:12]


@needs_plain_user
def test_a_catalog_that_cannot_be_written_is_merged_compared_and_published(sealed: Path, tmp_path: Path) -> None:
    for words in (("merge", sealed, "-C", tmp_path / "into"), ("diff", sealed, sealed)):
        done = run(*words)
        assert done.returncode == 0, done.stderr
    done = run("publish", tmp_path / "out", "-C", sealed)
    assert (done.returncode, "does not know of this publication" in done.stderr) == (0, True), done.stderr
    assert len(reader.variants(tmp_path / "out")) == len(reader.variants(tmp_path / "into"))


@needs_plain_user
@pytest.mark.parametrize("words", [("gc",), ("merge", "OTHER")], ids=["gc", "merge"])
def test_what_has_to_write_is_refused_where_it_cannot(sealed: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    fill(tmp_path / "other", THREE, "other")
    words = tuple(str(tmp_path / "other") if word == "OTHER" else word for word in words)
    told_once(run(*words, "-C", sealed), str(sealed), "cannot be written")


@needs_plain_user
def test_a_log_that_cannot_be_read_is_refused_and_not_left_out(sealed: Path) -> None:
    (sealed / f"{FILE}-wal").chmod(0)
    done = run("query", "-C", sealed)
    told_once(done, f"{FILE}-wal", "Permission denied")
    assert done.stdout == ""


def test_a_copy_that_is_written_to_meanwhile_is_told(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(range(99))
    monkeypatch.setattr(reader, "_state", lambda file: next(states))
    with pytest.raises(CatalogError, match="is being written to"):
        reader._copied(sealed / FILE)


# --- other users -------------------------------------------------------------------------------------------------


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Path]:
    """A catalog in a folder that another user's umask closed."""
    folder = tmp_path / "home"
    fill(folder / "catalog", THREE)
    folder.chmod(0)
    yield folder / "catalog"
    folder.chmod(0o755)


@needs_plain_user
@pytest.mark.parametrize("words", [("query",), ("verify",), ("gc", "-n"), ("run", "m"), ("publish", "x")], ids=" ".join)
def test_a_folder_of_another_user_is_one_sentence(private: Path, words: tuple[str, ...]) -> None:
    told_once(run(*words, "-C", private), str(private), "Permission denied")


@needs_plain_user
def test_another_users_catalog_is_no_source(private: Path, tmp_path: Path) -> None:
    told_once(run("merge", private, "-C", tmp_path / "into"), str(private), "Permission denied")
    assert not (tmp_path / "into").exists()


@needs_plain_user
def test_the_loader_raises_our_errors_alone(private: Path) -> None:
    code = (
        "import llmbuild, sys\n"
        "from llmbuild.runtime import load\n"
        "from llmbuild.errors import CatalogError\n"
        f"try: load({str(private)!r}, 'm')\n"
        "except CatalogError as error: print(error)"
    )
    done = subprocess.run(
        [*PLAIN_USER, sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert str(private) in done.stdout and "Permission denied" in done.stdout


@needs_plain_user
def test_a_blob_folder_that_cannot_be_read_loses_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "c", THREE)
    folder = next((tmp_path / "c" / "blobs" / "sha256").iterdir())
    folder.chmod(0)
    try:
        for words in (("verify",), ("gc",)):
            told_once(run(*words, "-C", tmp_path / "c"), str(folder), "Permission denied")
    finally:
        folder.chmod(0o755)


# --- streams -----------------------------------------------------------------------------------------------------


def test_a_closed_output_is_told_before_anything_is_done(tmp_path: Path) -> None:
    told_once(run("keys", tmp_path / "k", shell=">&-"), "standard output is closed")
    assert list(tmp_path.iterdir()) == []


def test_a_full_output_is_one_sentence() -> None:
    for words in (("targets", "--knobs"), ("targets", "--knobs", "--json")):
        told_once(run(*words, shell="> /dev/full"), "the output cannot be written", "No space left on device")


@pytest.mark.parametrize("words", [("targets", "--knobs"), ("--help",), ("targets", "--knobs", "--csv")], ids=" ".join)
def test_a_reader_that_goes_away_ends_a_command_as_a_signal_does(words: tuple[str, ...]) -> None:
    done = run(*words, shell="| (exec <&-; sleep 3); exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_error_stream_loses_no_row_and_no_file_gets_its_number(tmp_path: Path) -> None:
    fill(tmp_path / "c", THREE)
    done = run("query", "--json", "-C", tmp_path / "c", shell="2>&-")
    assert (done.returncode, len(json.loads(done.stdout))) == (0, 2)


def test_a_terminal_of_another_encoding_gets_an_escape(tmp_path: Path) -> None:
    fill(tmp_path / "c", THREE, "模型")
    env = {"PYTHONIOENCODING": "latin-1"}
    assert run("query", "-C", tmp_path / "c", env=env).returncode == 0
    listed = run("query", "--json", "-C", tmp_path / "c", env=env)
    assert {row["model"] for row in json.loads(listed.stdout)} == {"模型"}
    said = run("pick", "-m", "型", "-C", tmp_path / "c", env=env)
    assert (said.returncode, "\\u578b" in said.stderr) == (2, True)


# --- sentences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied: its owner can give access"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: free some space"),
        (OSError("something odd"), "something odd"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x']"), "set TMPDIR to a folder"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), "/a -> /b: Invalid cross-device link"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(error: OSError, told: str) -> None:
    assert told in sentence(error)
    assert "\n" not in sentence(error)
    with pytest.raises(InputError) as raised, as_our_errors():
        raise error
    assert str(raised.value) == sentence(error)


@pytest.mark.parametrize(
    "command", [("doctor",), ("query",), ("verify",), ("pull", "loop"), ("build", "loop"), ("recipes", "loop")]
)
def test_a_link_that_leads_to_itself_is_one_message(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    done = llmbuild(*command, *(() if command[0] == "recipes" else ("-C", "loop")), cwd=tmp_path)
    assert "internal error" not in done.stderr
    assert done.returncode in ((0,) if command[0] == "doctor" else (1, 2)), done.stdout + done.stderr
