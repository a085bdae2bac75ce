"""The two ways to run a Python tool: a process of its own, and a fork of one that has imported its modules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmbuild.process.child import Limits, python, run
from llmbuild.process.prefork import Prefork
from llmbuild.spec.variant import Failure, Stage

BRIEF = Limits(20)
RunCode = Callable[..., Failure | None]


@pytest.fixture(scope="session")
def prefork() -> Iterator[Prefork]:
    """What starts jobs from a process that has imported `wave`; no job may run without it."""
    made = Prefork(["wave"])
    yield made
    made.close()
    assert made.told() == []


@pytest.fixture(params=["alone", "forked"])
def run_code(request: pytest.FixtureRequest, tmp_path: Path, prefork: Prefork) -> RunCode:
    """Run code of Python as a tool that writes `output`."""
    forked = request.param == "forked"
    if forked and sys.platform != "linux":
        pytest.skip("only Linux forks")

    def run_code(code: str, output: Path, limits: Limits = BRIEF, stage: Stage = "compile") -> Failure | None:
        script = tmp_path / "tool.py"
        script.write_text(f"import sys; assert ('wave' in sys.modules) is {forked}\n{code}")
        if forked:
            return prefork.run(str(script), [], stage, limits, output)
        return run(python(str(script)), stage, limits, output)

    return run_code
