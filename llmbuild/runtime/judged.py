"""A pick whose verdicts on every row are computed on first access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar, overload

from llmbuild.spec.pick import Pick

T = TypeVar("T")


class Later:
    """A pick that is computed on first access."""

    def __init__(self, judged: Callable[[], Pick]) -> None:
        self._judged = judged

    @cached_property
    def pick(self) -> Pick:
        """All rows of the catalog, each with its verdict."""
        return self._judged()


class Judged(Sequence[T]):
    """The candidates of a pick, computed on first access."""

    def __init__(self, later: Later, part: Callable[[Pick], Sequence[T]]) -> None:
        self._later, self._part = later, part

    def _tuple(self) -> tuple[T, ...]:
        return tuple(self._part(self._later.pick))

    def __len__(self) -> int:
        return len(self._tuple())

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...

    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        return self._tuple()[index]
