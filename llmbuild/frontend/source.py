"""Find a model and name it by content, without loading it: no torch here, so that an up-to-date build stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.spec.recipe import ModelSource

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")
_SHAPE = ("config.json", "generation_config.json")
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class FoundModel:
    """A model on this disk. `digest` covers what an import reads; `tokenizer` is absent where there is none."""

    folder: Path
    digest: str
    tokenizer: Path | None


def find_model(source: ModelSource) -> FoundModel:
    """Return where a model is and what its content is named.

    Raises:
        InputError: no such folder, no configuration, no weights, or a hub that does not answer.
    """
    folder = Path(source.location)
    if not folder.is_dir():
        folder = _from_hub(source.location)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json in this model folder")
    files = sorted(
        {p for pattern in (_SHAPE if source.random_init else _SHAPE + _WEIGHTS) for p in folder.glob(pattern)}
    )
    if not source.random_init and not any(p.suffix in (".safetensors", ".bin") for p in files):
        raise InputError(f"{folder}: no weights in this model folder; --random-init builds its shape without any")
    tokenizer = folder / TOKENIZER
    content = {p.name: digest.of_file(p) for p in files}
    return FoundModel(
        folder,
        digest.of(
            {"files": content, "random_init": source.random_init, "seed": source.seed if source.random_init else 0}
        ),
        tokenizer if tokenizer.is_file() else None,
    )


def _from_hub(location: str) -> Path:
    if location.startswith("/"):
        raise InputError(f"{location}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(location, allow_patterns=[*_SHAPE, *_WEIGHTS, TOKENIZER]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"model {location!r}: neither a folder here nor to be had from the hub: {told}") from None
