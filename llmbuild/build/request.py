"""A request to the build path: made from the command line, or by a script."""

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
    """Recipes on targets, and build options; omitted options have the recipes' values."""

    recipes: tuple[Path, ...] = ()
    targets: tuple[str, ...] = ()
    """Names or files; default: the host, or with `on` the best target that the remote machine supports."""
    catalog: Path | None = None
    """Folder of the catalog; without one there are no known results."""
    pins: tuple[tuple[str, str], ...] = ()
    """Knobs and their pinned values."""
    random_init: bool = False
    seed: int = 0
    budget_s: float | None = None
    trials: int | None = None
    sampler: Sampler | None = None
    until: Step | None = None
    on: str | None = None
    """The machine that measures, `ssh://...`, or the cluster that does it all, `ray` or `slurm`; default: this host."""
    jobs: int = 1
    """Number of parallel compiles."""
    force: bool = False
    dry_run: bool = False
    explain: bool = False

    @property
    def folder(self) -> Path:
        """The catalog's folder; the request must have one."""
        assert self.catalog is not None
        return self.catalog


def pins_of(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return the knobs and values of `KNOB=VALUE`; of a knob that is pinned twice, the last value.

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
        InputError: not a time.
    """
    from llmbuild.spec.files.reader import seconds

    try:
        return seconds(budget)
    except ValueError as error:
        raise InputError(f"--budget: {error}") from None
