"""The properties of a model that decide which choices apply to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """Sizes and parts of a decoder, from its configuration."""

    hidden: int
    inner: int
    """Width of the feed-forward part."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    activation: str = "silu"
    """The library's name (`hidden_act`)."""
    head_norms: bool = False
    """Whether each head's query and key are normalized."""

    @property
    def attended(self) -> int:
        """Total width of the query heads."""
        return self.heads * self.head_dim

    @property
    def cached(self) -> int:
        """Total width of the key heads."""
        return self.kv_heads * self.head_dim
