"""Models in memory: their modules filled as an import fills an archive, and run by torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from llmbuild.frontend import archive, huggingface, importer
from llmbuild.frontend.cache import new_cache
from llmbuild.frontend.checkpoint import Floats, Model, Plain
from llmbuild.frontend.entry import Decode, Prefill
from llmbuild.frontend.huggingface import LIBRARY_ATTENTION
from llmbuild.frontend.layerwise import Layers, Look, Weights, embedded
from llmbuild.frontend.modules import Matrix, Store
from llmbuild.frontend.reference import reference_logits
from llmbuild.frontend.tensors import HEAD
from llmbuild.frontend.truth import CheckTokens
from llmbuild.frontend.weights import Source
from llmbuild.spec.program import Abi
from llmbuild.transform.panels import encode
from llmbuild.transform.stored import Rows
from llmbuild.transform.weights import Array
from tests.support import buffers


class Held(Plain):
    """Weights that are arrays in memory."""

    def __init__(self, tensors: Mapping[str, Floats]) -> None:
        self.tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the library's names."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows f32 of a tensor."""
        return self.tensors[name][start:stop]


def model_of(folder: Path) -> Model:
    """Return the weights of a model folder."""
    return huggingface.source_of(str(folder), False, 0).weights


def source_config(folder: Path) -> Any:
    """Return the library's configuration of a model folder."""
    return huggingface.source_of(str(folder), False, 0).skeleton(LIBRARY_ATTENTION).model.config


def weights_of(model: Any) -> Model:
    """Return the weights of a model of the library, in f32 and in memory; a copy of them."""
    tensors = {name: tensor.numpy().copy() for name, tensor in model.named_parameters()}
    return Model(Held(tensors), "in memory", model.config.tie_word_embeddings)


def as_bytes(tensor: torch.Tensor) -> Array:
    """Return the bytes u8[n] of a tensor, which they share."""
    found: Array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return found


def filled(kind: Store, dense: Floats, form: str) -> Matrix:
    """Return a matrix that holds f32[N,K] in a format."""
    made = kind(Rows((("", len(dense)),)), dense.shape[1], form)
    for name, array in made.stored.encode(encode(form, dense)).items():
        as_bytes(getattr(made, name))[:] = array.reshape(-1).view(np.uint8)
    return made


def fill(model: Any, source: Source) -> None:
    """Put weights into the modules that the choices of an import have put into a model, outside of any fake mode."""
    names = importer.canonical(model)
    tensors = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if names[n] == n}
    constants = {n: t.numpy() for n, t in model.named_buffers() if "rotary_emb" in n}
    plan = archive.plan(model, {name: tensor.nbytes for name, tensor in tensors.items()}, constants)
    held = {name: as_bytes(tensor) for name, tensor in tensors.items()}
    makes: Iterable[archive.Make]
    for makes in (*plan.layers, plan.tables, plan.rest):
        buffers.make(plan.units(makes, source), held)


def reference(folder: Path, windows: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Return the library's logits f32[W,L,V] of a model folder, or of random weights of its shape."""
    with TemporaryDirectory() as out:
        path = Path(out) / "logits.npy"
        reference_logits(str(folder), seed is not None, seed or 0, windows, path)
        found: np.ndarray = np.load(path)
        return found


def library_says(model: Any, tokens: CheckTokens) -> np.ndarray:
    """Return logits f32[1+D,B,V] of a model of the library, without a cache: after prompts, then after each token."""
    rows = []
    with torch.inference_mode():
        for prompt, forced, start in zip(tokens.prompt, tokens.forced, tokens.start, strict=True):
            first, then = (_whole(model, line) for line in (prompt, np.concatenate([prompt[:start], forced])))
            rows.append(torch.cat([first[-1:], then[start:]]))
    found: np.ndarray = torch.stack(rows, 1).numpy()
    return found


def _whole(model: Any, tokens: np.ndarray) -> torch.Tensor:
    logits: torch.Tensor = model(torch.from_numpy(tokens[None]), use_cache=False).logits[0].float()
    return logits


def layerwise(config: Any, look: Look, weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """Return logits f32[W,L,V] of the library's layers on some weights."""
    layers = Layers(config, LIBRARY_ATTENTION)
    with torch.inference_mode():
        states = embedded(look, tokens)
        for index in range(config.num_hidden_layers):
            layers.layer(index, weights)
            states = layers.run(states)
        states = layers.normalized(states, weights("model.norm.weight"))
        found: np.ndarray = (states @ torch.from_numpy(weights(HEAD)).T).numpy()
    return found


def run_eagerly(
    model: Any, abi: Abi, tokens: CheckTokens, count: int, cache: Sequence[torch.Tensor] | None = None
) -> np.ndarray:
    """Return logits f32[1+count,B,V]: of the prompts' last tokens, then of the first forced tokens."""
    kv = new_cache(abi.kv) if cache is None else list(cache)
    prefill, decode = Prefill(model, abi.context), Decode(model, abi.context)
    rows = [prefill(torch.from_numpy(tokens.prompt), torch.zeros(abi.batch, dtype=torch.int64), kv)[1]]
    for offset, forced in enumerate(tokens.forced.T[:count].copy()):
        rows.append(decode(torch.from_numpy(forced), torch.from_numpy(tokens.start + offset), kv)[1])
    found: np.ndarray = torch.stack(rows).view(len(rows), abi.batch, -1).numpy()
    return found
