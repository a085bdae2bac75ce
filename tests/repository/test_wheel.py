"""The wheel alone, in a fresh environment and far from the checkout: it pulls, picks and generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Project, llmbuild

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

from install import install, sizes, wheel

LARGE = ("iree-base-runtime", "numpy")
"""The two libraries without which nothing runs: 118 MB of the installation."""

MOST_BYTES = 60e6
"""Of all else in the loader's installation."""

LOAD = """\
import sys, llmbuild
model = llmbuild.load("deployed", model="tiny", slo=["tpot_s<=10"], objective="tpot_s")
print("".join(model.generate("push", max_new_tokens=3)))
heavy = ("click", "sqlalchemy", "pydantic", "torch", "optuna", "jinja2")
print([name for name in heavy if name in sys.modules])
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("wheel"))


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python that knows nothing of the checkout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLMBUILD"))}
    return subprocess.run(
        [python, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_loaders_installation_is_small_and_deploys(python: Path, chatty: Project, tmp_path: Path) -> None:
    assert sum(size for name, size in sizes(python).items() if name not in LARGE) < MOST_BYTES, sizes(python)
    sent = llmbuild("publish", "tiny", tmp_path / "published", "-C", chatty.catalog)
    assert sent.returncode == 0, sent.stderr
    for command in (
        ("pull", "published", "--slo", "tpot_s<=10", "-C", "deployed"),
        ("query", "-C", "deployed"),
        ("pick", "--slo", "tpot_s<=10", "-C", "deployed"),
        ("run", "tiny", "--prompt", "push", "--max-new-tokens", "3", "-C", "deployed"),
        ("run", "tiny", "--chat", "--prompt", "push", "--max-new-tokens", "3", "-C", "deployed"),
    ):
        done = run(python, tmp_path, "-m", "llmbuild", *command)
        assert done.returncode == 0, done.stderr
    loaded = run(python, tmp_path, "-c", LOAD)
    assert (loaded.returncode, loaded.stdout.splitlines()[-1]) == (0, "[]"), loaded.stderr


def test_what_the_loaders_installation_lacks_is_told(python: Path, built: Project, tmp_path: Path) -> None:
    for command in (("build", str(built.recipe)), ("targets",), ("verify", "-C", str(built.catalog)), ("recipes",)):
        done = run(python, tmp_path, "-m", "llmbuild", *command)
        assert (done.returncode, "pip install 'llmbuild[build]'" in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
    done = run(python, tmp_path, "-m", "llmbuild", "serve", "tiny", "-C", str(built.catalog))
    assert (done.returncode, "pip install 'llmbuild[serve]'" in done.stderr) == (2, True), done.stderr
    offline = run(
        python, tmp_path, "-c", f"from llmbuild.serve import LLM; LLM('tiny', catalog={str(built.catalog)!r})"
    )
    assert offline.returncode == 0, offline.stderr
    assert llmbuild("keys", tmp_path / "mine").returncode == 0
    sent = llmbuild("publish", "tiny", tmp_path / "signed", "--sign", tmp_path / "mine.key", "-C", built.catalog)
    assert sent.returncode == 0, sent.stderr
    trusting = "import llmbuild; llmbuild.load('signed', model='tiny', trust_keys='mine.pub')"
    for trusted in (("-m", "llmbuild", "pull", "signed", "--trust", "mine.pub", "-C", "here"), ("-c", trusting)):
        done = run(python, tmp_path, *trusted)
        assert "signatures need cryptography" in done.stderr, done.stderr
        assert "pip install 'llmbuild[publish]'" in done.stderr, done.stderr
        assert "internal error" not in done.stderr


def test_the_wheel_has_what_it_needs_outside_the_checkout(tmp_path: Path) -> None:
    """Here with the libraries that build: targets, the recipes of shapes and the migrations come with it."""
    folder = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel(tmp_path)], check=True
    )
    (tmp_path / "empty").mkdir()
    env = {**os.environ, "PYTHONPATH": str(folder)}
    rows = {}
    for command in ("targets", "recipes"):
        done = subprocess.run(
            [sys.executable, "-m", "llmbuild", command, "--json"],
            cwd=tmp_path / "empty",
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        rows[command] = json.loads(done.stdout)
    assert {"x86-64-v4", "cuda-sm80", "host"} <= {row["target"] for row in rows["targets"]}
    assert {Path(row["recipe"]).parent for row in rows["recipes"]} == {folder / "llmbuild" / "recipes"}
    assert {row["state"] for row in rows["recipes"]} == {"ok"}
    code = "from llmbuild.catalog.writer import Catalog; from pathlib import Path; Catalog(Path('c')).close()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "empty", env=env, check=True)
