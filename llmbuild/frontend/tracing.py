"""A model's entry points as exported torch programs: traced on tensors without bytes, the prompt length dynamic."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from llmbuild.frontend import repeat
from llmbuild.frontend.cache import new_cache
from llmbuild.frontend.entry import Decode, Prefill, Score, Step
from llmbuild.spec.program import DECODE, PREFILL, SCORE, STEP, Abi

Call = tuple[nn.Module, tuple[object, ...], tuple[object, ...]]
"""A module, arguments that it is traced with, and which of their sizes are dynamic."""

Programs = dict[str, torch.export.ExportedProgram]


def export(model: Any, abi: Abi) -> Programs:
    """Trace the entry points.

    Of layers that are alike, two are traced: `repeat` makes the others.
    """
    if len({type(layer) for layer in model.model.layers}) > 1 or not _alike(model):
        return entries(model, abi, new_cache(abi.kv))
    per_layer = len(abi.kv) // model.config.num_hidden_layers
    with repeat.shortened(model.model) as count:
        kv = new_cache(abi.kv[: per_layer * min(count, repeat.TRACED)])
        return entries(model, abi, kv)


def _alike(model: Any) -> bool:
    """Return whether decoder layers store the same: our kernels' layers are several in one, and are few."""

    def kinds(layer: nn.Module) -> list[tuple[str, tuple[int, ...], str]]:
        tensors = (*layer.named_parameters(), *layer.named_buffers())
        return [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]

    layers = list(model.model.layers)
    return len(layers) == model.config.num_hidden_layers and all(kinds(x) == kinds(layers[0]) for x in layers)


def entries(model: Any, abi: Abi, kv: list[torch.Tensor]) -> Programs:
    """Trace the entry points with these caches."""
    length = torch.export.Dim("T", min=2, max=abi.context)
    fixed = [None] * len(kv)
    long = torch.zeros(abi.batch, min(8, abi.context), dtype=torch.int64)
    one, start = torch.zeros(abi.batch, dtype=torch.int64), torch.zeros(abi.batch, dtype=torch.int64)
    calls: dict[str, Call] = {
        PREFILL: (Prefill(model, abi.context), (long, start, kv), ({1: length}, None, fixed)),
        DECODE: (Decode(model, abi.context), (one, start, kv), (None, None, fixed)),
    }
    if abi.score:
        calls[SCORE] = Score(model, abi.context), (long, start, kv), ({1: length}, None, fixed)
    if abi.page:
        calls[STEP] = _step(model, abi.context, kv)
    return traced(calls)


def _step(model: Any, context: int, kv: list[torch.Tensor]) -> Call:
    """Return the step of any rows, with a cache of any number of places."""
    rows, items, read, places = (torch.export.Dim(name, min=2) for name in ("rows", "items", "read", "places"))
    long, where, picked = (torch.zeros(size, dtype=torch.int64) for size in (5, 12, 3))
    sizes = ({0: rows}, {0: rows}, {0: items}, {0: read}, [{0: places}] * len(kv))
    return Step(model, context), (long, long.clone(), where, picked, kv), sizes


def traced(calls: Mapping[str, Call]) -> Programs:
    """Trace calls, each under its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own use of its own tree specs
        return {
            name: torch.export.export(entry, args, dynamic_shapes=shapes, strict=False).run_decompositions({})
            for name, (entry, args, shapes) in calls.items()
        }
