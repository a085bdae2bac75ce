"""Final norm and output matrix, of one row and of many: held against NumPy, and against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmbuild.kernels.head import HeadShape, head, picked, scores
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.layouts import family
from llmbuild.spec.formats import INTEGERS
from llmbuild.transform import reference
from llmbuild.transform.panels import Matrix, encode_for, pack, unpack
from llmbuild.transform.weights import pad_width
from tests.support.artifact import relative_error
from tests.support.machines import MACHINES
from tests.support.units import with_each_family

HEADS = {
    "whole panel": (64, "int8"),
    "part of a panel": (100, "int8"),
    "panels and a part": (333, "int8"),
    "int4 in one group": (100, "int4_g64"),
    "int4 in groups": (333, "int4_g32"),
    "int7 in groups": (333, "int7_g32"),
    "int6 in groups": (100, "int6_g32"),
    "int5 in groups": (333, "int5_g64"),
    "int3 in groups": (100, "int3_g32"),
    "int2 in groups": (333, "int2_g32"),
    "int5, scales in bytes": (333, "int5_g32s8"),
    "f16": (100, "f16"),
    "bf16": (333, "bf16"),
    "f12_e4m7": (333, "f12_e4m7"),
    "q8_0": (333, "q8_0"),
    "q4_0": (100, "q4_0"),
    "q4_1": (333, "q4_1"),
}
FORMS = {name: form for name, (_, form) in HEADS.items()}
ROWS = (1, 2, 3, 17, 64, 129)


class Head:
    """An output matrix of random weights, none positive: three of its rows are alike and larger than the others."""

    def __init__(self, unit: Instructions, case: str) -> None:
        vocabulary, form = HEADS[case]
        rng, hidden = np.random.default_rng(vocabulary), 84 if form in INTEGERS else 48
        self.shape = HeadShape(hidden, vocabulary, 1e-5, 2, form, unit.kernels[family(form)].narrow)
        self.wide = self.shape.width
        dense = -np.abs(rng.standard_normal((vocabulary, hidden))).astype(np.float32)
        dense[vocabulary // 2] = dense[vocabulary - 1] = dense[3] = -1e-3
        data, scales = (part.view(np.uint8) for part in pack(self.shape.layout, encode_for(self.shape.layout, dense)))
        values = unpack(self.shape.layout, data, scales)
        self.matrix = Matrix(*values, np.zeros(self.shape.padded, np.float32), self.shape.layout)
        self.norm, self.stored = np.ones(self.wide, np.float32), [data.view(np.int8), scales.view(np.int8)]
        self.x = pad_width(np.abs(rng.standard_normal((max(ROWS), hidden))).astype(np.float32), self.wide)

    def expect(self, x: Any) -> Any:
        """Return logits f32[T,padded] by NumPy."""
        return reference.multiply(reference.normalize(x, self.norm, 1e-5, self.shape.hidden), self.matrix)

    @property
    def weights(self) -> tuple[str, str, str, str]:
        """Return, in MLIR, the types of data and scales as stored, the arguments that bring their bytes, the operations
        that see these as stored, and the type of the norm.
        """
        layout = self.shape.layout
        held = [f"tensor<{part.size}xi8>" for part in self.stored]
        each = [2 if layout.is_half else 1, layout.scale_size]
        elements = layout.element, layout.scale_element
        kinds = [f"tensor<{p.size // n}x{e}>" for p, n, e in zip(self.stored, each, elements, strict=True)]
        seen = "".join(f"%{n} = {_as(h, f'%{n}_bytes', k)}\n" for n, h, k in zip(("w", "s"), held, kinds, strict=True))
        return ", ".join(kinds), f"%w_bytes: {held[0]}, %s_bytes: {held[1]}", seen, f"tensor<{self.wide}xf32>"


def _as(held: str, name: str, wanted: str) -> str:
    """Return the operation that sees bytes as another type."""
    return (
        f"flow.tensor.bitcast {name} : {held} -> {wanted}"
        if held != wanted
        else f"util.optimization_barrier {name} : {held}"
    )


@with_each_family("case", FORMS)
def test_head_agrees_with_numpy_and_takes_the_first_largest(tmp_path: Path, case: tuple[Instructions, str]) -> None:
    unit, made = case[0], Head(*case)
    kinds, taken, seen, norm = made.weights
    results = f"tensor<{made.shape.padded}xf32>, tensor<1xi64>"
    wide = f"tensor<1x{made.wide}xf32>"
    main = f"""
