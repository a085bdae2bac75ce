"""Models of every shape that is taken: our kernels' arithmetic on packed weights is the library's, and compiled too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.frontend import attention, modules, own, single_row
from llmbuild.frontend.archive import LOOKED_UP
from llmbuild.frontend.calibration import Asked, Calibration
from llmbuild.frontend.config import judge
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.program import Calibrated, apply, describe, patched, settle
from llmbuild.frontend.source import find_model
from llmbuild.frontend.truth import CheckTokens
from llmbuild.frontend.weights import Patch, Source
from llmbuild.kernels.applies import ACTIVATIONS, cpu_problem, gpu_problem
from llmbuild.kernels.choose import KNOWN
from llmbuild.kernels.layouts import FORMATS
from llmbuild.kernels.matvec import ROW_READS, ROW_TILES, work
from llmbuild.spec.decoder import Decoder
from llmbuild.spec.formats import INTEGERS, WEIGHT_FORMATS
from llmbuild.spec.model import facts_of
from llmbuild.spec.program import ImportJob
from llmbuild.spec.recipe import ModelSource
from llmbuild.transform.quantized import dequantize, pad_columns, quantize, split_groups
from scripts.bench import shapes as shapes_to_build
from tests.frontend.conftest import Imports
from tests.support import tiny
from tests.support.artifact import relative_error
from tests.support.eager import fill, layerwise, run_eagerly, weights_of
from tests.support.machines import MACHINES

CONTEXT = 32
OWN = {"weight_format": "f16", "layout": "packed", "kernel": "own"}
UNITS = {unit.name: unit for unit in KNOWN}


@st.composite
def shapes(draw: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """Return a kind of model and what its configuration says."""
    kind = draw(st.sampled_from(("Llama", "Qwen2", "Qwen3")))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    shape = {
        "hidden_size": heads * draw(st.integers(1, 30)),
        "intermediate_size": draw(st.integers(1, 120)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.one_of(st.integers(1, 20).map(lambda n: 8 * n), st.integers(1, 80).map(lambda n: 2 * n))),
        "vocab_size": draw(st.integers(3, 200)),
        "hidden_act": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "tie_word_embeddings": draw(st.booleans()),
    }
    biases = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())} if kind == "Llama" else {}
    return kind, {**tiny.SHAPE, **shape, **biases}


def drawn(kind: str, shape: dict[str, Any]) -> Any:
    """Return a model with weights that f16 holds, of which norms and biases are not what a new model has."""
    import transformers

    library: Any = transformers
    attention.register()
    config = getattr(library, f"{kind}Config")(**shape)
    config._attn_implementation = attention.NAME
    torch.manual_seed(0)
    model = getattr(library, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if part.dim() == 1:
                part.copy_(0.3 * torch.randn_like(part) + ("bias" not in name))
            part.copy_(part.half().float())
    return model


@settings(max_examples=10)
@given(shapes(), st.sampled_from(("f32", "f16")))
def test_arithmetic_on_packed_weights_is_that_of_the_library(shape: tuple[str, dict[str, Any]], cache: str) -> None:
    library, model = drawn(*shape), drawn(*shape)
    features = UNITS["avx2"].kernels["f16"].features
    job = ImportJob("drawn", CONTEXT, choices=tuple({**OWN, "kv_dtype": cache}.items()), features=features)
    assert cpu_problem(own.facts(model), "f16", "f16") == ""
    drawing, vocabulary = np.random.default_rng(0), shape[1]["vocab_size"]
    tokens = CheckTokens(*(drawing.integers(0, vocabulary, (1, n)) for n in (7, 2)), np.array([7]))
    with torch.inference_mode():
        abi, weights, formats = describe(model, job, settle(job)), weights_of(model), Formats("f16", "f16")
        apply(model, job, settle(job), formats)
        fill(model, Source(weights, formats))
        expected, actual = (run_eagerly(each, abi, tokens, 2) for each in (library, model))
    assert relative_error(actual, expected) < (1e-5 if cache == "f32" else 1e-2)


@pytest.mark.parametrize("form", ["int8", "int4_g64"])
def test_calibrated_weights_are_kept_in_widths_that_are_padded(form: str) -> None:
    shape = {**tiny.SHAPE, "hidden_size": 60, "intermediate_size": 172, "head_dim": 24, "num_hidden_layers": 1}
    calibrated = {"weight_format": form, "head_format": "int8", "quantization": "gptq", "scaling": "activation"}
    features, formats = UNITS["avx2"].kernels["int8"].features, Formats(form, "int8")
    job = ImportJob("drawn", CONTEXT, choices=tuple({**OWN, **calibrated}.items()), features=features)
    model = drawn("Qwen3", shape)
    tokens = CheckTokens(np.arange(9)[None], np.array([[5, 7]]), np.array([9]))
    calibration = np.random.default_rng(0).integers(0, 99, (2, CONTEXT))
    with torch.inference_mode():
        abi, weights, config = describe(model, job, settle(job)), weights_of(model), model.config
        apply(model, job, settle(job), formats)
        asked = Calibrated(
            Calibration(config, weights, calibration), Asked(True, True, own.rounded_to_bytes("int8")), mixed=False
        )
        source, patches = patched(Source(weights, formats), model, asked)
        (patch,) = patches.layers(source, 0, {})
        both = Patch({**source.patch.dense, **patch.dense}, {**source.patch.ready, **patch.ready})
        fill(model, replace(source, patch=both))
        actual = run_eagerly(model, abi, tokens, 2)
    kept = {**both.dense, **{f"{layer}.weight": dequantize(matrix) for layer, matrix in both.ready.items()}}
    fitted = {f"{layer}.weight" for layer in both.ready} - {"model.embed_tokens.weight"}  # one with the head
    assert {name for name in kept if "_proj" in name or "lm_head" in name} == fitted

    def look(token: int) -> np.ndarray:
        return kept["lm_head.weight"][token : token + 1] * kept[LOOKED_UP]

    text = np.concatenate([tokens.prompt, tokens.forced], axis=1)
    expected = layerwise(config, look, kept.__getitem__, text)[0, 8:, None]
    assert relative_error(actual, expected) < 0.03, "inputs are rounded to bytes; weights of 4 bits cost ten times it"


ODD = {"hidden_size": 60, "intermediate_size": 172, "num_hidden_layers": 1, "vocab_size": 333}
CASES = {
    "heads of 8": (
        "Llama",
        {**ODD, "hidden_size": 40, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
        ("int7_g64", "f12_e4m7", "int4"),
    ),
    "heads of 40": (
        "Qwen3",
        {**ODD, "head_dim": 40, "hidden_act": "gelu", "tie_word_embeddings": False, "hidden_size": 100},
        ("int4_g64", "int8", "int8"),
    ),
    "heads of 24, biases": (
        "Llama",
        {**ODD, "head_dim": 24, "hidden_act": "gelu_new", "attention_bias": True, "tie_word_embeddings": False},
        ("f12_e4m7", "int7_g32", "k8v4"),
    ),
}
"""Models, with the formats of their layers, tables and cache: each kind of format is that of some layers."""


UNIT = next((unit for unit in ("avx512", "avx2") if not MACHINES[unit].lacks), "")
"""The highest instruction set of this host; the kernels of each are held against NumPy in `tests/kernels`."""


@pytest.mark.skipif(not UNIT, reason="this CPU has neither AVX2 nor AVX-512")
@pytest.mark.parametrize(("unit", "name"), [(UNIT, name) for name in CASES])
def test_compiled_models_of_odd_shapes_agree_with_torch(imports: Imports, unit: str, name: str) -> None:
    kind, shape, (*forms, cache) = CASES[name]
    choices = {**OWN, "weight_format": forms[0], "head_format": forms[1], "kv_dtype": cache}
    kernels = [UNITS[unit].kernels[form.partition("_g")[0]] for form in forms]
    features = tuple(dict.fromkeys(feature for kernel in kernels for feature in kernel.features))
    made = imports(imports.model(kind, **shape), choices, context=CONTEXT, features=features)
    loaded = made.at("O2", "local-task", MACHINES[unit].cpu, *MACHINES[unit].flags)
    assert loaded.abi["required_features"] == list(features)
    actual, expected, noise = made.checked(loaded)
    assert relative_error(actual, expected) < max(1e-5, 10 * noise)


def test_what_our_kernels_do_not_take_is_told_from_the_facts_of_a_model() -> None:
    taken = Decoder(60, 172, 8, 4, 8, 333, "gelu", True)
    assert {cpu_problem(taken, layers, head) for layers in FORMATS for head in FORMATS} == {""}
    assert "must be even, found 15" in cpu_problem(replace(taken, head_dim=15), "int8", "int8")
    assert "found hidden_act mish" in cpu_problem(replace(taken, activation="mish"), "int8", "int8")


@settings(max_examples=25)
@given(
    st.integers(1, 8).map(lambda n: 8 * n),
    st.integers(1, 20).map(lambda n: 8 * n),
    st.sampled_from(WEIGHT_FORMATS),
    st.sampled_from(WEIGHT_FORMATS),
    st.builds(work, st.sampled_from((8, 32)), st.sampled_from(ROW_TILES), st.sampled_from(ROW_READS)),
)
def test_facts_tell_whether_a_gpu_finds_a_matrix(hidden: int, inner: int, layers: str, head: str, on: Any) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = drawn("Llama", {**tiny.SHAPE, **sizes, "head_dim": 8, "num_hidden_layers": 1, "vocab_size": 9})
    told = gpu_problem(own.facts(model), layers, head, on)
    modules.swap(model, Formats(layers, head).of, single_row.stored_for(on), fused=True)
    assert (told == "") == bool(single_row.kernels(model))


@given(
    st.integers(1, 60),
    st.sampled_from(("int8", "int7_g32", "int4_g64", "int4_g128", "int2_g32", "int5_g32s8")),
    st.sampled_from((16, 32)),
)
def test_columns_of_zeros_and_shorter_groups_keep_quantized_weights(columns: int, form: str, multiple: int) -> None:
    dense = np.random.default_rng(columns).standard_normal((3, columns)).astype(np.float32)
    before, width = quantize(dense, INTEGERS[form]), -(-columns // multiple) * multiple
    padded = pad_columns(before, width)
    assert np.array_equal(dequantize(padded)[:, :columns], dequantize(before))
    assert not padded.codes[:, columns:].any()
    split = split_groups(padded, 8)
    assert split is not None
    assert split.group == 8
    assert relative_error(dequantize(split), dequantize(padded)) < (2**-7 if form.endswith("s8") else 2**-8)
    assert split_groups(split, 16) is None


def test_every_shape_that_is_drawn_to_be_built_is_taken(tmp_path: Path) -> None:
    for seed in range(200):
        config = shapes_to_build.drawn(seed).config
        assert list(judge(config, False, CONTEXT).faults) == [], config
        assert cpu_problem(facts_of(config).decoder, "int8", "int4_g64") == ""
    small = shapes_to_build.Shape("small", shapes_to_build.SMALL, tokenizer=True)
    shapes_to_build.write(tmp_path / "model", small)
    found = find_model(ModelSource("huggingface", str(tmp_path / "model")), CONTEXT)
    assert found.tokenizer is not None
    assert small.parameters == 260_032


def test_a_shape_is_wrong_where_any_promise_is_broken() -> None:
    right: dict[str, Any] = {"exit": [0, 0], "front": 1, "f32": True, "int8": {"own": (0.01, 0.03)}, "int4": {}}
    broken = [{"exit": [0, 2]}, {"front": 0}, {"f32": None}, {"f32": False}, {"int4": {"compiler": (0.04, 0.03)}}]
    assert not shapes_to_build.wrong(right)
    assert [change for change in broken if not shapes_to_build.wrong({**right, **change})] == []
