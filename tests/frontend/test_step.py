"""`step` of compiled programs: rows of any mix of sequences say, bit for bit, what each sequence says alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.frontend.conftest import BIASED, ONE, TWO, Imported, Imports
from tests.frontend.test_frontend import CONTEXT, FEATURES, HOST, OWN
from tests.frontend.test_shapes import CASES, UNIT, UNITS
from tests.frontend.test_shapes import CONTEXT as SHORT
from tests.frontend.test_shapes import OWN as PACKED
from tests.support.artifact import Loaded
from tests.support.machines import MACHINES

HALVES = {"weight_format": "bf16", "head_format": "f16", "kv_dtype": "f16"}
Rows = list[tuple[int, int, int]]
"""Sequence, token and position of each row."""


def texts(vocabulary: int, context: int) -> list[list[int]]:
    """Return a short text, two of more than a tile of rows, and one of a whole context."""
    drawn = np.random.default_rng(3)
    return [drawn.integers(0, vocabulary, length).tolist() for length in (2, 17, 9, context)]


def alone(loaded: Loaded, text: list[int]) -> Any:
    """Return logits f32[T,V], each of one call."""
    return np.stack([loaded.decode(token, position)[1] for position, token in enumerate(text)])


def mixes(said: list[list[int]], drawn: np.random.Generator) -> list[Rows]:
    """Return steps: in each some texts go on by one token or several, as they come."""
    at, steps = [0] * len(said), []
    while any(begun < len(text) for begun, text in zip(at, said, strict=True)):
        rows: Rows = []
        for number in drawn.permutation(len(said)):
            count = min(int(drawn.choice([0, 1, 1, 2, 7, 13])), len(said[number]) - at[number])
            rows += [(int(number), said[number][at[number] + i], at[number] + i) for i in range(count)]
            at[number] += count
        if rows:
            steps.append(rows)
    return steps


def check(loaded: Loaded, vocabulary: int, context: int) -> None:
    said, drawn = texts(vocabulary, context), np.random.default_rng(0)
    wanted, page = [alone(loaded, text) for text in said], loaded.abi["page"]
    each = -(-context // page)
    tables = drawn.permutation(len(said) * each + 1)[: len(said) * each].reshape(len(said), each)
    kv, steps = loaded.shared_kv(len(said) * each + 1), mixes(said, drawn)
    assert {len(rows) == 1 for rows in steps} == {True, False}, "single rows, and several"
    for rows in steps:
        read = drawn.permutation(len(rows))[: drawn.integers(1, len(rows), endpoint=True)]
        tokens, logits = loaded.step(rows, tables, read, kv)
        for token, found, (number, _, position) in zip(tokens, logits, [rows[i] for i in read], strict=True):
            assert np.array_equal(found, wanted[number][position]), (len(rows), number, position)
            assert token == found.argmax()
    for text, logits in zip(said, wanted, strict=True):
        assert np.array_equal(loaded.prefill(text)[1], logits[-1])
        assert np.array_equal(loaded.score(text), logits)


@pytest.mark.skipif("avx512_vnni" not in HOST, reason="this CPU has no AVX-512 VNNI")
@pytest.mark.parametrize(
    ("shape", "more"),
    [(TWO, {}), (ONE, HALVES), (BIASED, {"weight_format": "int4_g64"})],
    ids=["int8", "halves", "int4 and biases"],
)
def test_rows_of_a_mix_say_what_they_say_alone(imports: Imports, shape: dict[str, Any], more: dict[str, str]) -> None:
    made = imports(imports.model(**shape), {**OWN, **more}, context=CONTEXT, features=FEATURES)
    check(made.at("O2"), shape.get("vocab_size", 320), CONTEXT)


@pytest.mark.skipif(not UNIT, reason="this CPU has neither AVX2 nor AVX-512")
@pytest.mark.parametrize("name", CASES)
def test_models_of_all_kinds_have_it(imports: Imports, name: str) -> None:
    """As compiled in `test_shapes`."""
    kind, shape, (*forms, cache) = CASES[name]
    choices = {**PACKED, "weight_format": forms[0], "head_format": forms[1], "kv_dtype": cache}
    kernels = [UNITS[UNIT].kernels[form.partition("_g")[0]] for form in forms]
    features = tuple(dict.fromkeys(feature for kernel in kernels for feature in kernel.features))
    made = imports(imports.model(kind, **shape), choices, context=SHORT, features=features)
    check(made.at("O2", "local-task", MACHINES[UNIT].cpu, *MACHINES[UNIT].flags), 333, SHORT)


def has_step(made: Imported) -> bool:
    """Return whether a module has `step`, and see that the contract says the same."""
    there = b"step" in (made.folder / "module.mlirbc").read_bytes()
    assert there is bool(made.result["program"]["abi"].get("page", 0))
    return there


@pytest.mark.skipif("avx512_vnni" not in HOST, reason="this CPU has no AVX-512 VNNI")
def test_programs_without_our_kernels_have_none(imports: Imports) -> None:
    assert has_step(imports(imports.model(**TWO), OWN, context=CONTEXT, features=FEATURES))
    assert not has_step(imports(imports.model(**TWO), {}, context=CONTEXT, features=FEATURES))
    assert not has_step(imports(imports.model(**BIASED), context=CONTEXT, batch=3))
