"""Our kernels for 64-bit Arm: what they are compiled to, and a whole model under emulation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmbuild.frontend.program import import_model
from llmbuild.kernels.choose import KNOWN, choose
from llmbuild.kernels.layouts import Layout
from llmbuild.spec.program import ImportJob
from tests.support import tiny
from tests.support.artifact import relative_error
from tests.support.machines import EMULATOR, MACHINES, emulate
from tests.support.products import products_module

UNITS = {unit.name: unit for unit in KNOWN}
BRANCH = re.compile(r"\s(?:b\.\w+|cbn?z\s+\w+,)\s+(\.LBB0_\w+)$")


def innermost_loops(assembly: str) -> list[str]:
    """Return what is between a label of the first function and the branch back to it, with no label between."""
    lines = [line.split("//")[0].rstrip() for line in assembly.splitlines()]
    loops, label, start = [], "", 0
    for i, line in enumerate(lines):
        if found := re.match(r"(\.LBB0_\w+):", line):
            label, start = found[1], i
        elif (found := BRANCH.search(line)) and found[1] == label:
            loops.append("\n".join(lines[start:i]))
    return loops


@pytest.mark.parametrize(
    ("name", "form", "together", "instruction", "count"),
    [
        ("dotprod", "int8", False, "sdot", 128),
        ("dotprod", "int8", True, "sdot", 64),
        ("dotprod", "int6_g32", True, "sdot", 64),
        ("dotprod", "int4_g32", False, "sdot", 128),
        ("dotprod", "int4_g32", True, "sdot", 64),
        ("dotprod", "q8_0", True, "sdot", 64),
        ("dotprod", "q4_0", True, "sdot", 64),
        ("i8mm", "int8", False, "usdot", 128),
        ("i8mm", "int8", True, "usmmla", 32),
    ],
)
def test_inner_loops_are_the_instructions_and_spill_next_to_nothing(
    tmp_path: Path, name: str, form: str, together: bool, instruction: str, count: int
) -> None:
    unit, layout = UNITS[name], Layout(form, 576)
    source = tmp_path / "products.mlir"
    source.write_text(products_module(unit, layout, unit.kernels[layout.family].row_tile if together else 1))
    MACHINES[name].compile(source, f"--iree-hal-dump-executable-intermediates-to={tmp_path / 'code'}")
    (assembly,) = (tmp_path / "code").glob("*.s")
    loops = [loop for loop in innermost_loops(assembly.read_text()) if instruction in loop]
    assert loops
    for loop in loops:
        assert len(re.findall(rf"\s{instruction}\s", loop)) == count
        kept = len(re.findall(r"\[(?:sp|x29)\b|\[x\d+\], #-16\]!|\sst[rpu]", loop))
        assert kept <= (0 if together else 0.35 * count)


@pytest.mark.skipif(not EMULATOR, reason="LLMBUILD_AARCH64_RUN names no emulator")
@pytest.mark.parametrize(
    ("name", "form", "shape"),
    [
        ("i8mm", "int8", {"kind": "Qwen3", "hidden_size": 60, "head_dim": 24, "hidden_act": "gelu"}),
        pytest.param("dotprod", "int4_g64", {}, marks=pytest.mark.exhaustive),
        pytest.param("dotprod", "int6_g32", {"intermediate_size": 43}, marks=pytest.mark.exhaustive),
        pytest.param(
            "dotprod",
            "f16",
            {"hidden_size": 36, "intermediate_size": 43, "head_dim": 8, "hidden_act": "gelu_new"},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_model_for_aarch64_agrees_with_torch(tmp_path: Path, name: str, form: str, shape: dict[str, Any]) -> None:
    features = {"i8mm": ("+dotprod", "+i8mm"), "dotprod": ("+dotprod",)}[name]
    assert choose(features, form) is UNITS[name]
    choices = {"weight_format": form, "layout": "packed", "kernel": "own"}
    model = tiny.write(tmp_path / "model", **shape)
    job = ImportJob(str(model), 64, choices=tuple(choices.items()), features=features)
    abi = import_model(job, tmp_path).program.abi
    artifact = MACHINES[name].compile(tmp_path / "module.mlirbc")
    with np.load(tmp_path / "check.npz") as check:
        kv = [np.zeros(kind.shape, kind.dtype) for kind in abi.kv]
        inputs = [check["prompt"], np.zeros(1, np.int64), *kv]
        flags = [f"--parameters=model={tmp_path / 'parameters.irpa'}", "--device=local-task", "--function=prefill"]
        _, logits = emulate(artifact, inputs, 2, *flags)
        assert relative_error(logits, check["logits"][0]) < max(1e-5, 10 * float(check["noise"]))
