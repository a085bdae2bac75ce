"""The file of a predictor: arrays in NumPy's form, and a header that says of whose answers it is."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from llmbuild import digest
from llmbuild.errors import InputError
from llmbuild.serve.predict.features import BUCKETS
from llmbuild.serve.predict.model import LengthModel, Spread
from llmbuild.system.strict_json import loads

VERSION = 1
_LARGEST = 1 << 20
"""Bytes of a file, and of what is packed in it."""
_MOST_QUANTILES = 4096
_DAMAGE = (KeyError, ValueError, TypeError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What the libraries raise for files that are none of ours."""


@dataclass(frozen=True)
class Header:
    """Whose answers a predictor was trained on, how many, and up to how many tokens they had."""

    model: str
    variant: str
    tokenizer: str
    """The digest of its `tokenizer.json`: token ids mean nothing to another one."""
    answers: int
    max_tokens: int
    version: int = VERSION


def write(path: Path, model: LengthModel, header: Header) -> None:
    """Write a predictor.

    Raises:
        InputError: as `put`.
    """
    body = BytesIO()
    told = np.frombuffer(digest.canonical(asdict(header)).encode(), np.uint8)
    weights, rarity, middle, quantiles = (
        np.asarray(one, np.float32) for one in (model.weights, model.rarity, [model.middle], model.spread.quantiles)
    )
    np.savez_compressed(body, header=told, weights=weights, rarity=rarity, middle=middle, quantiles=quantiles)
    put(path, body.getvalue())


def put(path: Path, data: bytes) -> None:
    """Write a file; it appears, or replaces an earlier one, at once.

    Raises:
        InputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: it cannot be written: {error.strerror or error}") from None


def read(path: Path) -> tuple[LengthModel, Header]:
    """Return a predictor and what it was trained on.

    Raises:
        InputError: missing, or no predictor that this version reads.
    """
    try:
        with open(path, "rb") as file:
            body = file.read(_LARGEST + 1)
        arrays = _arrays(body)
        header = _header(arrays["header"].tobytes())
        shapes = {"weights": (BUCKETS,), "rarity": (BUCKETS,), "middle": (1,)}
        for name in (*shapes, "quantiles"):
            _check(name, arrays[name], shapes.get(name))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except _DAMAGE as error:
        told = f"{path}: no predictor of lengths: {error}"
        raise InputError(f"{told}: `llmbuild profile VARIANT --answers PROMPTS.jsonl -o FILE` writes one") from None
    weights, rarity = (arrays[name].astype(np.float64) for name in ("weights", "rarity"))
    spread = Spread(tuple(sorted(arrays["quantiles"].tolist())))
    return LengthModel(float(arrays["middle"][0]), weights, rarity, spread), header


def of_tokens(path: Path, model: str, tokenizer: str | None) -> LengthModel:
    """Return a predictor for a model of whose tokenizer the digest is given.

    Raises:
        InputError: as `read`, or it was trained on other tokens.
    """
    made, header = read(path)
    if header.tokenizer != tokenizer:
        told = f"{path} predicts the answers of {header.model}, whose tokenizer is {digest.short(header.tokenizer)}"
        here = f"that of {model} is {digest.short(tokenizer) if tokenizer else 'none'}"
        todo = "`llmbuild profile VARIANT --answers PROMPTS.jsonl -o FILE` trains one for it"
        raise InputError(f"{told}; {here}: {todo}")
    return made


def _arrays(body: bytes) -> dict[str, Any]:
    """Return the arrays of a file: small ones, of numbers alone."""
    if len(body) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST} bytes")
    with zipfile.ZipFile(BytesIO(body)) as packed:
        if sum(one.file_size for one in packed.infolist()) > _LARGEST:
            raise ValueError(f"its arrays have more than {_LARGEST} bytes")
    with np.load(BytesIO(body), allow_pickle=False) as found:
        return {name: found[name] for name in ("header", "weights", "rarity", "middle", "quantiles")}


def _header(text: bytes) -> Header:
    found = loads(text)
    types = {one.name: str if one.type == "str" else int for one in fields(Header)}
    if not isinstance(found, dict) or set(found) != set(types):
        raise ValueError(f"its header has not the keys {', '.join(types)}")
    for name, kind in types.items():
        if type(found[name]) is not kind:
            raise ValueError(f"{name} of its header is {found[name]!r}")
    if found["version"] != VERSION:
        raise ValueError(f"it has version {found['version']}; this llmbuild reads version {VERSION}")
    return Header(**found)


def _check(name: str, found: Any, shape: tuple[int, ...] | None) -> None:
    right = found.shape == shape if shape else found.ndim == 1 and 0 < len(found) <= _MOST_QUANTILES
    if found.dtype != np.float32 or not right or not np.isfinite(found).all():
        raise ValueError(f"{name} is {found.dtype}{list(found.shape)}, or has values that are not finite")
