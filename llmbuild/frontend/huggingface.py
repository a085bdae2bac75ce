"""A Hugging Face folder or hub id to a model of the library, or to one clear `InputError`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch.overrides import TorchFunctionMode

from llmbuild.errors import InputError
from llmbuild.transform.drawn import draw

_library: Any = transformers
"""The library without its types: they do not cover what is called here."""

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Decoders whose layers are those of Llama, up to biases and norms of the projections."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def load(model: str, random_init: bool, seed: int, attention: str) -> Any:
    """Return the model in f32, in evaluation mode, with weights from its files or drawn from `seed`.

    Raises:
        InputError: the model is missing, incomplete, corrupt or of an architecture that is not taken.
    """
    _library.logging.set_verbosity_error()
    _library.logging.disable_progress_bar()
    config = _config(model)
    if random_init:
        torch.manual_seed(seed)
        config.dtype = torch.float32
        with _Undrawn():
            built = _library.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        _draw_matrices(built, seed, config.initializer_range)
    else:
        built = _with_weights(model, config, attention)
    return built.eval().requires_grad_(False)


class _Undrawn(TorchFunctionMode):
    """Leaves out the random numbers that a model's matrices begin with, where others take their place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_) and args[0].dim() > 1:
            return args[0]
        return func(*args, **(kwargs or {}))


def _draw_matrices(built: Any, seed: int, spread: float) -> None:
    """Give every matrix weights that numpy alone can draw again, on a machine without PyTorch."""
    with torch.no_grad():
        for name, weights in built.named_parameters():
            if weights.dim() > 1:
                weights.copy_(torch.from_numpy(draw(seed, name, tuple(weights.shape), spread)))


def _config(model: str) -> Any:
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json; a model is a Hugging Face folder or the id of one on the hub")
    if not folder.exists() and (folder.is_absolute() or model.startswith(".") or model.count("/") != 1):
        raise InputError(f"{model}: no such folder")
    try:
        config = _library.AutoConfig.from_pretrained(model)
    except json.JSONDecodeError as error:
        raise InputError(f"{model}/config.json: not JSON: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{model}: no usable configuration: {_first_line(error)}") from error
    _check_architecture(model, config)
    return config


def _check_architecture(model: str, config: Any) -> None:
    names = config.architectures or []
    if not any(name in ARCHITECTURES for name in names):
        found = ", ".join(names) or f"model_type {config.model_type} without an architecture"
        raise InputError(f"{model}: architecture {found} is not supported; taken are {', '.join(ARCHITECTURES)}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise InputError(f"{model}: rope type {rope} is not supported; taken are {', '.join(ROPE_TYPES)}")
    if getattr(config, "use_sliding_window", False) or (
        "Mistral" in names[0] and getattr(config, "sliding_window", None)
    ):
        raise InputError(f"{model}: sliding-window attention is not supported; set sliding_window to null to drop it")


def _with_weights(model: str, config: Any, attention: str) -> Any:
    try:
        built, loading = _library.AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    except safetensors.SafetensorError as error:
        raise InputError(f"{model}: weights are truncated or corrupt: {_first_line(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{model}: weights cannot be read: {_first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if loading[kind]:
            names = sorted(str(key) for key in loading[kind])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"{model}: weights do not fit config.json: {kind.split('_')[0]} {', '.join(names[:3])}{more}"
            )
    return built


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def eos_tokens(model: Any) -> tuple[int, ...]:
    """Return the tokens that end a text, from the generation settings or else the configuration."""
    for source in (getattr(model, "generation_config", None), model.config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()
