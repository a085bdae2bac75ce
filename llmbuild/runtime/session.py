"""Open one artifact on a device and call it, independently of catalogs, text and SLOs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import iree.runtime as rt
import numpy as np
from iree.runtime._binding import create_hal_driver
from iree.runtime.flags import parse_flags
from numpy.typing import NDArray

from llmbuild.errors import InputError, LoadRefused
from llmbuild.runtime import checks, host
from llmbuild.runtime.calls import PlainCaller, PolledCaller
from llmbuild.runtime.code import mapped
from llmbuild.runtime.memory import shares_memory
from llmbuild.runtime.readback import Readback
from llmbuild.spec.program import DECODE, PARAMETER_SCOPE, PREFILL, SCORE, STEP, Abi, TensorType

_ELEMENT = {
    "float32": rt.HalElementType.FLOAT_32,
    "float16": rt.HalElementType.FLOAT_16,
    "int8": rt.HalElementType.SINT_8,
    "int64": rt.HalElementType.SINT_64,
}


_SHARED_MEMORY = rt.MemoryType.DEVICE_LOCAL | rt.MemoryType.HOST_VISIBLE
_SHARED_USAGE = rt.BufferUsage.DEFAULT | rt.BufferUsage.MAPPING

_MOST_WORKERS = 64
"""IREE's own bound where the number of workers is not given."""

_MOST_BLOCKS = 2**31
"""Upper bound of the blocks of a cache."""

_MOST_ALIKE = 64
"""Rows of a step up to which its input buffers are kept for the next step of as many rows, which takes as long."""

_LARGEST_WORKERS = 2**16
"""Upper bound of worker threads."""

_RELEASED_IN_ORDER = (
    "_logits",
    "_scored",
    "_stepped",
    "_inputs",
    "_tokens",
    "_positions",
    "_tokens_view",
    "_positions_view",
    "_own",
    "_spare",
    "_copied",
    "_call",
    "_entries",
    "_context",
    "_keep",
    "_device",
    "_code",
)
"""Buffers are freed before their device, or the process crashes. The artifact's module is freed after it: freeing a
module takes the GIL. A worker may hold the last reference to the module after its call returns; it would wait for the
GIL while the thread with the GIL waits for the device's workers."""


@dataclass(frozen=True)
class Settings:
    """Run-time settings of a variant: the driver, and the number of worker threads (0: one per physical core)."""

    driver: str = "local-task"
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse invalid values.

        Raises:
            InputError: the driver is not a name, or the workers are not a number of threads.
        """
        checks.text("driver", self.driver)
        checks.integer("workers", self.workers, 0, _LARGEST_WORKERS)


Kind = TypeVar("Kind", bound=np.generic)

Cache = list[Any]
"""The KV cache of one answer, as views of the device's buffers; empty once its session is closed."""


