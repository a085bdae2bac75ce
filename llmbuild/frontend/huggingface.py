"""A Hugging Face folder or hub id to a model of the library, strictly: one clear `InputError` for what does not fit."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch.overrides import TorchFunctionMode

from llmbuild.errors import InputError
from llmbuild.frontend.config import KINDS
from llmbuild.frontend.documents import shown
from llmbuild.frontend.files import Files, alone
from llmbuild.frontend.headers import Stored
from llmbuild.frontend.source import Examined, examine, locate
from llmbuild.frontend.tensors import misplaced
from llmbuild.spec.model import facts_of
from llmbuild.transform.drawn import draw

_library: Any = transformers
"""The library without its types: they do not cover what is called here."""

_REFUSALS = (
    *(OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, IndexError, AssertionError),
    *(ArithmeticError, ImportError, EOFError, StrictDataclassError, safetensors.SafetensorError),
    pickle.UnpicklingError,
)
"""What the library raises for files that it cannot take."""

_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Loaded:
    """A model of the library, untouched, and what the library said of it while loading."""

    model: Any
    notes: tuple[str, ...]


def load(model: str, random_init: bool, seed: int, attention: str, context: int = 0) -> Any:
    """Return the model in f32, in evaluation mode, with weights from its files or drawn from `seed`.

    Raises:
        InputError: the model is missing, incomplete, corrupt, or holds what the library would leave out.
    """
    return load_told(model, random_init, seed, attention, context).model


def load_told(model: str, random_init: bool, seed: int, attention: str, context: int = 0) -> Loaded:
    """Return the same, with what the library said."""
    found = examine(locate(model, random_init), random_init, context)
    with _listening() as said, alone(found.files) as folder:
        try:
            built = _drawn(folder, seed, attention) if random_init else _read(found, folder, attention)
        except _REFUSALS as error:
            raise InputError(f"{model}: the library cannot load this model: {_said(error, folder, model)}") from error
    if type(built).__name__ != KINDS[found.config["model_type"]].name:
        raise InputError(f"{model}: the library builds {type(built).__name__} of it, which is not supported")
    built.generation_config.eos_token_id = list(found.end_tokens) or None
    for name in ("output_hidden_states", "output_attentions"):
        setattr(built.config, name, False)
    built.config.return_dict = True
    _check_values(model, built)
    notes = dict.fromkeys(text.replace(str(folder), model) for text in said)
    return Loaded(built.eval().requires_grad_(False), tuple(notes))


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what the library warns of, which it would print in the middle of all else."""
    said: list[str] = []

    class _Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not record.name.startswith("transformers.generation"):  # of settings for its own sampling
                said.append(" ".join(_COLOR.sub("", record.getMessage()).split()))

    handler, logger = _Handler(logging.WARNING), logging.getLogger("transformers")
    _library.logging.disable_progress_bar()
    _library.logging.disable_default_handler()
    _library.logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            yield said
    finally:
        logger.removeHandler(handler)
        _library.logging.set_verbosity_error()
        _library.logging.enable_default_handler()
    ours = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)  # for those who write the library's callers
    said += [" ".join(str(each.message).split()) for each in raised if not issubclass(each.category, ours)]


def _said(error: Exception, folder: Path, model: str) -> str:
    """Return the whole of what an error says, in one line."""
    text = " ".join(_COLOR.sub("", str(error)).split()).replace(str(folder), model)
    return text[:400] if text and not isinstance(error, KeyError) else f"{type(error).__name__} {text}".strip()


# --- random weights ----------------------------------------------------------------------------------------------


def _drawn(folder: Path, seed: int, attention: str) -> Any:
    config = _library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    torch.manual_seed(seed)
    config.dtype = torch.float32
    with _Undrawn():
        built = _library.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, trust_remote_code=False
        )
    _draw_matrices(built, seed, config.initializer_range)
    return built


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


# --- weights from files ------------------------------------------------------------------------------------------


def _read(found: Examined, folder: Path, attention: str) -> Any:
    if found.files.pickled:
        _check_pickled(found)
    built, loading = _library.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attention,
        output_loading_info=True,
        generation_config=_library.GenerationConfig(),
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=not found.files.pickled,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[kind]:
            names = sorted(str(key) for key in loading[kind])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"weights do not fit config.json: {kind.split('_')[0]} tensors: {', '.join(names[:3])}{more}"
            )
    return built


def _check_pickled(found: Examined) -> None:
    """Hold pickled weights against the configuration; their values stay on the disk.

    Raises:
        InputError: what does not fit.
    """
    files: Files = found.files
    stored = []
    for path in files.weights:
        state = torch.load(path, map_location="meta", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError(f"{path.name} holds no tensors by name")
        for name, tensor in state.items():
            kind = _TYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            stored.append((str(name), Stored(kind, tuple(tensor.shape), path.name)))
    if faults := misplaced(stored, facts_of(found.config)):
        raise InputError(f"{files.folder}: " + "; ".join(faults))


def _check_values(model: str, built: Any) -> None:
    """Refuse weights that are no numbers in f32: every answer would be none either."""
    for name, weights in built.named_parameters():
        low, high = weights.aminmax() if weights.numel() else (torch.zeros(()), torch.zeros(()))
        if not torch.isfinite(low) or not torch.isfinite(high):
            count = int((~torch.isfinite(weights)).sum())
            raise InputError(
                f"{model}: {shown(name)[1:-1]} has {count} values that are NaN or infinite, of {weights.numel()}"
            )


def eos_tokens(model: Any) -> tuple[int, ...]:
    """Return the tokens that end a text, from the generation settings or else the configuration."""
    for source in (getattr(model, "generation_config", None), model.config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()
