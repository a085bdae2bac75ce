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
    counts = np.array([len(one) for one in tokens])
    behind = np.cumsum(counts)
    count = int(behind[-1])
    ids = np.fromiter((token for one in tokens for token in one), np.int64, count)
    positions = np.repeat(np.array(starts) - (behind - counts), counts) + np.arange(count)
    rows = 2 * count + np.array(slots) * tables.shape[1]
    where = np.concatenate([positions, np.repeat(rows, counts), tables.ravel()])
    return Told(ids, positions, where, behind - 1)
