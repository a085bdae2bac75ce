"""Choose a token from logits: the most likely one, or a draw with temperature, top-k and top-p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmbuild.errors import InputError


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
        """Refuse what makes no sense.

        Raises:
            InputError: a negative temperature or k, or a p outside 0 to 1.
        """
        if self.temperature < 0 or not np.isfinite(self.temperature):
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (all tokens) or positive")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """Say whether the device's own choice is taken."""
        return self.temperature == 0


class Sampler:
    """Draws tokens one after another from one seed."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Return a token drawn from f32[V]; the logits are only read."""
        kept = self._kept(logits)
        scaled = logits[kept].astype(np.float64) / self.sampling.temperature
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        if self.sampling.top_p < 1:
            kept, weights = _nucleus(kept, weights, self.sampling.top_p)
        return int(self._random.choice(kept, p=weights))

    def _kept(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the top k tokens without sorting the rest; all of them where k is 0."""
        k = self.sampling.top_k
        if k == 0 or k >= logits.size:
            return np.arange(logits.size)
        return np.argpartition(logits, -k)[-k:]


def _nucleus(
    tokens: NDArray[np.int64], weights: NDArray[np.float64], share: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the fewest tokens whose weights reach `share`, the most likely first; one at least."""
    order = np.argsort(-weights, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order]), share)) + 1
    chosen = order[:count]
    return tokens[chosen], weights[chosen] / weights[chosen].sum()
