"""Weights read by rows: what torch and safetensors say of the same files, in every type that means numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmbuild.errors import InputError
from llmbuild.frontend import checkpoint, huggingface
from llmbuild.frontend.checkpoint import Checkpoint, Drawn, Model, Pickled, Safetensors, untied
from llmbuild.frontend.tensors import EMBEDDING, HEAD
from llmbuild.spec.model import facts_of
from llmbuild.transform.drawn import draw
from tests.support import folders

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
FACTS = facts_of(folders.shape(**UNTIED))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The tensors of a small model, each in one of the types; among them what one type can just hold."""
    weights = {name: torch.from_numpy(w) for name, w in folders.tensors(folders.shape(**UNTIED)).items()}
    kinds = [*TYPES.values()]
    found = {name: w.to(kinds[i % len(kinds)]) for i, (name, w) in enumerate(sorted(weights.items()))}
    assert {w.dtype for w in found.values()} == {*kinds}
    for name in (EMBEDDING, HEAD):
        limits = torch.finfo(found[name].dtype)
        edge = [0.0, -0.0, limits.tiny, limits.smallest_normal / 2, -min(limits.max, torch.finfo(torch.float32).max)]
        found[name][3, :5] = torch.tensor(edge, dtype=torch.float64).to(found[name].dtype)
    return found


def safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> Safetensors:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Safetensors([folder / "model.safetensors"], FACTS)


def shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Safetensors:
    names = sorted(tensors)
    for number in range(3):
        save_file({n: tensors[n] for n in names[number::3]}, folder / f"{number}.safetensors")
    return Safetensors([folder / f"{number}.safetensors" for number in range(3)], FACTS)


def pickles(folder: Path, tensors: dict[str, torch.Tensor]) -> Pickled:
    names = sorted(tensors)
    torch.save({n: tensors[n] for n in names[::2]}, folder / "a.bin")
    torch.save({n: tensors[n] for n in names[1::2]}, folder / "b.bin")
    return Pickled([folder / "a.bin", folder / "b.bin"], FACTS)


def old_pickle(folder: Path, tensors: dict[str, torch.Tensor]) -> Pickled:
    torch.save(tensors, folder / "old.bin", _use_new_zipfile_serialization=False)
    return Pickled([folder / "old.bin"], FACTS)


Write = Callable[[Path, dict[str, torch.Tensor]], Checkpoint]


