"""A model's sizes and parts from its configuration, read without any library: the inputs of the choices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmbuild.errors import InputError
from llmbuild.spec.decoder import Decoder
from llmbuild.system.strict_json import JsonObject

_COMMON: JsonObject = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, JsonObject] = {
    "llama": {**_COMMON, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        **_COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        **_COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
}
"""By `model_type`, for the supported types: the library's defaults for keys that config.json omits."""


@dataclass(frozen=True)
class ModelFacts:
    """Sizes and parts of a model from its configuration; the applicable choices follow from these alone."""

    kind: str
    """`model_type`: a key of `DEFAULTS`."""
    decoder: Decoder
    layers: int
    positions: int
    """Maximum number of positions."""
    tied: bool
    """Whether the head and the token table share one matrix."""
    projection_biases: bool
    """Whether the query, key and value projections have biases."""
    output_bias: bool
    """Whether attention's output projection has a bias."""
    mlp_biases: bool


def facts_of(config: Mapping[str, object], where: str = "config.json") -> ModelFacts:
    """Return the facts of a parsed config.json; `where` names the file.

    Raises:
        InputError: an unsupported model type, or a size that is not a positive integer.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise InputError(f"{where}: model_type {kind!r} is not supported; taken are {', '.join(DEFAULTS)}")
    said = {**DEFAULTS[kind], **config}

    def size(key: str, otherwise: int | None = None) -> int:
        found = otherwise if said.get(key) is None else said[key]
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise InputError(f"{where}: {key} is {found!r}, which is no positive integer")
        return found

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    bias = kind == "qwen2" or (kind in ("llama", "qwen3") and bool(said.get("attention_bias", False)))
    return ModelFacts(
        kind,
        Decoder(
            hidden=hidden,
            inner=size("intermediate_size"),
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            vocabulary=size("vocab_size"),
            activation=str(said["hidden_act"]),
            head_norms=kind == "qwen3",
        ),
        layers=size("num_hidden_layers"),
        positions=size("max_position_embeddings"),
        tied=bool(said["tie_word_embeddings"]),
        projection_biases=bias,
        output_bias=bias and kind != "qwen2",
        mlp_biases=kind == "llama" and bool(said.get("mlp_bias", False)),
    )


def read_facts(config: Path) -> ModelFacts:
    """Return the facts of a config.json.

    Raises:
        InputError: it cannot be read, is not a JSON object, or `facts_of` finds no facts in it.
    """
    try:
        body = json.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{config}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{config}: not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InputError(f"{config}: not a JSON object")
    return facts_of(body, str(config))
