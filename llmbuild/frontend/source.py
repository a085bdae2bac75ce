"""Find a model, judge it and name it by content, without loading it: no torch here, so that a build that is up to
date, or that cannot begin, says so at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.frontend import gguf_place
from llmbuild.frontend.chat import SETTINGS, TEMPLATE, chat_of, unusable
from llmbuild.frontend.config import end_fault, end_tokens, judge
from llmbuild.frontend.documents import check_file, meaning, read_json, shown
from llmbuild.frontend.files import (
    ADAPTER,
    CONFIG,
    GENERATION,
    INDEX,
    PICKLED_INDEX,
    TOKENIZER,
    Files,
    chosen,
    files_of,
    parts,
)
from llmbuild.frontend.headers import read_header
from llmbuild.frontend.tensors import misplaced
from llmbuild.runtime.tokenizer import Tokenizer
from llmbuild.spec.model import facts_of
from llmbuild.spec.recipe import GGUF, ModelSource

_SMALL = (CONFIG, GENERATION, TOKENIZER, ADAPTER, INDEX, PICKLED_INDEX, SETTINGS, TEMPLATE)
"""What is fetched from the hub before the weights: what says which weights there are, and what texts need."""


@dataclass(frozen=True)
class Examined:
    """A model folder that can be built: its files, what its JSON says, and what is worth telling of it."""

    files: Files
    config: dict[str, Any]
    generation: dict[str, Any]
    notes: tuple[str, ...] = ()
    chat: bytes | None = None
    """The chat template, as a catalog keeps it; absent where there is none, or no tokenizer."""

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are those of one GGUF file."""
        return self.files.gguf

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return end_tokens(self.config, self.generation)


@dataclass(frozen=True)
class FoundModel:
    """A model on this disk. `digest` covers what an import reads; `tokenizer` is absent where there is none.

    `folder` has config.json, and the weights too unless these are in `weights`, a GGUF file.
    """

    folder: Path
    digest: str
    tokenizer: Path | None
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What is worth telling of it once: what lies beside and is not used, what the library does not read."""
    chat: bytes | None = None
    """The chat template, as a catalog keeps it; absent where there is none."""
    weights: Path | None = None

    @property
    def location(self) -> Path:
        """What an import is told to read: a folder, or a GGUF file."""
        return self.weights or self.folder


def find_model(source: ModelSource, context: int = 0) -> FoundModel:
    """Return where a model is and what its content is named, for a cache of `context` positions.

    Raises:
        InputError: no such folder or file, a hub that does not answer, or a model that cannot be built as it stands.
    """
    place = gguf_place.find(source.location) if source.kind == GGUF else locate(source.location, source.random_init)
    found = examine(place, source.random_init, context)
    return FoundModel(
        found.files.folder,
        _digest(found, source.random_init, source.seed),
        found.files.tokenizer,
        found.notes,
        found.chat,
        found.files.weights[0] if found.is_gguf else None,
    )


def _digest(found: Examined, random_init: bool, seed: int) -> str:
    """Name a model by what is read of it: JSON by its meaning, tensors by their bytes."""
    return digest.of(
        {
            "config": meaning(found.config),
            "generation": meaning(found.generation),
            "weights": sorted(digest.of_file(path) for path in found.files.weights),
            "random_init": random_init,
            "seed": seed if random_init else 0,
        }
    )


def examine(folder: Path, random_init: bool, context: int = 0) -> Examined:
    """Return what a model folder or a GGUF file holds, judged without reading its weights: every fault at once.

    Raises:
        InputError: a file, a key of the configuration or a tensor that cannot be taken.
    """
    if folder.is_file() or gguf_place.is_place(str(folder)):
        return _examine_gguf(folder, random_init, context)
    try:
        files = files_of(folder, random_init)
    except InputError as error:
        raise InputError(_with_configuration(str(error), folder, random_init, context)) from None
    config = read_json(files.config)
    judged = judge(config, random_init, context)
    faults = [f"{CONFIG}: {fault}" for fault in judged.faults]
    generation = read_json(files.generation) if files.generation else {}
    vocabulary = config.get("vocab_size")
    if isinstance(vocabulary, int) and (why := end_fault(generation.get("eos_token_id"), vocabulary)):
        faults.append(f"{GENERATION}: eos_token_id is {shown(generation['eos_token_id'])}: {why}")
    if not faults and not files.pickled:
        stored = [item for path in files.weights for item in read_header(path).items()]
        faults += misplaced(stored, facts_of(config)) if files.weights else []
    if files.tokenizer is not None:
        check_file(files.tokenizer)
        Tokenizer(files.tokenizer)
    chat = chat_of(folder) if files.tokenizer is not None else None
    if faults:
        raise InputError(_told(folder, faults))
    notes = (*judged.notes, *_beside(files), *unusable(chat))
    return Examined(files, config, generation, notes, None if chat is None else chat.blob())


def _examine_gguf(path: Path, random_init: bool, context: int) -> Examined:
    """Return the same for a GGUF file: its metadata as a folder of the cache, its tensors where they are."""
    from llmbuild.frontend.gguf_file import describe
    from llmbuild.frontend.gguf_folder import folder_of
    from llmbuild.frontend.gguf_header import read_header
    from llmbuild.frontend.gguf_weights import unfit

    header = read_header(path)
    described = describe(header)
    faults = list(described.faults)
    notes: tuple[str, ...] = ()
    if not faults:
        judged = judge(described.config, random_init, context)
        faults, notes = [f"as {CONFIG}: {fault}" for fault in judged.faults], judged.notes
    if not faults and not random_init:
        faults += unfit(header, described.config)
    if faults:
        raise InputError(_told(path, faults))
    made = folder_of(header, described)
    tokenizer = made.path / TOKENIZER
    files = Files(
        made.path,
        made.path / CONFIG,
        made.path / GENERATION if described.generation else None,
        None,
        () if random_init else (path,),
        tokenizer if tokenizer.is_file() else None,
        (),
        gguf=not random_init,
    )
    if files.tokenizer is not None:
        Tokenizer(files.tokenizer)
    chat = chat_of(made.path) if files.tokenizer is not None else None
    notes = (*notes, *made.notes, *unusable(chat))
    return Examined(files, described.config, described.generation, notes, None if chat is None else chat.blob())


def _with_configuration(fault: str, folder: Path, random_init: bool, context: int) -> str:
    """Return what is wrong with a folder's files, and with its configuration, where that can be read."""
    try:
        judged = judge(read_json(folder / CONFIG), random_init, context)
    except InputError:
        return fault
    faults = [f"{CONFIG}: {each}" for each in judged.faults]
    return _told(folder, [*faults, fault]) if faults else fault


