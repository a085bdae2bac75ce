"""The library run layer by layer: what it says of a text is what its whole, untouched model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmbuild.errors import InputError
from llmbuild.frontend import attention, huggingface, layerwise
from llmbuild.frontend.cache import layer_buffers
from llmbuild.frontend.check import Check, Kept
from llmbuild.frontend.formats import Formats
from llmbuild.frontend.huggingface import LIBRARY_ATTENTION
from llmbuild.frontend.layerwise import Cached, Layers, embedded, own_vectors
from llmbuild.frontend.tensors import HEAD
from llmbuild.frontend.truth import CheckTokens, truth
from llmbuild.frontend.weights import Source
from llmbuild.spec.program import Abi
from tests.support import folders
from tests.support.artifact import relative_error
from tests.support.eager import Held, library_says, model_of, reference, source_config

CONTEXT = 48
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 5, "rope_parameters": LLAMA3}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("mistral", {"num_hidden_layers": 4, "sliding_window": CONTEXT, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"num_hidden_layers": 4, "rope_parameters": YARN, "hidden_act": "gelu"}),
    "qwen3": ("qwen3", {"num_hidden_layers": 4, "head_dim": 16, "attention_bias": True}),
    "qwen3-windows": (
        "qwen3",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": CONTEXT,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
    ),
}
TEXTS = np.random.default_rng(0).integers(0, 64, (3, 40))


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, changes = MODELS[request.param]
    return folders.write(tmp_path_factory.mktemp(request.param) / "model", kind, **changes)


@pytest.fixture(scope="module")
def untouched(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def test_logits_layer_by_layer_are_those_of_the_whole_model(folder: Path, untouched: Any) -> None:
    with torch.inference_mode():
        expected = untouched(torch.from_numpy(TEXTS)).logits.numpy()
    actual = reference(folder, TEXTS)
    assert actual.shape == (3, 40, 64)
    assert relative_error(actual, expected) < 1e-5


def test_the_truth_of_a_check_is_what_the_whole_model_says(folder: Path, untouched: Any) -> None:
    tokens = CheckTokens(TEXTS[:2, :9], TEXTS[:2, 9:14], np.array([9, 5]))
    kv = layer_buffers(
        "f32", 2 * CONTEXT, untouched.config.num_key_value_heads, untouched.model.layers[0].self_attn.head_dim
    )
    abi = Abi(64, CONTEXT, kv * untouched.config.num_hidden_layers, (), 0, batch=2)
    found = truth(source_config(folder), model_of(folder), abi, tokens)
    assert found.shape == (6, 2, 64)
    assert relative_error(found, library_says(untouched, tokens)) < 1e-5


def test_states_of_each_layer_are_those_of_the_whole_model(folder: Path, untouched: Any) -> None:
    model = model_of(folder)
    with torch.inference_mode():
        states = untouched(torch.from_numpy(TEXTS), output_hidden_states=True).hidden_states
        layers = Layers(source_config(folder), LIBRARY_ATTENTION)
        now = embedded(own_vectors(model), TEXTS)
        assert torch.equal(now, states[0])
        for index in range(untouched.config.num_hidden_layers - 1):
            layers.layer(index, model.whole)
            now = layers.run(now)
            assert relative_error(now.numpy(), states[index + 1].numpy()) < 1e-5


@pytest.mark.parametrize(
    ("kind", "own", "limit"),
    [("f32", "", 1e-5), ("f16", "", 5e-3), ("int8", "", 5e-2), ("f32", "int8", 5e-2), ("f32", "k8v4", 0.2)],
)
def test_our_attention_reads_what_it_wrote_to_a_cache(
    folder: Path, untouched: Any, kind: str, own: str, limit: float
) -> None:
    """Rounding of what is cached shows, and is all that does."""
    attention.register()
    config, model = source_config(folder), model_of(folder)
    heads, size = untouched.config.num_key_value_heads, untouched.model.layers[0].self_attn.head_dim
    cached = Cached(lambda tokens: layer_buffers(kind, tokens, heads, size), own)
    plain, ours = Layers(config, LIBRARY_ATTENTION), Layers(config, attention.NAME, cached)
    with torch.inference_mode():
        states = embedded(own_vectors(model), TEXTS)
        for layers in (plain, ours):
            layers.layer(0, model.whole)
        expected, actual = plain.run(states) - states, ours.run(states) - states
    off = relative_error(actual.numpy(), expected.numpy())
    assert off < limit
    assert (off > 1e-4) == (kind != "f32" or own != "")
    assert kind == "f32" or off > 1e-7


def test_a_head_in_parts_is_the_head(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(folder)
    states = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, 32)).astype(np.float32))
    expected = states.numpy() @ model.whole(HEAD).T
    for weights in (1, 32 * 7, 1 << 23):
        monkeypatch.setattr(layerwise, "HEAD_WEIGHTS", weights)
        found = np.zeros((2, 3, 64), np.float32)
        layerwise.through_head(model, states, found)
        assert relative_error(found, expected) < 1e-6


def test_tokens_are_looked_up_once_each() -> None:
    asked: list[int] = []

    def look(token: int) -> np.ndarray:
        asked.append(token)
        return np.full((1, 4), token, np.float32)

    tokens = np.array([[3, 1, 3], [1, 7, 7]])
    found = embedded(look, tokens)
    assert sorted(asked) == [1, 3, 7]
    assert np.array_equal(found[..., 0].numpy(), tokens)


def test_a_model_whose_answers_are_no_numbers_is_refused(tmp_path: Path) -> None:
    model = folders.write(tmp_path / "model", num_hidden_layers=1)
    weights, config = model_of(model), source_config(model)
    huge = {name: weights.whole(name) * np.float32(1e19) for name in weights.stored.shapes}
    large = type(weights)(Held(huge), "huge", True)
    tokens = CheckTokens(TEXTS[:1, :9], TEXTS[:1, 9:14], np.array([9]))
    abi = Abi(64, CONTEXT, layer_buffers("f32", CONTEXT, 2, 8), (), 0)
    with np.errstate(all="ignore"), pytest.raises(InputError, match=r"^huge: .* NaN or infinite"):
        truth(config, large, abi, tokens)


def test_the_check_runs_what_is_kept_of_a_layer_and_goes_on_from_its_states(folder: Path, untouched: Any) -> None:
    """With weights as they are, logits are the library's; saved states and restored ones give the same bits."""
    attention.register()
    config, model = source_config(folder), model_of(folder)
    heads, size = untouched.config.num_key_value_heads, untouched.model.layers[0].self_attn.head_dim
    cached = Cached(lambda tokens: layer_buffers("f32", tokens, heads, size))
    tokens = CheckTokens(TEXTS[:2, :9], TEXTS[:2, 9:14], np.array([9, 5]))
    source, layers = Source(model, Formats("f32", "f32")), untouched.config.num_hidden_layers

    def begun() -> Check:
        return Check(config, cached, lambda *_: None, tokens, own_vectors(model))

    def filled(check: Check, index: int) -> Kept:
        kept = check.room(source, index)
        for name in list(kept._filled):
            kept.keep(name.removesuffix(".weight"), 0, model.whole(name))
        return kept

    def ended(check: Check) -> dict[str, np.ndarray]:
        check.head(source.whole("model.norm.weight"), 64)
        for start in (0, 40):
            check.keep("lm_head", start, model.rows(HEAD, start, min(start + 40, 64)))
        check.keep("model.embed_tokens", 0, np.zeros((64, 32), np.float32))
        return check.data(None)

    through, resumed = begun(), begun()
    saved: dict[str, np.ndarray] = {}
    for index in range(layers):
        through.layer(index, filled(through, index))
        if index == 0:
            saved = {name: state.copy() for name, state in through.state().items()}
    resumed.restore(saved)
    for index in range(1, layers):
        resumed.layer(index, filled(resumed, index))
    one, two = ended(through), ended(resumed)
    assert {name: found.tobytes() for name, found in one.items()} == {n: found.tobytes() for n, found in two.items()}
    assert relative_error(one["logits"], library_says(untouched, tokens)) < 1e-5
    assert 0 < one["noise"] < 1e-4


def test_a_skeleton_holds_no_weights(folder: Path) -> None:
    built = huggingface.source_of(str(folder), False, 0).skeleton(attention.NAME).model
    assert all(
        type(tensor).__name__ == "FakeTensor" or "Parameter" in type(tensor).__name__ for tensor in built.parameters()
    )
    with pytest.raises(RuntimeError):
        next(built.parameters()).numpy()
