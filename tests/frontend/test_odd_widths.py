"""Matrices of 4-bit codes whose sizes no vector divides: they say what their codes say, and they compile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbuild.compiler import iree
from llmbuild.compiler.resolved import resolve
from llmbuild.frontend import importer, modules
from llmbuild.process.child import Limits
from llmbuild.spec.formats import INTEGERS
from llmbuild.spec.target import Target
from llmbuild.transform.quantized import dequantize, quantize
from tests.support.eager import filled

FOURS = [name for name, form in INTEGERS.items() if form.bits == 4 and not form.is_block]


def drawn(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * columns).standard_normal((rows, columns), dtype=np.float32)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(modules.LAYOUTS)),
    st.sampled_from(FOURS),
    st.integers(1, 140),
    st.integers(1, 200),
    st.integers(1, 3),
)
def test_products_and_rows_are_those_of_the_codes_whatever_the_sizes(
    layout: str, form: str, rows: int, columns: int, length: int
) -> None:
    weights = drawn(rows, columns)
    made, dense = filled(modules.LAYOUTS[layout], weights, form), dequantize(quantize(weights, INTEGERS[form]))
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, length, columns), dtype=np.float32))
    torch.testing.assert_close(made.multiply(x), x @ torch.from_numpy(dense).T, atol=1e-3, rtol=1e-4)
    wanted = [0, rows - 1]
    torch.testing.assert_close(made.look_up(torch.tensor([wanted])), torch.from_numpy(dense[[wanted]]))


class _Product(nn.Module):
    def __init__(self, matrix: modules.Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix.multiply(x)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch warns of its own use of its own tree specs
@pytest.mark.parametrize(
    ("layout", "form", "rows", "columns", "level"),
    [
        ("row_major", "int4_g64", 64, 172, "O0"),
        ("row_major", "int4a_g64", 65, 171, "O0"),
        ("row_major", "int4_g64", 65, 64, "O2"),
        ("packed", "int4_g64", 66, 200, "O0"),
    ],
)
def test_matrices_of_odd_sizes_compile(
    tmp_path: Path, layout: str, form: str, rows: int, columns: int, level: str
) -> None:
    program = _Product(filled(modules.LAYOUTS[layout], drawn(rows, columns), form))
    long = {1: torch.export.Dim("T", min=2, max=32)}
    exported = {
        name: torch.export.export(program, (torch.zeros(1, length, columns),), dynamic_shapes=shapes, strict=False)
        for name, length, shapes in (("one", 1, None), ("many", 4, (long,)))
    }
    lowered = {name: each.run_decompositions({}) for name, each in exported.items()}
    importer.save_module(importer.import_programs(lowered, {}, 0)[0], tmp_path / "module.mlirbc")
    target = resolve(Target("v3", "llvm-cpu", "x86_64", "x86-64-v3"))
    failure = iree.compile_module(
        tmp_path / "module.mlirbc", tmp_path / "module.vmfb", target, {"opt_level": level}, Limits()
    )
    assert failure is None
