"""Follows docs/tutorial.md to the letter: writes its files and runs its commands in order, on a small model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Project
from tests.support import tiny

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_tutorial_leads_from_a_folder_to_a_deployment(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(tmp_path / "my-model", num_hidden_layers=1)
    shutil.copy(project.model / "tokenizer.json", tmp_path / "my-model")
    monkeypatch.delenv("LLMBUILD_CATALOG", raising=False)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran, said = 0, ""
    for block in BLOCK.finditer(PAGE.read_text()):
        kind, _, rest = (block["mark"] or "").partition(": ")
        if kind == "file":
            (tmp_path / rest).write_text(block["text"])
        elif kind != "not run":
            assert block["kind"] == "sh", block["text"]
            done = subprocess.run(
                ["sh", "-e", "-c", block["text"]],
                cwd=tmp_path,
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            ran, said = ran + 1, done.stdout + done.stderr
    assert ran == len(re.findall(r"^```sh", PAGE.read_text(), re.MULTILINE)) - 1  # all but the installation
    assert "chosen" in said and (tmp_path / "llmbuild.lock").is_file()
