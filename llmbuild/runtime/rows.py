"""How rows of several sequences are told to `Session.step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class Told(NamedTuple):
    """The inputs of a step, as `spec.program.STEP` says."""

    tokens: Integers
    positions: Integers
    where: Integers
    read: Integers


def told(
    tokens: Sequence[Sequence[int]], starts: Sequence[int], slots: Sequence[int], tables: NDArray[np.int64]
) -> Told:
    """Return the inputs of a step that computes tokens of several sequences, and reads behind the last of each.

    Each sequence goes on from its position in `starts`; its blocks are the row of `tables` i64[S,P] that `slots` names.
    """
    if all(len(one) == 1 for one in tokens):
        return _singles([one[0] for one in tokens], starts, slots, tables)
    counts = np.array([len(one) for one in tokens])
    behind = np.cumsum(counts)
    count = int(behind[-1])
    ids = np.fromiter((token for one in tokens for token in one), np.int64, count)
    positions = np.repeat(np.array(starts) - (behind - counts), counts) + np.arange(count)
    rows = 2 * count + np.array(slots) * tables.shape[1]
    where = np.concatenate([positions, np.repeat(rows, counts), tables.ravel()])
    return Told(ids, positions, where, behind - 1)


def _singles(tokens: Sequence[int], starts: Sequence[int], slots: Sequence[int], tables: NDArray[np.int64]) -> Told:
    """Return the same for one token of each sequence, which all steps are that only decode: in a few passes."""
    count = len(tokens)
    where = np.empty(2 * count + tables.size, np.int64)
    where[:count] = starts
    where[count : 2 * count] = slots
    where[count : 2 * count] *= tables.shape[1]
    where[count : 2 * count] += 2 * count
    where[2 * count :].reshape(tables.shape)[:] = tables
    return Told(np.array(tokens, np.int64), where[:count], where, np.arange(count))
