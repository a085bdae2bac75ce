"""Model folders that are unusual in one or more ways, drawn by seed: values of the configuration, tensors, files."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llmbuild.errors import InputError
from llmbuild.frontend.source import find_model
from llmbuild.frontend.tensors import HEAD, places
from llmbuild.spec.model import facts_of
from llmbuild.spec.recipe import ModelSource

CONTEXT = 48
WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 7, 16, 32, 64, -1, -2, 1 << 31, 1 << 70, 0.0, 0.5, 1.0, 1e-6, 1e-300, 1e300, -0.5),
    *("", "silu", "gelu", "relu2", "prelu", "float32", "float8_e4m3fn", "llama", "mistral", "qwen2", "qwen3", "gpt2"),
    *([], {}, [1, 2], [0], ["full_attention"] * 2, ["sliding_attention"] * 2, {"a": 1}, "\ud800", "\x1b[2J", "x" * 999),
)
ROPES: tuple[Any, ...] = (
    *({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 0.1}, {"rope_type": "dynamic", "factor": 2}),
    *({"rope_type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4, "mscale": None, "truncate": 1}),
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
    *({"rope_type": "default", "rope_theta": 1e6}, {"full_attention": {"rope_type": "default"}}, {"factor": 3}),
)
KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout", "attention_bias"),
    *("mlp_bias", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "model_type", *WINDOWS),
    *("architectures", "quantization_config", "torch_dtype", "dtype", "return_dict", "output_attentions", "id2label"),
    *("transformers_version", "is_encoder_decoder", "auto_map", "transformers_weights", "per_layer_config", "note"),
    *("num_labels", "problem_type", "chunk_size_feed_forward", "output_hidden_states", "pretraining_tp", "label2id"),
)


def sound(draw: random.Random) -> dict[str, Any]:
    """Return a small configuration that is taken."""
    kind = draw.choice(["llama", "mistral", "qwen2", "qwen3"])
    heads, size = draw.choice([1, 2, 4]), draw.choice([2, 8, 16])
    found: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": heads * size,
        "intermediate_size": draw.choice([7, 24, 44]),
        "num_hidden_layers": draw.choice([1, 2]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, 4) if heads % n == 0]),
        "head_dim": draw.choice([size, 4]),
        "vocab_size": draw.choice([64, 65]),
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if kind == "mistral" or draw.random() < 0.2:
        found["sliding_window"] = draw.choice([None, CONTEXT, 64])
    if draw.random() < 0.3:
        found["attention_bias"] = draw.random() < 0.5
    return found


def write(folder: Path, draw: random.Random) -> bool:
    """Write a model folder with up to three oddities, and return whether its weights are to be drawn."""
    config = sound(draw)
    weights = {
        name: np.asarray(np.random.default_rng(0).normal(1.0 if "norm" in name else 0.0, 0.1, shape), np.float32)
        for name, shape in places(facts_of(config), config["num_hidden_layers"]).items()
        if name != HEAD or not config["tie_word_embeddings"]
    }
    odd = [draw.choice((_value, _value, _value, _tensor, _file, _bytes, _beside)) for _ in range(draw.randrange(4))]
    for change in odd:
        if change is _value:
            _value(config, draw)
        elif change is _tensor:
            _tensor(weights, draw)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if draw.random() < 0.2:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": draw.choice([1, [1, 2], *VALUES])}))
    for change in odd:
        if change in (_file, _bytes, _beside):
            change(folder, draw)  # type: ignore[operator]
    return draw.random() < 0.2


def _value(config: dict[str, Any], draw: random.Random) -> None:
    key = draw.choice(KEYS)
    if draw.random() < 0.1:
        config.pop(key, None)
    else:
        config[key] = draw.choice(ROPES if key.startswith("rope_") and draw.random() < 0.7 else VALUES)


def _tensor(weights: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(sorted(weights))
    match draw.randrange(8):
        case 0:
            del weights[name]
        case 1:
            weights[draw.choice(["extra", name + "_scale", name.replace("layers.0", "layers.9"), "\x1b[2J"])] = weights[
                name
            ].copy()
        case 2:
            weights[name] = weights[name][:-1].copy()
        case 3:
            weights[name] = weights[name].astype(draw.choice([np.int8, np.float16, np.float64, np.uint8, np.int64]))
        case 4:
            weights[name] = weights[name] * np.float32(draw.choice([np.nan, np.inf, 0.0, 1e30]))
        case 5:
            weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        case 6:
            weights[name.removeprefix("model.")] = weights.pop(name)
        case _:
            weights[name] = weights[name].reshape(-1).copy()


def _file(folder: Path, draw: random.Random) -> None:
    """Put something else than a file where one is read."""
    path = folder / draw.choice(["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"])
    data = path.read_bytes() if path.is_file() else b"{}"
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    makes: tuple[Callable[[], object], ...] = (
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to(path.name),
        lambda: path.write_bytes(POINTER),
        lambda: path.write_bytes(data[: draw.randrange(len(data) + 1)]),
        lambda: None,
    )
    draw.choice(makes)()


def _bytes(folder: Path, draw: random.Random) -> None:
    """Change some bytes of a file, its header above all."""
    path = folder / draw.choice(["config.json", "model.safetensors"])
    if path.is_symlink() or not path.is_file():
        return
    data = bytearray(path.read_bytes())
    for _ in range(draw.randrange(1, 4)):
        if data:
            data[draw.randrange(min(len(data), 2000))] = draw.randrange(256)
    path.write_bytes(data)


def _beside(folder: Path, draw: random.Random) -> None:
    """Put a file beside, or an index in front of the weights."""
    name = draw.choice(["adapter_config.json", "optimizer.bin", "pytorch_model.bin", "x.gguf", "tokenizer.json", ""])
    if name:
        if not (folder / name).exists() and not (folder / name).is_symlink():
            (folder / name).write_bytes(draw.choice([b"{}", b"", POINTER, b"\xff" * 9]))
        return
    if (folder / "model.safetensors").is_file():
        (folder / "part.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").unlink()
    place = draw.choice(["part.safetensors", "part.safetensors", "../x.safetensors", "/x", "", 7, "a\0", "x" * 300])
    index: dict[str, Any] = {"metadata": {}, "weight_map": {"model.norm.weight": place}}
    if draw.random() < 0.3:
        index.pop(draw.choice(sorted(index)))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def feed(work: Path, seed: int, load: bool) -> None:
    """Judge an odd folder; with `load`, what is taken is loaded as well, and must answer as the library does.

    Raises:
        InputError: it is refused, which is as it should be.
        AssertionError: it was taken, and then not loaded.
    """
    draw = random.Random(seed)
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    random_init = write(folder, draw)
    found = find_model(ModelSource("huggingface", str(folder), random_init), CONTEXT)
    for text in found.notes:
        assert text.isprintable(), text
    if not load:
        return
    from llmbuild.frontend.program import settle, take
    from llmbuild.spec.program import ImportJob

    job = ImportJob(str(folder), CONTEXT, random_init=random_init)
    try:
        take(job, settle(job))
    except InputError as error:
        if "NaN or infinite" in str(error):
            raise
        raise AssertionError(f"taken, then not loaded: {error}") from error
