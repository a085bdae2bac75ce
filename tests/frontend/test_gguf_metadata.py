"""What the metadata of GGUF files means: the configuration of a model, and what is refused by key and by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.frontend import gguf_rope
from llmbuild.frontend.gguf_header import read_header
from llmbuild.frontend.gguf_weights import GgufCheckpoint
from llmbuild.frontend.source import examine
from tests.support import gguf_files
from tests.support.gguf_files import refused

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_configuration_is_that_of_the_library(tmp_path: Path, kind: str, tied: bool) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import AutoConfig

    vocabulary = {"tokenizer.ggml.tokens": [f"t{number}" for number in range(64)]}
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.padding_token_id": 3}
    path = gguf_files.write(tmp_path / "m.gguf", kind, keys={**vocabulary, **ends}, tie_word_embeddings=tied)
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = AutoConfig.from_pretrained(examine(path, False).files.folder)
    assert type(ours) is type(theirs)
    said, wanted = ours.to_dict(), theirs.to_dict()
    for name in ("_name_or_path", "_model_name_or_path", "architectures", "head_dim"):
        said.pop(name, None), wanted.pop(name, None)
    assert np.float32(said.pop("rms_norm_eps")) == np.float32(wanted.pop("rms_norm_eps"))
    assert said == wanted


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_configuration_is_that_of_the_model_that_was_written(tmp_path: Path, kind: str) -> None:
    config = gguf_files.configuration(kind)
    said = examine(gguf_files.write(tmp_path / "m.gguf", kind), False).config
    assert {key: said[key] for key in config} == config
    assert said["rope_theta"] == 10000.0


def test_biases_are_those_that_are_stored(tmp_path: Path) -> None:
    parts = {"attention_bias": True, "mlp_bias": True}
    said = examine(gguf_files.write(tmp_path / "m.gguf", **parts), False).config
    assert {key: said.get(key) for key in parts} == parts
    assert not {*parts} & {*examine(gguf_files.write(tmp_path / "n.gguf"), False).config}
    one = gguf_files.write(tmp_path / "o.gguf", extra={"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    assert "missing tensors: model.layers.0.self_attn.k_proj.bias" in refused(one)


def test_answers_end_with_every_end_that_is_named(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    made = examine(gguf_files.write(tmp_path / "m.gguf", keys=keys), False)
    assert (made.end_tokens, made.config["eos_token_id"]) == ((2, 5), 2)
    assert json.loads((made.files.folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 5]}


def test_a_number_of_f32_is_written_as_it_was_meant(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", keys={"llama.attention.layer_norm_rms_epsilon": 1e-5})
    assert read_header(path).metadata["llama.attention.layer_norm_rms_epsilon"] != 1e-5
    assert examine(path, False).config["rms_norm_eps"] == 1e-5


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.factor": 1.0}, None),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.finetuned": True,
                "rope.scaling.yarn_beta_fast": 24.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0},
        ),
    ],
)
def test_stretched_positions_are_those_of_the_keys(tmp_path: Path, keys: dict[str, Any], scaling: Any) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", keys={f"llama.{key}": value for key, value in keys.items()})
    assert examine(path, False).config.get("rope_scaling") == scaling


def llama3(theta: float, dim: int, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """Return the factors that llama.cpp's converter writes, computed one frequency at a time as it does."""
    import torch

    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    found = []
    for frequency in frequencies.tolist():
        wavelength = 2 * np.pi / frequency
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(found, np.float32)


@pytest.mark.parametrize(
    ("theta", "dim", "factor", "low", "high", "context"),
    [
        (500000.0, 128, 8.0, 1.0, 4.0, 8192),
        (500000.0, 64, 32.0, 1.0, 4.0, 8192),
        (10000.0, 128, 16.0, 1.0, 8.0, 4096),
        (1e6, 256, 4.0, 1.0, 2.5, 30000),
    ],
)
def test_llama_3s_positions_are_found_again_from_their_factors(
    theta: float, dim: int, factor: float, low: float, high: float, context: int
) -> None:
    factors = llama3(theta, dim, factor, low, high, context)
    assert gguf_rope.scaling_of(factors, theta) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def test_another_low_factor_is_said_with_other_numbers_that_mean_the_same() -> None:
    factors = llama3(500000.0, 128, 8.0, 2.0, 8.0, 16384)
    said = gguf_rope.scaling_of(factors, 500000.0)
    assert said is not None
    assert (said["low_freq_factor"], said["high_freq_factor"], said["original_max_position_embeddings"]) == (1, 4, 8192)


