"""A GGUF file's metadata as the config.json and generation_config.json that the library would have for the model.

What would change the numbers and is not known here is refused by its key; nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmbuild.frontend import gguf_rope
from llmbuild.frontend.config import KINDS
from llmbuild.frontend.documents import shown
from llmbuild.frontend.gguf_header import Header, Value

ARCHITECTURE, TYPE = "general.architecture", "general.type"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those that are taken; Mistral's files say llama."""
_INTERLEAVED = ("llama",)
"""Those whose rows of queries and keys llama.cpp reorders."""
TOKENS = "tokenizer.ggml.tokens"
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Tokens that end an answer, below `tokenizer.ggml.`."""

_MOST = 3e38
"""The largest number of f32, about."""
_THETA = 10_000.0
"""The base of rotary positions where the file has none."""
_KNOWN = frozenset(
    "context_length embedding_length block_count feed_forward_length vocab_size tensor_data_layout "
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon attention.sliding_window rope.dimension_count rope.freq_base rope.scale_linear "
    "rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned "
    "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow".split()
)
"""Keys below the architecture's name that are read, or that say nothing about the numbers."""
_NEUTRAL: Mapping[str, Value] = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
"""Other keys, with the value that changes nothing; of all further ones that is nothing, 0 or false."""


@dataclass(frozen=True)
class Described:
    """What a file's metadata means. `faults` refuse it, and the configuration then lacks keys."""

    architecture: str
    config: dict[str, Any]
    generation: dict[str, Any]
    faults: tuple[str, ...] = ()
    interleaved: Mapping[str, int] = field(default_factory=dict)
    """Projections whose rows are interleaved in the file, with their heads."""


def describe(header: Header) -> Described:
    """Return what a file's metadata means, with all faults at once."""
    name, kind = header.metadata.get(ARCHITECTURE), header.metadata.get(TYPE, "model")
    if kind != "model":
        return Described("", {}, {}, (f"{TYPE} is {shown(kind)}: it is no whole model",))
    if not isinstance(name, str) or name not in ARCHITECTURES:
        told = shown(name)[1:-1] if isinstance(name, str) else "none"
        return Described("", {}, {}, (f"{ARCHITECTURE} {told} is not supported; taken are {', '.join(ARCHITECTURES)}",))
    return _Reading(header, name).described()


