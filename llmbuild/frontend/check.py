"""The check data of a program: what it must say on a few tokens, computed from its weights as they are stored.

Layers are run one after another while the archive is written: what the archive holds of a layer is in memory then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.frontend import attention
from llmbuild.frontend.checkpoint import Floats
from llmbuild.frontend.formats import TABLES
from llmbuild.frontend.layerwise import Cached, Layers, Look, embedded
from llmbuild.frontend.truth import CheckTokens, Texts, distance
from llmbuild.frontend.weights import Source
from llmbuild.kernels.layouts import Layout
from llmbuild.transform.reference import rounded_rows
from llmbuild.transform.weights import pad_width

NUDGE = 1e-6
NOISE_FORCED = 2
"""Forced tokens that noise is measured on."""

Rounding = Callable[[int, str], Layout | None]
"""From a decoder layer's number and a matrix's name in it to the layout that rounds what it reads, if one does."""


class Kept:
    """The matrices f32 of one decoder layer as a program has them, filled by rows from several threads."""

    def __init__(self, source: Source, index: int) -> None:
        self.source, self.prefix = source, f"model.layers.{index}."
        self._filled: dict[str, Floats] = {}

    def room(self, names: list[str]) -> None:
        """Make room for the matrices of these tensors."""
        for name in names:
            shape = self.source.model.shape(self.prefix + name)
            if len(shape) == 2:
                self._filled[f"{self.prefix}{name}"] = np.empty(shape, np.float32)

    def keep(self, layer: str, start: int, rows: Floats) -> None:
        """Take rows of a matrix."""
        self._filled[f"{layer}.weight"][start : start + len(rows)] = rows

    def __call__(self, name: str) -> Floats:
        """Return a tensor."""
        found = self._filled.get(name)
        return self.source.whole(name) if found is None else found


class Check:
    """The states of the check's texts on their way through the layers: as they are, and a millionth off."""

    def __init__(self, config: Any, cached: Cached, rounding: Rounding, tokens: CheckTokens, look: Look) -> None:
        attention.register()
        self.tokens, self._head, self._at = tokens, rounding(0, TABLES[1]), 0
        self._layers = Layers(config, attention.NAME, cached)
        for name, part in self._layers.module.named_modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(_rounds(partial(self._layout, rounding, name)))
        self._texts: list[Texts] = [tokens.texts(), tokens.texts(NOISE_FORCED)]
        with torch.inference_mode():
            plain = [embedded(look, line[None]) for line in self._texts[0].lines]
            nudged = [_nudged(embedded(look, line[None])) for line in self._texts[1].lines]
        self._states = [plain, nudged]
        self._rows: np.ndarray = np.empty(0)
        self._logits: np.ndarray = np.empty(0)

    def _layout(self, rounding: Rounding, name: str) -> Layout | None:
        return rounding(self._at, name)

    def room(self, source: Source, index: int) -> Kept:
        """Return the room for a layer's matrices."""
        kept = Kept(source, index)
        kept.room(self._layers.names)
        return kept

    def layer(self, index: int, weights: Kept) -> None:
        """Run a layer."""
        self._at = index
        with torch.inference_mode(), _half_of_the_threads():
            self._layers.layer(index, weights)
            self._states = [[self._layers.run(state) for state in states] for states in self._states]

    def state(self) -> dict[str, np.ndarray]:
        """Return the states, by names of their own."""
        return {f"check.{i}.{j}": s.numpy() for i, part in enumerate(self._states) for j, s in enumerate(part)}

    def restore(self, saved: Mapping[str, np.ndarray]) -> None:
        """Go on from states that `state` returned."""
        self._states = [
            [torch.from_numpy(saved[f"check.{i}.{j}"]) for j in range(len(part))] for i, part in enumerate(self._states)
        ]

    def head(self, norm: Floats, vocabulary: int) -> None:
        """Normalize what the head reads; its rows then come by `keep`."""
        with torch.inference_mode():
            picked = [texts.rows(states) for texts, states in zip(self._texts, self._states, strict=True)]
            rows = self._layers.normalized(torch.cat(picked), norm).numpy()
        flat = rows.reshape(-1, rows.shape[-1])
        if self._head is not None:
            flat = _rounded(flat, self._head)
        self._rows = flat
        self._logits = np.empty((*rows.shape[:-1], vocabulary), np.float32)

    def keep(self, layer: str, start: int, rows: Floats) -> None:
        """Take rows of the head; the token table's are of no use here."""
        if layer == TABLES[1]:
            out = self._rows @ rows.T
            self._logits[..., start : start + len(rows)] = out.reshape(*self._logits.shape[:-1], len(rows))

    def data(self, truth: np.ndarray | None) -> dict[str, np.ndarray]:
        """Return prompts, forced tokens and logits: see `Program.check`.

        The logits are the library's own where there is `truth`, else those of the weights as they are stored. `noise`
        is how far the logits move, root mean square over their own, when every token vector moves by a millionth:
        rounding to integers inside the model can make much of little, and no artifact can be nearer than that.
        """
        count = len(self._texts[0].picked)
        logits, moved = self._logits[:count], self._logits[count:]
        noise = np.asarray(distance(moved, logits[: len(moved)]), np.float32)
        tokens = self.tokens
        found = {"prompt": tokens.prompt, "forced": tokens.forced, "start": tokens.start}
        return {**found, "logits": np.ascontiguousarray(logits) if truth is None else truth, "noise": noise}


@contextmanager
def _half_of_the_threads() -> Iterator[None]:
    """Leave CPUs to what packs the next layer meanwhile: threads of PyTorch spin while they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rounds(layout_now: Callable[[], Layout | None]) -> Any:
    def hook(_: nn.Module, read: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        layout = layout_now()
        if layout is None:
            return read
        flat = read[0].flatten(0, -2).numpy()
        return (torch.from_numpy(_rounded(flat, layout)).view(read[0].shape),)

    return hook


def _rounded(rows: Floats, layout: Layout) -> Floats:
    """Return rows f32[T,K] as they are when they meet weights of a layout."""
    wide = rounded_rows(pad_width(rows, layout.columns), layout)
    return np.ascontiguousarray(wide[:, : rows.shape[1]], np.float32)


def _nudged(vectors: torch.Tensor) -> torch.Tensor:
    signs = torch.arange(vectors.numel()).remainder(2).mul(2).sub(1).view(vectors.shape)
    return vectors * (1 + NUDGE * signs)
