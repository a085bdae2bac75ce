"""The tensors of GGUF files: every type, by rows and by blocks, under the library's names and in its order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llmbuild.frontend.checkpoint import Checkpoint
from llmbuild.frontend.gguf_weights import BLOCKS, PLAIN, TAKEN, GgufCheckpoint
from tests.conftest import shared
from tests.support import folders, gguf_files

QUERY, KEY, VALUE = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
DOWN, NORM = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file of an architecture whose matrices have a type."""

    @cache
    def write(kind: str, stored_as: str) -> Path:
        name = f"gguf-{kind}-{stored_as}"
        folder = shared(
            tmp_path_factory,
            name,
            lambda folder: (
                folder.mkdir(),
                gguf_files.write(folder / "m.gguf", kind, stored_as, **gguf_files.WIDE),
            ),
        )
        return folder / "m.gguf"

    return write


@cache
def whole(path: Path) -> dict[str, np.ndarray]:
    """Return what the gguf package reads of a file, by llama.cpp's names."""
    with np.errstate(all="ignore"):
        return {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for tensor in gguf.GGUFReader(path).tensors
        }


def bits(values: np.ndarray) -> np.ndarray:
    assert values.dtype == np.float32
    return np.ascontiguousarray(values).view(np.int32)


def halves_apart(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Return rows whose heads are interleaved in the library's order, one row at a time."""
    found = []
    for head in range(0, len(rows), head_dim):
        found += [rows[head + entry] for entry in range(0, head_dim, 2)]
        found += [rows[head + entry] for entry in range(1, head_dim, 2)]
    return np.stack(found)


def expected(path: Path, kind: str, name: str) -> np.ndarray:
    values = whole(path)[gguf_files.named(name)]
    moved = kind == "llama" and name in (QUERY, KEY)
    return halves_apart(values, 64) if moved else values


@pytest.mark.parametrize("stored_as", TAKEN)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_rows_are_what_the_package_makes_of_them_bit_for_bit(made: Any, kind: str, stored_as: str) -> None:
    path = made(kind, stored_as)
    found = GgufCheckpoint(path)
    for name, shape in found.shapes.items():
        wanted = expected(path, kind, name)
        assert shape == wanted.shape
        for start, stop in ((0, shape[0]), (0, 1), (1, 1), (3, 20), (shape[0] - 7, shape[0])):
            assert np.array_equal(bits(found.rows(name, start, stop)), bits(wanted[start:stop])), (name, start, stop)


def test_the_order_of_queries_and_keys_is_that_of_the_model_that_was_written(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", num_hidden_layers=2)
    config = gguf_files.configuration(num_hidden_layers=2)
    found = GgufCheckpoint(path)
    for name, value in folders.tensors(config).items():
        assert np.array_equal(found.rows(name, 0, len(value)), value), name


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_biases_are_in_the_same_order(tmp_path: Path, kind: str) -> None:
    more = {"attention_bias": True} if kind == "llama" else {}
    path = gguf_files.write(tmp_path / "m.gguf", kind, **more)
    found = GgufCheckpoint(path)
    biases = {n: v for n, v in folders.tensors(gguf_files.configuration(kind, **more)).items() if "bias" in n}
    assert len(biases) == (4 if kind == "llama" else 3)
    for name, value in biases.items():
        assert np.array_equal(found.rows(name, 0, len(value)), value), name


@pytest.mark.parametrize("stored_as", BLOCKS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_weights_follow_from_their_blocks_exactly(made: Any, kind: str, stored_as: str) -> None:
    found = GgufCheckpoint(made(kind, stored_as))
    least, most = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q8_0": (-128, 127)}[stored_as]
    for name in (QUERY, VALUE, DOWN, "model.embed_tokens.weight"):
        columns = found.shapes[name][1]
        for start, stop in ((0, found.shapes[name][0]), (5, 6), (2, 31), (4, 4)):
            blocks = found.quantized(name, start, stop)
            assert (blocks.codes.dtype, blocks.scale.dtype) == (np.int8, np.float16)
            assert blocks.codes.shape == (stop - start, columns)
            assert blocks.scale.shape == (stop - start, columns // 32)
            assert (blocks.minimum is not None) == (stored_as == "Q4_1")
            assert ((least <= blocks.codes) & (blocks.codes <= most)).all()
            values = (
                blocks.codes.reshape(stop - start, columns // 32, 32).astype(np.float32)
                * blocks.scale.astype(np.float32)[..., None]
            )
            if blocks.minimum is not None:
                values = values + blocks.minimum.astype(np.float32)[..., None]
            assert np.array_equal(bits(values.reshape(stop - start, columns)), bits(found.rows(name, start, stop)))


def test_blocks_of_one_weight_tell_every_code(tmp_path: Path) -> None:
    """A block with every code once: nibbles lie where the format has them."""
    ramp = np.tile(np.concatenate([np.arange(16), np.arange(16)[::-1]]).astype(np.float32), (64, 1))
    config = gguf_files.metadata(gguf_files.configuration(), "llama")
    path = gguf_files.write(tmp_path / "m.gguf", stored_as="Q4_1")
    weights = {
        t.name: (gguf.quants.dequantize(t.data, t.tensor_type), t.tensor_type.name)
        for t in gguf.GGUFReader(path).tensors
    }
    weights["token_embd.weight"] = (ramp, "Q4_1")
    gguf_files.write_file(path, "llama", config, weights)
    blocks = GgufCheckpoint(path).quantized("model.embed_tokens.weight", 7, 9)
    assert blocks.codes.tolist() == ramp[7:9].astype(int).tolist()
    assert blocks.minimum is not None
    assert (blocks.scale.tolist(), blocks.minimum.tolist()) == ([[1.0], [1.0]], [[0.0], [0.0]])


def test_formats_are_told_by_tensor(made: Any) -> None:
    found: Checkpoint = GgufCheckpoint(made("llama", "Q4_K"))
    assert (found.blocks(QUERY), found.blocks(NORM)) == ("q4_k", "")
    assert GgufCheckpoint(made("llama", "BF16")).blocks(QUERY) == ""
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight is Q4_K, not one of Q4_0, Q4_1, Q8_0"):
        found.quantized(QUERY, 0, 1)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is F32"):
        found.quantized(NORM, 0, 1)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 257), (5, 4), (300, 301)])
def test_rows_that_are_not_there_are_refused(made: Any, start: int, stop: int) -> None:
    found = GgufCheckpoint(made("llama", "Q4_0"))
    for read in (found.rows, found.quantized):
        with pytest.raises(IndexError, match=f"has 256 rows, not {start} to {stop}"):
            read(QUERY, start, stop)


def test_what_is_read_is_the_readers_own(made: Any) -> None:
    for kind in (*PLAIN, "Q8_0"):
        found = GgufCheckpoint(made("llama", kind))
        for name in (QUERY, DOWN, NORM):
            first = found.rows(name, 0, 4)
            again = first.copy()
            first += 1  # the map of the file is read only, and shared
            assert np.array_equal(found.rows(name, 0, 4), again)
    blocks = GgufCheckpoint(made("llama", "Q8_0")).quantized(DOWN, 0, 1)
    blocks.codes[:] = 0


def test_a_head_that_is_the_token_table_is_not_there(tmp_path: Path) -> None:
    tied = GgufCheckpoint(gguf_files.write(tmp_path / "tied.gguf"))
    apart = GgufCheckpoint(gguf_files.write(tmp_path / "apart.gguf", tie_word_embeddings=False))
    assert set(apart.shapes) - set(tied.shapes) == {"lm_head.weight"}


def test_threads_read_the_same(made: Any) -> None:
    path = made("llama", "Q4_1")
    found = GgufCheckpoint(path)
    wanted = {name: expected(path, "llama", name) for name in (QUERY, DOWN)}
    spans = [(name, at, at + 16) for name in (QUERY, DOWN) for at in range(0, 256, 16)] * 8
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda span: found.rows(*span), spans))
    for (name, start, stop), rows in zip(spans, read, strict=True):
        assert np.array_equal(rows, wanted[name][start:stop])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_library_reads_the_same_tensors(tmp_path: Path, kind: str) -> None:
    """transformers has a reader of its own: names, order and values are its."""
    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils", reason="the library reads no GGUF files")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = gguf_files.write(tmp_path / "m.gguf", kind, "Q8_0", tie_word_embeddings=False, num_hidden_layers=2)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf"))
    theirs = reader.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    found = GgufCheckpoint(path)
    assert set(theirs) == set(found.shapes)
    for name, values in theirs.items():
        assert np.array_equal(bits(values.numpy()), bits(found.rows(name, 0, len(values)))), name
