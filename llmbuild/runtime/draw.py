"""Draw a token from the distribution that logits, a temperature, top-k, top-p and min-p leave.

All tokens of a vocabulary are weighed in f32, and only those that count are looked at again in f64: a draw is made
between two steps of the device, for every sequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmbuild.errors import InputError

Logits = NDArray[np.float32]
Weights = NDArray[np.float64]
BLOCK = 256
"""Weights whose sum is looked at before they are; so few are looked at in f64 alone."""
FEW = 1e-3
"""Probability of a token that usually lies in the nucleus: no more than a thousand have as much."""
COLD, HOT = 1e-2, 1e30
"""Temperatures outside are not for f32: below, few tokens have a weight; above, all have the same."""
NOTHING = 750.0
"""How far below the largest logit, in temperatures, a weight is 0 in f64."""


def drawn(
    logits: Logits, share: float, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> int:
    """Return the token at a share of [0, 1) of the distribution, in the order of ids; f32[V] is only read.

    A `top_k` of 0 or less leaves all in; tokens as likely as the k-th are left in with it. `top_p` leaves in the fewest
    tokens with that much probability, `min_p` those with that much of the likeliest one's.

    Raises:
        InputError: a logit is NaN or +inf, or all are -inf.
    """
    most = float(checked(logits).max())
    least = _least(logits, most, temperature, top_k, min_p)
    if least > -np.inf:
        kept = np.flatnonzero(logits >= np.float32(least))
        return _of_few(kept, _weights(logits[kept], most, temperature), share, top_p)
    if logits.size <= BLOCK:
        return _of_few(np.arange(logits.size), _weights(logits, most, temperature), share, top_p)
    weights = logits - np.float32(most)
    weights /= np.float32(min(temperature, HOT))
    np.exp(weights, out=weights)
    if top_p < 1:
        return _of_nucleus(logits, weights, most, temperature, share, top_p)
    return _at(weights, share)


def checked(logits: Logits) -> Logits:
    """Return logits from which a token can be chosen.

    Raises:
        InputError: one is NaN or +inf, or all are -inf.
    """
    most = logits.max(initial=-np.inf)  # NaN where one is
    if not np.isfinite(most):
        raise InputError(f"the largest logit is {most}: the variant computes no probabilities, nothing can be drawn")
    return logits


def _least(logits: Logits, most: float, temperature: float, top_k: int, min_p: float) -> float:
    """Return the least logit that is left in before `top_p` is looked at; -inf where all are."""
    least = most - NOTHING * temperature if temperature < COLD else -np.inf
    if 0 < top_k < logits.size:
        least = max(least, float(np.partition(logits, logits.size - top_k)[logits.size - top_k]))
    if min_p > 0:
        least = max(least, most + temperature * float(np.log(min_p)))
    return least


def _weights(logits: Logits, most: float, temperature: float) -> Weights:
    with np.errstate(over="ignore"):  # a tiny temperature: less likely tokens get probability 0
        return np.exp((logits.astype(np.float64) - most) / temperature)


def _of_few(kept: NDArray[np.int64], weights: Weights, share: float, top_p: float) -> int:
    """Return the token at a share of those that are kept."""
    if top_p < 1:
        inside = _nucleus(weights, top_p * weights.sum())
        kept, weights = kept[inside], weights[inside]
    reached = np.cumsum(weights)
    at = int(np.searchsorted(reached, share * reached[-1], side="right"))
    return int(kept[min(at, kept.size - 1)])


def _of_nucleus(logits: Logits, weights: Logits, most: float, temperature: float, share: float, top_p: float) -> int:
    """Return the token at a share of the nucleus: tokens above some weight that have `top_p` together contain it.

    All above half the mean of what may lie outside do; most often a few do already.
    """
    total = float(weights.sum(dtype=np.float64))
    kept = np.flatnonzero(weights >= np.float32(FEW * total))
    if weights[kept].sum(dtype=np.float64) < top_p * total * (1 + 1e-6):
        kept = np.flatnonzero(weights >= np.float32((1 - top_p) * total / weights.size / 2))
    likely = _weights(logits[kept], most, temperature)
    others = total - float(weights[kept].sum(dtype=np.float64))
    chosen = _nucleus(likely, top_p * (likely.sum() + others))
    return _of_few(kept[chosen], likely[chosen], share, 1.0)


def _nucleus(weights: Weights, wanted: float) -> NDArray[np.int64]:
    """Return the places of the fewest weights that sum to what is wanted, in their own order; at least one."""
    order = np.argsort(-weights, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1
    return np.sort(order[:count])


def _at(weights: Logits, share: float) -> int:
    """Return the place at a share of all weights: first the block, then the place in it."""
    whole = weights.size // BLOCK * BLOCK
    sums = weights[:whole].reshape(-1, BLOCK).sum(1, dtype=np.float64)
    reached = np.cumsum(np.append(sums, weights[whole:].sum(dtype=np.float64)))
    wanted = share * reached[-1]
    block = min(int(np.searchsorted(reached, wanted, side="right")), reached.size - 1)
    inside = weights[block * BLOCK : (block + 1) * BLOCK if block * BLOCK < whole else None]
    within = np.cumsum(inside, dtype=np.float64)
    at = int(np.searchsorted(within, wanted - (reached[block - 1] if block else 0.0), side="right"))
    return block * BLOCK + (at if at < inside.size else int(np.flatnonzero(inside)[-1]))
