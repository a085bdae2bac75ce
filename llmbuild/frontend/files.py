"""The files of a model that the library reads: one list, made once by the library's rules.

What is digested, checked, loaded and fetched from the hub is this list, and nothing that lies beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from llmbuild.errors import InputError
from llmbuild.frontend.documents import check_file, read_json, shown, told

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"

_CHECKPOINT = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of a distributed checkpoint, which the library takes before all others."""

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".h5", ".msgpack", ".onnx")
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|tokenizer)\b.*")
"""What a training run leaves beside its weights: nobody takes it for weights."""


@dataclass(frozen=True)
class Files:
    """The files of a model that are read.

    Random weights have no `weights`; else these are all safetensors, all pickled, or one GGUF file, whose `folder` is
    one of the cache.
    """

    folder: Path
    config: Path
    generation: Path | None
    index: Path | None
    weights: tuple[Path, ...]
    tokenizer: Path | None
    beside: tuple[str, ...]
    """What lies beside, looks as if it belonged to the model, and is not used."""
    gguf: bool = False
    """Whether `weights` is one GGUF file."""

    @property
    def pickled(self) -> bool:
        """Whether the weights are pickled: what they hold is known when they are loaded."""
        return not self.gguf and any(path.suffix != ".safetensors" for path in self.weights)

    def read(self) -> tuple[Path, ...]:
        """Return the files that the library reads."""
        weights = () if self.gguf else self.weights  # the library has another reader for GGUF
        return tuple(path for path in (self.config, self.generation, self.index, *weights) if path is not None)


def files_of(folder: Path, random_init: bool) -> Files:
    """Return the files of a model folder, each of them checked for what it is.

    Raises:
        InputError: a file is missing, not readable, or outside the folder.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no model folder that can be read: {told(error)}") from None
    if CONFIG not in names:
        raise InputError(f"{folder}: no config.json in this model folder")
    config = read_json(folder / CONFIG)
    index, weights = (None, ()) if random_init else _weights(folder, names, config)
    used = {path.name for path in weights if path.parent == folder} | {CONFIG}
    found = Files(
        folder,
        folder / CONFIG,
        folder / GENERATION if GENERATION in names else None,
        index,
        weights,
        folder / TOKENIZER if TOKENIZER in names else None,
        () if random_init else tuple(name for name in names if name not in used and _looks_used(name)),
    )
    for path in found.read():
        check_file(path)
    return found


def _looks_used(name: str) -> bool:
    return name == ADAPTER or (name.endswith(_WEIGHTS) and not _TRAINING.match(name))


def _weights(folder: Path, names: list[str], config: Mapping[str, Any]) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the index and the files of weights, chosen as the library chooses."""
    if found := next((name for name in names if _CHECKPOINT.fullmatch(name)), ""):
        raise InputError(f"{folder / found}: a part of a distributed checkpoint: save the model as {SINGLE} first")
    name = chosen(names.__contains__, config)
    if not name:
        near = [name for name in names if _looks_used(name)]
        lies = f" (not read: {', '.join(near[:3])})" if near else ""
        raise InputError(
            f"{folder}: no weights in this model folder{lies}: the library reads {SINGLE}, {INDEX}, {PICKLED} or "
            f"{PICKLED_INDEX}; --random-init builds its shape without any"
        )
    if not name.endswith(".index.json"):
        return None, (folder / name,)
    return folder / name, tuple(folder / part for part in parts(folder / name))


def chosen(exists: Callable[[str], bool], config: Mapping[str, Any]) -> str:
    """Return the name of the weights that the library reads, or of their index; empty where there are none.

    Raises:
        InputError: the configuration names another file that the library does not take.
    """
    named = config.get("transformers_weights")
    if named is None:
        return next((name for name in (SINGLE, INDEX, PICKLED, PICKLED_INDEX) if exists(name)), "")
    if not _is_inside(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise InputError(f"config.json: transformers_weights is {shown(named)}, no safetensors file in this folder")
    return str(named)


def parts(index: Path) -> tuple[str, ...]:
    """Return the names of the files that an index says hold the weights.

    Raises:
        InputError: it names none, or one outside the folder.
    """
    body = read_json(index)
    places = body.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index}: weight_map names no files of weights")
    if not isinstance(body.get("metadata"), dict):
        raise InputError(f"{index}: metadata is missing, which the library needs; an empty object will do")
    suffix = ".safetensors" if index.name.endswith(".safetensors.index.json") else ".bin"
    for tensor, name in places.items():
        if not _is_inside(name):
            raise InputError(f"{index}: weight_map puts {shown(tensor)} into {shown(name)}, outside the model's folder")
        if not name.endswith(suffix):
            raise InputError(f"{index}: weight_map puts {shown(tensor)} into {shown(name)}, which is no {suffix} file")
    return tuple(sorted({*places.values()}))


def _is_inside(name: Any) -> bool:
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()


@contextmanager
def alone(files: Files) -> Iterator[Path]:
    """Give a folder that holds the files of a model and nothing else, so that the library can read nothing else."""
    with TemporaryDirectory(prefix="llmbuild-model-") as name:
        folder = Path(name)
        for path in files.read():
            link = folder / path.relative_to(files.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        yield folder
