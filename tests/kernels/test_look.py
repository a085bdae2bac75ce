"""The look-up of tokens: the rows that NumPy takes out of the same panels, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmbuild.kernels.choose import KNOWN
from llmbuild.kernels.look import look
from llmbuild.spec.formats import BLOCKS, INTEGERS
from tests.kernels.test_head import HEADS, Head
from tests.support.artifact import compile_file

UNIT = next(unit for unit in KNOWN if unit.name == "avx2")
"""It names how matrices lie alone: the look-up is the same code on every CPU."""


def wanted(made: Head, tokens: list[int]) -> np.ndarray:
    """Return rows f32[T,width] by NumPy."""
    found: np.ndarray = (made.matrix.values * made.matrix.scale[:, None])[tokens]
    return found


CASES = [(case, False) for case in HEADS] + [
    (case, True) for case, (_, form) in HEADS.items() if form in INTEGERS and form not in BLOCKS
]
"""Weights in blocks are never scaled."""


@pytest.mark.parametrize(("case", "scaled"), CASES, ids=lambda of: {True: "scaled", False: "plain"}.get(of, of))
def test_rows_are_those_of_the_matrix(case: str, scaled: bool, tmp_path: Path) -> None:
    import iree.runtime as rt

    made = Head(UNIT, case)
    kinds, taken, seen, factor = made.weights
    tokens, rows = "tensor<1x?xi64>", f"tensor<1x?x{made.wide}xf32>"
    more = (f", %f: {factor}", ", %f", f", {factor}") if scaled else ("", "", "")
    main = f"""
util.func public @main(%tokens: {tokens}, {taken}{more[0]}) -> {rows} {{
{seen}%r = util.call @look(%tokens, %w, %s{more[1]}) : ({tokens}, {kinds}{more[2]}) -> {rows}
util.return %r : {rows}
}}"""
    (tmp_path / "look.mlir").write_text(look("look", made.shape, scaled) + main)
    artifact = compile_file(tmp_path / "look.mlir", tmp_path / "look.vmfb")
    module, device = rt.load_vm_flatbuffer_file(str(artifact), driver="local-task"), rt.get_device("local-task")
    by = np.linspace(0.3, 3.0, made.wide, dtype=np.float32)
    last = made.shape.vocabulary - 1
    for asked in ([last], [3, 0, 63, last // 2, last, 3, 17]):
        given = [np.array([asked]), *made.stored, *([by] if scaled else [])]
        found = np.asarray(module.main(*(rt.asdevicearray(device, part) for part in given)))[0]
        expected = wanted(made, asked) * (by if scaled else np.float32(1))
        assert found.shape == (len(asked), made.wide)
        np.testing.assert_array_equal(found, expected)
