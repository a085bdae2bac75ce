"""Held-out text against the f32 model: the arithmetic, the mapped reference, and the two ways through a program."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmbuild.profiler.divergence import Divergence, mapped
from llmbuild.profiler.worker import QUALITY_PROMPT, Worker

V, WINDOWS, LENGTH = 50, 3, 20


def exact(expected: NDArray[Any], actual: NDArray[Any], tokens: NDArray[Any]) -> dict[str, float]:
    """Return the readings by log-probabilities in f64."""

    def log_softmax(x: NDArray[Any]) -> NDArray[np.float64]:
        wide = x.astype(np.float64) - x.max(-1, keepdims=True)
        return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))

    wanted, found = log_softmax(expected), log_softmax(actual)
    return {
        "quality_kl": float(np.mean(np.sum(np.exp(wanted) * (wanted - found), -1))),
        "quality_top1": float(np.mean(wanted.argmax(-1) == found.argmax(-1))),
        "quality_perplexity": float(np.exp(np.mean(-found[np.arange(len(tokens)), tokens]))),
    }


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_divergence_is_that_of_log_probabilities_in_f64(noise: float, size: float) -> None:
    chosen = np.random.default_rng(0)
    expected = (chosen.standard_normal((37, 4096)) * 3).astype(np.float32)
    expected[np.arange(37), chosen.integers(0, 4096, 37)] += chosen.uniform(0, 20, 37).astype(np.float32)
    actual = (expected + noise * chosen.standard_normal(expected.shape)).astype(np.float32)
    if size > 1:
        expected[:, 0], actual[:, 0] = size, size  # whose exponential is no f32
    tokens = chosen.integers(0, 4096, 37)
    found = Divergence()
    for part in (slice(0, 10), slice(10, 37)):
        found.add(expected[part], actual[part], tokens[part])
    assert found.readings() == pytest.approx(exact(expected, actual, tokens), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_reference_is_mapped_as_it_was_saved(tmp_path: Path, save: Any) -> None:
    chosen = np.random.default_rng(0)
    arrays = {
        "tokens": chosen.integers(0, V, (2, 9)),
        "logits": chosen.standard_normal((2, 9, V)).astype(np.float32),
        "turned": np.asfortranarray(chosen.standard_normal((3, 5))),
        "none": np.zeros((0, 4)),
        "one": np.float32(3.0),
    }
    save(tmp_path / "reference.npz", **arrays)
    found = mapped(tmp_path / "reference.npz")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert isinstance(found["logits"], np.memmap) == (save is np.savez)


class FakeSession:
    """A program whose logits after a token depend on it and the one before, by both of its ways."""

    def __init__(self, score: bool, off: float = 0.0) -> None:
        self.abi = SimpleNamespace(batch=1, score=score, page=0)
        self.table = np.random.default_rng(1).standard_normal((V, V, V)).astype(np.float32)
        self.off, self.calls, self._seen = off, list[str](), np.zeros(0, np.int64)

    def prefill_batch(self, tokens: NDArray[np.int64]) -> None:
        self.calls.append("prefill")
        self._seen = tokens[0]

    def decode_batch(self, tokens: NDArray[np.int64], position: Any) -> None:
        self.calls.append("decode")
        self._seen = np.append(self._seen[: int(np.max(position))], tokens)

    def logits_batch(self) -> NDArray[np.float32]:
        return np.array(self._after(self._seen)[None, -1])

    def score(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self.calls.append("score")
        return self._after(tokens) + np.float32(self.off)

    def _after(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.table[np.append(0, tokens[:-1]), tokens]
        return found


def worker_of(session: FakeSession) -> Worker:
    made = Worker()
    made._session = session  # type: ignore[assignment]
    return made


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    chosen = np.random.default_rng(2)
    tokens = chosen.integers(0, V, (WINDOWS, LENGTH))
    logits = chosen.standard_normal((WINDOWS, LENGTH, V)).astype(np.float32)
    np.savez(tmp_path / "reference.npz", tokens=tokens, logits=logits)
    return tmp_path / "reference.npz"


def test_a_program_that_scores_is_scored_in_one_call_a_window_with_the_same_result(reference: Path) -> None:
    new, old = FakeSession(score=True), FakeSession(score=False)
    scored, decoded = (worker_of(one).quality({"data": str(reference)}) for one in (new, old))
    assert scored == pytest.approx(decoded)
    assert new.calls == ["score"] * WINDOWS
    assert old.calls == ["prefill", *["decode"] * (LENGTH - QUALITY_PROMPT - 1)] * WINDOWS


@pytest.mark.parametrize("start", [8, 3])
def test_a_check_holds_both_ways_against_the_reference(tmp_path: Path, start: int) -> None:
    chosen, plain = np.random.default_rng(3), FakeSession(score=False)
    prompt, forced = chosen.integers(0, V, (1, 8)), chosen.integers(0, V, (1, 4))
    told: dict[str, Any] = {"prompt": prompt, "forced": forced, "start": np.array([start]), "noise": np.float32(0)}
    logits = worker_of(plain)._forced(prompt, forced, np.array([start]))
    np.savez(tmp_path / "check.npz", logits=logits, **told)
    for score, off, error in ((False, 0.1, 0.0), (True, 0.0, 0.0), (True, 0.1, 0.1)):
        found = worker_of(FakeSession(score, off)).check({"data": str(tmp_path / "check.npz")})
        assert found["error"] == pytest.approx(error, rel=0.1), "an error of either way counts"
