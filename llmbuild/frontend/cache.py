"""A key/value cache in buffers that the caller owns, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class CallerCache:
    """The part of the library's cache interface that a decoder layer calls, over buffers `[context, kv_heads,
    head_dim]`.

    The sequence is the first axis: one position is one contiguous row, which the compiler can write in place.
    """

    is_compileable = True

    def __init__(self, buffers: Sequence[torch.Tensor], positions: torch.Tensor, start: torch.Tensor) -> None:
        """Take two buffers per layer, key before value, the positions i64[T] that this call writes, and the first
        i64[1].
        """
        self.buffers = buffers
        self.start = start
        self.positions = positions

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values `[1, kv_heads, T, head_dim]`, return the layer's whole buffers."""
        pair = self.layer(layer)
        for buffer, new in zip(pair, (keys, values), strict=True):
            buffer.index_put_((self.positions,), new[0].transpose(0, 1).to(buffer.dtype))
        return pair

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the buffers of a layer: keys, values."""
        return self.buffers[2 * index], self.buffers[2 * index + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: positions are always given, so nothing may be derived from the cache."""
        return 0