def _told(folder: Path, faults: Sequence[str]) -> str:
    if len(faults) == 1:
        return f"{folder}: {faults[0]}"
    return f"{folder}: this model cannot be taken:" + "".join(f"\n  {fault}" for fault in faults)


def _beside(files: Files) -> list[str]:
    """Return what to tell of files that lie beside those that are read."""
    notes, others = [], [name for name in files.beside if name != ADAPTER]
    if ADAPTER in files.beside:
        notes.append(f"{ADAPTER} is not used: merge the adapter into the weights to build with it")
    if others:
        used = ", ".join(path.name for path in files.weights[:3])
        notes.append(f"weights are read from {used}; not used: {', '.join(others[:5])}")
    return notes


# --- where a model is --------------------------------------------------------------------------------------------


def at_hand(location: str, random_init: bool) -> Path | None:
    """Return where a model is without asking the hub: None where the hub would have to be asked.

    Raises:
        InputError: the location is no folder or GGUF file, and no id of the hub either.
    """
    return locate(location, random_init) if gguf_place.is_place(location) or _is_local(location) else None


def locate(location: str, random_init: bool) -> Path:
    """Return the folder of a model, or its GGUF file; what is missing of one of the hub is fetched first.

    Raises:
        InputError: neither a folder nor a GGUF file here, nor to be had from the hub.
    """
    if gguf_place.is_place(location):
        return gguf_place.find(location)
    folder = Path(location).expanduser()
    try:
        if folder.is_dir():
            return folder
        exists = folder.exists() or folder.is_symlink()
    except (OSError, ValueError):
        exists = True
    if exists:
        raise InputError(f"{location}: no model folder: it is no folder that can be read")
    if _is_local(location):
        raise InputError(f"{location}: no such model folder")
    return _from_hub(location, random_init)


def _is_local(location: str) -> bool:
    return location.startswith(("/", ".", "~")) or location.count("/") > 1 or Path(location).is_dir()


def _from_hub(location: str, random_init: bool) -> Path:
    """Fetch what is read of a model and nothing else, all of it from one commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(names: Sequence[str], revision: str | None = None) -> Path:
        return Path(snapshot_download(location, revision=revision, allow_patterns=list(names)))

    try:
        folder = fetch(_SMALL)
        if random_init or not (folder / CONFIG).exists():
            return folder
        config = read_json(folder / CONFIG)

        def fetched(name: str) -> bool:
            return (folder / name).exists() or (fetch([name], folder.name) / name).exists()

        if (name := chosen(fetched, config)).endswith(".index.json"):
            fetch(parts(folder / name), folder.name)
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"model {location!r}: neither a folder here nor to be had from the hub: {told}") from None
