"""The description of a build: data only, so that it can be hashed, compared and stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llmbuild.spec.slo import Bound
from llmbuild.spec.space import Value
from llmbuild.spec.workload import Workload

Sampler = Literal["auto", "gp", "tpe", "nsga2", "random"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
AUTO: Sampler = "gp"
"""The sampler of `auto`."""

HUGGINGFACE, GGUF = "huggingface", "gguf"
"""Kinds of sources of a model: the keys of a recipe that name one."""
PACKAGE = "package:"
"""How the place of a file in an installed Python package begins: `package:NAME/FILE`."""


@dataclass(frozen=True)
class ModelSource:
    """The source of a model, of kind `huggingface` or `gguf`; `location` is never part of a key.

    It is an absolute folder or a hub id; of GGUF an absolute file, or `package:NAME/FILE`, a file of a Python package.
    """

    kind: str
    location: str
    random_init: bool = False
    seed: int = 0


GATE = (Bound("quality_kl", "<=", 0.05), Bound("quality_top1", ">=", 0.9))
"""The gate of a recipe that has a text to score and names no bounds."""


@dataclass(frozen=True)
class Quality:
    """The quality gate of a variant on held-out text: `stdlib` module names, or text files.

    `tokens` is the number of scored tokens. A bound is a quality metric with a limit.
    """

    stdlib: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    tokens: int = 512
    bounds: tuple[Bound, ...] = ()


@dataclass(frozen=True)
class Text:
    """A text to calibrate on: `stdlib` module names, text `files`, or `chats`, a file of prompts that it answers.

    `share` is its part of the tokens, relative to the other texts.
    """

    stdlib: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    chats: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """The texts for the calibration of weights, of which `tokens` are read.

    They must not be the text that quality is measured on.
    """

    texts: tuple[Text, ...]
    tokens: int = 4096


@dataclass(frozen=True)
class Budget:
    """The limits of a build: unique evaluations, and seconds."""

    trials: int = 12
    seconds: float = 1200.0


@dataclass(frozen=True)
class Recipe:
    """Model, workloads, objectives, gate and budget; `knobs` narrows or pins a knob to these values."""

    name: str
    model: ModelSource
    workloads: tuple[Workload, ...]
    objectives: tuple[str, ...]
    constraints: tuple[Bound, ...]
    quality: Quality
    budget: Budget
    knobs: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    calibration: Calibration | None = None
    sampler: Sampler = "auto"
    """The sampler of points: llmbuild's own (`gp`, which `auto` selects), or one of Optuna's."""

    @property
    def context(self) -> int:
        """Tokens of the KV cache, sufficient for every workload."""
        return max(w.context for w in self.workloads)

    @property
    def batch(self) -> int:
        """The batch size of every workload."""
        return self.workloads[0].batch
