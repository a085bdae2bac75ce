"""Every script of `scripts/` begins: what it imports of the package is there, and its options are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for path in sorted((ROOT / "scripts").rglob("*.py")) if "ArgumentParser(" in path.read_text()]

BEGIN = """\
import contextlib, io, runpy, sys
from pathlib import Path
root = Path(sys.argv[1])
wrong = []
for name in sys.argv[2:]:
    path = root / name
    sys.path.insert(0, str(path.parent))
    sys.argv = [name, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as done:
        if done.code not in (0, None):
            wrong.append(f"{name}: exit {done.code}")
    except Exception as error:
        wrong.append(f"{name}: {type(error).__name__}: {error}")
    sys.path.pop(0)
print("\\n".join(wrong))
"""


def test_every_script_says_what_it_takes() -> None:
    names = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    assert len(names) > 15
    done = subprocess.run(
        [sys.executable, "-c", BEGIN, str(ROOT), *names], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
