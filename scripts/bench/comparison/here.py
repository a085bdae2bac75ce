"""Compile for this host."""

from __future__ import annotations

from pathlib import Path

from llmbuild.build.targets import find_target
from llmbuild.compiler import iree
from llmbuild.process.child import Limits
from llmbuild.search.knobs.space import KNOBS
from llmbuild.spec.target import HOST
from llmbuild.spec.variant import Failure

POINT = {knob.name: knob.default for knob in KNOBS} | {"opt_level": "O2"}


def compile_here(source: Path, output: Path) -> Failure | None:
    """Compile MLIR for this host; None when it is there."""
    return iree.compile_module(source, output, find_target(HOST), POINT, Limits(seconds=120))
