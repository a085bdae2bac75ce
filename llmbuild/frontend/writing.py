"""Stream a model's weights into an archive, layer by layer, and run what was stored of each layer for the check data.

While one layer runs, the next one is read, quantized and packed. What was finished when a run was ended is not made
again by the next one in the same folder: the layers in the archive, and the states behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Protocol
from zipfile import BadZipFile

import numpy as np

from llmbuild import digest
from llmbuild.frontend.archive import Plan
from llmbuild.frontend.check import Check, Kept
from llmbuild.frontend.weights import Patch, Source
from llmbuild.transform.stream import Begun, Draft, Pipeline, cores

SAVE_S = 2.0
"""Seconds between two records of how far an import is."""

Arrays = dict[str, np.ndarray]


class Patches(Protocol):
    """What changes layers, one after another, and what it must know to go on with a later one."""

    def layers(self, source: Source, first: int, saved: Mapping[str, np.ndarray]) -> Iterator[Patch]:
        """Yield the patches of the layers from `first` on; `saved` is what `state` returned before it."""

    def state(self) -> Arrays:
        """Return what the next layer's patch is made from."""


class Unchanged:
    """Layers as they are."""

    def layers(self, source: Source, first: int, saved: Mapping[str, np.ndarray]) -> Iterator[Patch]:
        """Yield nothing to change, for ever."""
        while True:
            yield Patch()

    def state(self) -> Arrays:
        """Return that there is nothing to know."""
        return {}


class Writing:
    """One archive in the making; `source` has the patch of the token tables."""

    def __init__(self, path: Path, plan: Plan, source: Source, key: str) -> None:
        self.plan, self.source, self.key = plan, source, key
        self._progress = path.with_suffix(".npz")
        self._draft = Draft(path, plan.layout, key)
        self._saved_at = monotonic()
        self.resumed = 0
        """Layers that an earlier run had finished."""

    def write(self, check: Check, patches: Patches, vocabulary: int) -> str:
        """Write all tensors and return the digest of the archive; `check` is run on the way.

        Raises:
            InputError: weights that are no numbers.
            OSError: the disk is full.
        """
        pipeline = Pipeline(self._draft, cores())
        try:
            self._layers(pipeline, check, patches)
            check.head(self.source.whole("model.norm.weight"), vocabulary)
            pipeline.finish(pipeline.begin(self.plan.units(self.plan.tables, self.source, check.keep)))
            pipeline.finish(pipeline.begin(self.plan.units(self.plan.rest, self.source)))
        finally:
            pipeline.close()
            self._draft.close()
        return digest.of_file(self._draft.path)

    def forget(self) -> None:
        """Remove what is beside a finished archive, so that it is finished for good."""
        self._draft.forget()
        self._progress.unlink(missing_ok=True)

    def _layers(self, pipeline: Pipeline, check: Check, patches: Patches) -> None:
        saved = self._saved()
        first = self.resumed = self._finished(saved)
        if first:
            check.restore({name: saved[name] for name in saved if name.startswith("check.")})
        before = None
        count = len(self.plan.layers)
        changes = patches.layers(self.source, first, saved if first else {})
        for index in range(first, count):
            source = self._patched(next(changes))
            kept = check.room(source, index)
            begun = pipeline.begin(self.plan.units(self.plan.layers[index], source, kept.keep))
            state = patches.state()
            if before is not None:
                self._end(pipeline, check, *before)
            before = index, begun, kept, state
        if before is not None:
            self._end(pipeline, check, *before)

    def _end(self, pipeline: Pipeline, check: Check, index: int, begun: Begun, kept: Kept, state: Arrays) -> None:
        pipeline.finish(begun)
        check.layer(index, kept)
        self._save(index + 1, {**check.state(), **state})

    def _patched(self, patch: Patch) -> Source:
        tables = self.source.patch
        merged = Patch({**tables.dense, **patch.dense}, {**tables.ready, **patch.ready})
        return replace(self.source, patch=merged)

    # --- going on ------------------------------------------------------------------------------------------------

    def _save(self, layers: int, state: Arrays) -> None:
        if not self.key or monotonic() < self._saved_at + SAVE_S:
            return
        draft = self._progress.with_suffix(".part")
        with open(draft, "wb") as file:
            np.savez(file, layers=layers, key=self.key, **state)  # type: ignore[arg-type]
        draft.replace(self._progress)
        self._saved_at = monotonic()

    def _saved(self) -> Arrays:
        if not self.key or not self._progress.is_file():
            return {}
        try:
            with open(self._progress, "rb") as data, np.load(data) as file:
                found = {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return {}
        return found if str(found.get("key")) == self.key else {}

    def _finished(self, saved: Arrays) -> int:
        """Return how many layers are in the archive, whole, with the states behind them."""
        count = int(saved["layers"]) if saved else 0
        units = chain.from_iterable(self.plan.units(makes, self.source) for makes in self.plan.layers[:count])
        return count if all(map(self._draft.has, units)) else 0
