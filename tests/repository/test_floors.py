from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from llmbuild.system.extras import EXTRAS, advice

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "llmbuild").rglob("*.py"))


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_loader_loads_nothing_it_does_not_need() -> None:
    loaded = modules_after("import llmbuild.runtime")
    heavy = ("torch", "transformers", "sqlalchemy", "alembic", "optuna", "click", "pydantic", "ruamel", "iree.compiler")
    heavy = (*heavy, "jinja2")
    assert [name for name in heavy if name in loaded] == []


def test_the_command_line_starts_without_anything_heavy() -> None:
    loaded = modules_after("import llmbuild.cli.main")
    heavy = ("torch", "numpy", "sqlalchemy", "optuna", "pydantic", "iree", "jinja2")
    assert [name for name in heavy if name in loaded] == []


def test_files_and_functions_stay_small() -> None:
    long_files = [str(p) for p in SOURCES if len(p.read_text().splitlines()) > 500]
    long_functions = [
        f"{path}:{node.name}"
        for path in SOURCES
        if path.parent.name != "migrations"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert long_files + long_functions == []


IMPORTED = ("frontend", "kernels", "transform")
"""Folders whose text names what they import: it is not changed for a sentence."""


def test_a_class_over_200_lines_says_why_it_is_one() -> None:
    large = [
        f"{path}:{node.name}"
        for path in SOURCES
        if path.relative_to(ROOT / "llmbuild").parts[0] not in IMPORTED
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= 200
        if "One class: " not in (ast.get_docstring(node) or "")
    ]
    assert large == []


def test_folders_are_two_deep_at_most() -> None:
    assert [str(p) for p in SOURCES if len(p.relative_to(ROOT / "llmbuild").parts) > 3] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_module_of_an_extra_is_told_by_its_name() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: {re.split(r"[\[<>=]", line)[0] for line in extras[extra]} for extra in EXTRAS}
    modules = packages_distributions()
    brought = {extra: {d for m in EXTRAS[extra] for d in modules[m]} for extra in EXTRAS}
    for extra, wanted in names.items():
        normal = {name.lower().replace("_", "-").replace(".", "-") for name in brought[extra]}
        assert {name.replace(".", "-") for name in wanted} <= normal, extra


def test_what_no_extra_brings_is_not_told_as_one() -> None:
    assert advice(ModuleNotFoundError("no", name="json.decoder")) == ""
    assert advice(ImportError("no pq wrapper"), "postgres") == "pip install 'llmbuild[postgres]'"
    assert advice(ModuleNotFoundError("no", name="iree.compiler")) == "pip install 'llmbuild[build]'"
