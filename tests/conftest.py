"""Shared fixtures: a tiny model with a tokenizer, its recipe, and a catalog built from it by the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmbuild.runtime import host
from tests.support import tiny

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
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **env}, timeout=300
    )


def make_project(folder: Path) -> Project:
    """Write a tiny model with its tokenizer, a text and a recipe."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.write(folder / "model")
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


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A tiny project that nothing was built from yet."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def built(project: Project) -> Project:
    """The tiny project with three variants built, through the command line."""
    done = llmbuild("build", project.recipe, "-C", project.catalog)
    assert done.returncode == 0, done.stderr
    return project


TIERS = ("v2", "v3", "v4", "arm")
"""Targets of `tiers`, three of x86-64 and one of aarch64, the lowest first."""


@pytest.fixture(scope="session")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A tiny project whose default is compiled for every one of `TIERS`, and never measured; not to be written to."""
    made = make_project(tmp_path_factory.mktemp("tiers"))
    for tier in TIERS[:3]:
        (made.folder / f"{tier}.yaml").write_text(f"backend: llvm-cpu\narch: x86_64\ncpu: x86-64-{tier}\n")
    arm = "backend: llvm-cpu\narch: aarch64\ncpu: generic\nfeatures: [+dotprod]\n"
    (made.folder / "arm.yaml").write_text(arm)
    targets = [word for tier in TIERS for word in ("-t", made.folder / f"{tier}.yaml")]
    done = llmbuild("compile", made.recipe, *targets, "--trials", "1", "-j", "2", "-C", made.catalog)
    assert done.returncode == 0, done.stderr
    return made


def low_copy(tiers: Project, folder: Path) -> Project:
    """Copy the tiers' project, with a target `low.yaml` besides that any host of this architecture runs."""
    shutil.copytree(tiers.folder, folder)
    level = "arch: x86_64\ncpu: x86-64-v2\n" if host.architecture() == "x86_64" else "arch: aarch64\ncpu: generic\n"
    (folder / "low.yaml").write_text(f"backend: llvm-cpu\n{level}")
    return Project(folder, folder / "tiny.yaml", folder / "catalog", folder / "model")
