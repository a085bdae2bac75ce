"""What a config.json means for the class that the library builds of it: every fault at once, by key.

The class is chosen by `model_type`, as the library does; labels in `architectures` decide nothing. No library is
needed for this, so that what cannot be built is told at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmbuild.frontend import rope
from llmbuild.frontend.documents import shown
from llmbuild.kernels import applies
from llmbuild.spec.model import DEFAULTS

_LLAMA_KEYS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id "
    "eos_token_id tie_word_embeddings rope_parameters rope_scaling rope_theta attention_dropout".split()
)
_GENERAL_KEYS = frozenset(
    "model_type architectures transformers_version _name_or_path name_or_path torch_dtype dtype id2label label2id "
    "num_labels problem_type output_hidden_states output_attentions return_dict chunk_size_feed_forward "
    "is_encoder_decoder auto_map quantization_config compression_config transformers_weights pretraining_tp "
    "partial_rotary_factor per_layer_config fusion_config sliding_window layer_types torchscript use_bfloat16 "
    "tokenizer_class prefix finetuning_task task_specific_params pruned_heads is_decoder add_cross_attention "
    "tie_encoder_decoder bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty "
    "forced_bos_token_id forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beams "
    "num_beam_groups num_return_sequences remove_invalid_values repetition_penalty return_dict_in_generate "
    "sep_token_id suppress_tokens temperature tf_legacy_loss top_k top_p typical_p attn_implementation "
    "_attn_implementation".split()
)
"""Keys that say nothing about what is computed, or that are checked apart."""

ACTIVATIONS = tuple(applies.ACTIVATIONS)
"""Those that our kernels compute, as the compiler's do."""
DTYPES = ("float32", "float16", "bfloat16", "float64")
FULL, SLIDING = "full_attention", "sliding_attention"
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
MOST = (1 << 31) - 1
"""The largest size: positions and sizes are 32-bit numbers in compiled code."""


@dataclass(frozen=True)
class Kind:
    """A class of the library that is taken, and what it takes for keys that are left out."""

    name: str
    keys: frozenset[str]
    window: int | None = None
    """The attention window where the key is left out."""
    by_layer: bool = False
    """Whether windows belong to layers, and are off without `use_sliding_window`."""


_QWEN_KEYS = _LLAMA_KEYS | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
KINDS = {
    "llama": Kind("LlamaForCausalLM", _LLAMA_KEYS | {"attention_bias", "mlp_bias"}),
    "mistral": Kind("MistralForCausalLM", _LLAMA_KEYS, window=4096),
    "qwen2": Kind("Qwen2ForCausalLM", _QWEN_KEYS, window=4096, by_layer=True),
    "qwen3": Kind("Qwen3ForCausalLM", _QWEN_KEYS | {"attention_bias"}, window=4096, by_layer=True),
}
"""By `model_type`."""
TAKEN = ", ".join(f"{kind} ({each.name})" for kind, each in KINDS.items())
"""The architectures that are taken, for people."""


@dataclass(frozen=True)
class Judged:
    """What was found in a configuration: `faults` refuse it, `notes` are worth telling once."""

    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()


