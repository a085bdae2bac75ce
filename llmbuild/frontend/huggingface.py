"""Models of the library, strictly: whole, or as a skeleton without weights. What does not fit is one `InputError`."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode

from llmbuild.errors import InputError
from llmbuild.frontend.checkpoint import Checkpoint, Drawn, Model, Pickled, Safetensors, untied
from llmbuild.frontend.config import KINDS
from llmbuild.frontend.documents import shown
from llmbuild.frontend.files import Files, alone
from llmbuild.frontend.gguf_weights import GgufCheckpoint
from llmbuild.frontend.headers import Stored
from llmbuild.frontend.source import Examined, examine, locate
from llmbuild.frontend.tensors import misplaced
from llmbuild.spec.model import ModelFacts, facts_of

LIBRARY_ATTENTION = "eager"
"""The library's plainest attention."""

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


@dataclass(frozen=True)
class Skeleton:
    """A model of the library without weights: torch's fake tensors on the CPU, which have shapes and hold no bytes.

    An export sees what it would see of real ones. What it computes with them is computed in `mode`.
    """

    model: Any
    mode: FakeTensorMode
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ModelFiles:
    """A model that was examined, and its weights."""

    model: str
    found: Examined
    weights: Model
    notes: tuple[str, ...]

    def skeleton(self, attention: str) -> Skeleton:
        """Return its structure.

        Raises:
            InputError: the library cannot build it.
        """
        return skeleton(self.model, self.found, attention, self.weights.tied)

    @property
    def apart(self) -> bool:
        """Whether head and token table differ though the configuration ties them."""
        return UNTIED in self.notes


UNTIED = "lm_head.weight and model.embed_tokens.weight differ, though config.json ties them: both are kept"


def source_of(model: str, random_init: bool, seed: int, context: int = 0) -> ModelFiles:
    """Return a model's files and weights; nothing of the weights is read yet.

    Raises:
        InputError: the model is missing, incomplete, corrupt, or holds what the library would leave out.
    """
    found = examine(locate(model, random_init), random_init, context)
    stored = opened(found, random_init, seed)
    tied = facts_of(found.config).tied
    apart = tied and untied(stored)
    return ModelFiles(model, found, Model(stored, model, tied and not apart), (UNTIED,) if apart else ())


def load(model: str, random_init: bool, seed: int, attention: str, context: int = 0) -> Any:
    """Return the model in f32, in evaluation mode, with weights from its files or drawn from `seed`.

    Raises:
        InputError: the model is missing, incomplete, corrupt, or holds what the library would leave out.
    """
    return load_told(model, random_init, seed, attention, context).model


def load_told(model: str, random_init: bool, seed: int, attention: str, context: int = 0) -> Loaded:
    """Return the same, with what the library said."""
    found = examine(locate(model, random_init), random_init, context)

    def make(folder: Path) -> Any:
        if random_init or found.is_gguf:
            return _filled(found, folder, opened(found, random_init, seed), attention)
        return _read(found, folder, attention)

    built, notes = _built(model, found, make)
    _check_values(model, built)
    return Loaded(built, notes)


def skeleton(model: str, found: Examined, attention: str, tied: bool) -> Skeleton:
    """Return a model without its weights; `tied` says whether its head and its token table are one.

    Raises:
        InputError: the library cannot build it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make(folder: Path) -> Any:
        config = _configuration(folder)
        config.tie_word_embeddings = tied
        with mode:
            return _library.AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=False
            )

    built, notes = _built(model, found, make)
    return Skeleton(built, mode, notes)


def _built(model: str, found: Examined, make: Callable[[Path], Any]) -> tuple[Any, tuple[str, ...]]:
    """Have the library build a model of a folder that holds its files and no others."""
    with _listening() as said, alone(found.files) as folder:
        try:
            built = make(folder)
        except _REFUSALS as error:
            raise InputError(f"{model}: the library cannot load this model: {_said(error, folder, model)}") from error
    if type(built).__name__ != KINDS[found.config["model_type"]].name:
        raise InputError(f"{model}: the library builds {type(built).__name__} of it, which is not supported")
    built.generation_config.eos_token_id = list(found.end_tokens) or None
    for name in ("output_hidden_states", "output_attentions"):
        setattr(built.config, name, False)
    built.config.return_dict = True
    notes = dict.fromkeys(text.replace(str(folder), model) for text in said)
    return built.eval().requires_grad_(False), tuple(notes)


def _configuration(folder: Path) -> Any:
    config = _library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    return config


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


# --- weights ------------------------------------------------------------------------------------------------------


def _filled(found: Examined, folder: Path, stored: Checkpoint, attention: str) -> Any:
    """Return a model of the library with all of its weights, which it did not read itself."""
    with torch.device("meta"):
        built = _library.AutoModelForCausalLM.from_config(
            _configuration(folder), attn_implementation=attention, trust_remote_code=False
        )
    weights = Model(stored, str(found.files.folder), built.config.tie_word_embeddings)
    built.load_state_dict({n: torch.from_numpy(weights.whole(n).copy()) for n in built.state_dict()}, assign=True)
    built.tie_weights()
    built.model.rotary_emb = type(built.model.rotary_emb)(built.config)
    return built


def _drawn_from(found: Examined, seed: int) -> tuple[ModelFacts, int, float]:
    return facts_of(found.config), seed, float(found.config.get("initializer_range", 0.02))


def opened(found: Examined, random_init: bool, seed: int) -> Checkpoint:
    """Return the weights of a model.

    Raises:
        InputError: pickled ones do not fit the configuration.
    """
    facts = facts_of(found.config)
    if random_init:
        return Drawn(*_drawn_from(found, seed))
    if found.is_gguf:
        return GgufCheckpoint(found.files.weights[0])
    if found.files.pickled:
        try:
            _check_pickled(found)
            return Pickled(found.files.weights, facts)
        except _REFUSALS as error:
            told = _said(error, found.files.folder, str(found.files.folder))
            raise InputError(f"{found.files.folder}: the library cannot load this model: {told}") from error
    return Safetensors(found.files.weights, facts)


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