class Session:
    """One opened artifact: `prefill` a prompt, then `decode` token by token.

    An artifact of a batch of B continues B sequences per call, by `prefill_batch` and `decode_batch`; `prefill` and
    `decode` then repeat one sequence B times. The parameter archive is mapped, not copied. The KV cache is the
    session's own, or that of the answer whose `cache` is given; it is updated in place. Not for use by two threads at
    a time. One class: everything it does is on one opened context of IREE, which is closed in one order.
    """

    def __init__(self, artifact: Path, parameters: Path, abi: Abi, settings: Settings) -> None:
        """Map both files and create the device.

        Raises:
            LoadRefused: the runtime rejects the artifact or its parameters.
        """
        self.abi = abi
        try:
            self._device = _create_device(settings)
            self._threaded = settings.driver == "local-task"
            self._shared = shares_memory(settings.driver)
            self._copied = Readback(self._device)
            self._open(artifact, parameters)
        except (OSError, RuntimeError, ValueError) as error:
            raise LoadRefused(f"{artifact}: the IREE runtime refuses it: {_first_line(error)}") from error
        self._taken: list[Cache] = []
        self._own: Cache | None = None
        self._spare: list[Cache] = [self._new_cache()]
        if self._shared:
            self._tokens, self._tokens_view = self._steps()
            self._positions, self._positions_view = self._steps()
        self._logits: Any = None
        self._scored: Any = None
        self._stepped: Any = None
        self._inputs: dict[tuple[str, int], tuple[NDArray[np.int64], Any]] = {}

    def close(self) -> None:
        """Release everything in the order that neither crashes nor deadlocks."""
        for cache in self.__dict__.pop("_taken", ()):
            cache.clear()
        for name in _RELEASED_IN_ORDER:
            self.__dict__.pop(name, None)

    def __del__(self) -> None:
        self.close()

    def _open(self, artifact: Path, parameters: Path) -> None:
        instance = rt.VmInstance()
        index = rt.ParameterIndex()
        index.load(str(parameters), format="irpa")
        provider = index.create_provider(scope=PARAMETER_SCOPE)
        self._code = mapped(instance, artifact)
        services = [rt.create_io_parameters_module(instance, provider), rt.create_hal_module(instance, self._device)]
        self._context = rt.VmContext(instance, [*services, self._code])
        self._call = (PolledCaller if self._threaded else PlainCaller)(self._device, self._context, 2)
        suffix = "$async" if self._threaded else ""
        names = (PREFILL, DECODE, *((SCORE,) if self.abi.score else ()), *((STEP,) if self.abi.page else ()))
        self._entries = {name: self._code.lookup_function(name + suffix) for name in names}
        self._keep = (instance, index, provider, services)

    @contextmanager
    def cache(self) -> Iterator[Cache]:
        """Allocate a KV cache for an answer, until it ends: so answers may be interleaved.

        Raises:
            InputError: the device has no memory for another answer, or the session is closed.
        """
        self._check_open()
        made = self._spare.pop() if self._spare else self._new_cache()
        try:
            with self._lent(made):
                yield made
        finally:
            if made and not self._spare:
                self._spare.append(made)

    @contextmanager
    def shared_cache(self, blocks: int) -> Iterator[Cache]:
        """Allocate blocks of `Abi.page` positions each, for `step` to share out among sequences.

        Raises:
            InputError: the program has no `step`, the device no memory, or the session is closed.
        """
        self._check_open()
        if not self.abi.page:
            raise InputError("the program has no `step`: run `prefill` and `decode`")
        places = checks.integer("blocks", blocks, 1, _MOST_BLOCKS) * self.abi.page
        self._spare.clear()  # that of one answer: who steps does not need it
        made = self._new_cache(places)
        with self._lent(made):
            yield made

    @contextmanager
    def _lent(self, made: Cache) -> Iterator[None]:
        """Clear a cache when the session is closed while it is lent."""
        self._taken.append(made)
        try:
            yield
        finally:
            if made:  # else the session is closed
                self._taken = [one for one in self._taken if one is not made]

    def _new_cache(self, places: int = 0) -> Cache:
        """Return zeroed buffers, of so many places or of the context."""
        try:
            return [self._zeros(replace(k, shape=(places or k.shape[0], *k.shape[1:]))) for k in self.abi.kv]
        except (RuntimeError, MemoryError, ValueError) as error:
            told = f"no memory for the keys and values of one more answer: {_first_line(error)}"
            raise InputError(f"{told}: end or close another first") from None

    def _check_open(self) -> None:
        if "_context" not in self.__dict__:
            raise InputError("the session is closed: open the variant again")

    def prompt(self, name: str, tokens: object) -> list[int]:
        """Return the checked tokens of a prompt.

        Raises:
            InputError: not tokens, a token outside the vocabulary, or more than fits in the context.
        """
        ids = checks.tokens(name, tokens, self.abi.vocabulary)
        if not ids:
            told = "the prompt is empty" if name == "the prompt" else f"{name}: a prompt is empty"
            raise InputError(f"{told}: give at least one token")
        if len(ids) > self.abi.context:
            raise InputError(f"{name}: {len(ids)} tokens do not fit in a context of {self.abi.context}")
        return ids

    def prefill(self, tokens: Sequence[int] | NDArray[np.int64], start: int = 0, cache: Cache | None = None) -> int:
        """Run the prompt `tokens` from position `start` on and return the most likely next token.

        Raises:
            InputError: no token, a token outside the vocabulary, or more than fits in the context.
        """
        row = np.array([self.prompt("the prompt", tokens)], np.int64)
        return int(self._prefill(np.repeat(row, self.abi.batch, 0), start, cache)[0])

    def prefill_batch(
        self, tokens: NDArray[np.int64], start: int | NDArray[np.int64] = 0, cache: Cache | None = None
    ) -> NDArray[np.int64]:
        """Run prompts i64[B,T], each from its own position `start` i64[B] on; return the next tokens i64[B].

        Raises:
            InputError: not B prompts, no token, a token outside the vocabulary, or more than fits in the context.
        """
        found = checks.integers("prompts", tokens)
        if found.ndim != 2 or len(found) != self.abi.batch:
            raise InputError(f"prompts must be i64[{self.abi.batch},T]: the artifact answers so many together")
        if found.size == 0:
            raise InputError("the prompts are empty: give at least one token")
        checks.inside("prompts", found, self.abi.vocabulary)
        return np.array(self._prefill(np.ascontiguousarray(found), start, cache))

    def _prefill(
        self, tokens: NDArray[np.int64], start: int | NDArray[np.int64], cache: Cache | None
    ) -> NDArray[np.int64]:
        starts, length = self._places("start", start), tokens.shape[1]
        if starts.min() < 0:
            raise InputError(f"start is {starts.min()}; it must be 0 or more")
        if starts.max() > self.abi.context - length:
            told = f"{length} tokens from position {starts.max()} on" if starts.max() else f"{length} tokens"
            raise InputError(f"{told} do not fit in a context of {self.abi.context}")
        self._check_open()
        return self._run(PREFILL, self._buffer(tokens), starts, cache)

    def decode(self, token: int, position: int, cache: Cache | None = None) -> int:
        """Run one token at `position` and return the most likely next one.

        Raises:
            InputError: the token is outside the vocabulary, or the position outside the context.
        """
        checks.integer("token", token, 0, self.abi.vocabulary - 1)
        checks.integer("position", position, 0, self.abi.context - 1)
        return int(self._decode(token, position, cache)[0])

    def decode_batch(
        self, tokens: NDArray[np.int64], positions: int | NDArray[np.int64], cache: Cache | None = None
    ) -> NDArray[np.int64]:
        """Run one token i64[B] of each sequence at its position i64[B]; return the most likely next ones i64[B].

        Raises:
            InputError: not B tokens, one outside the vocabulary, or a position that is not in the context.
        """
        found = checks.integers("tokens", tokens)
        if found.shape != (self.abi.batch,):
            raise InputError(f"tokens must be i64[{self.abi.batch}]: the artifact answers so many sequences together")
        checks.inside("tokens", found, self.abi.vocabulary)
        places = self._places("positions", positions)
        if places.min() < 0 or places.max() >= self.abi.context:
            raise InputError(f"a position is outside a context of {self.abi.context}")
        return np.array(self._decode(found, places, cache))

    def score(self, tokens: Sequence[int] | NDArray[np.int64], cache: Cache | None = None) -> NDArray[np.float32]:
        """Run a text from the beginning of the context, and return the logits f32[T,V] after each of its tokens.

        They are valid until the next call, and not copied where the device shares its memory. The cache is then as
        after `prefill`; `logits` are still those of the last `prefill` or `decode`.

        Raises:
            InputError: the program has no `score`, no token, one outside the vocabulary, or more than fits.
        """
        if not self.abi.score:
            raise InputError("the program has no `score`: run `prefill` and `decode`, and read `logits` after each")
        row = np.array([self.prompt("the text", tokens)], np.int64)
        self._check_open()
        results = self._results(SCORE, self._buffer(row), 0, cache)
        self._scored = results.get_as_object(0, rt.HalBufferView)
        return self._read(self._scored, np.float32)

    def step(
        self,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        where: NDArray[np.int64],
        read: NDArray[np.int64],
        cache: Cache,
    ) -> NDArray[np.int64]:
        """Run rows of any mix of sequences, as `spec.program.STEP` says, on the cache of `shared_cache`.

        Return the most likely next tokens i64[R] behind the R rows that are read, valid until the next call. What
        `where` says of blocks is the caller's to have right.

        Raises:
            InputError: no row, or a token, a position or a row that is not there.
        """
        self._check_open()
        rows = len(tokens)
        if not 0 < rows == len(positions) or len(where) <= 2 * rows or not len(read):
            raise InputError("a step needs rows with a token, a position and a table each, and one that is read")
        checks.inside("tokens", tokens, self.abi.vocabulary)
        if checks.outside(positions, self.abi.context):
            raise InputError(f"a position is outside a context of {self.abi.context}")
        if checks.outside(read, rows):
            raise InputError(f"a row that is read is not one of the {rows}")
        given = {"tokens": tokens, "positions": positions, "where": where, "read": read}
        views = [self._input(name, array, rows) for name, array in given.items()]
        alike = (STEP, rows) if rows <= _MOST_ALIKE else None
        self._stepped = self._call(self._entries[STEP], (*views, *cache), alike)
        return self._read(self._stepped.get_as_object(0, rt.HalBufferView), np.int64)

    def step_logits(self) -> NDArray[np.float32]:
        """Return the logits f32[R,V] behind the rows that the last step read; valid until the next call, and not
        copied where the device shares its memory.

        Raises:
            InputError: there was no step.
        """
        self._check_open()
        if self._stepped is None:
            raise InputError("there are no logits yet: call `step` first")
        return self._read(self._stepped.get_as_object(1, rt.HalBufferView), np.float32)[:, : self.abi.vocabulary]

    def _input(self, name: str, array: NDArray[np.int64], rows: int) -> Any:
        """Return a buffer with an input of a step, one that is kept where a step has few rows."""
        if not self._shared or rows > _MOST_ALIKE:
            return self._buffer(np.ascontiguousarray(array, np.int64))
        key = name, array.size
        if key not in self._inputs:
            view = self._buffer(np.zeros(array.size, np.int64))
            self._inputs[key] = view.map().asarray((array.size,), np.dtype(np.int64)), view
        mapped_, view = self._inputs[key]
        mapped_[:] = array
        return view

    def _places(self, name: str, value: object) -> NDArray[np.int64]:
        """Return one position per sequence; a single position is repeated."""
        found = checks.integers(name, value)
        if found.shape not in ((), (self.abi.batch,)):
            raise InputError(f"{name} must be one integer or i64[{self.abi.batch}]; its shape is {list(found.shape)}")
        return found

    def _decode(
        self, tokens: int | NDArray[np.int64], positions: int | NDArray[np.int64], cache: Cache | None
    ) -> NDArray[np.int64]:
        self._check_open()
        if not self._shared:
            return self._run(DECODE, self._buffer(self._each(tokens)), positions, cache)
        self._tokens[:] = tokens
        return self._run(DECODE, self._tokens_view, positions, cache)

    def logits(self) -> NDArray[np.float32]:
        """Return the f32[V] logits of the last call, copied: later calls do not change them.

        Of a batch these are the first sequence's.
        """
        return np.array(self.peek())

    def peek(self) -> NDArray[np.float32]:
        """Return the f32[V] logits of the last call without a copy; valid until the next call."""
        found: NDArray[np.float32] = self._rows()[0]
        return found

    def logits_batch(self) -> NDArray[np.float32]:
        """Return the f32[B,V] logits of the last call, copied."""
        return np.array(self._rows())

    def _rows(self) -> NDArray[np.float32]:
        self._check_open()
        if self._logits is None:
            raise InputError("there are no logits yet: call `prefill` first")
        found: NDArray[np.float32] = self._read(self._logits, np.float32).reshape(self.abi.batch, -1)
        return found

    def _run(
        self, entry: str, tokens: Any, positions: int | NDArray[np.int64], cache: Cache | None
    ) -> NDArray[np.int64]:
        """Return the next tokens i64[B] without a copy; valid until the next call."""
        results = self._results(entry, tokens, positions, cache)
        token = results.get_as_object(0, rt.HalBufferView)
        self._logits = results.get_as_object(1, rt.HalBufferView)
        return self._read(token, np.int64)

    def _results(self, entry: str, tokens: Any, positions: int | NDArray[np.int64], cache: Cache | None) -> Any:
        """Call an entry point with tokens from their positions on, and return the list of its results."""
        if cache is None:
            cache = self._own = self._own or (self._spare.pop() if self._spare else self._new_cache())
        if not isinstance(cache, list) or len(cache) != len(self.abi.kv):
            raise InputError("cache must be what `Session.cache` gives")
        if self._shared:
            self._positions[:] = positions
            where = self._positions_view
        else:
            where = self._buffer(self._each(positions))
        return self._call(self._entries[entry], (tokens, where, *cache), DECODE if entry == DECODE else None)

    def _each(self, value: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return one value for each sequence: i64[B]."""
        return np.ascontiguousarray(np.broadcast_to(np.asarray(value, np.int64), (self.abi.batch,)))

    def _read(self, view: Any, kind: type[Kind]) -> NDArray[Kind]:
        """Return the contents of a buffer: in place if the host sees it, else a copy."""
        if self._shared:
            found: NDArray[Kind] = view.map().asarray(view.shape, np.dtype(kind))
            return found
        return self._copied(view, kind)

    def _buffer(self, array: NDArray[np.generic]) -> Any:
        return self._device.allocator.allocate_buffer_copy(
            memory_type=_SHARED_MEMORY if self._shared else rt.MemoryType.DEVICE_LOCAL,
            allowed_usage=_SHARED_USAGE if self._shared else rt.BufferUsage.DEFAULT,
            device=self._device,
            buffer=array,
            element_type=_ELEMENT[array.dtype.name],
        )

    def _zeros(self, kind: TensorType) -> Any:
        return self._buffer(np.zeros(kind.shape, kind.dtype))

    def _steps(self) -> tuple[NDArray[np.int64], Any]:
        """Return an i64[B] that the host writes and the device reads, without a copy per call."""
        view = self._buffer(np.zeros(self.abi.batch, np.int64))
        return view.map().asarray((self.abi.batch,), np.dtype(np.int64)), view


def _create_device(settings: Settings) -> Any:
    if settings.driver == "local-task":
        return threaded_device(settings.workers)
    return rt.get_device(settings.driver, cache=False)


def threaded_device(workers: int) -> Any:
    """Return a device with its own worker threads, one per physical core where `workers` is 0.

    IREE creates the threads with the driver, from process flags, and keeps one driver for all devices of a process:
    without its own driver, a second device would use as many workers as the first. A single worker is not pinned,
    unless the process is: IREE lets an unpinned worker run on every core of the host, also on those of other processes.
    Several are pinned, each to its own core: woken together without pinning, Linux puts them on one core, and they
    run as slowly as one.
    """
    alone = int(workers == 1 and host.cores() == host.machine_cores())
    most = workers or _MOST_WORKERS
    parse_flags(f"--task_topology_group_count={alone}", f"--task_topology_max_group_count={most}")
    uri = "local-task"
    return create_hal_driver(uri).create_device_by_uri(uri)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
