"""How much a text shows that matrices are rounded, all of a model in one pass forwards and one back.

The KL divergence of the next token that a small change of a matrix causes is half the mean square of what it does to
the log-probability of a token drawn from the model (its Fisher information). What a change of weights does there is, to
first order, the change of the matrix's outputs times their gradient. Errors at different tokens are taken as
independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.frontend.checkpoint import Model
from llmbuild.frontend.layerwise import Layers, embedded, head_parts, own_vectors
from llmbuild.spec.formats import Format
from llmbuild.transform.allocation import Part
from llmbuild.transform.quantized import dequantize, quantize

ROWS = 128
"""States whose logits are held at a time."""

Place = tuple[int, str]
"""A decoder layer's number, and the kind of its matrices."""


Change = Callable[[int, Any, torch.Tensor], object]
"""Changes a decoder layer in place, by its number, before it is rounded; it is given the states that come in."""


def harms(
    layers: Layers,
    model: Model,
    tokens: np.ndarray,
    form: Format,
    kinds: Mapping[str, Sequence[str]],
    change: Change = lambda *_: None,
) -> dict[Place, Part]:
    """Return what rounding to the nearest of a format does to each kind of matrix of each layer, on tokens i64[W,L].

    `kinds` are the names in a layer of the matrices that share a format. A layer is read twice, and held alone. What
    `change` does to it may not change what it computes.
    """
    count = layers.config.num_hidden_layers

    def load(index: int) -> Any:
        layers.layer(index, lambda name: np.array(model.whole(name), np.float32))
        return layers.module

    with torch.no_grad():
        states = [embedded(own_vectors(model), tokens)]
        for index in range(count):
            load(index)
            states.append(layers.run(states[-1]))
    gradient, found = _of_drawn(layers, model, states.pop()), dict[Place, Part]()
    for index in reversed(range(count)):
        module, entering = load(index), states.pop()
        with torch.no_grad():
            change(index, module, entering)
        entering.requires_grad_()
        with torch.enable_grad(), _seen(module) as seen:
            layers.run(entering).backward(gradient)
        gradient = entering.grad if entering.grad is not None else torch.zeros_like(entering)
        for kind, names in kinds.items():
            parts = [module.get_submodule(name) for name in names]
            moved = sum(_moved(part.weight, form, *seen[name]) for name, part in zip(names, parts, strict=True))
            harm = float(torch.as_tensor(moved).square().mean()) / 2
            found[index, kind] = Part(sum(part.weight.numel() for part in parts), harm)
    return {(index, kind): found[index, kind] for index in range(count) for kind in kinds}


def _of_drawn(layers: Layers, model: Model, states: torch.Tensor) -> torch.Tensor:
    """Return the gradient f32[W,L,hidden] of the log-probability of tokens that are drawn from the model."""
    norm, draw = model.whole("model.norm.weight"), torch.Generator().manual_seed(0)
    found = []
    for rows in states.flatten(0, 1).split(ROWS):
        leaf = rows.detach().clone().requires_grad_()
        with torch.enable_grad():
            normal = layers.normalized(leaf, norm)
            logits = torch.cat([nn.functional.linear(normal, part) for _, part in head_parts(model)], -1)
            likely = torch.log_softmax(logits, -1)
            drawn = torch.multinomial(likely.detach().exp(), 1, generator=draw)
            likely.gather(1, drawn).sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    return torch.cat(found).view(states.shape)


def _moved(weight: torch.Tensor, form: Format, read: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return how far rounding moves the log-probability at each token, f32[W*L]."""
    dense = weight.detach()
    change = torch.from_numpy(dequantize(quantize(dense.numpy(), form))) - dense
    return (nn.functional.linear(read, change) * gradient).sum(-1)


@contextmanager
def _seen(module: Any) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Give what each matrix of a layer reads f32[W*L,K], and once the layer was run back the gradient of what it wrote
    f32[W*L,N], by its name.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):

            def keep(_: nn.Module, read: tuple[torch.Tensor], out: torch.Tensor, name: str = name) -> None:
                entered = read[0].detach().flatten(0, -2)
                out.register_hook(lambda grad: seen.__setitem__(name, (entered, grad.flatten(0, -2))))

            handles.append(part.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