@pytest.fixture(scope="module", params=[safetensors, shards, pickles, old_pickle], ids=lambda write: write.__name__)
def stored(request: pytest.FixtureRequest, tensors: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    write: Write = request.param
    return write(tmp_path_factory.mktemp("stored"), tensors)


def test_all_tensors_are_there_with_their_shapes(stored: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert dict(stored.shapes) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert {stored.blocks(name) for name in tensors} == {""}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_are_those_of_the_tensor_in_f32(
    stored: Checkpoint, tensors: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(tensors)))
    start = data.draw(st.integers(0, len(tensors[name])))
    stop = data.draw(st.integers(start, len(tensors[name])))
    found = stored.rows(name, start, stop)
    assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_array_equal(found, tensors[name].float().numpy()[start:stop])
    assert np.signbit(found).tolist() == np.signbit(tensors[name].float().numpy()[start:stop]).tolist()


def test_files_that_leave_out_or_add_the_name_of_the_inner_model_are_read_alike(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), **short}
    found = safetensors(tmp_path, old)
    assert {*found.shapes} == {*tensors}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found.rows(name, 0, len(tensor)), tensor.float().numpy())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_drawn_weights_are_one_draw_for_each_matrix_and_ones_and_zeros_beside(kind: str, tied: bool) -> None:
    config = folders.shape(kind, tie_word_embeddings=tied, attention_bias=True)
    stored = Drawn(facts_of(config), 9, 0.03)
    wanted = folders.tensors(config)
    assert dict(stored.shapes) == {name: weights.shape for name, weights in wanted.items()}
    for name, weights in wanted.items():
        if weights.ndim == 2:
            expected = draw(9, name, weights.shape, 0.03)
        else:
            expected = np.full(weights.shape, 0 if "bias" in name else 1, np.float32)
        for start, stop in ((0, len(weights)), (1, len(weights)), (len(weights) // 2, len(weights) // 2 + 1)):
            np.testing.assert_array_equal(stored.rows(name, start, stop), expected[start:stop], err_msg=name)


# --- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [EMBEDDING, HEAD])
def test_a_tied_head_and_table_are_one_whichever_is_stored(tmp_path: Path, left: str) -> None:
    weights = folders.tensors(folders.shape())
    table = weights.pop(EMBEDDING)
    save_file({n: torch.from_numpy(w) for n, w in {**weights, left: table}.items()}, tmp_path / "model.safetensors")
    model = Model(Safetensors([tmp_path / "model.safetensors"], facts_of(folders.shape())), "m", True)
    for name in (EMBEDDING, HEAD):
        assert (model.shape(name), model.has(name)) == (table.shape, True)
        np.testing.assert_array_equal(model.rows(name, 5, 9), table[5:9])
    assert not model.has("model.layers.0.mlp.up_proj.bias")


def test_a_head_that_differs_from_the_table_it_is_tied_to_is_noticed(tmp_path: Path) -> None:
    facts = facts_of(folders.shape())
    weights = {n: torch.from_numpy(w) for n, w in folders.tensors(folders.shape()).items()}

    def stored(head: torch.Tensor) -> Safetensors:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({**weights, HEAD: head}, path)
        return Safetensors([path], facts)

    other = weights[EMBEDDING].clone()
    other[-1, -1] += 1
    assert [untied(stored(head)) for head in (weights[EMBEDDING].clone(), other)] == [False, True]
    alone = tmp_path / "alone.safetensors"
    save_file(weights, alone)
    assert untied(Safetensors([alone], facts)) is False


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", EMBEDDING])
def test_rows_that_are_no_numbers_are_named_and_others_are_read(tmp_path: Path, name: str, value: float) -> None:
    weights = folders.tensors(folders.shape())
    weights[name].reshape(-1)[[5, 7]] = value
    save_file({n: torch.from_numpy(w) for n, w in weights.items()}, tmp_path / "model.safetensors")
    model = Model(Safetensors([tmp_path / "model.safetensors"], facts_of(folders.shape())), "a model", True)
    told = f"^a model: {name} has 2 values that are NaN or infinite, of {weights[name].size}$"
    with pytest.raises(InputError, match=told):
        model.whole(name)
    assert len(model.rows(name, 10, 20)) == 10


def test_numbers_beyond_f32_are_infinite_and_large_ones_are_not(tmp_path: Path) -> None:
    weights = {n: torch.from_numpy(w) for n, w in folders.tensors(folders.shape()).items()}
    weights["model.norm.weight"] = torch.full((32,), 1e300, dtype=torch.float64)
    weights["model.layers.0.input_layernorm.weight"] = torch.full((32,), 3e38)
    save_file(weights, tmp_path / "model.safetensors")
    model = Model(Safetensors([tmp_path / "model.safetensors"], facts_of(folders.shape())), "m", True)
    with pytest.raises(InputError, match=r"model\.norm\.weight has 32 values"):
        model.whole("model.norm.weight")
    large = model.whole("model.layers.0.input_layernorm.weight")
    assert np.array_equal(large, np.full(32, 3e38, np.float32)), "their sum is infinite, they are not"


def test_blocks_are_of_no_plain_number(stored: Checkpoint) -> None:
    model = Model(stored, "m", False)
    assert model.blocks(HEAD) == ""
    with pytest.raises(NotImplementedError, match="plain numbers"):
        model.quantized(HEAD, 0, 1)


def test_the_library_reads_the_same_of_a_folder(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "model", "qwen2", tie_word_embeddings=False)
    weights = huggingface.source_of(str(folder), False, 0).weights
    built = huggingface.load(str(folder), False, 0, "eager")
    assert {name for name, _ in built.named_parameters()} == {*weights.stored.shapes}
    for name, parameter in built.named_parameters():
        np.testing.assert_array_equal(weights.whole(name), parameter.numpy(), err_msg=name)


def test_reading_rows_does_not_read_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is mapped once, whatever is read of it."""
    mapped: list[Path] = []
    real = checkpoint._mapped
    monkeypatch.setattr(checkpoint, "_mapped", lambda path: (mapped.append(path), real(path))[1])
    weights = {n: torch.from_numpy(w) for n, w in folders.tensors(folders.shape()).items()}
    save_file(weights, tmp_path / "model.safetensors")
    stored = Safetensors([tmp_path / "model.safetensors"], facts_of(folders.shape()))
    assert mapped == []
    for name in weights:
        assert np.array_equal(stored.rows(name, 0, 1), weights[name].numpy()[:1])
    assert mapped == [tmp_path / "model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