util.func public @main(%x: {wide}, %norm: {norm}, {taken}) -> ({results}) {{
{seen}%r:2 = util.call @head(%x, %norm, %w, %s) : ({wide}, {norm}, {kinds}) -> ({results})
util.return %r#0, %r#1 : {results}
}}"""
    (tmp_path / "head.mlir").write_text(head("head", made.shape, unit) + main)
    artifact = MACHINES[unit.name].compile(tmp_path / "head.mlir")
    x, vocabulary = made.x[:1], made.shape.vocabulary
    (logits, token), _ = MACHINES[unit.name].call(artifact, [x, made.norm, *made.stored], 2, "local-task")
    assert relative_error(logits[:vocabulary], made.expect(x)[0, :vocabulary]) < 1e-5
    assert token.tolist() == [3]


@with_each_family("case", FORMS)
def test_many_rows_are_those_of_the_head_bit_for_bit(tmp_path: Path, case: tuple[Instructions, str]) -> None:
    unit, made = case[0], Head(*case)
    kinds, taken, seen, norm = made.weights
    wide, one, logits = f"tensor<?x{made.wide}xf32>", f"tensor<1x{made.wide}xf32>", f"tensor<?x{made.shape.padded}xf32>"
    alone, read = f"tensor<{made.shape.padded}xf32>", "tensor<?xi64>"
    results = f"{logits}, {alone}, {logits}, {read}"
    main = f"""
util.func public @main(%x: {wide}, %one: {one}, %read: {read}, %norm: {norm}, {taken}) -> ({results}) {{
{seen}%all = util.call @{scores("head")}(%x, %norm, %w, %s) : ({wide}, {norm}, {kinds}) -> {logits}
%r:2 = util.call @head(%one, %norm, %w, %s) : ({one}, {norm}, {kinds}) -> ({alone}, tensor<1xi64>)
%p:2 = util.call @{picked("head")}(%x, %read, %norm, %w, %s) : ({wide}, {read}, {norm}, {kinds}) -> ({logits}, {read})
util.return %all, %r#0, %p#0, %p#1 : {results}
}}"""
    (tmp_path / "scores.mlir").write_text(head("head", made.shape, unit) + main)
    artifact = MACHINES[unit.name].compile(tmp_path / "scores.mlir")
    tile = unit.kernels[made.shape.layout.family].row_tile
    tolerance = 1e-2 if made.shape.layout.block else 1e-5  # one of many may round to a byte the other way
    real = made.shape.vocabulary
    for rows in ROWS[3:4] if MACHINES[unit.name].emulated else ROWS:
        for row in sorted({0, rows // tile * tile - 1, rows - 1} - {-1}):
            read_rows = np.array([row, *range(rows - 1, -1, -2)])
            inputs = [made.x[:rows], made.x[row : row + 1], read_rows, made.norm, *made.stored]
            (all_, alone_, some, tokens), _ = MACHINES[unit.name].call(artifact, inputs, 4, "local-task")
            assert all_.shape == (rows, made.shape.padded)
            assert relative_error(all_[:, :real], made.expect(made.x[:rows])[:, :real]) < tolerance
            assert np.array_equal(all_[row], alone_)
            assert np.array_equal(some, all_[read_rows])
            assert tokens.tolist() == [3] * len(read_rows)
