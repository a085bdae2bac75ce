"""The facts of a model, read from its config.json alone, are those of what the library builds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbuild.errors import InputError
from llmbuild.spec.decoder import Decoder
from llmbuild.spec.model import DEFAULTS, ModelFacts, facts_of, read_facts


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of a kind that is taken, with any keys left out that the library has a default for."""
    kv_heads, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    full = {
        "hidden_size": draw(st.integers(2, 12)) * kv_heads * repeats * 2,
        "intermediate_size": draw(st.integers(1, 200)),
        "num_hidden_layers": 1,
        "num_attention_heads": kv_heads * repeats,
        "num_key_value_heads": kv_heads,
        "vocab_size": draw(st.integers(1, 300)),
        "max_position_embeddings": draw(st.integers(8, 64)),
        "hidden_act": draw(st.sampled_from(["silu", "gelu"])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    kind = draw(st.sampled_from(sorted(DEFAULTS)))
    extra: dict[str, Any] = {"attention_bias": draw(st.booleans())} if kind in ("llama", "qwen3") else {}
    if kind == "llama":
        extra["mlp_bias"] = draw(st.booleans())
    if draw(st.booleans()):
        extra["head_dim"] = 2 * draw(st.integers(4, 80))
    left_out = draw(st.sets(st.sampled_from(["num_key_value_heads", "hidden_act", "tie_word_embeddings"])))
    if kind in ("qwen2", "qwen3", "mistral"):
        left_out -= {"num_key_value_heads"}
    return {"model_type": kind, **{k: v for k, v in full.items() if k not in left_out}, **extra}


def built_facts(config: dict[str, Any]) -> ModelFacts:
    """What the library builds of a configuration, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    library = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(library)
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    decoder = Decoder(
        hidden=attention.q_proj.in_features,
        inner=mlp.up_proj.out_features,
        heads=attention.q_proj.out_features // attention.head_dim,
        kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_dim=attention.head_dim,
        vocabulary=model.lm_head.out_features,
        activation=library.hidden_act,
        head_norms=hasattr(attention, "q_norm"),
    )
    return ModelFacts(
        config["model_type"],
        decoder,
        len(model.model.layers),
        library.max_position_embeddings,
        model.lm_head.weight is model.model.embed_tokens.weight,
        attention.q_proj.bias is not None,
        attention.o_proj.bias is not None,
        mlp.down_proj.bias is not None,
    )


@settings(max_examples=25)
@given(configurations())
def test_facts_are_those_of_what_the_library_builds(config: dict[str, Any]) -> None:
    assert facts_of(config) == built_facts(config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "gpt2"}, "m: model_type 'gpt2' is not supported; taken are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "m: model_type None is not supported"),
        ({"hidden_size": "64"}, "m: hidden_size is '64', which is no positive integer"),
        ({"num_hidden_layers": 0}, "m: num_hidden_layers is 0, which"),
        ({"intermediate_size": None}, "m: intermediate_size is None, which"),
        ({"vocab_size": True}, "m: vocab_size is True, which"),
    ],
)
def test_a_configuration_without_facts_is_told_by_key(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        facts_of({"model_type": "llama", **change}, "m")


@pytest.mark.parametrize(("text", "told"), [("{", "not JSON"), ("[]", "not a JSON object"), (None, "cannot be read")])
def test_a_file_without_a_configuration_is_told_by_path(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=f"{path}: {told}"):
        read_facts(path)
