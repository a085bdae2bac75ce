"""Functions as jobs of one of submitit's executors: begun, watched, begun again where a node was lost, cancelled.

Beside Slurm's executor there is one of submitit for this machine, which tests use: what is here does not tell them
apart.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any

from llmbuild.process.slurm import MARGIN_S, NAME, Options

LOST = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED")
"""States of a job that did nothing wrong."""
_ENDED = (*LOST, "CANCELLED", "DEADLINE", "OUT_OF_MEMORY", "TIMEOUT")
"""States in which no result comes any more. One that failed or completed may have one that is still on its way."""
LOOK_S = 0.5
"""Seconds between two looks for a result."""
ASK_S = 30.0
"""Seconds between two questions to Slurm, of all jobs together."""
_TOLD = 300


def this_node() -> str:
    """Return Slurm's name of the node where this runs, within a job."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def told_where(function: Callable[..., Any], *words: Any) -> Any:
    """Return what a function returns that takes the name of the node where it runs, too, as its last argument."""
    return function(*words, this_node())


class Ended(Exception):
    """A job has no result, or Slurm did not take it."""

    def __init__(self, told: str, lost: bool = False) -> None:
        super().__init__(told)
        self.lost = lost


@dataclass(frozen=True)
class Work:
    """A function of a module that nodes can import, its argument, and what its job asks for."""

    function: Callable[..., Any]
    words: tuple[Any, ...]
    seconds: float
    options: Options
    cpus: int = 1

    def parameters(self) -> dict[str, Any]:
        """Return them as submitit takes them."""
        return {
            "name": NAME,
            "timeout_min": ceil((self.seconds + MARGIN_S) / 60),
            "cpus_per_task": self.cpus,
            "slurm_use_srun": False,  # there is one task; what Slurm kills then is Python itself
            "slurm_additional_parameters": self.options.pairs(),
        }


class Jobs:
    """The jobs of one build. Those that still run when it ends are cancelled, and their files removed."""

    def __init__(self, executor: Any, look_s: float = LOOK_S) -> None:
        self.look_s = look_s
        self._executor = executor
        self._lock = threading.Lock()
        self._asked_s = monotonic()
        self._live: dict[str, Any] = {}
        self.close = weakref.finalize(self, _close, self._live, Path(executor.folder))

    def begin(self, work: Work) -> Any:
        """Return a job that was submitted.

        Raises:
            Ended: it was refused.
        """
        with self._lock:
            try:
                self._executor.update_parameters(**work.parameters())
                job = self._executor.submit(work.function, *work.words)
            except (RuntimeError, OSError) as error:  # submitit's own are RuntimeErrors
                raise Ended(f"Slurm did not take a job: {told_of(error)}") from None
            self._live[job.job_id] = job
            return job

    def cancel(self, job: Any) -> None:
        """End a job, if it has not ended."""
        if self._live.pop(job.job_id, None) is not None:
            _cancel(job)

    def result(self, job: Any) -> Any | None:
        """Return what a job's function returned, in a tuple; None while it waits or runs.

        Raises:
            Ended: there is none.
        """
        done = job.done(force_check=self._due())
        state = job.state.partition(" ")[0].rstrip("+")  # `CANCELLED by 1000`
        if not done and state not in _ENDED:
            return None
        self._live.pop(job.job_id, None)
        try:
            if state in _ENDED and not job.paths.result_pickle.exists():
                raise Ended(f"job {job.job_id} ended as {state}{_last(job)}", state in LOST)
            return (job.result(),)
        except (RuntimeError, OSError, EOFError) as error:
            raise Ended(f"job {job.job_id} ended as {state}: {told_of(error)}") from None
        finally:
            for path in job.paths.folder.glob(f"{job.job_id}_*"):
                path.unlink(missing_ok=True)

    def _due(self) -> bool:
        """Return whether it is time to ask Slurm: submitit waits longer and longer, and a lost job writes nothing."""
        with self._lock:
            due = monotonic() - self._asked_s > ASK_S
            if due:
                self._asked_s = monotonic()
            return due


class Running:
    """A function that runs as a job, and as another one after its node was lost."""

    def __init__(self, jobs: Jobs, work: Work, tries: int) -> None:
        """Submit it.

        Raises:
            Ended: it was refused.
        """
        self._jobs, self._work, self._tries = jobs, work, tries
        self._cancelled = threading.Event()
        self._job = jobs.begin(work)

    def wait(self) -> Any:
        """Return what the function returned. An exception in this thread, Ctrl-C above all, cancels the job.

        Raises:
            Ended: it was cancelled, its time was up, it failed, or its nodes were lost too often.
        """
        try:
            while True:
                try:
                    return self._waited()
                except Ended as error:
                    if not error.lost or not self._tries:
                        raise
                self._tries -= 1
                self._job = self._jobs.begin(self._work)
        finally:
            self._jobs.cancel(self._job)

    def _waited(self) -> Any:
        while not self._cancelled.is_set():
            found = self._jobs.result(self._job)
            if found is not None:
                return found[0]
            self._cancelled.wait(self._jobs.look_s)
        raise Ended(f"job {self._job.job_id} was cancelled")

    def cancel(self) -> None:
        """End the job, and let who waits go."""
        self._cancelled.set()
        self._jobs.cancel(self._job)


def told_of(error: BaseException) -> str:
    """Return an error of submitit in one line: of a traceback that a job has left, the cause, which comes last."""
    text = str(error).partition("You can check full logs")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return lines[-1][:_TOLD] if lines else type(error).__name__


def _last(job: Any) -> str:
    """Return the last line of a job's log, where Slurm itself writes why it has ended a job."""
    with contextlib.suppress(OSError, ValueError):
        lines = [line.strip() for line in (job.stderr() or "").splitlines() if line.strip()]
        return f": {lines[-1][:_TOLD]}" if lines else ""
    return ""


def _cancel(job: Any) -> None:
    with contextlib.suppress(OSError):
        job.cancel(check=False)


def _close(live: dict[str, Any], folder: Path) -> None:
    while live:
        _cancel(live.popitem()[1])
    shutil.rmtree(folder, ignore_errors=True)
