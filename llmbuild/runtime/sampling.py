"""Choose a token from logits: the most likely one, or a draw with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from llmbuild.errors import InputError
from llmbuild.runtime import checks
from llmbuild.runtime.draw import drawn

LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How to choose. A temperature of 0 is greedy: the device's own choice is taken and no logit is read.

    `top_k` 0 and `top_p` 1 leave all tokens in. The same seed gives the same text from the same variant.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse invalid values.

        Raises:
            InputError: a value of the wrong type, a negative temperature, k or seed, or a p outside 0 to 1.
        """
        if checks.number("temperature", self.temperature) < 0:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive")
        checks.integer("top_k", self.top_k, 0)
        if not 0 < checks.number("top_p", self.top_p) <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        checks.integer("seed", self.seed, 0, LARGEST_SEED)

    @staticmethod
    def of(options: Mapping[str, Any]) -> Sampling:
        """Return the sampling of keyword arguments.

        Raises:
            InputError: an argument is unknown or invalid.
        """
        known = [field.name for field in fields(Sampling)]
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"{', '.join(unknown)}: no such option of sampling; it has {', '.join(known)}")
        return Sampling(**options)

    @property
    def greedy(self) -> bool:
        """Return whether the device's own choice is taken."""
        return self.temperature == 0


class Options(TypedDict, total=False):
    """The options of an answer, besides its length."""

    stop: str | Sequence[str]
    add_special_tokens: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int


class Sampler:
    """Draws the tokens of one sequence.

    Sequences of one call share a seed and have independent draws; another seed differs from all of them. The first
    sequence draws the same tokens as alone.
    """

    def __init__(self, sampling: Sampling, sequence: int = 0) -> None:
        self.sampling = sampling
        key = (sequence,) if sequence else ()
        self._random = np.random.default_rng(np.random.SeedSequence(sampling.seed, spawn_key=key))

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return a token drawn from f32[V]; the logits are only read.

        Raises:
            InputError: the logits are not a row of numbers, one is NaN or +inf, or all are -inf.
        """
        if not isinstance(logits, np.ndarray) or logits.ndim != 1 or not logits.size or logits.dtype.kind != "f":
            raise InputError("logits must be a row of floating-point numbers, one for each token")
        of = self.sampling
        return drawn(logits, self._random.random(), of.temperature, of.top_k, of.top_p)
