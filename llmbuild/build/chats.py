"""Chats that a job's model writes to be calibrated on: from the catalog, or from a child process that goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import TYPE_CHECKING

from llmbuild import digest
from llmbuild.build.compiling import once
from llmbuild.build.events import Event, Tell
from llmbuild.build.job import Job
from llmbuild.build.price import weights
from llmbuild.digest import plain
from llmbuild.errors import InputError
from llmbuild.frontend.files import CONFIG
from llmbuild.frontend.transcript import TOGETHER, TRANSCRIPT_FILE, count
from llmbuild.process.child import Limits
from llmbuild.profiler.calibration import Chats as Asked
from llmbuild.spec.model import read_facts
from llmbuild.spec.variant import Failure
from llmbuild.system.strict_json import JsonObject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmbuild.catalog.writer import Catalog

LEAST_WEIGHTS_PER_S = 10e6
"""Weights that a step of the model passes in a second at the least: some hundredth of what an idle core does."""
LOOK_S = 1.0
"""Seconds between two looks at how many tokens there are."""

Run = Callable[[Mapping[str, object], Path, Limits], JsonObject | Failure]
"""Runs a request to the frontend in a child process, with its files in a folder, by limits."""


class Chats:
    """The chats of a job's model; what a child process had written when it was ended stays in the catalog."""

    def __init__(self, job: Job, catalog: Catalog, run: Run, tell: Tell) -> None:
        self.job, self.catalog, self._run, self._tell = job, catalog, run, tell

    def tokens(self, asked: Asked, forced: Callable[[str], bool]) -> NDArray[np.int64] | Failure:
        """Return the tokens i64[W,L] that the model writes; `forced` says whether known ones are written again.

        Raises:
            InputError: the model cannot be taken.
        """
        import numpy as np

        model = {"model": self.job.model.digest, "importer": self.job.toolchain.importer}
        inputs = {"chats": digest.of(plain(asked)), **model}
        key, find = digest.of(inputs), self.catalog.find_reference
        made = once(self.catalog, forced, "chats", key, find, lambda: self._written(key, inputs, asked))
        return made if isinstance(made, Failure) else np.load(self.catalog.blobs.path(made))

    def limits(self, asked: Asked) -> Limits:
        """Return the limits of the child process: the time of an import, and more by what there is to compute."""
        facts = self.job.facts or read_facts(self.job.model.folder / CONFIG)
        steps = -(-asked.windows // TOGETHER) * asked.length
        limits = self.job.limits
        return replace(limits, seconds=limits.seconds + steps * weights(facts) / LEAST_WEIGHTS_PER_S)

    def _written(self, key: str, inputs: Mapping[str, object], asked: Asked) -> str | Failure:
        """Return the blob of the tokens, written now by a child process or gone on with."""
        folder = self.catalog.importing(key)
        transcript, total = folder / TRANSCRIPT_FILE, asked.windows * asked.length
        request = {"verb": "chats", "model": str(self.job.model.location.absolute()), "key": key, **plain(asked)}
        try:
            with self._told(transcript, total):
                result = self._run(request, folder, self.limits(asked))
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if isinstance(result, Failure):
            if not result.lasting:
                return _kept(result, count(transcript), total)
            shutil.rmtree(folder, ignore_errors=True)
            return result
        blob = self.catalog.blobs.put_file(folder / result["chats"])
        self.catalog.record_reference(key, inputs, blob)
        shutil.rmtree(folder, ignore_errors=True)
        return blob

    @contextmanager
    def _told(self, transcript: Path, total: int) -> Iterator[None]:
        """Tell how many tokens there are, while they are written."""
        known = count(transcript)
        again = f": {known} were there, of a run that was ended" if known else ""
        self._tell(Event("note", f"the model writes chats of {total} tokens to calibrate on{again}"))
        over = Flag()

        def look() -> None:
            told = known
            while not over.wait(LOOK_S):
                if (now := count(transcript)) > told:
                    told = now
                    self._tell(Event("chats", f"{now} of {total} tokens are written"))

        watch = Thread(target=look, name="chats", daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()


def _kept(failure: Failure, known: int, total: int) -> Failure:
    """Return the failure of chats that go on in the next run: with how far they are, and what they would gain by."""
    told = f"{known} of {total} tokens of chats are kept, and the next build goes on with them"
    advice = "idle cores, or a smaller share of `chats` in the recipe, take less time"
    return replace(failure, reason=f"{failure.reason}; {told}: {advice}")
