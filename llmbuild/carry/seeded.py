"""Archives of random weights that are drawn from their seed on the other machine, instead of being packed.

An archive is split into matrices that a seed reproduces byte for byte, and the rest, which stays an archive. The split
is tested here; there, the digest of the result decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from iree.runtime import ParameterIndex

from llmbuild import digest
from llmbuild.runtime import host
from llmbuild.system.strict_json import JsonObject
from llmbuild.transform.drawn import draw, stored

_MATRIX = ".matrix."
MOST_THREADS = 16
"""Matrices that are drawn in parallel."""


def shapes(config: JsonObject) -> dict[str, tuple[int, int]]:
    """Return the shape of a Llama's matrices by the last part of their names."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = config.get("num_key_value_heads", heads) * head
    table = (config["vocab_size"], hidden)
    wide = {"q_proj": heads * head, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}
    return {
        **{name: (rows, hidden) for name, rows in wide.items()},
        "o_proj": (hidden, heads * head),
        "down_proj": (hidden, inner),
        "lm_head": table,
        "embed_tokens": table,
    }


def take_apart(archive: Path, config: JsonObject, seed: int, forms: tuple[str, str], rest: Path) -> JsonObject | None:
    """Write an archive's non-reproducible part to `rest`, and return the recipe of the others; None on failure.

    `forms` are the formats of the layers and of the token tables.
    """
    known, spread = shapes(config), float(config.get("initializer_range", 0.02))
    entries = _entries(archive)
    matrices = []
    for name in sorted({key.partition(_MATRIX)[0] for key in entries if _MATRIX in key}):
        last = name.rpartition(".")[2]
        if last not in known:
            return None
        table = last in ("lm_head", "embed_tokens")
        tied = table and config.get("tie_word_embeddings", False)
        source = "model.embed_tokens.weight" if tied else f"{name}.weight"
        form = forms[1] if table else forms[0]
        parts = _parts(seed, source, known[last], spread, form)
        if any(entries.pop(f"{name}{_MATRIX}{part}", b"") != each for part, each in parts.items()):
            return None
        matrices.append((name, source, list(known[last]), form))
    if not matrices or any(_MATRIX in key for key in entries):
        return None
    _save(rest, entries)
    return {"seed": seed, "spread": spread, "matrices": matrices, "rest": digest.of_file(rest)}


def put_together(made: JsonObject, rest: Path, archive: Path) -> None:
    """Write the archive again; matrices are drawn in parallel, since numpy releases the GIL meanwhile."""

    def parts(matrix: tuple[str, str, list[int], str]) -> dict[str, bytes]:
        name, source, shape, form = matrix
        found = _parts(made["seed"], source, (shape[0], shape[1]), made["spread"], form)
        return {f"{name}{_MATRIX}{part}": each for part, each in found.items()}

    entries = _entries(rest)
    with ThreadPoolExecutor(min(MOST_THREADS, host.cores())) as pool:
        for drawn in pool.map(parts, made["matrices"]):
            entries |= drawn
    _save(archive, entries)


def _parts(seed: int, source: str, shape: tuple[int, ...], spread: float, form: str) -> dict[str, bytes]:
    return {part: each.tobytes() for part, each in stored(draw(seed, source, shape, spread), form).items()}


def _entries(archive: Path) -> dict[str, bytes]:
    index = ParameterIndex()
    index.load(str(archive), format="irpa")
    return {name: bytes(entry.file_view) for name, entry in index.items()}


def _save(archive: Path, entries: Mapping[str, bytes]) -> None:
    """Write an archive as an import does: tensors sorted by name."""
    index = ParameterIndex()
    for name in sorted(entries):
        index.add_buffer(name, np.frombuffer(entries[name], np.uint8))
    index.create_archive_file(str(archive))
