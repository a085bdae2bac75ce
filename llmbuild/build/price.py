"""What a build will cost, before it begins: seconds and bytes of the catalog, from its model's size and earlier builds.

A build on this machine says how long its trials took; their seconds beyond the fixed ones of a trial are scaled by
the number of weights. Without an earlier build they follow from constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmbuild.spec.formats import SAME, bits, in_panels
from llmbuild.spec.model import ModelFacts

FIXED_S = 4.0
"""Seconds of a trial that do not depend on the model's size: processes that start, and rounds."""

FIRST_S, FIRST_WEIGHTS = 7.0, 10_000_000
"""A trial's seconds beyond those, and the number of weights they are for, where no earlier build tells them: on two
cores of a server of 2024."""

GROWTH = 0.5
"""The power of the number of weights that these seconds grow with, between 5 million and 8 billion."""

ONCE_S = 12.0
"""Seconds that the first build of a catalog takes besides its trials: the machine's limits, the f32 model's logits."""

TRIAL_BYTES = 1 << 20
"""Bytes of a trial beside its weights: code, its halves, and check data."""

NEAREST = 3
"""Maximum number of earlier builds that an estimate is taken from: those of models nearest in size."""


@dataclass(frozen=True)
class Earlier:
    """An earlier build on the same machine: its model's weights, and the mean seconds of its trials."""

    weights: int
    trial_s: float


@dataclass(frozen=True)
class Archive:
    """How weights are stored: the formats of the layers and of the head, and whether in `panels` of our kernels."""

    layers: str
    head: str = SAME
    panels: bool = False

    @classmethod
    def of(cls, choices: Mapping[str, object]) -> Archive:
        """Return how the choices of a point store them."""
        layers, head = (str(choices.get(knob, usual)) for knob, usual in USUAL.items())
        return cls(layers, head, in_panels(choices))


USUAL = {"weight_format": "f32", "head_format": SAME}
"""The formats of layers and head where nothing is said of them."""


@dataclass(frozen=True)
class Asked:
    """What a build has to do: trials to go, archives of weights that are not known yet, and the rest of the budget."""

    facts: ModelFacts
    trials: int
    archives: Sequence[Archive]
    reference_tokens: int
    """Tokens of held-out text whose logits are not known yet."""
    budget_s: float
    race_s: float
    first: bool = False
    """Whether the machine's limits are not known yet."""
    earlier: Sequence[Earlier] = field(default_factory=tuple)


@dataclass(frozen=True)
class Price:
    """The expected seconds and bytes of a build; `builds` is the number of earlier ones that say so."""

    seconds: float
    bytes: int
    trial_s: float
    builds: int

    def told(self) -> str:
        """Return it as text, with where it comes from."""
        builds = f"{self.builds} earlier build{'s' if self.builds > 1 else ''}"
        basis = f"from {builds} here" if self.builds else "no earlier build here: a guess"
        return f"some {duration(self.seconds)}, {size(self.bytes)} of catalog ({basis})"


def price(asked: Asked) -> Price:
    """Return what a build will cost."""
    count = weights(asked.facts)
    near = sorted(asked.earlier, key=lambda one: abs(math.log(one.weights / count)))[:NEAREST]
    found = near or [Earlier(FIRST_WEIGHTS, FIXED_S + FIRST_S)]
    scaled = [FIXED_S + max(0.0, one.trial_s - FIXED_S) * (count / one.weights) ** GROWTH for one in found]
    each = sum(scaled) / len(scaled)
    searching = min(asked.trials * each, asked.budget_s + each / 2) if asked.trials else 0.0
    once = ONCE_S if asked.first else 0.0
    archives = sum(archive_bytes(asked.facts, archive) for archive in asked.archives)
    logits = 4 * asked.reference_tokens * asked.facts.decoder.vocabulary
    return Price(searching + once + asked.race_s, archives + logits + asked.trials * TRIAL_BYTES, each, len(near))


def left_s(trials: int, trial_s: float, begun_s: float, budget_s: float, race_s: float) -> float:
    """Return the expected seconds until a build ends.

    `trials` are those to go, of which one began `begun_s` ago; `budget_s` is what is left of the search's time.
    """
    return min(max(0.0, trials * trial_s - begun_s), max(0.0, budget_s)) + race_s


def weights(facts: ModelFacts) -> int:
    """Return the number of a model's weights, tied ones counted once."""
    return _layers(facts) + _table(facts) * (1 if facts.tied else 2)


def archive_bytes(facts: ModelFacts, archive: Archive) -> int:
    """Return about how many bytes an archive of weights has."""
    head = archive.layers if archive.head == SAME else archive.head
    tables = bits(head, archive.panels) + (0 if facts.tied else bits(head, panels=False))
    return round((_layers(facts) * bits(archive.layers, archive.panels) + _table(facts) * tables) / 8)


def _layers(facts: ModelFacts) -> int:
    d = facts.decoder
    return facts.layers * d.hidden * (2 * d.attended + 2 * d.cached + 3 * d.inner)


def _table(facts: ModelFacts) -> int:
    return facts.decoder.vocabulary * facts.decoder.hidden


def duration(seconds: float) -> str:
    """Return seconds as an estimate is told: in steps of five, or in minutes, or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds / 5)) * 5} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Return bytes as an estimate is told: two digits."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "kB"))
    return f"{float(f'{count / unit:.2g}'):g} {name}"
