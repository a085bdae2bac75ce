"""`score` of a compiled program: the logits after every token, by one call."""

from __future__ import annotations

import re
from pathlib import Path

import iree.runtime as rt
import numpy as np
import pytest

from llmbuild.errors import InputError
from llmbuild.runtime.session import Session, Settings
from llmbuild.spec.program import Abi, TensorType
from tests.support.artifact import compile_file

V = 16
PROGRAM = f"""
func.func @prefill(%tokens: tensor<1x?xi64>, %start: tensor<1xi64>, %kv: tensor<4xf32>)
    -> (tensor<1xi64>, tensor<{V}xf32>) {{
  %zero = arith.constant 0 : index
  %one = arith.constant 1 : index
  %length = tensor.dim %tokens, %one : tensor<1x?xi64>
  %last = arith.subi %length, %one : index
  %token = tensor.extract %tokens[%zero, %last] : tensor<1x?xi64>
  %logits = func.call @after(%token) : (i64) -> tensor<{V}xf32>
  %next = tensor.from_elements %token : tensor<1xi64>
  return %next, %logits : tensor<1xi64>, tensor<{V}xf32>
}}
func.func @decode(%tokens: tensor<1xi64>, %positions: tensor<1xi64>, %kv: tensor<4xf32>)
    -> (tensor<1xi64>, tensor<{V}xf32>) {{
  %zero = arith.constant 0 : index
  %token = tensor.extract %tokens[%zero] : tensor<1xi64>
  %logits = func.call @after(%token) : (i64) -> tensor<{V}xf32>
  return %tokens, %logits : tensor<1xi64>, tensor<{V}xf32>
}}
func.func @score(%tokens: tensor<1x?xi64>, %start: tensor<1xi64>, %kv: tensor<4xf32>) -> tensor<?x{V}xf32> {{
  %one = arith.constant 1 : index
  %length = tensor.dim %tokens, %one : tensor<1x?xi64>
  %rows = tensor.collapse_shape %tokens [[0, 1]] : tensor<1x?xi64> into tensor<?xi64>
  %empty = tensor.empty(%length) : tensor<?x{V}xf32>
  %logits = linalg.generic {{
    indexing_maps = [affine_map<(t, v) -> (t)>, affine_map<(t, v) -> (t, v)>],
    iterator_types = ["parallel", "parallel"]
  }} ins(%rows : tensor<?xi64>) outs(%empty : tensor<?x{V}xf32>) {{
  ^bb0(%token: i64, %_: f32):
    %v = linalg.index 1 : index
    %column = arith.index_cast %v : index to i64
    %sum = arith.addi %token, %column : i64
    %value = arith.sitofp %sum : i64 to f32
    linalg.yield %value : f32
  }} -> tensor<?x{V}xf32>
  return %logits : tensor<?x{V}xf32>
}}
func.func private @after(%token: i64) -> tensor<{V}xf32> {{
  %empty = tensor.empty() : tensor<{V}xf32>
  %logits = linalg.generic {{indexing_maps = [affine_map<(v) -> (v)>], iterator_types = ["parallel"]}}
    outs(%empty : tensor<{V}xf32>) {{
  ^bb0(%_: f32):
    %v = linalg.index 0 : index
    %column = arith.index_cast %v : index to i64
    %sum = arith.addi %token, %column : i64
    %value = arith.sitofp %sum : i64 to f32
    linalg.yield %value : f32
  }} -> tensor<{V}xf32>
  return %logits : tensor<{V}xf32>
}}
"""
SUFFIX = {"local-sync": "", "local-task": "$async"}
MODEL = {"local-sync": "async-internal", "local-task": "async-external"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with one function for each way of calling it, as an import makes it, and an archive."""
    made = tmp_path_factory.mktemp("score")
    for driver, suffix in SUFFIX.items():
        named = re.sub(r"func.func @(\w+)", rf"func.func @\1{suffix}", PROGRAM)
        (made / f"{driver}.mlir").write_text(named)
        compile_file(made / f"{driver}.mlir", made / driver, f"--iree-execution-model={MODEL[driver]}")
    archive = rt.ParameterIndex()
    archive.add_splat("unused", b"\x00", 4)
    archive.create_archive_file(str(made / "parameters.irpa"))
    return made


def session_of(folder: Path, driver: str, score: bool = True) -> Session:
    kv = (TensorType((4,), "float32"),)
    abi = Abi(V, 32, kv, (), 1, score=score)
    return Session(folder / driver, folder / "parameters.irpa", abi, Settings(driver, 1))


@pytest.mark.parametrize("driver", ["local-sync", "local-task"])
def test_score_gives_the_logits_after_every_token(folder: Path, driver: str) -> None:
    session, text = session_of(folder, driver), [3, 1, 15, 0, 7]
    expected = np.asarray(text)[:, None] + np.arange(V)
    assert np.array_equal(session.score(text), expected)
    session.prefill(text[:2])
    assert np.array_equal(session.score(np.asarray(text)), expected)
    assert np.array_equal(session.logits(), expected[1]), "those of the last prefill"
    session.decode(15, 2)
    assert np.array_equal(session.logits(), expected[2])
    session.close()


def test_what_cannot_be_scored_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(folder, "local-sync")
    for tokens, told in (([], "at least one token"), ([V], str(V)), ([1] * 33, "do not fit in a context of 32")):
        with pytest.raises(InputError, match=told):
            session.score(tokens)
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.score([1])
    with pytest.raises(InputError, match="no `score`"):
        session_of(folder, "local-sync", score=False).score([1])


def test_a_device_with_memory_of_its_own_is_read_by_copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmbuild.runtime.session.shares_memory", lambda driver: False)
    session = session_of(folder, "local-sync")
    assert np.array_equal(session.score([2, 5]), np.array([[2], [5]]) + np.arange(V))