def test_factors_are_read_from_a_file_and_the_library_computes_the_same_frequencies(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = llama3(500000.0, 8, 8.0, 1.0, 4.0, 8192)
    keys = {"llama.rope.freq_base": 500000.0, "llama.context_length": 131072}
    path = gguf_files.write(tmp_path / "m.gguf", keys=keys, extra={"rope_freqs.weight": factors})
    config = AutoConfig.from_pretrained(examine(path, False).files.folder)
    frequencies, scale = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(frequencies.numpy(), plain / factors, rtol=1e-6)
    assert scale == 1.0
    assert "rope_freqs.weight" not in GgufCheckpoint(path).shapes


@pytest.mark.parametrize(
    ("factors", "scaling"),
    [([1.0, 1.0, 1.0, 1.0], None), ([4.0, 4.0, 4.0, 4.0], {"rope_type": "linear", "factor": 4.0})],
)
def test_factors_of_one_value_are_linear_or_nothing(tmp_path: Path, factors: list[float], scaling: Any) -> None:
    extra = {"rope_freqs.weight": np.asarray(factors, np.float32)}
    assert examine(gguf_files.write(tmp_path / "m.gguf", extra=extra), False).config.get("rope_scaling") == scaling


@pytest.mark.parametrize(
    ("factors", "keys", "told"),
    [
        ([1.0, 2.0, 3.0, 1.0], {}, "rope_freqs.weight: its factors are not those of Llama 3's positions"),
        ([1.0, 1.0, 0.5, 0.25], {}, "rope_freqs.weight: its factors are not those of Llama 3's positions"),
        ([1.0, 1.0, np.nan, 8.0], {}, "rope_freqs.weight: its factors are not those of Llama 3's positions"),
        ([1.0, 1.0, 8.0], {}, "rope_freqs.weight is F32 3, not F32 4"),
        (
            [1.0, 1.0, 8.0, 8.0],
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            'llama.rope.scaling.type is "linear": rope_freqs.weight stretches positions too: leave one out',
        ),
    ],
)
def test_factors_that_cannot_be_said_are_refused(
    tmp_path: Path, factors: list[float], keys: dict[str, Any], told: str
) -> None:
    extra = {"rope_freqs.weight": np.asarray(factors, np.float32)}
    assert told in refused(gguf_files.write(tmp_path / "m.gguf", keys=keys, extra=extra))


def test_a_window_makes_a_mistral_and_is_judged(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", keys={"llama.attention.sliding_window": 48})
    said = examine(path, False, 32).config
    assert (said["model_type"], said["architectures"], said["sliding_window"]) == (
        "mistral",
        ["MistralForCausalLM"],
        48,
    )
    assert "sliding_window 48: sliding-window attention is not supported" in refused(path, context=64)
    qwen = gguf_files.write(tmp_path / "q.gguf", "qwen2", keys={"qwen2.attention.sliding_window": 48})
    assert "sliding_window 48: sliding-window attention is not supported" in refused(qwen, context=64)
    none = gguf_files.write(tmp_path / "n.gguf", keys={"llama.attention.sliding_window": 0})
    assert examine(none, False, 64).config["model_type"] == "llama"


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"llama.block_count": ...}, "llama.block_count is missing: it must be a whole number, at least 1"),
        ({"llama.embedding_length": 0}, "llama.embedding_length is 0: it must be a whole number, at least 1"),
        ({"llama.embedding_length": "32"}, 'llama.embedding_length is "32": it must be a whole number, at least 1'),
        ({"llama.context_length": ...}, "llama.context_length is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": ...}, "llama.attention.layer_norm_rms_epsilon is missing: it must"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "llama.attention.layer_norm_rms_epsilon is NaN"),
        ({"llama.feed_forward_length": [64, 32]}, "llama.feed_forward_length is [64, 32]: layers that differ"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length is 4: values of another size"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4: heads of 8 are rotated whole"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8: what it changes is not supported"),
        ({"llama.attention.causal": False}, "llama.attention.causal is false: what it changes is not supported"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor is 2.0: what it changes"),
        ({"llama.rope.scaling.type": "longrope"}, 'llama.rope.scaling.type is "longrope": none, linear and yarn'),
        ({"llama.rope.scaling.type": "yarn"}, "as config.json: rope_scaling: factor is 0.0"),
        ({"general.type": "adapter"}, 'general.type is "adapter": it is no whole model'),
        ({"llama.attention.head_count_kv": 3}, "as config.json: num_key_value_heads 3 does not divide"),
        ({"tokenizer.ggml.eos_token_id": 64}, "as config.json: eos_token_id is 64: it must be null, the id"),
        ({"llama.context_length": 32}, "as config.json: context 64 is longer than the 32 positions"),
        ({"llama.vocab_size": 65}, "shapes that differ: model.embed_tokens.weight is 64x32, the metadata makes"),
        ({"llama.block_count": 2}, "tensors do not fit the metadata: missing tensors: model.layers.1.input_layernorm."),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_built_is_told_by_key(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    message = refused(gguf_files.write(tmp_path / "m.gguf", keys=keys))
    assert message.startswith(f"{tmp_path / 'm.gguf'}: ")
    assert told in message


def test_keys_that_change_nothing_are_taken(tmp_path: Path) -> None:
    keys = {
        "llama.expert_count": 0,
        "llama.attention.causal": True,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.attention.head_count_kv": [2],
        "llama.tensor_data_layout": "Meta AI original pth",
        "quantize.imatrix.file": "x",
    }
    assert (
        examine(gguf_files.write(tmp_path / "m.gguf", keys=keys), False).config
        == examine(gguf_files.write(tmp_path / "n.gguf"), False).config
    )


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    keys = {"llama.block_count": ..., "llama.context_length": ..., "llama.pooling_type": 3}
    told = refused(gguf_files.write(tmp_path / "m.gguf", keys=keys)).splitlines()
    assert [line.split(" is ")[0].strip() for line in told[1:]] == [
        "llama.block_count",
        "llama.context_length",
        "llama.pooling_type",
    ]


@pytest.mark.parametrize(("architecture", "told"), [("gemma3", "gemma3 is"), ("mistral3", "mistral3 is")])
def test_an_architecture_that_is_not_taken_is_told(tmp_path: Path, architecture: str, told: str) -> None:
    path = gguf_files.write_file(tmp_path / "m.gguf", architecture, {}, {"a": (np.zeros(32, np.float32), "F32")})
    assert f"general.architecture {told} not supported; taken are llama, qwen2, qwen3" in refused(path)


@pytest.mark.parametrize(
    ("name", "kind", "size", "told"),
    [
        ("blk.0.ffn_gate_exps.weight", "F32", (32,), "tensors that are not known: blk.0.ffn_gate_exps.weight (F32)"),
        ("blk.7.attn_norm.weight", "F32", (32,), "tensors that this model has no place for: model.layers.7."),
        ("blk.0.ffn_up.weight", "TQ2_0", (64, 256), "blk.0.ffn_up.weight is TQ2_0"),
        ("blk.0.attn_norm.weight", "Q8_0", (32,), "blk.0.attn_norm.weight is Q8_0"),
        (
            "blk.0.attn_norm.weight",
            "F32",
            (64,),
            "model.layers.0.input_layernorm.weight is 64, the metadata makes it 32",
        ),
    ],
)
def test_tensors_that_cannot_be_taken_are_told_by_name(
    tmp_path: Path, name: str, kind: str, size: tuple[int, ...], told: str
) -> None:
    keys = gguf_files.metadata(gguf_files.configuration(), "llama")
    tensors = {
        tensor.name: (np.array(tensor.data), "F32")
        for tensor in gguf.GGUFReader(gguf_files.write(tmp_path / "m.gguf")).tensors
    }
    path = gguf_files.write_file(
        tmp_path / "n.gguf", "llama", keys, {**tensors, name: (np.zeros(size, np.float32), kind)}
    )
    assert told in refused(path)
    with pytest.raises(InputError, match=r"n\.gguf: "):
        GgufCheckpoint(path)
