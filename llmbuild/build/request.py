"""What a command asks of the build path: made once from the command line, or by a script."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmbuild.errors import InputError
from llmbuild.spec.recipe import Sampler

Step = Literal["import", "compile", "profile"]


@dataclass(frozen=True)
class BuildRequest:
    """Recipes on targets, and how to build them; what is left out is as the recipes say."""

    recipes: tuple[Path, ...] = ()
    targets: tuple[str, ...] = ()
    """Names or files; the host, or with `on` the highest target of that machine, if there are none."""
    catalog: Path | None = None
    """Folder of the catalog; without one nothing is known."""
    pins: tuple[tuple[str, str], ...] = ()
    """Knobs and the value that each is pinned to."""
    random_init: bool = False
    seed: int = 0
    budget_s: float | None = None
    trials: int | None = None
    sampler: Sampler | None = None
    until: Step | None = None
    on: str | None = None
    """The machine to measure on, `ssh://...`; this one if left out."""
    jobs: int = 1
    """Compiles side by side."""
    force: bool = False
    dry_run: bool = False
    explain: bool = False

    @property
    def folder(self) -> Path:
        """The catalog's folder, of a request that needs one."""
        assert self.catalog is not None
        return self.catalog


def pins_of(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return the knobs and values of `KNOB=VALUE`; of one knob that is pinned twice the last value.

    Raises:
        InputError: a text is not of this form.
    """
    pins: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise InputError(f"cannot read --set {text!r}: write KNOB=VALUE")
        pins[name.strip()] = value.strip()
    return tuple(pins.items())


def seconds_of(budget: str) -> float:
    """Return the seconds of a time such as `20m`.

    Raises:
        InputError: it is no time.
    """
    from llmbuild.spec.files.reader import seconds

    try:
        return seconds(budget)
    except ValueError as error:
        raise InputError(f"--budget: {error}") from None
