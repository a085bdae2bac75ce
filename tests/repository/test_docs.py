"""What README.md, catalog/README.md and docs/ tell a reader to write, checked against what is there."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
from ruamel.yaml import YAML

from llmbuild.catalog.schema import FILE
from llmbuild.catalog.writer import Catalog
from llmbuild.cli.main import main
from llmbuild.fleet.policies.named import POLICIES
from llmbuild.frontend.config import KINDS
from llmbuild.search.knobs.space import knobs_of
from llmbuild.spec.files.fleet import read_fleet
from llmbuild.spec.files.reader import read_recipe, read_target
from llmbuild.spec.slo import METRICS
from llmbuild.spec.target import BACKENDS
from tests.conftest import Project

ROOT = Path(__file__).parents[2]
TUTORIAL = "docs/tutorial.md"
"""Followed from end to end by `tests/repository/test_tutorial.py`."""
PAGES = (
    "README.md",
    "catalog/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")) if "generated" not in path.parts),
)
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


def blocks(language: str) -> list[tuple[str, str]]:
    """Return the blocks of a language, each with its page."""
    found = [(page, *match) for page in PAGES if page != TUTORIAL for match in BLOCK.findall((ROOT / page).read_text())]
    return [(page, text) for page, kind, text in found if kind == language]


def spans() -> list[str]:
    """Return the words that stand as code in the text and its tables."""
    prose = "".join(BLOCK.sub("", (ROOT / page).read_text()) for page in PAGES)
    return [" ".join(span.replace("\\|", "|").split()) for span in re.findall(r"`([^`]+)`", prose)]


def shell_lines() -> list[str]:
    """Return the commands of the shell blocks, without comments."""
    joined = [line for _, text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.join(words) for line in joined if (words := shlex.split(line, comments=True))]


def commands_in(text: str) -> Iterator[str]:
    """Yield the commands of a line, which may join several with `&&` or `;`."""
    yield from (part.strip() for part in re.split(r"&&|;", text))


def ours(command: str) -> click.Command:
    """Return the command that a line calls."""
    name = shlex.split(command)[1]
    assert name in main.commands, command
    return main.commands[name]


def options_of(command: click.Command) -> set[str]:
    """Return the options of a command, and those that stand before its name."""
    parameters = [*command.params, *main.params]
    options = [each for each in parameters if isinstance(each, click.Option)]
    names = {name for each in options for name in (*each.opts, *each.secondary_opts)}
    return names | {"-h", "--help"}


@cache
def options_of_scripts() -> set[str]:
    """Return the options of the scripts, and of the programs that are carried to other machines."""
    files = [ROOT / "scripts/demo", *(ROOT / "scripts").rglob("*.py"), *(ROOT / "llmbuild/carry").glob("*.py")]
    return {name for path in files for name in re.findall(r'"(--?[a-zA-Z][\w-]*)"', path.read_text())}


def script_lines() -> list[str]:
    """Return what is written behind the name of each script, from its name on."""
    found = [re.search(r"(?:^|python3? )(scripts/\S+.*)", line) for line in [*shell_lines(), *spans()]]
    return sorted({match[1] for match in found if match})


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_a_recipe_target_or_fleet_is_read_as_it_stands(page: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "copied.yaml"
    path.write_text(text)
    keys = YAML(typ="safe").load(text)
    reads = {"model": read_recipe, "nodes": lambda fleet: read_fleet(fleet, tuple(POLICIES))}
    read = next((each for key, each in reads.items() if key in keys), read_target)(path)
    assert (page, read.name) == (page, keys.get("name", "copied"))


def test_every_kind_of_block_is_there_and_known() -> None:
    kinds = {kind for page in PAGES for kind, _ in BLOCK.findall((ROOT / page).read_text())}
    directives = {"{toctree}", "{include} ../../catalog/README.md", "{eval-rst}"}
    assert kinds == {"", "sh", "python", "yaml", "sql"} | directives


@pytest.mark.parametrize("line", [c for line in shell_lines() for c in commands_in(line) if c.startswith("llmbuild ")])
def test_a_command_of_a_block_is_parsed(line: str) -> None:
    words = shlex.split(line)
    context = main.make_context("llmbuild", words[1:])
    with context:
        assert ours(line).make_context(words[1], words[2:], parent=context).params


@pytest.mark.parametrize("span", sorted({s for s in spans() if s.startswith("llmbuild ")}))
def test_a_command_of_the_text_has_its_options(span: str) -> None:
    command = ours(span)
    assert set(OPTION.findall(span)) - options_of(command) == set()


@pytest.mark.parametrize("span", sorted({s for s in spans() if s.startswith("-")}))
def test_an_option_of_the_text_is_one_of_a_command_or_a_script(span: str) -> None:
    everyones = set().union(*(options_of(command) for command in main.commands.values()))
    compilers = {"-O3"}
    assert set(OPTION.findall(span)) - everyones - options_of_scripts() - compilers == set()


@pytest.mark.parametrize("line", script_lines())
def test_a_script_is_there_and_has_its_options(line: str) -> None:
    script, _, rest = line.partition(" ")
    assert (ROOT / script).exists()
    assert set(OPTION.findall(rest)) - options_of_scripts() == set()


FILES = sorted({s for s in spans() if re.fullmatch(r"(tests|targets|recipes|\.github)/\S+", s)})


@pytest.mark.parametrize("span", FILES)
def test_a_file_that_is_named_is_there(span: str) -> None:
    assert (ROOT / span).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"LLMBUILD_[A-Z_]+", "".join(spans())))))
def test_an_environment_variable_is_read_by_the_code(name: str) -> None:
    assert any(name in path.read_text() for path in (ROOT / "llmbuild").rglob("*.py"))


def pairs() -> set[tuple[str, str]]:
    """Return every KNOB=VALUE of the text and the commands."""
    whole = [s for s in spans() if re.fullmatch(r"\w+=[\w-]+( \w+=[\w-]+)*", s) and not s.startswith("LLMBUILD")]
    after_set = [match for line in [*shell_lines(), *spans()] for match in re.findall(r"--set '?(\w+=[\w-]+)", line)]
    found = {tuple(word.split("=", 1)) for text in [*whole, *after_set] for word in text.split()}
    return {(name, value) for name, value in found if (name, value) != ("KNOB", "VALUE")}


@pytest.mark.parametrize(("name", "value"), sorted(pairs()))
def test_a_knob_that_is_named_takes_the_value(name: str, value: str) -> None:
    knobs = [knob for backend in BACKENDS for knob in knobs_of(backend) if knob.name == name]
    assert any(value in map(str, knob.domain) for knob in knobs)


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_runs_on_a_catalog_that_was_built(
    page: str, text: str, built: Project, chatty: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "catalog").symlink_to((chatty if "model.chat(" in text else built).catalog)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(re.sub('"(pystdlib|my-model)"', '"tiny"', text).replace("0.02", "10"), page, "exec"), {})
    assert "chosen" in said.getvalue()


def queries() -> list[str]:
    """Return the SQL of the blocks, and what the shell blocks give to sqlite3."""
    given = [shlex.split(line)[-1] for line in shell_lines() if line.startswith("sqlite3 ")]
    return [*(text for _, text in blocks("sql")), *given, *(s for s in spans() if s.startswith("SELECT "))]


@pytest.mark.parametrize("query", queries())
def test_a_query_runs_on_the_schema(query: str, tmp_path: Path) -> None:
    Catalog(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute(query).fetchall()


def test_the_metrics_of_the_catalog_are_all_named() -> None:
    named = next(s for s in spans() if s.startswith("ttft_s tpot_s"))
    assert set(named.split()) == set(METRICS)


def test_the_architectures_that_are_named_are_those_that_are_taken() -> None:
    assert {kind for kind in KINDS if kind in spans()} == set(KINDS)


def faults() -> list[list[str]]:
    """Return the rows of the tables of faults that other servers had."""
    lines = (ROOT / "docs/explanation/serving-faults.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "fault"]


def test_every_fault_of_other_servers_has_its_tests() -> None:
    sources = [source for row in faults() for source in row[3].split(", ")]
    assert (len(faults()), len(set(sources))) == (42, len(sources))
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+|CVE-\d+-\d+", source) for source in sources)
    for _, does, tests, _ in faults():
        assert does and re.fullmatch(r"`test_\w+\.py::\w+`(, `test_\w+\.py::\w+`)*", tests), tests


@pytest.mark.parametrize("name", sorted({name for row in faults() for name in re.findall(r"`([^`]+)`", row[2])}))
def test_a_test_that_is_named_is_there(name: str) -> None:
    file, _, wanted = name.partition("::")
    found = ast.parse((ROOT / "tests/serve" / file).read_text()).body
    functions = {each.name for each in found if isinstance(each, ast.FunctionDef)}
    machines = {
        each.targets[0].id for each in found if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name)
    }
    assert wanted in functions | machines
