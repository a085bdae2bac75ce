"""Shared fixtures: a tiny model with a tokenizer, its recipe, and a catalog built from it by the command line."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from llmbuild.runtime import host
from tests.support import tiny
from tests.support.artifact import CHECKS
from tests.support.limits import give_limits

RECIPE = """\
name: tiny
model:
  huggingface: {model}
workloads:
  - {{name: short, prompt: 8, output: 8, context: 32}}
objectives: [tpot_s, ttft_s, parameter_bytes]
quality:
  text: {{file: {text}}}
  tokens: 64
budget: {{trials: 3, time: 5m}}
knobs:
  opt_level: [O2]
  data_tiling: [off]
  distribution_size: [64]
  split_reduction: [false]
"""

TEXT = "def push(self, item):\n    self.items.append(item)\n\n" * 40


SLOW = (
    "build/build build/freshness build/imports build/shared_imports build/tuning carry/drawn carry/pack "
    "carry/peers_bench catalog/postgres catalog/publish cli/chat cli/cli cli/endurance cli/isolated cli/study "
    "compiler/phases compiler/targets fleet/measured fleet/orchestrate frontend/batch frontend/formats "
    "frontend/frontend frontend/frontend_job frontend/hub frontend/loading frontend/odd_widths "
    "frontend/pystdlib_model frontend/repeat frontend/resume frontend/scaling frontend/score frontend/shapes "
    "frontend/step kernels/aarch64 kernels/kernels kernels/matvec kernels/shared_exponent kernels/vulkan "
    "profiler/comparisons profiler/energy profiler/profiler profiler/remote profiler/roofline repository/docs "
    "repository/nightly repository/scripts repository/tutorial repository/wheel runtime/answers runtime/ladder "
    "serve/client serve/exact serve/offline serve/ragged system/odd_hosts"
).split()
"""Modules that compile or build models, or wait for servers: `scripts/test --fast` goes without them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run have all of each sweep."""
    parser.addoption("--exhaustive", action="store_true", help="run the tests marked exhaustive too")


def pytest_configure(config: pytest.Config) -> None:
    """Let the compiler check its own text after each pass where a run has all of each sweep; no example has a deadline:
    a slow machine is no fault.
    """
    settings.register_profile("llmbuild", deadline=None)
    settings.load_profile("llmbuild")
    if config.getoption("exhaustive"):
        os.environ[CHECKS] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of slow modules, and leave out what only an exhaustive run has."""
    here = Path(__file__).parent
    slow = {here / folder / f"test_{name}.py" for folder, _, name in (each.partition("/") for each in SLOW)}
    assert all(path.is_file() for path in slow), sorted(path for path in slow if not path.is_file())
    for item in items:
        if item.path in slow:
            item.add_marker(pytest.mark.slow)
    left = [item for item in items if item.get_closest_marker("exhaustive")]
    if left and not config.getoption("exhaustive"):
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@dataclass(frozen=True)
class Project:
    """A recipe of a tiny model, and where its catalog is."""

    folder: Path
    recipe: Path
    catalog: Path
    model: Path


def llmbuild(*arguments: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "llmbuild", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **env}, timeout=900
    )


def make_project(folder: Path, **shape: Any) -> Project:
    """Write a tiny model with its tokenizer, a text and a recipe; `shape` is what its configuration has otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.write(folder / "model", **shape)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(str(model / "tokenizer.json"))
    text = folder / "heldout.txt"
    text.write_text(TEXT)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(model="./model", text="./heldout.txt"))
    return Project(folder, recipe, folder / "catalog", model)


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that one of the workers of a test run makes, and all of them use."""
    base = factory.getbasetemp()
    root = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the kernel, whatever ends its holder
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


def project_in(folder: Path) -> Project:
    """Return the project that `make_project` wrote to a folder."""
    return Project(folder, folder / "tiny.yaml", folder / "catalog", folder / "model")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A tiny project that nothing is built from; not to be written to."""
    return project_in(shared(tmp_path_factory, "project", make_project))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, project: Project) -> Project:
    """The tiny project with three variants built, through the command line."""

    def make(folder: Path) -> None:
        shutil.copytree(project.folder, folder)
        made = project_in(folder)
        give_limits(made.catalog)
        done = llmbuild("build", made.recipe, "-C", made.catalog)
        assert done.returncode == 0, done.stderr

    return project_in(shared(tmp_path_factory, "built", make))


CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
"""The chat template of `chatty`: the model's context is short."""


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory, built: Project) -> Project:
    """The built project, built once more with a chat template."""

    def make(folder: Path) -> None:
        shutil.copytree(built.folder, folder)
        made = project_in(folder)
        (made.model / "chat_template.jinja").write_text(CHAT)
        done = llmbuild("build", made.recipe, "-C", made.catalog)
        assert (done.returncode, "nothing was made or measured" in done.stderr) == (0, True), done.stderr

    return project_in(shared(tmp_path_factory, "chatty", make))


TIERS = ("v2", "v3", "v4", "arm")
"""Targets of `tiers`, three of x86-64 and one of aarch64, the lowest first."""


@pytest.fixture(scope="session")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A tiny project whose default is compiled for every one of `TIERS`, and never measured; not to be written to."""
    return project_in(shared(tmp_path_factory, "tiers", make_tiers))


def make_tiers(folder: Path) -> None:
    """Make the project of `tiers`."""
    made = make_project(folder, num_hidden_layers=1)
    for tier in TIERS[:3]:
        (made.folder / f"{tier}.yaml").write_text(f"backend: llvm-cpu\narch: x86_64\ncpu: x86-64-{tier}\n")
    arm = "backend: llvm-cpu\narch: aarch64\ncpu: generic\nfeatures: [+dotprod]\n"
    (made.folder / "arm.yaml").write_text(arm)
    targets = [word for tier in TIERS for word in ("-t", made.folder / f"{tier}.yaml")]
    done = llmbuild("compile", made.recipe, *targets, "--trials", "1", "-j", "2", "-C", made.catalog)
    assert done.returncode == 0, done.stderr


def low_copy(tiers: Project, folder: Path) -> Project:
    """Copy the tiers' project, with a target `low.yaml` besides that any host of this architecture runs."""
    shutil.copytree(tiers.folder, folder)
    level = "arch: x86_64\ncpu: x86-64-v2\n" if host.architecture() == "x86_64" else "arch: aarch64\ncpu: generic\n"
    (folder / "low.yaml").write_text(f"backend: llvm-cpu\n{level}")
    return Project(folder, folder / "tiny.yaml", folder / "catalog", folder / "model")
