"""Compile what an import or a kernel writer made, and call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmbuild.compiler.flags import UNVERIFIED

if TYPE_CHECKING:
    from llmbuild.runtime.session import Session

COMPILER = Path(sys.executable).parent / "iree-compile"
FLAGS = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
CHECKS = "LLMBUILD_TESTS_VERIFY"
"""Set, the compiler checks its own text after each pass, as an exhaustive run wants it: a quarter of a compile."""


def compile_file(source: Path, output: Path, *flags: str, cpu: str = "host") -> Path:
    """Compile MLIR text or bytecode; the compiler's own message is the failure."""
    told = [*FLAGS, f"--iree-llvmcpu-target-cpu={cpu}", *([] if os.environ.get(CHECKS) else [UNVERIFIED])]
    command = [str(COMPILER), str(source), *told, *flags, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


class Loaded:
    """A compiled program with its cache buffers."""

    def __init__(self, folder: Path, artifact: Path, driver: str = "local-task") -> None:
        import iree.runtime as rt

        self.abi = json.loads((folder / "abi.json").read_text())
        device, instance = rt.get_device(driver), rt.VmInstance()
        self._device = device
        index = rt.ParameterIndex()
        index.load(str(folder / "parameters.irpa"))
        modules = [
            rt.create_io_parameters_module(instance, index.create_provider(scope="model")),
            rt.create_hal_module(instance, device),
            rt.VmModule.mmap(instance, str(artifact)),
        ]
        self._context = rt.SystemContext(vm_modules=modules, config=rt.Config(device=device))
        self._module = self._context.modules.module
        self.kv = [rt.asdevicearray(device, np.zeros(k["shape"], k["dtype"])) for k in self.abi["kv"]]

    def prefill(self, tokens: Sequence[int], start: int = 0) -> tuple[int, Any]:
        """Return the next token and the logits."""
        token, logits = self._module.prefill(np.asarray(tokens, np.int64)[None], np.array([start]), *self.kv)
        return int(token.to_host()[0]), np.asarray(logits)

    def decode(self, token: int, position: int) -> tuple[int, Any]:
        """Return the next token and the logits."""
        token_out, logits = self._module.decode(np.array([token]), np.array([position]), *self.kv)
        return int(token_out.to_host()[0]), np.asarray(logits)

    def score(self, tokens: Sequence[int]) -> Any:
        """Return logits f32[T,V] after each token of a text from position 0 on."""
        return self._module.score(np.asarray(tokens, np.int64)[None], np.array([0]), *self.kv).to_host()

    def step(self, rows: Sequence[tuple[int, int, int]], tables: Any, read: Sequence[int], kv: list[Any]) -> Any:
        """Return next tokens i64[R] and logits f32[R,V] of rows (sequence, token, position); `kv` is a shared cache."""
        sequences, tokens, positions = np.array(rows, np.int64).T
        first = 2 * len(rows) + sequences * tables.shape[1]
        where = np.concatenate([positions, first, tables.ravel()])
        found, logits = self._module.step(tokens.copy(), positions.copy(), where, np.array(read), *kv)
        return found.to_host(), logits.to_host()[:, : self.abi["vocabulary"]]

    def shared_kv(self, blocks: int) -> list[Any]:
        """Return a cache of so many blocks for `step`, of numbers that are none."""
        import iree.runtime as rt

        sizes = [(blocks * self.abi["page"], *k["shape"][1:]) for k in self.abi["kv"]]
        made = [np.empty(size, k["dtype"]) for size, k in zip(sizes, self.abi["kv"], strict=True)]
        for part in made:
            part.view(np.uint8)[:] = 255  # of integers, the scales are no numbers
        return [rt.asdevicearray(self._device, part) for part in made]

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Any:
        """Return logits f32[1+D,V] after the prompt and after each token."""
        rows = [self.prefill(prompt)[1]]
        rows += [self.decode(int(token), len(prompt) + i)[1] for i, token in enumerate(tokens)]
        return np.stack(rows)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the tokens after the prompt."""
        found = [self.prefill(prompt)[0]]
        while len(found) < count:
            found.append(self.decode(found[-1], len(prompt) + len(found) - 1)[0])
        return found


def answers(session: Session, prompt: Sequence[int], forced: Sequence[int]) -> Any:
    """Return logits f32[1+D,V] of an opened session after the prompt and after each forced token."""
    session.prefill(list(prompt))
    rows = [session.logits()]
    for position, token in enumerate(forced, len(prompt)):
        session.decode(int(token), position)
        rows.append(session.logits())
    return np.stack(rows)


def archived(path: Path) -> dict[str, bytes]:
    """Return the bytes of the tensors in a parameter archive."""
    import iree.runtime as rt

    index = rt.ParameterIndex()
    index.load(str(path))
    return {name: bytes(entry.file_view) for name, entry in index.items()}


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference over the largest value."""
    wide = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(actual, np.float64) - wide).max() / (np.abs(wide).max() or 1.0))
