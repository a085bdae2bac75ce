"""Our kernels for each instruction set, compiled and held against NumPy over sizes at the edges and extreme values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.kernels.choose import KNOWN
from llmbuild.kernels.instructions import Instructions
from llmbuild.kernels.kept import Kept
from llmbuild.kernels.layer import MAX_LAYERS, layers, paged
from llmbuild.kernels.layer_weights import offsets
from llmbuild.kernels.layouts import TWO_BYTES, Layout, family
from llmbuild.kernels.shapes import HEAD_NORMS, DecoderShape
from llmbuild.spec.formats import BLOCKS, INTEGERS
from llmbuild.transform import reference
from llmbuild.transform.kept import packed, unpacked
from llmbuild.transform.quantized import Quantized
from llmbuild.transform.weights import pad_width
from tests.support.artifact import relative_error
from tests.support.buffers import layer_buffer
from tests.support.machines import MACHINES
from tests.support.products import panel, prepared, products_module
from tests.support.units import UNITS, all_pairs, covering, with_each_family, with_enough

ALL = TWO_BYTES["int16"]
SHAPES = {
    "whole panels": DecoderShape(128, 4, 2, 32, 192, 1e-5, 32**-0.5, 64, "f32", 2),
    "partial panels": DecoderShape(80, 3, 1, 32, 50, 1e-5, 32**-0.5, 40, "f32", 2),
    "smallest": DecoderShape(16, 1, 1, 32, 1, 1e-6, 1.0, 16, "f32", 1),
    "f16 cache, many work-groups": DecoderShape(144, 5, 5, 64, 100, 1e-6, 0.125, 33, "f16", 7),
    "int4 in partial panels": DecoderShape(80, 3, 1, 32, 50, 1e-5, 32**-0.5, 40, "f32", 2, "int4_g64"),
    "int4 in one group": DecoderShape(64, 2, 1, 32, 75, 1e-5, 32**-0.5, 40, "f32", 2, "int4_g64"),
    "int4 smallest": DecoderShape(16, 1, 1, 32, 1, 1e-6, 1.0, 16, "f32", 1, "int4_g32"),
    "int4 many groups": DecoderShape(384, 4, 4, 64, 256, 1e-6, 0.125, 33, "f16", 3, "int4_g128"),
    "int7 in partial panels": DecoderShape(20, 2, 2, 40, 43, 1e-5, 0.16, 40, "f32", 3, "int7_g32", activation="gelu"),
    "int7 many groups": DecoderShape(384, 4, 4, 64, 256, 1e-6, 0.125, 33, "f16", 3, "int7_g64"),
    "int6": DecoderShape(80, 3, 1, 32, 50, 1e-5, 32**-0.5, 40, "f32", 2, "int6_g32"),
    "int5 many groups": DecoderShape(384, 4, 4, 64, 256, 1e-6, 0.125, 33, "f16", 3, "int5_g128"),
    "int3 in partial panels": DecoderShape(20, 2, 2, 40, 43, 1e-5, 0.16, 40, "f32", 3, "int3_g32", activation="gelu"),
    "int2, scales in bytes": DecoderShape(
        80, 2, 2, 40, 43, 1e-5, 0.16, 40, "f32", 3, "int2_g32s8", formats=(("out", "int4_g32s8"), ("down", "int2_g64"))
    ),
    "f16": DecoderShape(37, 3, 1, 10, 86, 1e-5, 0.3, 40, "f32", 2, "f16", head_norms=True),
    "bf16": DecoderShape(9, 2, 1, 160, 21, 1e-5, 0.08, 40, "f16", 2, "bf16", activation="gelu_tanh"),
    "f12_e4m7": DecoderShape(80, 3, 1, 32, 50, 1e-5, 32**-0.5, 40, "f32", 2, "f12_e4m7"),
    "q8_0": DecoderShape(80, 3, 1, 32, 50, 1e-5, 32**-0.5, 40, "f32", 2, "q8_0"),
    "q4_0 many groups": DecoderShape(384, 4, 4, 64, 256, 1e-6, 0.125, 33, "f16", 3, "q4_0"),
    "q4_1": DecoderShape(20, 2, 2, 40, 43, 1e-5, 0.16, 40, "f32", 3, "q4_1", activation="gelu"),
    "two bytes": DecoderShape(80, 3, 1, 32, 50, 1e-5, 32**-0.5, 40, "f32", 2, wide=ALL),
    "two bytes, int4 many groups": DecoderShape(384, 4, 4, 64, 256, 1e-6, 0.125, 33, "f16", 3, "int4_g128", wide=ALL),
    "two bytes, int6": DecoderShape(20, 2, 2, 40, 43, 1e-5, 0.16, 40, "f32", 3, "int6_g32", wide=ALL),
    "two bytes, scales in bytes": DecoderShape(20, 2, 2, 40, 43, 1e-5, 0.16, 40, "f32", 3, "int6_g32s8", wide=ALL),
    "two bytes, q4_1": DecoderShape(80, 3, 1, 32, 50, 1e-5, 32**-0.5, 40, "f32", 2, "q4_1", wide=ALL),
    "bits of each matrix": DecoderShape(
        80,
        3,
        1,
        32,
        50,
        1e-5,
        32**-0.5,
        40,
        "f32",
        2,
        "int5_g32",
        formats=(("qkv", "int7_g32"), ("gate_up", "int3_g32"), ("down", "int6_g32")),
        wide=TWO_BYTES["mixed"],
    ),
    "bits of each layer": DecoderShape(
        80, 3, 1, 32, 50, 1e-5, 32**-0.5, 40, "f32", 2, "int5_g64", formats=(("out", "int4_g64"), ("down", "int7_g64"))
    ),
    "bits of each layer, two bytes": DecoderShape(384, 4, 4, 64, 256, 1e-6, 0.125, 33, "f16", 3, "int4_g32", wide=ALL),
    "int8 cache": DecoderShape(80, 4, 2, 48, 50, 1e-5, 0.15, 40, "int8", 2, "f16"),
    "int4 cache": DecoderShape(37, 3, 1, 10, 86, 1e-5, 0.3, 40, "int4", 2, "bf16", head_norms=True),
    "heads of 8": DecoderShape(44, 5, 1, 8, 43, 1e-5, 8**-0.5, 40, "f32", 2, activation="gelu", head_norms=True),
}
Formats = tuple[tuple[str, str], ...]
SECOND: dict[str, Formats] = {
    "bits of each layer": (("qkv", "int3_g64"), ("gate_up", "int6_g64")),
    "bits of each layer, two bytes": (("qkv", "int6_g32"), ("out", "int5_g32"), ("down", "int3_g32")),
}
"""Formats of the second layer's matrices where they are not those of the first's."""
IN_PARTS = {
    "parts of positions": DecoderShape(80, 3, 1, 32, 50, 1e-5, 32**-0.5, 700, "f32", 2, part=16),
    "parts, f16 cache": DecoderShape(64, 4, 2, 64, 75, 1e-5, 0.125, 700, "f16", 3, "f16", part=32),
    "parts, k8v4 cache": DecoderShape(80, 4, 2, 64, 50, 1e-5, 0.125, 700, "k8v4", 3, "f16", part=32),
    "parts, int4": DecoderShape(
        100, 3, 1, 24, 33, 1e-5, 0.2, 700, "f32", 2, "int4_g64", 16, activation="gelu_tanh", head_norms=True
    ),
}
"""Shapes whose cache a single row attends to in parts; `test_layers_agree_with_numpy` never has more than one."""
FORMS = {name: shape.weights for name, shape in SHAPES.items()}


def alike(form: str) -> str:
    """Return the family of a format; those whose codes share bytes are put together by one rule, and count as one."""
    of = INTEGERS.get(form)
    return family(form) if of is None or of.is_block or 8 % of.bits == 0 else "codes that share bytes"


GROUPS = {
    name: shape.cache
    if shape.kept[0].is_integer
    else f"{alike(shape.weights)}{' of two bytes' if shape.wide == ALL else ''}{' by layer' if name in SECOND else ''}"
    for name, shape in SHAPES.items()
}
LONG_FORMS = {name: shape.weights for name, shape in IN_PARTS.items()}
ANY = {name: shape.cache if shape.kept[0].is_integer else "any format" for name, shape in IN_PARTS.items()}
"""Formats of weights do not matter where positions are attended to."""
COUNT = 2
CALLS = ((1, 0), (1, 15), (5, 3), (6, 0), (16, 0))
"""Rows, and the position of the first."""
EMULATED_CALLS = CALLS[1:3]
MIX = ((5, 15), (1, 31), (2, 0), (1, 16))
"""Rows of four sequences, and the position of the first of each."""
LONG_MIX = ((1, 699), (3, 299), (1, 47), (2, 0))
PAGE = 16
LONG_CALLS = ((1, 15), (1, 16), (1, 47), (1, 299), (1, 699), (3, 299))
SIZES = (0.0, 1e-12, 1e12)


def draw(shape: DecoderShape, rng: np.random.Generator) -> dict[str, Any]:
    """Return random weights of one layer."""
    h, a, c, f = shape.hidden, shape.attended, shape.cached, shape.inner
    sizes = {
        "query": (a, h),
        "key": (c, h),
        "value": (c, h),
        "out": (h, a),
        "gate": (f, h),
        "up": (f, h),
        "down": (h, f),
    }
    arrays: dict[str, Any] = {n: (rng.standard_normal(s) / np.sqrt(s[1])).astype(np.float32) for n, s in sizes.items()}
    arrays |= {f"{n}.bias": rng.standard_normal(s[0]).astype(np.float32) for n, s in sizes.items()}
    arrays |= {norm: rng.standard_normal(h).astype(np.float32) for norm in ("norm1", "norm2")}
    return arrays | {norm: rng.standard_normal(shape.head_dim).astype(np.float32) for norm in HEAD_NORMS}


Call = tuple[Any, int, list[Any], list[Any]]
"""Hidden states, the position of the first row, cache buffers, and the cosines and sines of the rows."""


class Layers:
    """Two compiled layers with random weights."""

    def __init__(self, shape: DecoderShape, unit: Instructions, folder: Path, second: Formats = ()) -> None:
        """Compile them, the second one perhaps with other formats of its matrices; where a process would be needed for
        each call, with functions that make several.
        """
        self.shape = shape = replace(shape, narrow=unit.kernels[family(shape.weights)].narrow, page=PAGE)
        self.shapes = [replace(shape, formats=formats) for formats in (shape.formats, second or shape.formats)]
        rng = np.random.default_rng(1)
        self.buffers = [layer_buffer(each, draw(each, rng)) for each in self.shapes]
        self.machine = MACHINES[unit.name]
        several = {len(EMULATED_CALLS), len(LONG_CALLS), len(SIZES), len(MIX)} if self.machine.emulated else set()
        mains = [self._main("main", 1), *(self._main(f"main_{n}", n) for n in sorted(several))]
        mains.append(self._main("main_paged", 1, paged("layers"), "?"))
        (folder / "layers.mlir").write_text("".join([layers(["layers"], self.shapes, unit), *mains]))
        self.artifact = self.machine.compile(folder / "layers.mlir")

    def _main(self, name: str, calls: int, function: str = "layers", places: str = "") -> str:
        s = self.shape
        cache = [f"tensor<{places or s.context}x{s.kv_heads}x{kept.elements}x{kept.element}>" for kept in s.kept]
        wide, angle = f"tensor<?x{s.width}xf32>", f"tensor<?x{s.head_dim}xf32>"
        kinds = [wide, angle, angle, "tensor<?xi64>", f"tensor<{offsets(self.shapes)[-1]}xi8>"] + cache * COUNT
        names = [[f"%a{call}_{i}" for i in range(len(kinds))] for call in range(calls)]
        taken = ", ".join(f"{n}: {k}" for each in names for n, k in zip(each, kinds, strict=True))
        made = ", ".join([wide] * calls)
        body = "".join(
            f"%r{call} = util.call @{function}({', '.join(each)}) : ({', '.join(kinds)}) -> {wide}\n"
            for call, each in enumerate(names)
        )
        results = ", ".join(f"%r{call}" for call in range(calls))
        return f"""