class _Reading:
    """One pass over the metadata; keys are those below the architecture's name unless they have a dot of their own."""

    def __init__(self, header: Header, architecture: str) -> None:
        self.header, self.architecture = header, architecture
        self.faults: list[str] = []

    def described(self) -> Described:
        """Read all of it."""
        config = self._sizes() | self._tokens() | self._window() | self._biases()
        config |= self._positions(config["head_dim"])
        self._others()
        heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
        return Described(
            self.architecture,
            {key: value for key, value in config.items() if value is not None},
            self._generation(),
            tuple(self.faults),
            {part: config[key] for part, key in heads.items()} if self.architecture in _INTERLEAVED else {},
        )

    # --- values by key -------------------------------------------------------------------------------------------

    def _key(self, key: str) -> str:
        return key if key.startswith(("tokenizer.", "general.")) else f"{self.architecture}.{key}"

    def _found(self, key: str) -> Value | None:
        return self.header.metadata.get(self._key(key))

    def _fault(self, key: str, why: str) -> None:
        found = self._found(key)
        is_ = f"is {shown(found)}" if found is not None else "is missing"
        self.faults.append(f"{self._key(key)} {is_}: {why}")

    def _whole(self, key: str, otherwise: int | None = None) -> int:
        """Return a whole number, one for all layers; 1 where it is refused."""
        found = self._found(key)
        if isinstance(found, tuple) and len(set(found)) > 1:
            self._fault(key, "layers that differ are not supported")
            return 1
        value = found[0] if isinstance(found, tuple) and found else found
        if value is None and otherwise is not None:
            return otherwise
        if type(value) is int and value >= 1:
            return value
        self._fault(key, "it must be a whole number, at least 1")
        return 1

    def _number(self, key: str, otherwise: float | None = None) -> float:
        """Return a number as it is written shortest in f32: 1e-05, where the file has 9.999999747378752e-06."""
        found = self._found(key)
        if found is None and otherwise is not None:
            return otherwise
        if isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < _MOST:
            return float(str(np.float32(found)))
        self._fault(key, "it must be a number")
        return 1.0

    # --- groups of keys ------------------------------------------------------------------------------------------

    def _sizes(self) -> dict[str, Any]:
        hidden, heads = self._whole("embedding_length"), self._whole("attention.head_count")
        head_dim = self._whole("attention.key_length", max(1, hidden // heads))
        if self._whole("attention.value_length", head_dim) != head_dim:
            self._fault("attention.value_length", f"values of another size than keys ({head_dim}) are not supported")
        if self._whole("rope.dimension_count", head_dim) != head_dim:
            self._fault("rope.dimension_count", f"heads of {head_dim} are rotated whole, or not at all")
        return {
            "model_type": self.architecture,
            "vocab_size": self._vocabulary(),
            "hidden_size": hidden,
            "intermediate_size": self._whole("feed_forward_length"),
            "num_hidden_layers": self._whole("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._whole("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._whole("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self.header.tensors,
        }

    def _vocabulary(self) -> int:
        """Return how many tokens there are: those that are listed, as llama.cpp counts them."""
        listed = self.header.metadata.get(TOKENS)
        return len(listed) if isinstance(listed, tuple) and listed else self._whole("vocab_size")

    def _tokens(self) -> dict[str, Any]:
        ids = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
        return {key: self._found(f"tokenizer.ggml.{name}") for key, name in ids.items()}

    def _generation(self) -> dict[str, Any]:
        """Return the settings of generation: where an answer ends."""
        found = [self._found(f"tokenizer.ggml.{name}") for name in ENDS]
        ends = list(dict.fromkeys(token for token in found if token is not None))
        return {"eos_token_id": ends} if ends else {}

    def _window(self) -> dict[str, Any]:
        """Return the attention window: the llama class has none, the mistral class differs in nothing else."""
        window = 0 if self._found("attention.sliding_window") == 0 else self._whole("attention.sliding_window", 0)
        kind = "mistral" if window and self.architecture == "llama" else self.architecture
        found: dict[str, Any] = {"model_type": kind, "architectures": [KINDS[kind].name]}
        if window:
            found["sliding_window"] = window
            if KINDS[kind].by_layer:
                found |= {"use_sliding_window": True, "max_window_layers": 0}
        return found

    def _biases(self) -> dict[str, Any]:
        """Return which parts have biases where the class leaves that open; each then has all of them."""
        parts: dict[str, tuple[str, ...]] = {"attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output")}
        if self.architecture == "llama":
            parts["mlp_bias"] = ("ffn_gate", "ffn_up", "ffn_down")
        stored = {name.split(".")[-2] for name in self.header.tensors if name.endswith(".bias") and "." in name[:-5]}
        return {} if self.architecture == "qwen2" else {key: True for key, names in parts.items() if stored & {*names}}

    def _positions(self, head_dim: int) -> dict[str, Any]:
        theta = self._number("rope.freq_base", _THETA)
        scaling = self._scaling()
        if gguf_rope.FACTORS in self.header.tensors:
            if scaling:
                self._fault("rope.scaling.type", f"{gguf_rope.FACTORS} stretches positions too: leave one out")
            scaling = self._factors(theta, head_dim)
        return {"rope_theta": theta, "rope_scaling": scaling or None}

    def _scaling(self) -> dict[str, Any]:
        """Return how positions are stretched, by keys."""
        old = "rope.scaling.factor" if self._found("rope.scaling.factor") is not None else "rope.scale_linear"
        factor = self._number(old, 0.0)
        kind = self._found("rope.scaling.type") or ("linear" if factor not in (0.0, 1.0) else "none")
        if kind == "none":
            return {}
        if kind == "linear":
            return {"rope_type": kind, "factor": factor} if factor else {}
        if kind != "yarn":
            self._fault("rope.scaling.type", "none, linear and yarn are supported")
            return {}
        found = {"rope_type": kind, "factor": factor}
        if self._found("rope.scaling.original_context_length") is not None:
            found["original_max_position_embeddings"] = self._whole("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if self._found(f"rope.scaling.yarn_{name}") is not None:
                found[name] = self._number(f"rope.scaling.yarn_{name}")
        return found

    def _factors(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Return how positions are stretched, by a factor for each frequency."""
        tensor = self.header.tensors[gguf_rope.FACTORS]
        if tensor.kind != "F32" or tensor.shape != (head_dim // 2,):
            self.faults.append(
                f"{tensor.name} is {tensor.kind} {'x'.join(map(str, tensor.shape))}, not F32 {head_dim // 2}"
            )
            return {}
        found = gguf_rope.scaling_of(np.frombuffer(self.header.read(tensor.name), np.float32), theta)
        if found is None:
            self.faults.append(f"{tensor.name}: its factors are not those of Llama 3's positions, which are supported")
        return found or {}

    def _others(self) -> None:
        """Refuse keys of the architecture that are not known, unless their value changes nothing."""
        prefix = f"{self.architecture}."
        for key, value in self.header.metadata.items():
            name = key.removeprefix(prefix)
            if not key.startswith(prefix) or name in _KNOWN:
                continue
            if value != _NEUTRAL[name] if name in _NEUTRAL else value:
                self._fault(name, "what it changes is not supported")
