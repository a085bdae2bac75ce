"""`score` of compiled programs: after every token, what decoding says token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.frontend.conftest import TWO, Imports
from tests.frontend.test_frontend import CONTEXT as LONG
from tests.frontend.test_frontend import FEATURES, HOST, OWN
from tests.frontend.test_shapes import CASES, CONTEXT, UNIT, UNITS
from tests.frontend.test_shapes import OWN as PACKED
from tests.support.artifact import Loaded, relative_error
from tests.support.machines import MACHINES


def by_decoding(loaded: Loaded, tokens: list[int]) -> Any:
    """Return logits f32[T,V], each of one call."""
    return np.stack([loaded.decode(token, position)[1] for position, token in enumerate(tokens)])


def texts(vocabulary: int, context: int) -> list[list[int]]:
    """Return texts of two tokens, of more than a tile of rows, and of a whole context."""
    drawn = np.random.default_rng(0)
    return [drawn.integers(0, vocabulary, length).tolist() for length in (2, 19, context)]


@pytest.mark.skipif(not UNIT, reason="this CPU has neither AVX2 nor AVX-512")
@pytest.mark.parametrize("name", CASES)
def test_own_kernels_score_as_they_decode(imports: Imports, name: str) -> None:
    """Formats of layers and tables: 7, 4 and 12 bits, 8 bits, as compiled in `test_shapes`."""
    kind, shape, (*forms, cache) = CASES[name]
    choices = {**PACKED, "weight_format": forms[0], "head_format": forms[1], "kv_dtype": cache}
    kernels = [UNITS[UNIT].kernels[form.partition("_g")[0]] for form in forms]
    features = tuple(dict.fromkeys(feature for kernel in kernels for feature in kernel.features))
    made = imports(imports.model(kind, **shape), choices, context=CONTEXT, features=features)
    loaded = made.at("O2", "local-task", MACHINES[UNIT].cpu, *MACHINES[UNIT].flags)
    assert loaded.abi["score"] is True
    for text in texts(333, CONTEXT):
        assert np.array_equal(loaded.score(text), by_decoding(loaded, text))


@pytest.mark.skipif("avx512_vnni" not in HOST, reason="this CPU has no AVX-512 VNNI")
@pytest.mark.parametrize("more", [{}, {"weight_format": "bf16", "head_format": "f16"}], ids=["int8", "halves"])
def test_own_kernels_for_vnni_score_as_they_decode(imports: Imports, more: dict[str, str]) -> None:
    from tests.frontend.conftest import ONE

    shape = ONE if more else TWO
    made = imports(imports.model(**shape), {**OWN, **more}, context=LONG, features=FEATURES)
    loaded = made.at("O2")
    for text in texts(shape.get("vocab_size", 320), LONG):
        assert np.array_equal(loaded.score(text), by_decoding(loaded, text))


def test_the_compilers_kernels_score_as_they_decode(imports: Imports) -> None:
    loaded = imports(imports.model(**TWO), {}, context=LONG, features=FEATURES).at("O2")
    for text in texts(320, LONG):
        found = loaded.score(text)
        assert found.shape == (len(text), 320)
        assert relative_error(found, by_decoding(loaded, text)) < 1e-5


def test_a_score_leaves_the_cache_as_a_prompt_does(imports: Imports) -> None:
    loaded = imports(imports.model(**TWO), {}, context=LONG, features=FEATURES).at("O2")
    (text,) = texts(320, LONG)[1:2]
    loaded.score(text)
    _, after_score = loaded.decode(7, len(text))
    loaded.prefill(text)
    _, after_prompt = loaded.decode(7, len(text))
    assert relative_error(after_score, after_prompt) < 1e-5


def test_batches_and_random_weights_have_no_score(imports: Imports) -> None:
    """As `test_batch` imports them."""
    from tests.frontend.conftest import BIASED

    made = imports(imports.model(**BIASED), context=LONG, batch=3)
    assert "score" not in made.result["program"]["abi"]
    drawn = imports(imports.model(**BIASED), context=LONG, random_init=True)
    assert "score" not in drawn.result["program"]["abi"]
    for folder in (made.folder, drawn.folder):
        assert b"score" not in (folder / "module.mlirbc").read_bytes()
