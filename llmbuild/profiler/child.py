"""The parent's end of a profiler worker: send a request, wait with a limit, and turn any error into a `Failure`."""

from __future__ import annotations

import json
import select
import shlex
import subprocess
import tempfile
from collections.abc import Mapping

from llmbuild.process.child import NEUTRAL, Limits, confine, environment, failure_of, python, stop_group, tail
from llmbuild.process.diagnosis import AGAIN
from llmbuild.spec.variant import Failure, Stage
from llmbuild.system.strict_json import JsonObject


class ChildFailed(Exception):
    """Carries the failure of a child to the code that records it; never leaves the profiler."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class Child:
    """One worker process with one artifact."""

    def __init__(self, limits: Limits, env: Mapping[str, str] | None = None) -> None:
        self.limits = limits
        self.command = python("llmbuild.profiler.worker")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._requests: list[str] = []
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            env=environment(env),
            cwd=NEUTRAL,
            preexec_fn=confine(limits),
        )

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the worker has not ended."""
        return self._process.poll() is None

    def ask(self, stage: Stage, verb: str, **request: object) -> JsonObject:
        """Return the worker's answer.

        Raises:
            ChildFailed: it crashed, took too long, or reported an error.
        """
        line = json.dumps({"verb": verb, **request})
        self._requests.append(line)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died(stage) from None
        ready, _, _ = select.select([self._process.stdout], [], [], self.limits.left_s())
        if not ready:
            stop_group(self._process)
            raise ChildFailed(failure_of(self.command, stage, self.limits, None, self._tail()))
        answer = self._process.stdout.readline()
        if not answer.endswith(b"\n"):
            raise self._died(stage)
        told: JsonObject = json.loads(answer)
        if "refused" in told:
            lasting = bool(told.get("lasting"))
            reason = told["refused"] if lasting else f"{told['refused']}; {AGAIN}"
            raise ChildFailed(Failure(stage, reason, self.pasteable(), self._tail(), lasting))
        return told

    def close(self) -> None:
        """End the worker."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        stop_group(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _died(self, stage: Stage) -> ChildFailed:
        code = self._process.wait()
        failure = failure_of(self.command, stage, self.limits, code, self._tail())
        return ChildFailed(Failure(stage, failure.reason, self.pasteable(), failure.log, failure.lasting))

    def pasteable(self) -> str:
        """Return a shell command that repeats the last request."""
        requests = " ".join("'" + r.replace("'", "'\\''") + "'" for r in self._requests[:1] + self._requests[1:][-1:])
        return f"printf '%s\\n' {requests} | {shlex.join(self.command)}"

    def _tail(self) -> str:
        return tail(self._log.fileno())
