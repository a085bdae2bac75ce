"""The code that is packed beside weights: it runs where nothing else of llmbuild is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llmbuild.carry.pack import MORE_CODE
from llmbuild.profiler.remote import archive

IMPORTED = [name.replace("/", ".") for name in MORE_CODE if not name.endswith("__init__")]


def test_modules_that_are_packed_import_no_others(tmp_path: Path) -> None:
    code = tmp_path / "code.zip"
    code.write_bytes(archive(*MORE_CODE))
    asked = "".join(f"import llmbuild.{name}\n" for name in IMPORTED)
    script = f"import sys\nsys.path.insert(0, {str(code)!r})\n{asked}print(llmbuild.__file__)"
    run = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert Path(run.stdout.strip()).parents[1] == code