util.func public @{name}({taken}) -> ({made}) {{
{body}util.return {results} : {made}
}}"""

    def run(self, calls: list[Call], driver: str) -> list[tuple[Any, list[Any]]]:
        """Return the new hidden states of each call, and the cache buffers after it where they can be seen."""
        packed = np.concatenate(self.buffers).view(np.int8)
        inputs = [[x, *angles, rows_from(start, x), packed, *cache] for x, start, cache, angles in calls]
        return [(out, after[-2 * COUNT :]) for out, after in self.machine.call_each(self.artifact, inputs, driver)]

    def run_shared(self, x: Any, angles: list[Any], where: Any, cache: list[Any], driver: str) -> tuple[Any, list[Any]]:
        """Return what `run` does, of rows of several sequences whose cache is one."""
        inputs = [x, *angles, where, np.concatenate(self.buffers).view(np.int8), *cache]
        (out,), after = self.machine.call(self.artifact, inputs, 1, driver, "main_paged")
        return out, after[-2 * COUNT :]

    def expect(self, call: Call) -> tuple[Any, list[Any]]:
        """Return what `run` should, by NumPy."""
        x, start, cache, angles = call
        after: list[Any] = []
        for i, (shape, buffer) in enumerate(zip(self.shapes, self.buffers, strict=True)):
            seen = reference.places(rows_from(start, x))
            x, *new = reference.layer(shape, x, *angles, seen, buffer, *cache[2 * i : 2 * i + 2])
            after += new
        return x, after


def rows_from(start: int, x: Any) -> Any:
    """Return the positions of rows one after the other."""
    return np.arange(start, start + len(x))


def layers_of(
    request: pytest.FixtureRequest, shapes: dict[str, DecoderShape], factory: pytest.TempPathFactory
) -> Layers:
    unit, name = request.param
    return Layers(shapes[name], unit, factory.mktemp("layers"), SECOND.get(name, ()))


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layers:
    return layers_of(request, SHAPES, tmp_path_factory)


@pytest.fixture(scope="module")
def in_parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layers:
    """A fixture of its own: pytest would run tests of equal places in two lists in turns, and compile for each."""
    return layers_of(request, IN_PARTS, tmp_path_factory)


on_enough_shapes = with_enough("compiled", FORMS, GROUPS)


@on_enough_shapes
def test_layers_agree_with_numpy(compiled: Layers) -> None:
    for driver in ("local-sync", "local-task"):
        assert_agree(compiled, EMULATED_CALLS if compiled.machine.emulated else CALLS, driver)


@with_enough("in_parts", LONG_FORMS, ANY)
def test_a_single_row_attends_to_long_caches_in_parts(in_parts: Layers) -> None:
    assert_agree(in_parts, LONG_CALLS, "local-task")


@on_enough_shapes
def test_a_row_is_computed_alike_whatever_the_others_are(compiled: Layers) -> None:
    for driver in ("local-sync", "local-task"):
        assert_alone(compiled, MIX, driver)


@with_enough("in_parts", LONG_FORMS, ANY)
def test_a_row_attends_to_long_caches_alike_whatever_the_others_are(in_parts: Layers) -> None:
    assert_alone(in_parts, LONG_MIX, "local-task")


def assert_alone(compiled: Layers, mix: Sequence[tuple[int, int]], driver: str) -> None:
    """Run sequences together, their pages anywhere in one cache, and compare every bit with calls of their own.

    Those of several rows are also run row by row, where a cache can be seen after a call.
    """
    context = compiled.shape.context
    calls = [random_call(compiled.shape, rows, min(start, context - rows)) for rows, start in mix]
    alone = compiled.run(calls, driver)
    tables, cache = in_pages(compiled.shape, calls)
    positions = [rows_from(start, x) for x, start, _, _ in calls]
    count, places = sum(map(len, positions)), []
    for number, own in enumerate(positions):
        places += [2 * count + number * len(tables[0])] * len(own)
    x, angles = np.concatenate([c[0] for c in calls]), [np.concatenate([c[3][i] for c in calls]) for i in range(2)]
    where = np.concatenate([*positions, np.array(places), *tables])
    found, after = compiled.run_shared(x, angles, where, cache, driver)
    assert np.array_equal(found, np.concatenate([out for out, _ in alone]))
    for number, (call, (out, own_after)) in enumerate(zip(calls, alone, strict=True)):
        for ours, theirs in zip(after, own_after, strict=bool(after and own_after)):
            seen = reference.places(positions[number][-1:], [tables[number]], PAGE)[0]
            assert np.array_equal(ours[seen], theirs[: len(seen)])
        if not compiled.machine.emulated:
            assert np.array_equal(row_by_row(compiled, call, driver), out)


def in_pages(shape: DecoderShape, calls: list[Call]) -> tuple[list[Any], list[Any]]:
    """Return the caches of calls as one, in pages that are in no order, and the blocks of each."""
    each = -(-shape.context // PAGE)
    blocks = np.random.default_rng(7).permutation(len(calls) * each + 1)[: len(calls) * each].reshape(len(calls), -1)
    caches = []
    for i in range(2 * COUNT):
        of_call = [call[2][i] for call in calls]
        made = np.empty(((len(calls) * each + 1) * PAGE, *of_call[0].shape[1:]), of_call[0].dtype)
        made.view(np.uint8)[:] = 255  # numbers and scales that are none
        for table, own in zip(blocks, of_call, strict=True):
            made[reference.places(np.array([shape.context - 1]), [table], PAGE)[0]] = own
        caches.append(made)
    return list(blocks), caches


def row_by_row(compiled: Layers, call: Call, driver: str) -> Any:
    """Return what single rows one after the other give."""
    x, start, cache, angles = call
    found = []
    for row in range(len(x)):
        one = slice(row, row + 1)
        ((out, cache),) = compiled.run([(x[one], start + row, cache, [angle[one] for angle in angles])], driver)
        found.append(out)
    return np.concatenate(found)


def random_call(shape: DecoderShape, rows: int, start: int) -> Call:
    rng = np.random.default_rng(rows)
    x = pad_width(rng.standard_normal((rows, shape.hidden)).astype(np.float32), shape.width)
    angles = [rng.standard_normal((rows, shape.head_dim)).astype(np.float32) for _ in range(2)]
    size = (shape.context, shape.kv_heads, shape.head_dim)
    cache = [packed(kept, rng.standard_normal(size).astype(np.float32)) for kept in shape.kept * COUNT]
    return x, start, cache, angles


def assert_agree(compiled: Layers, places: Sequence[tuple[int, int]], driver: str) -> None:
    shape = compiled.shape
    calls = [random_call(shape, rows, start) for rows, start in places]
    # a rounding to int8 that falls the other way, in two layers
    tolerance = 2e-2 if shape.cache != "f32" else 2e-4 if shape.wide == ALL else 1e-2
    for call, (actual, after) in zip(calls, compiled.run(calls, driver), strict=True):
        rows, start = len(call[0]), call[1]
        expected, expected_after = compiled.expect(call)
        assert relative_error(actual, expected) < tolerance, (driver, rows, start)
        assert not actual[:, shape.hidden :].any()
        assert len(after) == (0 if compiled.machine.emulated else 2 * COUNT)
        for kept, ours, theirs in zip(shape.kept * COUNT, after, expected_after, strict=bool(after)):
            untouched = [i for i in range(shape.context) if not start <= i < start + rows]
            assert np.array_equal(ours[untouched], theirs[untouched])
            written = [unpacked(kept, part[start : start + rows]) for part in (ours, theirs)]
            assert relative_error(*written) < max(tolerance, step_of(kept)), (driver, rows, start)


@on_enough_shapes
def test_layers_take_extreme_values(compiled: Layers) -> None:
    calls = [extreme_call(compiled.shape, size) for size in SIZES]
    for size, call, (actual, _) in zip(SIZES, calls, compiled.run(calls, "local-task"), strict=True):
        assert np.isfinite(actual).all(), size
        assert relative_error(actual, compiled.expect(call)[0]) < 2e-2, size


def step_of(kept: Kept) -> float:
    """Return how far apart neighbouring codes are, by the largest number; of numbers that are no codes, 0."""
    return 1.01 / kept.most if kept.is_integer else 0.0


def extreme_call(shape: DecoderShape, size: float) -> Call:
    x = pad_width(np.full((2, shape.hidden), size, np.float32), shape.width)
    x[:, ::3] *= -1
    angles = [np.ones((2, shape.head_dim), np.float32), np.zeros((2, shape.head_dim), np.float32)]
    places = shape.context, shape.kv_heads
    return x, 0, [np.zeros((*places, kept.elements), kept.dtype) for kept in shape.kept * COUNT], angles


@pytest.mark.parametrize(("forms", "groups"), [(FORMS, GROUPS), (LONG_FORMS, ANY)], ids=["shapes", "parts"])
@given(lacking=st.sets(st.sampled_from(sorted(UNITS))))
def test_enough_pairs_are_every_kernel_and_an_instruction_set_for_every_shape(
    forms: dict[str, str], groups: dict[str, str], lacking: set[str]
) -> None:
    pairs = [pair for pair in all_pairs(forms) if pair[0] not in lacking]
    enough = covering(pairs, groups)
    assert set(enough) <= set(pairs)
    assert {(unit, groups[case]) for unit, case in enough} == {(unit, groups[case]) for unit, case in pairs}
    for name in forms:
        had, kept = (sum(case == name for _, case in each) for each in (pairs, enough))
        assert kept >= min(had, 1)


@pytest.mark.parametrize("calls", [CALLS, EMULATED_CALLS], ids=["here", "emulated"])
def test_every_kernel_multiplies_one_row_and_a_tile_of_rows(calls: tuple[tuple[int, int], ...]) -> None:
    rows = {rows for rows, _ in calls}
    tiles = {kernel.row_tile for unit in KNOWN for kernel in unit.kernels.values() if calls is CALLS or unit.lanes == 4}
    assert 1 in rows and max(rows) >= max(tiles)


def test_a_dispatch_keeps_to_the_bindings_it_may_have() -> None:
    (unit,) = (unit for unit in KNOWN if unit.name == "avx512")
    assert layers(["many"], (SHAPES["smallest"],) * MAX_LAYERS, unit).count("stream.binding.subspan") <= 32


ENDS = ("int8", *(f"int{bits}_g64" for bits in range(2, 8)), "int4_g128", "int6_g32s8", *BLOCKS)
WIDE_ENDS = ("int8", "int2_g32s8", "int3_g64", "int4_g128", "int6_g64", "int7_g64", "q4_1")
OF_TWO_BYTES = " of two bytes"


@with_each_family("case", {form: form for form in ENDS} | {form + OF_TWO_BYTES: form for form in WIDE_ENDS})
@pytest.mark.parametrize("together", [False, True], ids=["one row", "a tile of rows"])
def test_products_are_exact_at_the_ends_of_integers(
    tmp_path: Path, case: tuple[Instructions, str], together: bool
) -> None:
    (unit, name), columns, rng = case, 128, np.random.default_rng(0)
    layout = Layout(name.removesuffix(OF_TWO_BYTES), columns, wide=name.endswith(OF_TWO_BYTES))
    of, most = INTEGERS[layout.form], layout.most
    rows = unit.kernels[layout.family].row_tile if together else 1
    low, high, least = of.lowest, of.highest, -3 if of.minimum else 0
    mixed = rng.choice(np.clip([low, high, low + 1, 0, 1, -1], low, high), (64, columns))
    calls = [
        (codes, x)
        for codes in (np.full((64, columns), low), np.full((64, columns), high), mixed)
        for x in (np.full((rows, columns), -most), rng.choice([-most, most, 1 - most, 0, 1, -1], (rows, columns)))
    ]
    (tmp_path / "products.mlir").write_text(products_module(unit, layout, rows, len(calls)))
    artifact, ones = MACHINES[unit.name].compile(tmp_path / "products.mlir"), np.ones((64, layout.groups), np.float32)
    inputs = []
    for codes, x in calls:
        minimum = ones * least if of.minimum else None
        weights = Quantized(codes.astype(np.int8), ones, None, of.bits, layout.group, minimum, of.scale)
        inputs += [panel(layout, weights), prepared(layout, x)]
    made, _ = MACHINES[unit.name].call(artifact, inputs, len(calls), "local-sync")
    for (codes, x), sums in zip(calls, made, strict=True):
        unit_scale = 64 if layout.has_powers else 1  # scales of 1 are bytes of 64, times what is left for the end
        assert np.array_equal(sums.reshape(rows, 64), unit_scale * added_by_blocks(layout, codes, x, least))


def added_by_blocks(layout: Layout, codes: Any, x: Any, least: int) -> Any:
    """Return sums of products, those of each block exact until they are added up in f32."""
    total = np.zeros((len(x), len(codes)), np.float32)
    for first in range(0, layout.columns, layout.block):
        block = slice(first, first + layout.block)
        total += (x[:, block] @ codes[:, block].T).astype(np.float32)
        total += np.float32(least) * x[:, block].sum(1, keepdims=True).astype(np.float32)
    return total
