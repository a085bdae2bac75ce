"""Each piece of advice that a message gives is run as it stands, and the fault is gone."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmbuild.build.jobs import jobs_of
from llmbuild.build.request import BuildRequest
from llmbuild.catalog.place import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.cli.main import main
from llmbuild.errors import InputError
from llmbuild.runtime import reader
from llmbuild.runtime.model import verify
from tests.support.quick import Asked, build

A = Asked(chat="{{ messages }}")


@dataclass(frozen=True)
class Place:
    """A folder with a catalog that was built in it."""

    folder: Path

    @property
    def catalog(self) -> Path:
        return self.folder / "c"

    def build(self, asked: Asked = A, catalog: Path | None = None) -> None:
        build(asked, catalog or self.catalog, self.folder / "m")

    def row(self, catalog: Path | None = None) -> dict:
        return next(r for r in reader.variants(catalog or self.catalog, "m") if r["tokenizer"])

    def blob(self, kind: str, catalog: Path | None = None) -> Path:
        return reader.blob_path(catalog or self.catalog, self.row(catalog)[kind])

    def run(self, *arguments: str | Path) -> tuple[int, str]:
        """Run a command and return its code and all that it said."""
        done = CliRunner().invoke(main, [str(a) for a in arguments])
        return done.exit_code, done.output


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    made.build()
    return made


def follow(place: Place, said: str) -> None:
    """Run the commands between backticks of a message, in order; a build is one of the same inputs."""
    found = re.findall(r'`(llmbuild [^`]*)`|(rm -f [^\s"]+)', said)
    assert found, said
    for command, removal in found:
        words = shlex.split(command or removal)
        if words[0] == "rm":
            Path(words[2]).unlink(missing_ok=True)
        elif words[1] == "build":
            place.build()
        else:
            words = [str(place.folder / word) if word in ("FOLDER", "DEST", "NAME") else word for word in words]
            named = [] if "-C" in words or words[1] == "keys" else ["-C", place.catalog]
            code, told = place.run(*words[1:], *named)
            assert code == 0, (command, told)


def load_it(place: Place) -> tuple[int, str]:
    try:
        verify(place.catalog, place.row())
    except Exception as error:  # noqa: BLE001 - its message is what is tested
        return 2, str(error)
    return 0, ""


def verify_it(place: Place) -> tuple[int, str]:
    code, told = place.run("verify", "--json", "-C", place.catalog)
    return code or int('"problem"' in told), told.replace("llmbuild gc frees them", "`llmbuild gc`").replace(
        "llmbuild gc removes it", "`llmbuild gc`"
    )


def publish_it(place: Place) -> tuple[int, str]:
    code, told = place.run("publish", "m", place.folder / "out", "-C", place.catalog)
    return code, told.replace("`llmbuild verify`, then ", "")


def gone(kind: str) -> Callable[[Place], None]:
    return lambda p: p.blob(kind).unlink()


def changed(kind: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.blob(kind)
        path.chmod(0o600)
        path.write_bytes(b"other bytes")

    return change


def blob_of(column: str) -> Callable[[Place], None]:
    def remove(place: Place) -> None:
        with sqlite3.connect(place.catalog / FILE) as connection:
            names = [row[0] for row in connection.execute(f"SELECT {column} FROM program")]
        for name in names:
            reader.blob_path(place.catalog, name).unlink()

    return remove


def cached(table: str) -> Callable[[Place], None]:
    """Return what lets a cache name a blob that is not there."""
    more = ", features, seconds" if table == "front_half" else ""
    values = ", '{}', 1" if more else ""

    def lose(place: Place) -> None:
        with sqlite3.connect(place.catalog / FILE) as connection:
            text = f"INSERT INTO {table} (key, inputs, blob, created_at{more}) VALUES (?, '{{}}', ?, ''{values})"
            connection.execute(text, ("k" * 64, "a" * 64))

    return lose


def orphan(place: Place) -> None:
    opened = Catalog(place.catalog)
    opened.blobs.put_bytes(b"nobody's")
    opened.close()


def spoiled_orphan(place: Place) -> None:
    orphan(place)
    opened = Catalog(place.catalog)
    path = opened.blobs.path(opened.blobs.put_bytes(b"more of nobody's"))
    opened.close()
    path.chmod(0o600)
    path.write_bytes(b"changed")


def leftover(place: Place) -> None:
    (place.blob("artifact").parent / ".put-killed").write_bytes(b"half")


def nothing(place: Place) -> None:
    (place.catalog / FILE).unlink()


def pick_it(place: Place) -> tuple[int, str]:
    return place.run("query", "--json", "-C", place.catalog)


FILES = ("artifact", "parameters", "tokenizer", "chat")

TABLE: dict[str, tuple[Callable[[Place], None], Callable[[Place], tuple[int, str]]]] = {
    **{f"{kind} is gone, by the loader": (gone(kind), load_it) for kind in FILES},
    **{f"{kind} was changed, by the loader": (changed(kind), load_it) for kind in FILES if kind != "parameters"},
    **{f"{kind} is gone, by verify": (gone(kind), verify_it) for kind in FILES},
    **{f"{kind} was changed, by verify": (changed(kind), verify_it) for kind in FILES if kind != "parameters"},
    **{f"{kind} is gone, by publish": (gone(kind), publish_it) for kind in FILES if kind != "parameters"},
    **{f"{kind} are gone, by publish": (blob_of(kind), publish_it) for kind in ("module", "checks")},
    **{f"{kind} are gone, by verify": (blob_of(kind), verify_it) for kind in ("module", "checks")},
    **{f"a {table} is gone, by verify": (cached(table), verify_it) for table in ("front_half", "reference")},
    "an orphan, by verify": (orphan, verify_it),
    "an orphan that was changed, by verify": (spoiled_orphan, verify_it),
    "a leftover, by verify": (leftover, verify_it),
    "no catalog, by query": (nothing, pick_it),
}


@pytest.mark.parametrize("fault", TABLE)
def test_what_a_message_says_to_do_mends_what_it_is_printed_for(fault: str, place: Place) -> None:
    harm, ask = TABLE[fault]
    assert ask(place)[0] == 0
    harm(place)
    code, said = ask(place)
    assert code != 0
    follow(place, said)
    assert ask(place)[0] == 0, ask(place)


def test_fronts_that_a_merge_mixed_are_ranked_together_by_the_build_that_it_names(place: Place) -> None:
    mixed = Place(place.folder / "mixed")
    mixed.build(replace(A, formats=("f32",)))
    mixed.build(replace(A, formats=("f16",)), mixed.folder / "other")
    code, said = mixed.run("merge", mixed.folder / "other", "-C", mixed.catalog)
    before = [r["reason"] for r in reader.variants(mixed.catalog, "m", everything=True)]
    assert (code, "ranked apart" in said) == (0, True), said
    follow(mixed, said)
    after = [r["reason"] for r in reader.variants(mixed.catalog, "m", everything=True)]
    assert [any("another catalog" in reason for reason in reasons) for reasons in (before, after)] == [True, False]


def test_a_file_that_is_gone_from_a_pulled_folder_is_fetched_again_as_told(place: Place) -> None:
    out, pulled = place.folder / "out", place.folder / "pulled"
    assert place.run("publish", "m", out, "-C", place.catalog)[0] == 0
    assert place.run("pull", out, "--all", "-C", pulled)[0] == 0
    row = place.row(pulled)
    place.blob("tokenizer", pulled).unlink()
    with pytest.raises(Exception, match="llmbuild pull") as told:
        verify(pulled, row)
    follow(place, str(told.value))
    verify(pulled, row)


def test_a_published_folder_becomes_one_to_build_in_as_told(place: Place) -> None:
    out = place.folder / "out"
    place.run("publish", "m", out, "-C", place.catalog)
    with pytest.raises(Exception, match="llmbuild merge") as told:
        Catalog(out)
    follow(place, str(told.value))
    Catalog(place.folder / "FOLDER").close()


def test_nothing_published_and_no_key_are_mended_as_told(place: Place) -> None:
    out = place.folder / "out"
    code, said = place.run("pull", out, "--all", "-C", place.folder / "pulled")
    assert code != 0
    follow(place, said)
    assert place.run("pull", out, "--all", "-C", place.folder / "pulled")[0] == 0


def test_a_lock_that_is_not_there_is_written_as_told(place: Place) -> None:
    lock = place.folder / "it.lock"
    code, said = place.run("run", "m", "--lock", lock, "-C", place.catalog)
    assert (code, lock.exists()) == (2, False)
    follow(place, said)
    assert lock.exists()


RECIPE = """\
name: {name}
model: {{huggingface: {model}, random_init: true}}
workloads: [{{name: short, prompt: 8, output: {output}, context: 32}}]
objectives: [tpot_s]
"""


def test_two_recipes_of_one_name_in_one_command_are_refused_unless_they_ask_for_the_same(
    project: object, tmp_path: Path
) -> None:
    from tests.conftest import Project

    assert isinstance(project, Project)
    for file, name, output in (("a", "one", 8), ("b", "one", 9), ("c", "two", 9), ("d", "one", 8)):
        (tmp_path / f"{file}.yaml").write_text(RECIPE.format(name=name, model=project.model, output=output))
    first, second, other, same = jobs_of(BuildRequest(recipes=tuple(tmp_path / f"{n}.yaml" for n in "abcd")))
    assert first().ranking == same().ranking
    assert other().recipe.name == "two"
    with pytest.raises(InputError, match="give one of them another name"):
        second()
