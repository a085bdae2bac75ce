"""A key/value cache in buffers that the caller owns, written in place."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from llmbuild.kernels.kept import keys_and_values
from llmbuild.spec.program import TensorType
from llmbuild.transform.kept import rounded

FLOATS = {"f32": "float32", "f16": "float16"}
CALLERS = (*FLOATS, "int8")
"""What caches that the compiler's code reads are kept as."""
LEAST_SCALE = 2.0**-14
"""The least normal number of f16, in which scales are kept."""


def layer_buffers(kind: str, places: int, kv_heads: int, head_dim: int) -> tuple[TensorType, ...]:
    """Return the buffers of one layer: keys, values; of `int8` the keys, their scales, the values, their scales.

    The first axis has a place for each position of each sequence, one sequence after the other: a position is one
    contiguous row, which the compiler can write in place. A scale belongs to one position and head: what was written
    before never changes.
    """
    shape = (places, kv_heads, head_dim)
    if kind == "int8":
        return (TensorType(shape, "int8"), TensorType(shape[:2], "float16")) * 2
    return (TensorType(shape, FLOATS[kind]),) * 2


def own_buffers(kind: str, places: int, kv_heads: int, head_dim: int) -> tuple[TensorType, ...]:
    """Return the buffers of one layer of our own kernels for CPUs: keys, values."""
    both = keys_and_values(kind, head_dim)
    return tuple(TensorType((places, kv_heads, kept.elements), kept.dtype) for kept in both)


def new_cache(kinds: Sequence[TensorType]) -> list[torch.Tensor]:
    """Return zeroed cache buffers."""
    return [torch.zeros(kind.shape, dtype=getattr(torch, kind.dtype)) for kind in kinds]


def head_size(config: Any) -> int:
    """Return the numbers of a key or a value of one head, from the library's configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_name(decoder: Any) -> str:
    """Return by which name a model of the library takes a cache: newer ones of transformers 5 say `cache`."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


class CallerCache:
    """The part of the library's cache interface that a decoder layer calls, over the buffers of `layer_buffers`."""

    is_compileable = True

    def __init__(self, buffers: Sequence[torch.Tensor], positions: torch.Tensor) -> None:
        """Take every layer's buffers, and the positions i64[B,T] that this call writes."""
        self.buffers = buffers
        self.where = positions.flatten()
        """What our kernels read of places: the position of each row."""
        batch = positions.shape[0]
        if batch > 1:
            positions = positions + torch.arange(batch)[:, None] * (buffers[0].shape[0] // batch)
        self.places = positions.flatten()

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values `[1, kv_heads, B * T, head_dim]`, return all of them `[places, kv_heads, head_dim]`."""
        if self.buffers[0].dtype == torch.int8:
            codes_k, scale_k, codes_v, scale_v = self.buffers[4 * layer : 4 * layer + 4]
            return self._integers(codes_k, scale_k, keys), self._integers(codes_v, scale_v, values)
        pair = self.layer(layer)
        for buffer, new in zip(pair, (keys, values), strict=True):
            buffer.index_put_((self.places,), new[0].transpose(0, 1).to(buffer.dtype))
        return pair

    def _integers(self, codes: torch.Tensor, scale: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        rows = new[0].transpose(0, 1)
        fresh = (rows.abs().amax(-1) / 127).clamp_min(LEAST_SCALE).to(scale.dtype)
        rounded = torch.round(rows / fresh.float().unsqueeze(-1)).clamp(-127, 127).to(torch.int8)
        codes.index_put_((self.places,), rounded)
        scale.index_put_((self.places,), fresh)
        return codes.float() * scale.float().unsqueeze(-1)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the floating-point buffers of a layer: keys, values."""
        return self.buffers[2 * index], self.buffers[2 * index + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: positions are always given, so nothing may be derived from the cache."""
        return 0


class RoundedCache(CallerCache):
    """A cache of f32 in which our own kernels' cache of a kind is told: what is written is rounded as they do."""

    def __init__(self, buffers: Sequence[torch.Tensor], positions: torch.Tensor, kind: str) -> None:
        """Take every layer's buffers, the positions i64[B,T] that this call writes, and what the kernels keep."""
        super().__init__(buffers, positions)
        self.kind = kind

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `CallerCache` does with rounded keys and values."""
        both = zip(keys_and_values(self.kind, keys.shape[-1]), (keys, values), strict=True)
        keys, values = (torch.from_numpy(rounded(kept, new.numpy())) for kept, new in both)
        return super().update(keys, values, layer)


class SharedCache(CallerCache):
    """A cache whose blocks sequences share; only our own kernels read and write it."""

    def __init__(self, buffers: Sequence[torch.Tensor], positions: torch.Tensor, where: torch.Tensor) -> None:
        """Take every layer's buffers, the position i64[T] of each row, and where its sequence is: `Abi.page`."""
        super().__init__(buffers, positions[None])
        self.where = where

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: what the compiler makes of attention knows no pages."""
        raise NotImplementedError("a shared cache is read and written by kernel=own alone")
