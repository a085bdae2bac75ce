"""What a prompt's tokens say of the length of its answer: tokens and pairs of them, hashed into buckets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BUCKETS = 4096
SEEN = 64
"""Tokens at the beginning, and at the end, that are looked at."""
_SHIFT = np.uint64(64 - 12)
"""Bits of a hash that are not its bucket."""
_ONE, _PAIR, _LENGTH = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
"""Odd numbers whose bits look random: products of them spread over all buckets."""


def buckets(ids: Sequence[int]) -> Any:
    """Return the buckets i64[N] of a prompt's features: of its first and last 64 tokens, each token, each token with
    the next one, and how long the prompt is, in half powers of two.
    """
    known = ids if len(ids) <= 2 * SEEN else (*ids[:SEEN], *ids[-SEEN:])
    count = len(known)
    mixed = np.empty(max(1, 2 * count), np.uint64)
    mixed[:count] = known
    mixed[:count] += np.uint64(1)
    mixed[:count] *= _ONE
    if count > 1:
        mixed[count:-1] = mixed[: count - 1] * _PAIR
        mixed[count:-1] += mixed[1:count]
        mixed[count:-1] *= _PAIR
    mixed[-1:] = 1 + int(2 * math.log2(1 + len(ids)))
    mixed[-1:] *= _LENGTH  # as arrays: a product of single numbers warns of what is left out of it
    return (mixed >> _SHIFT).astype(np.int64)
