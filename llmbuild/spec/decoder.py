"""The facts of a model that decide which choices apply to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """Sizes and parts of a decoder, as its configuration says them."""

    hidden: int
    inner: int
    """Width of the feed-forward part."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    activation: str = "silu"
    """By the library's name (`hidden_act`)."""
    head_norms: bool = False
    """Whether each head's query and key are normalized."""

    @property
    def attended(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def cached(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim
