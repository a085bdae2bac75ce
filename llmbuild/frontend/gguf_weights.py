"""The tensors of a GGUF file, by the library's names and read by rows; no torch here.

Blocks are made numbers by the gguf package. llama.cpp stores the rows of the query and key projections of Llama with
the two halves of each head interleaved; here they are in the library's order again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from llmbuild.errors import InputError
from llmbuild.frontend.checkpoint import Blocks
from llmbuild.frontend.documents import shown
from llmbuild.frontend.gguf_file import describe
from llmbuild.frontend.gguf_header import Header, Tensor, read_header
from llmbuild.frontend.gguf_rope import FACTORS
from llmbuild.frontend.headers import Stored
from llmbuild.frontend.tensors import misplaced
from llmbuild.spec.model import facts_of

PLAIN = ("F32", "F16", "BF16")
BLOCKS = ("Q4_0", "Q4_1", "Q8_0")
"""Whose blocks `quantized` gives."""
TAKEN = (*PLAIN, *BLOCKS, "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The library's names of llama.cpp's."""
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)")
_TOLD = 5
"""How many tensors are named for each fault."""


def library_name(name: str) -> str:
    """Return the library's name of a tensor; empty where it has none."""
    found = _TENSOR.fullmatch(name)
    if not found or found[2] not in _NAMES:
        return ""
    layer = "" if found[1] is None else f"model.layers.{int(found[1])}."
    return f"{layer}{_NAMES[found[2]]}.{found[3]}"


def unfit(header: Header, config: Mapping[str, object]) -> list[str]:
    """Return what is wrong with a file's tensors, held against the configuration that its metadata means."""
    found = {tensor: library_name(tensor.name) for tensor in header.tensors.values()}
    faults = (
        (
            "tensors that are not known",
            [f"{shown(t.name)[1:-1]} ({t.kind})" for t, name in found.items() if not name and t.name != FACTORS],
        ),
        (
            f"types that are not supported (of matrices {', '.join(TAKEN)} are, of vectors {', '.join(PLAIN)})",
            [f"{t.name} is {t.kind}" for t, name in found.items() if name and not _is_taken(t)],
        ),
    )
    told = [f"{what}: {_list(names)}" for what, names in faults if names]
    stored = [(name, Stored("F32", tensor.shape, header.path.name)) for tensor, name in found.items() if name]
    for fault in misplaced(stored, facts_of(config)):
        told.append(fault.replace("weights do not fit config.json", "tensors do not fit the metadata", 1))
    return [each.replace("config.json makes it", "the metadata makes it") for each in told]


def _is_taken(tensor: Tensor) -> bool:
    return tensor.kind in (TAKEN if len(tensor.shape) > 1 else PLAIN)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more


class GgufCheckpoint:
    """The weights of a GGUF file, a `Checkpoint`. The file is mapped into memory; several threads may read at once."""

    def __init__(self, path: Path) -> None:
        """Read the header, and hold the tensors against the metadata.

        Raises:
            InputError: no GGUF file that can be built.
        """
        header = read_header(path)
        described = describe(header)
        if faults := [*described.faults] or unfit(header, described.config):
            raise InputError(f"{path}: " + "; ".join(faults))
        self.path = path
        self._tensors = {name: each for each in header.tensors.values() if (name := library_name(each.name))}
        self._heads = described.interleaved
        self._data = np.memmap(path, np.uint8, "r").view(np.ndarray)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor by the library's name; a head that is the token table is not there."""
        return MappingProxyType({name: tensor.shape for name, tensor in self._tensors.items()})

    def blocks(self, name: str) -> str:
        """Return the block format of a tensor (`q4_1`, `q8_0`, `q6_k`), or '' for plain numbers."""
        kind = self._tensors[name].kind
        return "" if kind in PLAIN else kind.lower()

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows `start` to `stop` of a matrix, f32[n,K], or entries of a vector, f32[n].

        Raises:
            IndexError: there are no such rows.
        """
        tensor = self._tensors[name]
        raw = self._stored(name, start, stop)
        if start == stop:
            return np.empty((0, *tensor.shape[1:]), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # values that are no numbers are the caller's to refuse
            found = dequantize(raw.reshape(1, -1) if len(tensor.shape) == 1 else raw, GGMLQuantizationType[tensor.kind])
        return found.astype(np.float32, copy=tensor.kind == "F32").reshape(stop - start, *tensor.shape[1:])

    def quantized(self, name: str, start: int, stop: int) -> Blocks:
        """Return rows as they are stored: what `rows` gives follows from them exactly.

        Raises:
            IndexError: there are no such rows.
            ValueError: a tensor of another format than q4_0, q4_1 and q8_0.
        """
        tensor = self._tensors[name]
        if tensor.kind not in BLOCKS or len(tensor.shape) != 2:
            raise ValueError(f"{name} is {tensor.kind}, not one of {', '.join(BLOCKS)}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.kind]]
        raw = self._stored(name, start, stop).reshape(stop - start, tensor.shape[1] // block, size)
        numbers = 2 if tensor.kind == "Q4_1" else 1  # before the codes: scale, minimum
        first = np.ascontiguousarray(raw[..., : 2 * numbers]).view(np.float16)
        codes = raw[..., 2 * numbers :]
        if tensor.kind != "Q8_0":  # a byte has an entry of the first half of a block, and above it one of the second
            codes = np.concatenate((codes & 0xF, codes >> 4), -1)
        if tensor.kind == "Q4_0":
            codes = codes - np.uint8(8)  # wraps, which is the same bits
        whole = np.array(codes, order="C").view(np.int8).reshape(stop - start, tensor.shape[1])
        return Blocks(whole, first[..., 0].copy(), first[..., 1].copy() if numbers == 2 else None)

    def _stored(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the bytes u8[n,B] of rows in the library's order."""
        tensor = self._tensors[name]
        count = tensor.shape[0]
        if not 0 <= start <= stop <= count:
            raise IndexError(f"{name} has {count} rows, not {start} to {stop}")
        whole = self._data[tensor.begin : tensor.begin + tensor.size].reshape(count, -1)
        for part, heads in self._heads.items():
            if f".{part}." in name:
                return whole[_interleaved(np.arange(start, stop), count // heads)]
        return whole[start:stop]


def _interleaved(rows: NDArray[np.int64], head_dim: int) -> NDArray[np.int64]:
    """Return where rows in the library's order lie in the file: entry i of half p of a head is its row 2i + p."""
    head, inside = np.divmod(rows, head_dim)
    half, entry = np.divmod(inside, head_dim // 2)
    return np.asarray(head * head_dim + 2 * entry + half, np.int64)
