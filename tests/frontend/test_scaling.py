"""Scaling of channels: the model computes the same, and rounding it costs less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbuild.errors import InputError
from llmbuild.frontend.archive import LOOKED_UP
from llmbuild.frontend.calibration import Asked, Calibration
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.layerwise import own_vectors
from llmbuild.frontend.own import rounded_to_bytes
from llmbuild.frontend.program import import_model
from llmbuild.frontend.scaling import Noise, Site, fitting_scale, fold, sites
from llmbuild.frontend.tensors import HEAD
from llmbuild.frontend.weights import Source
from llmbuild.kernels.layouts import Layout
from llmbuild.spec.formats import INTEGERS
from llmbuild.spec.program import ImportJob
from llmbuild.transform.gptq import nearest
from llmbuild.transform.quantized import dequantize, quantize
from llmbuild.transform.reference import rounded_rows
from tests.frontend.conftest import AVX2, ONE, Imports
from tests.support import tiny
from tests.support.artifact import relative_error
from tests.support.eager import layerwise, model_of, source_config

CONTEXT = 32
HOST = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
LAYERS = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Tiny models with two query heads for each head of keys, whose table is tied or not."""
    return lambda tied: tiny.write(
        tmp_path_factory.mktemp("tiny"), num_hidden_layers=1, vocab_size=323, tie_word_embeddings=tied
    )


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 320, (4, CONTEXT))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("formats", [Formats("int8", "int8"), Formats("int4_g32", "f16")])
def test_a_scaled_model_computes_the_same(
    folder: Callable[[bool], Path], tokens: np.ndarray, tied: bool, formats: Formats
) -> None:
    model, asked = folder(tied), Asked(fitted=False, scaled=True, rounded=rounded_to_bytes("int8"))
    config, weights = source_config(model), model_of(model)
    calibration, own = Calibration(config, weights, tokens), own_vectors(weights)
    with torch.inference_mode():
        tables = calibration.tables(formats, asked)
        patches = [tables, *calibration.layers(Source(weights, formats, tables), own, asked, 0, {})]
    changed = {name: tensor for patch in patches for name, tensor in patch.dense.items()}
    ready = {name for patch in patches for name in patch.ready}
    factor = changed.get(LOOKED_UP)

    def look(token: int) -> Any:
        return own(token) if factor is None else changed[HEAD][token : token + 1] * factor

    before = layerwise(config, own, weights.whole, tokens)
    after = layerwise(config, look, lambda name: changed[name] if name in changed else weights.whole(name), tokens)
    assert relative_error(after, before) < 1e-5
    assert np.array_equal(changed.get(HEAD, weights.whole(HEAD)), weights.whole(HEAD)) == (formats.head == "f16")
    assert (factor is not None) == (tied and formats.head == "int8")
    assert all(name in ready for name in LAYERS) == (formats.layers == "int4_g32")


@given(st.integers(0, 99), st.sampled_from(range(4)), st.booleans())
@settings(max_examples=20)
def test_any_positive_scales_leave_a_layer_as_it_is(seed: int, place: int, biased: bool) -> None:
    layer, config = decoder_layer(seed, biased)
    hidden, drawn = torch.randn(1, 5, config.hidden_size), torch.Generator().manual_seed(seed)
    angles = (torch.ones(1, 5, layer.self_attn.head_dim), torch.zeros(1, 5, layer.self_attn.head_dim))
    with torch.no_grad():
        before = first(layer(hidden, position_embeddings=angles))
        site = sites(layer, "l", config)[place]
        count = len(site.before.weight)
        fold(site, torch.exp(2 * torch.randn(count, generator=drawn)))
        after = first(layer(hidden, position_embeddings=angles))
    assert relative_error(after.numpy(), before.numpy()) < 1e-5


def decoder_layer(seed: int, biased: bool) -> tuple[Any, Any]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        attention_bias=biased, mlp_bias=biased,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, 0)
    for part in layer.modules():
        if getattr(part, "bias", None) is not None:
            nn.init.normal_(part.bias)
    return layer.eval().requires_grad_(False), config


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def uneven(seed: int, columns: int = 64) -> tuple[Site, torch.Tensor]:
    """Return a site behind a norm, and inputs some of whose channels are far larger than the others."""
    drawn = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=drawn)
    inputs *= torch.exp(1.5 * torch.randn(columns, generator=drawn))
    linear = nn.Linear(columns, 48, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randn(48, columns, generator=drawn))
    return Site(nn.RMSNorm(columns).requires_grad_(False), {"linear": linear}), inputs


def output_error(site: Site, inputs: torch.Tensor, name: str, rounded: bool) -> float:
    matrix, x = site.readers["linear"].weight.numpy(), inputs.numpy()
    stored = dequantize(quantize(matrix, INTEGERS[name]))
    read = rounded_rows(x, Layout(name, x.shape[1])) if rounded else x
    return float(np.square(read @ stored.T - x @ matrix.T).mean())


@pytest.mark.parametrize(
    ("name", "rounded"), [("int8", True), ("int8", False), ("int4_g32", False), ("int6_g32", True)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_scaled_channels_are_rounded_with_less_error(seed: int, name: str, rounded: bool) -> None:
    site, inputs = uneven(seed)
    before = output_error(site, inputs, name, rounded)
    scale = fitting_scale(site, inputs, INTEGERS[name], rounded)
    fold(site, scale)
    assert output_error(site, inputs / scale, name, rounded) < 0.7 * before
    assert abs(float(scale.log().mean())) < 1e-5


@given(st.integers(0, 99), st.floats(0, 1), st.sampled_from(("int8", "int4_g32")), st.booleans())
@settings(max_examples=30)
def test_the_modelled_error_is_convex_in_the_logarithms(seed: int, share: float, name: str, rounded: bool) -> None:
    site, inputs = uneven(seed)
    noise = Noise(inputs, site.readers["linear"].weight, INTEGERS[name], rounded)
    one, two = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
    between = noise(share * one + (1 - share) * two)
    assert float(between) <= share * float(noise(one)) + (1 - share) * float(noise(two)) + 1e-4


def test_a_clipped_range_serves_the_inputs_better() -> None:
    drawn = np.random.default_rng(0)
    dense, power = drawn.standard_normal((40, 128)).astype(np.float32), drawn.exponential(1, 128).astype(np.float32)
    form = INTEGERS["int4_g128"]
    errors = [np.square(dequantize(q) - dense) @ power for q in (nearest(dense, power, form), quantize(dense, form))]
    assert errors[0].sum() < 0.98 * errors[1].sum()


@pytest.mark.parametrize(
    "kernel", ["compiler", pytest.param("own", marks=pytest.mark.skipif("avx2" not in HOST, reason="needs AVX2"))]
)
def test_an_artifact_of_a_scaled_model_computes_what_pytorch_does(imports: Imports, kernel: str) -> None:
    choices = {"weight_format": "int8", "scaling": "activation", "layout": "packed", "kernel": kernel}
    made = imports(imports.model(**ONE), choices, features=AVX2)
    actual, expected, noise = made.checked(made.at("O2", cpu="x86-64-v3" if kernel == "own" else "host"))
    assert relative_error(actual, expected) < max(1e-5, 10 * noise)


def test_scaling_is_refused_where_nothing_is_rounded(folder: Callable[[bool], Path], tmp_path: Path) -> None:
    choices = (("weight_format", "f16"), ("scaling", "activation"))
    with pytest.raises(InputError, match="scaling=activation is for weights rounded to integers"):
        import_model(ImportJob(str(folder(True)), CONTEXT, choices=choices), tmp_path)
