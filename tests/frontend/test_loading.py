"""Models of strangers, loaded: what the library reads is what the folder was judged by, and nothing is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from llmbuild.errors import InputError
from llmbuild.frontend import huggingface, program
from llmbuild.frontend.reference import reference_greedy
from llmbuild.frontend.source import find_model
from llmbuild.frontend.tensors import places
from llmbuild.spec.model import facts_of
from llmbuild.spec.program import ImportJob
from llmbuild.spec.recipe import ModelSource
from tests.frontend.conftest import BIASED, Imports
from tests.support import folders
from tests.support.artifact import relative_error
from tests.support.eager import library_says, reference

CONTEXT = 64
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def load(folder: Path) -> huggingface.Loaded:
    return huggingface.load_told(str(folder), False, 0, "eager", CONTEXT)


def take(folder: Path, **choices: str) -> program.Taken:
    job = ImportJob(str(folder), CONTEXT, choices=tuple(choices.items()))
    return program.take(job, program.settle(job))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(folder)
    return str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folders.write(tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("llama", {"num_key_value_heads": ..., "return_dict": False, "output_hidden_states": True, "use_cache": False}),
        ("mistral", {"sliding_window": CONTEXT, "rope_scaling": LINEAR, "architectures": ["LlamaForCausalLM"]}),
        ("qwen2", {"head_dim": ..., "rope_parameters": YARN, "hidden_act": "gelu"}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": CONTEXT, "max_window_layers": 0}),
        ("qwen3", {"head_dim": 16, "attention_bias": True, "num_hidden_layers": 1}),
    ],
)
def test_places_are_those_of_the_class_and_its_import_says_what_the_library_says(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    folder = folders.write(tmp_path / "model", kind, **changes)
    config = folders.shape(kind, **changes)
    taken = take(folder)  # is refused where the library says otherwise
    expected = places(facts_of(config), config["num_hidden_layers"])
    assert {name: tuple(tensor.shape) for name, tensor in taken.skeleton.model.state_dict().items()} == expected
    assert taken.notes == ()


@pytest.mark.parametrize(
    ("kind", "more"), [("mistral", {}), ("qwen3", {"use_sliding_window": True, "max_window_layers": 0})]
)
def test_the_reference_of_a_model_whose_window_the_context_fits_in_is_taken(
    tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    folder = folders.write(tmp_path / "model", kind, sliding_window=8, **more)
    windows = np.arange(16).reshape(2, 8)
    assert reference(folder, windows).shape[:2] == (2, 8)
    assert reference_greedy(str(folder), False, 0, windows[0, :4], 4).shape == (4,)
    with pytest.raises(InputError, match=r"sliding_window 8: .* shorter than the context of 9"):
        reference_greedy(str(folder), False, 0, windows[0, :4], 5)


def test_check_data_of_f32_is_what_the_untouched_library_says(imports: Imports) -> None:
    from transformers import AutoModelForCausalLM

    made = imports(imports.model(**BIASED), context=CONTEXT, batch=3)  # as in `test_batch`
    plain = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32, attn_implementation="eager")
    assert type(plain).__name__ == "LlamaForCausalLM"
    with np.load(made.folder / "check.npz") as check, torch.inference_mode():
        for row in range(3):
            start = check["start"][row]
            text = np.concatenate([check["prompt"][row, :start], check["forced"][row]])
            last = plain(torch.from_numpy(check["prompt"][row : row + 1])).logits[0, -1].numpy()
            then = plain(torch.from_numpy(text[None])).logits[0, start:].numpy()
            np.testing.assert_allclose(check["logits"][:, row], [last, *then], rtol=1e-4, atol=1e-5)


def test_an_import_that_computes_something_else_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(positions: torch.Tensor, context: int) -> torch.Tensor:
        places = torch.arange(context)[None, None, :]
        seen = (places <= positions[:, :, None]) & (places > positions[:, :, None] - 4)
        return torch.where(seen, 0.0, -1e9)[:, None]

    monkeypatch.setattr("llmbuild.frontend.layerwise.causal_mask", narrow)
    with pytest.raises(InputError, match="computes other logits than the library's own model"):
        take(model, weight_format="int8")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(model: Path, value: float) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight has 1 values that are NaN or infinite, of 1408" in refused(model)


def test_numbers_beyond_f32_are_named(model: Path) -> None:
    weights = dict(load_file(model / "model.safetensors"))
    weights["model.norm.weight"] = np.full(32, 1e300)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight has 32 values" in refused(model)


@pytest.mark.parametrize("scaled", [True, False])
def test_weights_in_8_bits_are_refused_before_anything_is_loaded(model: Path, scaled: bool) -> None:
    weights = {name: torch.from_numpy(value) for name, value in load_file(model / "model.safetensors").items()}
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = (weights[name] * 100).to(torch.float8_e4m3fn)
    if scaled:
        weights[f"{name}_scale"] = torch.tensor(0.01)
    save_torch(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        find_model(ModelSource("huggingface", str(model)), CONTEXT)
    assert f"{name} is F8_E4M3" in str(caught.value)
    assert (f"{name}_scale (F32 a single number)" in str(caught.value)) == scaled


def test_pickled_weights_are_held_against_the_configuration_too(model: Path) -> None:
    weights = {name: torch.from_numpy(value) for name, value in load_file(model / "model.safetensors").items()}
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    assert load(model).notes == ()
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    torch.save({**weights, "extra": torch.ones(2)}, model / "pytorch_model.bin")
    message = refused(model)
    assert "no place for: extra (F32 2)" in message
    assert "model.norm.weight is int8" in message


def test_pickles_that_hold_something_else_are_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    assert "the library cannot load this model" in refused(model)


def test_the_library_reads_nothing_that_lies_beside(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = huggingface._library.AutoModelForCausalLM.from_pretrained

    def watched(folder: Path, **options: Any) -> Any:
        seen.append(sorted(path.name for path in folder.iterdir()))
        return real(folder, **options)

    monkeypatch.setattr(huggingface._library.AutoModelForCausalLM, "from_pretrained", watched)
    for name in ("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "custom_generate.py"):
        (model / name).write_bytes(b"{}")
    load(model)
    assert seen == [["config.json", "model.safetensors"]]


def test_what_the_library_warns_of_is_told_and_not_printed(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = load_file(model / "model.safetensors")
    weights[folders.HEAD] = weights[folders.EMBEDDING] * 2
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (note,) = load(model).notes
    assert "both are present in the checkpoints with different values" in note
    assert take(model).notes == (huggingface.UNTIED,)
    assert capfd.readouterr() == ("", "")


def test_tokens_are_tried_without_a_tokenizer_and_with_random_weights(model: Path) -> None:
    built = huggingface.load(str(model), True, 7, "eager", CONTEXT)
    job = ImportJob(str(model), CONTEXT, random_init=True, seed=7)
    taken = program.take(job, program.settle(job))
    assert relative_error(taken.truth, library_says(built, taken.tokens)) < 1e-5
