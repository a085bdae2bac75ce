"""Which format each layer's weights are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TABLES = ("model.embed_tokens", "lm_head")
"""Layers whose rows are tokens: their format is chosen apart, and tied ones are one table."""


@dataclass(frozen=True)
class Formats:
    """The formats of a model's weights by the name of their layer.

    `head` is the format of the token tables, `layers` that of all else, `kept` those of layers that differ from it.
    """

    layers: str
    head: str
    kept: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str) -> str:
        """Return the format of a layer."""
        return self.head if name in TABLES else self.kept.get(name, self.layers)