def judge(config: Mapping[str, Any], random_init: bool, context: int = 0) -> Judged:
    """Return all faults of a parsed config.json, for a cache of `context` positions; 0 leaves that open."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        return Judged((_unknown(config),))
    reading = _Reading(config, KINDS[kind], random_init, context)
    for part in (reading.general, reading.sizes, reading.numbers, reading.tokens, reading.windows, reading.positions):
        part()
    return Judged(tuple(reading.faults), tuple(reading.notes))


def _unknown(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    labels = ", ".join(map(str, named)) if isinstance(named, list) else ""
    found = f"{labels or 'this architecture'} is not supported: model_type is {shown(config.get('model_type'))}"
    return f"{found}; taken are {TAKEN}"


class _Reading:
    """One pass over a configuration; each method looks at a group of keys."""

    def __init__(self, config: Mapping[str, Any], kind: Kind, random_init: bool, context: int) -> None:
        self.config, self.kind, self.random_init, self.context = config, kind, random_init, context
        self.otherwise = DEFAULTS[config["model_type"]]
        self.faults: list[str] = []
        self.notes: list[str] = []

    def fault(self, key: str, why: str) -> None:
        """Refuse a key."""
        self.faults.append(f"{key} is {shown(self.config.get(key))}: {why}")

    def size(self, key: str, otherwise: int) -> int:
        """Return a size, at least 1; 0 where it is refused."""
        found = self.config.get(key, otherwise)
        if type(found) is int and 1 <= found <= MOST:
            return found
        self.fault(key, "it must be a whole number, at least 1")
        return 0

    def flag(self, key: str, otherwise: bool = False) -> bool:
        """Return a flag."""
        found = self.config.get(key, otherwise)
        if not isinstance(found, bool):
            self.fault(key, "it must be true or false")
        return bool(found)

    def number(self, key: str, least: float, most: float, decimal: bool = False) -> None:
        """Refuse what is no number from `least` to `most`; `decimal`: the library wants a decimal point too."""
        found = self.config.get(key)
        fits = type(found) is float or (type(found) is int and not decimal)
        if key in self.config and not (found is not None and fits and least <= found <= most):
            dotted = ", written with a decimal point" if decimal else ""
            self.fault(key, f"it must be a number from {least:g} to {most:g}{dotted}")

    # --- groups of keys ------------------------------------------------------------------------------------------

    def general(self) -> None:
        """Look at what applies to all classes, and at keys that none of them reads."""
        self._quantization()
        self._labels()
        self._bookkeeping()
        for key in ("return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder"):
            if self.config.get(key) is not None:
                self.flag(key)
        if self.config.get("is_encoder_decoder") is True:
            self.fault("is_encoder_decoder", "only decoders are taken")
        for key in ("per_layer_config", "fusion_config"):
            if self.config.get(key) is not None:
                self.fault(key, "layers that differ are not supported; leave the key out")
        for key in ("dtype", "torch_dtype"):
            if (found := self.config.get(key)) is not None and found not in DTYPES:
                self.fault(key, f"it must be one of {', '.join(DTYPES)}")
        if self.config.get("auto_map"):
            self.notes.append(f"auto_map names code of the model's own, which is not run: {self.kind.name} is built")
        unread = sorted(k for k, v in self.config.items() if v and k not in self.kind.keys | _GENERAL_KEYS)
        if unread:
            self.notes.append(f"{self.kind.name} does not read {', '.join(shown(key)[1:-1] for key in unread)}")

    def _bookkeeping(self) -> None:
        """Look at keys that say nothing here, but that the library cannot load a model with in another form."""
        objects = {
            "id2label": lambda key, value: key.isdecimal() and isinstance(value, str),
            "label2id": lambda _, value: type(value) is int,
            "auto_map": lambda _, value: isinstance(value, (str, list)),
        }
        for key, fits in objects.items():
            found = self.config.get(key, {} if key == "auto_map" else None)
            whole = isinstance(found, dict) and all(fits(name, value) for name, value in found.items())
            if not whole and (found is not None or key == "auto_map"):
                self.fault(key, "it must be an object of names; leave it out")
        if (labels := self.config.get("num_labels")) is not None and (type(labels) is not int or labels > 10_000):
            self.fault("num_labels", "it must be null or a number; leave it out")
        if not isinstance(self.config.get("transformers_version", ""), str | None):
            self.fault("transformers_version", "it must be null or a text; leave it out")
        for key in ("chunk_size_feed_forward", "pretraining_tp"):
            null = key == "pretraining_tp" and self.config.get(key) is None
            if key in self.config and type(self.config[key]) is not int and not null:
                self.fault(key, "it must be a whole number; leave it out")
        if self.config.get("problem_type") is not None:
            self.fault("problem_type", "only models that continue a text are taken; leave it out")

    def _quantization(self) -> None:
        for key in ("quantization_config", "compression_config"):
            found = self.config.get(key)
            if found is None:
                continue
            method = found.get("quant_method") if isinstance(found, dict) else None
            named = method if isinstance(method, str) else "no method is named"
            if self.random_init and isinstance(found, dict):
                self.notes.append(f"{key} ({named}) is not used: random weights are drawn in f32")
            else:
                self.faults.append(
                    f"{key}: quantized weights ({named}) are not supported; take the model's floating-point weights"
                )

    def _labels(self) -> None:
        named = self.config.get("architectures")
        if named is None:
            return
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            self.fault("architectures", "it must be a list of names")
        elif named and self.kind.name not in named:
            told = ", ".join(shown(name)[1:-1] for name in named)
            self.notes.append(
                f"architectures says {told}, but model_type {self.config['model_type']} builds {self.kind.name}"
            )

    def sizes(self) -> None:
        """Look at sizes, and at whether they go together."""
        found = {key: self.size(key, self.otherwise[key]) for key in _SIZES}
        hidden, heads = found["hidden_size"], found["num_attention_heads"]
        given = self.config.get("num_key_value_heads", self.otherwise.get("num_key_value_heads"))
        kv_heads = heads if given is None else self.size("num_key_value_heads", given)
        if heads and kv_heads and heads % kv_heads:
            self.faults.append(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        own = self.config.get("head_dim", self.otherwise.get("head_dim"))
        if own is None and "head_dim" in self.otherwise:
            self.fault("head_dim", "it must be a whole number, at least 1")
        elif own is not None:
            own = self.size("head_dim", own)
        if hidden and heads and hidden % heads and (own is None or self.config["model_type"] == "llama"):
            self.faults.append(f"num_attention_heads {heads} does not divide hidden_size {hidden}")
        head_dim = hidden // heads if own is None and heads else own or 0
        if head_dim % 2:
            self.faults.append(f"head_dim {head_dim} is odd: rotary positions need pairs")
        limit = found["max_position_embeddings"]
        if limit and self.context > limit:
            self.faults.append(
                f"context {self.context} is longer than the {limit} positions that the model was made for "
                "(max_position_embeddings)"
            )

    def numbers(self) -> None:
        """Look at numbers, flags and the activation."""
        self.number("rms_norm_eps", 1e-37, 1.0, decimal=True)
        self.number("initializer_range", 0.0, 1.0, decimal=True)
        if self.config.get("attention_dropout", 0) is not None or self.config["model_type"] != "llama":
            self.number("attention_dropout", 0.0, 1.0)
        for key in ("tie_word_embeddings", "use_cache", "attention_bias", "mlp_bias"):
            if key in self.kind.keys:
                self.flag(key)
        act = self.config.get("hidden_act", "silu")
        if act not in ACTIVATIONS:
            self.fault("hidden_act", f"it must be one of {', '.join(ACTIVATIONS)}")

    def tokens(self) -> None:
        """Look at the ids of tokens with a meaning of their own."""
        vocabulary = self.config.get("vocab_size", self.otherwise["vocab_size"])
        known = vocabulary if type(vocabulary) is int else MOST
        pad = self.config.get("pad_token_id")
        if pad is not None and (type(pad) is not int or not -1 <= pad < known):
            self.fault("pad_token_id", f"it must be null or the id of one of the {known} tokens")
        bos = self.config.get("bos_token_id")
        if bos is not None and type(bos) is not int:
            self.fault("bos_token_id", "it must be null or the id of a token")
        if (why := end_fault(self.config.get("eos_token_id"), known)) is not None:
            self.fault("eos_token_id", why)

    def windows(self) -> None:
        """Refuse attention windows that are shorter than the context; a longer one is none."""
        layers, types = self.config.get("num_hidden_layers"), self.config.get("layer_types")
        window = self.config.get("sliding_window", self.kind.window)
        if self.config["model_type"] == "mistral" and "layer_types" in self.config:
            self.fault("layer_types", "the library builds another class (Ministral) of a mistral with this key")
        elif types is not None and (not isinstance(types, list) or any(each not in (FULL, SLIDING) for each in types)):
            self.fault("layer_types", f"it must be a list of {FULL} and {SLIDING}")
        elif types is not None and type(layers) is int and len(types) != layers:
            self.faults.append(f"layer_types has {len(types)} entries for {layers} layers (num_hidden_layers)")
        if window is not None and (type(window) is not int or window < 1):
            self.fault("sliding_window", "it must be null or a whole number, at least 1")
            return
        windowed = self._windowed(types if isinstance(types, list) else None)
        if windowed and window is not None and window < self.context:
            self.faults.append(
                f"sliding_window {window}: sliding-window attention is not supported, and this window is shorter than "
                f"the context of {self.context}; ask for a context that fits into it"
            )

    def _windowed(self, types: list[Any] | None) -> bool:
        """Say whether a layer of the class that is built has a window, where one is given."""
        if not self.kind.by_layer:
            return True
        first = self.config.get("max_window_layers", 28)
        if type(first) is not int:
            self.fault("max_window_layers", "it must be a whole number")
            first = 0
        on = self.flag("use_sliding_window")
        if types is not None:
            sliding = SLIDING in types
            if sliding and (not on or self.config.get("sliding_window", self.kind.window) is None):
                self.faults.append(f"layer_types has {SLIDING}, but use_sliding_window or sliding_window is not set")
            return sliding and on
        layers = self.config.get("num_hidden_layers", self.otherwise["num_hidden_layers"])
        return on and first < (layers if type(layers) is int else MOST)

    def positions(self) -> None:
        """Look at rotary positions."""
        limit = self.config.get("max_position_embeddings", self.otherwise["max_position_embeddings"])
        layered = self.config.get("layer_types")
        faults, notes = rope.judge(self.config, limit if type(limit) is int else 1, layered)
        self.faults += faults
        self.notes += notes


def end_fault(found: Any, vocabulary: int) -> str | None:
    """Return why these are no tokens that end a text; None where they are, or where there are none."""
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if all(type(one) is int and 0 <= one < vocabulary for one in ids):
        return None
    return f"it must be null, the id of one of the {vocabulary} tokens, or a list of such ids"


def end_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end a text, by the generation settings or else the configuration."""
    for source in (generation, config):
        found = source.get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()
