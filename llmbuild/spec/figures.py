"""Figures that estimates are made of: of a device by its data sheet, and of a model by its configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A device by its data sheet; products are dense."""

    name: str
    bandwidth: float
    """Bytes a second."""
    fp16: float
    """Operations a second."""
    fp8: float
    """Of 8-bit numbers; where there are none, those of fp16."""
    memory_bytes: float
    board_w: float
    source: str

    def rate(self, precision: str) -> float:
        """Return operations a second for weights of a precision; narrower weights than 8 bits are widened first."""
        return self.fp8 if precision == "fp8" else self.fp16


@dataclass(frozen=True)
class Architecture:
    """A model by its configuration."""

    name: str
    parameters: float
    active: float
    """Parameters that one token is multiplied by."""
    layers: int
    kv_bytes: float
    """Keys and values of one position."""
    expert_share: float
    """Experts that one token uses, of all; 1 without experts."""
    source: str

    def read(self, tokens: float) -> float:
        """Return the parameters that a step of so many tokens reads: of experts, those that any token chose."""
        if self.expert_share >= 1:
            return self.parameters
        experts = (self.parameters - self.active) / (1 - self.expert_share)
        dense = self.parameters - experts
        touched: float = 1 - (1 - self.expert_share) ** max(tokens, 1.0)
        return dense + experts * touched
