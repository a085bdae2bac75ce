"""Quantize a model for the text it is meant for: what flows into each linear layer decides how its weights are rounded.

The library's own layers are run here, one after another, on calibration tokens; each sees what the layers before it
make of the text once they are quantized, and can make good some of their error. One layer is held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.errors import ChoiceRefused
from llmbuild.frontend.archive import LOOKED_UP
from llmbuild.frontend.checkpoint import Floats, Model
from llmbuild.frontend.formats import TABLES, Formats
from llmbuild.frontend.huggingface import LIBRARY_ATTENTION
from llmbuild.frontend.layerwise import Layers, Look, embedded, head_parts, own_vectors
from llmbuild.frontend.modules import FUSED_GROUPS
from llmbuild.frontend.scaling import Site, fitting_scale, fold, sites, spread
from llmbuild.frontend.sensitivity import harms
from llmbuild.frontend.tensors import HEAD
from llmbuild.frontend.weights import Patch, Source
from llmbuild.spec.formats import INTEGERS
from llmbuild.transform.allocation import share
from llmbuild.transform.gptq import DAMPING, gptq, nearest
from llmbuild.transform.quantized import Quantized, dequantize, quantize

SHARES_INPUT = {name: group[0] for group in FUSED_GROUPS for name in group}
TIED_DAMPING = 10 * DAMPING
SENSITIVE_SHARE = 0.25
"""Part of the layers' weights that keeps 8 bits when the sensitive ones do."""

FEW_BITS = 6
"""With more of them, no weight is worth clipping."""

SENSITIVE_FORMAT = "int8"
SENSITIVE_WINDOWS = 4
"""Windows that sensitivity is measured on: it takes a run of the model for each unit."""


def read_tokens(path: str) -> np.ndarray:
    """Return the calibration tokens i64[W,L] of an `.npy`.

    Raises:
        ChoiceRefused: there is no such file, or it holds something else.
    """
    if not path:
        raise ChoiceRefused(
            "quantization=gptq, scaling=activation, mixed=sensitive and allocation=sensitive need calibration text: "
            "name some in the recipe"
        )
    try:
        tokens = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ChoiceRefused(f"calibration {path}: cannot be read: {error}") from None
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int64:
        raise ChoiceRefused(f"calibration {path}: tokens must be i64[W,L]")
    return tokens


@dataclass(frozen=True)
class Asked:
    """What calibration is for: GPTQ, scaled channels, and the matrices for which a kernel rounds what they read to a
    byte, by their names in a decoder layer, or in the model for the head.
    """

    fitted: bool
    scaled: bool
    rounded: frozenset[str]

    def is_rounded(self, name: str) -> bool:
        """Return whether a kernel rounds what the matrix of this name in the model reads."""
        return name.split(".", 3)[-1] in self.rounded


class Calibration:
    """A model and calibration tokens i64[W,L]: patches for the token tables, and for one layer after another.

    `tables` comes first: what layers are fitted to begins with the token vectors as they are stored.
    """

    def __init__(self, config: Any, model: Model, tokens: np.ndarray) -> None:
        """Take both.

        Raises:
            ChoiceRefused: the tokens are not of this model, or a window is longer than the model can read.
        """
        vocabulary = config.vocab_size
        if tokens.ndim != 2 or tokens.size == 0 or tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ChoiceRefused(f"calibration tokens must be i64[W,L] with values from 0 to {vocabulary - 1}")
        limit, length = getattr(config, "max_position_embeddings", tokens.shape[1]), tokens.shape[1]
        if length > limit:
            raise ChoiceRefused(
                f"calibration windows of {length} tokens are longer than the {limit} that the model reads"
            )
        self.config, self.model, self.tied, self.tokens = config, model, model.tied, tokens
        self._layers = Layers(config, LIBRARY_ATTENTION)
        self._state: dict[str, np.ndarray] = {}

    def state(self) -> dict[str, np.ndarray]:
        """Return the hidden states that the next layer's patch is made from."""
        return self._state

    # --- running the model ---------------------------------------------------------------------------------------

    def _begin(self, windows: int | None = None) -> torch.Tensor:
        """Return the token vectors f32[W,L,hidden]."""
        return embedded(own_vectors(self.model), self.tokens[:windows])

    def _load(self, index: int) -> Any:
        """Return a layer with its own weights, which may be changed in place."""
        self._layers.layer(index, lambda name: np.array(self.model.whole(name), np.float32))
        return self._layers.module

    def final(self) -> torch.Tensor:
        """Return the final hidden states f32[W,L,hidden], before the norm."""
        states = self._begin()
        for index in range(self.config.num_hidden_layers):
            self._load(index)
            states = self._layers.run(states)
        return states

    # --- token tables --------------------------------------------------------------------------------------------

    def tables(self, formats: Formats, asked: Asked) -> Patch:
        """Return the patch of the final norm, the head and the token table."""
        if formats.head not in INTEGERS or not (asked.fitted or asked.scaled):
            return Patch()
        states = self.final()
        norm, head = nn.Module(), nn.Module()
        norm.weight = nn.Parameter(torch.from_numpy(self.model.whole("model.norm.weight").copy()), False)
        head.weight = nn.Parameter(torch.cat([rows for _, rows in head_parts(self.model)]), False)
        inputs = self._layers.normalized(states, norm.weight.numpy()).flatten(0, -2)
        dense: dict[str, Floats] = {}
        if asked.scaled:
            site = Site(norm, {TABLES[1]: head})  # type: ignore[dict-item]
            scale = fitting_scale(site, inputs, INTEGERS[formats.head], asked.is_rounded(TABLES[1]))
            fold(site, scale)
            inputs = inputs / scale
            dense = {"model.norm.weight": norm.weight.numpy(), HEAD: head.weight.numpy()}
            if self.tied:
                dense[LOOKED_UP] = (1 / scale).numpy()
        return Patch(dense, self._fit_tables(formats, head.weight.numpy(), inputs) if asked.fitted else {})

    def _fit_tables(self, formats: Formats, head: Floats, inputs: torch.Tensor) -> dict[str, Quantized]:
        """Round the head for its inputs f32[n,K]; the token table, whose rows are looked up, to the nearest.

        A tied table serves both. Looked up, every column counts alike, which is what more damping says.
        """
        form, hessian = INTEGERS[formats.head], (inputs.T @ inputs).numpy()
        fitted = gptq(head, hessian, form, TIED_DAMPING if self.tied else DAMPING)
        return dict.fromkeys(TABLES, fitted) if self.tied else {TABLES[1]: fitted}

    # --- layers --------------------------------------------------------------------------------------------------

    def layers(
        self, source: Source, look: Look, asked: Asked, first: int, saved: Mapping[str, np.ndarray]
    ) -> Iterator[Patch]:
        """Yield the patch of each layer from `first` on; `source` has that of the token tables.

        `look` gives token vectors as they are stored; `saved` is what `state` returned before the first.
        """
        exact = torch.from_numpy(saved["exact"]) if saved else self._begin()
        stored = exact
        if asked.fitted:
            stored = torch.from_numpy(saved["stored"]) if saved else embedded(look, self.tokens)
        for index in range(first, self.config.num_hidden_layers):
            layer = self._load(index)
            ready: dict[str, Quantized] = {}
            if asked.scaled:
                exact, ready = self._scale(index, layer, exact, source.formats, asked)
            if asked.fitted:
                stored, ready = self._fit(index, layer, stored, source.formats)
            self._state = {"exact": exact.numpy(), "stored": stored.numpy()}
            prefix = f"model.layers.{index}."
            yield Patch({prefix + n: p.numpy() for n, p in layer.state_dict().items()}, ready)

    def _scale(
        self, index: int, layer: Any, states: torch.Tensor, formats: Formats, asked: Asked
    ) -> tuple[torch.Tensor, dict[str, Quantized]]:
        """Scale the channels that matrices of integers read so that rounding costs less; return what comes out.

        The layer's weights change, in place, what it computes does not. Unless they will be fitted, layers of few bits
        are rounded to the nearest in ranges that clip what the text hardly needs.
        """
        found, ready = sites(layer, f"model.layers.{index}", self.config), dict[str, Quantized]()
        with _keeping(found) as inputs:
            out = self._layers.run(states)
        scales = [(site, self._fold(site, inputs[site.first], formats, asked.is_rounded(site.first))) for site in found]
        for site, scale in scales:
            if scale is not None and not asked.fitted:
                ready |= _clipped(site, inputs[site.first] / scale, formats)
        return out, ready

    @staticmethod
    def _fold(site: Site, inputs: torch.Tensor, formats: Formats, rounded: bool) -> torch.Tensor | None:
        """Return the scale f32[K] that was folded in; None where the readers are not stored as integers."""
        if formats.of(site.first) not in INTEGERS:
            return None
        scale = fitting_scale(site, inputs, INTEGERS[formats.of(site.first)], rounded)
        fold(site, scale)
        return spread(site, scale)

    def _fit(
        self, index: int, layer: Any, states: torch.Tensor, formats: Formats
    ) -> tuple[torch.Tensor, dict[str, Quantized]]:
        """Round a layer's integer matrices for the text, in place; return what comes out of it as it is stored."""
        prefix, ready = f"model.layers.{index}.", dict[str, Quantized]()
        linears = {
            prefix + name: part
            for name, part in layer.named_modules()
            if isinstance(part, nn.Linear) and formats.of(prefix + name) in INTEGERS
        }
        with _collecting(linears) as sums:
            self._layers.run(states)
        for name, part in linears.items():
            ready[name] = gptq(part.weight.numpy(), sums[_input_of(name)].numpy(), INTEGERS[formats.of(name)])
            part.weight.copy_(torch.from_numpy(dequantize(ready[name])))
        return self._layers.run(states), ready

    # --- mixed precision -----------------------------------------------------------------------------------------

    def sensitive(self, formats: Formats) -> dict[str, str]:
        """Return the layers that keep 8 bits, with their format.

        Every unit (layers that one product computes, so that they share a format) is rounded alone, all else being
        exact, and the KL divergence of the next token is measured on the first windows. Those with the most of it for
        each weight are kept, as long as they are a quarter of all weights.
        """
        before = [self._begin(SENSITIVE_WINDOWS)]
        for index in range(self.config.num_hidden_layers):
            self._load(index)
            before.append(self._layers.run(before[-1]))
        exact = self._log_probabilities(before[-1])
        harm, size, units = dict[str, float](), dict[str, int](), dict[str, list[str]]()
        for index in range(self.config.num_hidden_layers):
            for unit, names in self._units(index).items():
                units[unit] = names
                size[unit] = sum(int(np.prod(self.model.shape(f"{name}.weight"))) for name in names)
                now = self._log_probabilities(self._after(index, before[index], names, formats))
                harm[unit] = _divergence(exact, now)
        left, kept = SENSITIVE_SHARE * sum(size.values()), {}
        for unit in sorted(units, key=lambda u: (-harm[u] / size[u], u)):
            if size[unit] <= left:
                left -= size[unit]
                kept.update(dict.fromkeys(units[unit], SENSITIVE_FORMAT))
        return kept

    def _after(self, index: int, states: torch.Tensor, names: Sequence[str], formats: Formats) -> torch.Tensor:
        """Return the final states f32[W,L,hidden] where some matrices of a layer are rounded."""
        layer = self._load(index)
        for name in names:
            part = layer.get_submodule(name.removeprefix(f"model.layers.{index}."))
            part.weight.copy_(torch.from_numpy(dequantize(quantize(part.weight.numpy(), INTEGERS[formats.of(name)]))))
        states = self._layers.run(states)
        for later in range(index + 1, self.config.num_hidden_layers):
            self._load(later)
            states = self._layers.run(states)
        return states

    def allocated(
        self, formats: Formats, kinds: Mapping[str, Sequence[str]], extra: float, asked: Asked
    ) -> dict[str, str]:
        """Return the format of each matrix: those whose rounding the text shows most get more bits.

        `kinds` are the names in a layer of the matrices that share a format; `extra` bits of a weight in the mean are
        spent beyond those of the layers' format. Channels are scaled first where that is asked for.
        """

        def scale(index: int, layer: Any, states: torch.Tensor) -> None:
            if asked.scaled:
                self._scale(index, layer, states, formats, asked)

        tokens = self.tokens[:SENSITIVE_WINDOWS]
        found = harms(self._layers, self.model, tokens, INTEGERS[formats.layers], kinds, scale)
        chosen = share(found, formats.layers, extra)
        return {f"model.layers.{i}.{name}": form for (i, kind), form in chosen.items() for name in kinds[kind]}

    def _log_probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Return f32[W*L,V] of final states."""
        rows = self._layers.normalized(states, self.model.whole("model.norm.weight")).flatten(0, 1)
        return torch.log_softmax(torch.cat([rows @ part.T for _, part in head_parts(self.model)], -1), -1)

    def _units(self, index: int) -> Mapping[str, list[str]]:
        units: dict[str, list[str]] = {}
        for name, part in self._layers.module.named_modules():
            if isinstance(part, nn.Linear):
                full = f"model.layers.{index}.{name}"
                units.setdefault(_input_of(full), []).append(full)
        return units


def _divergence(exact: torch.Tensor, now: torch.Tensor) -> float:
    """Return the mean KL divergence of log-probabilities f32[n,V] from exact ones."""
    return float((exact.exp() * (exact - now)).sum(-1).mean())


def _input_of(name: str) -> str:
    """Return the first of the layers that have the same input as this one."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{SHARES_INPUT.get(last, last)}"


def _clipped(site: Site, inputs: torch.Tensor, formats: Formats) -> dict[str, Quantized]:
    """Return the readers of few bits, each weight rounded to the nearest in the range that serves inputs f32[T,K]."""
    form = INTEGERS[formats.of(site.first)]
    if form.bits > FEW_BITS:
        return {}
    power = inputs.square().mean(0).numpy()
    return {name: nearest(part.weight.numpy(), power, form) for name, part in site.readers.items()}


@contextmanager
def _keeping(found: Sequence[Site]) -> Iterator[dict[str, torch.Tensor]]:
    """Keep what flows into each site f32[T,K], by the name of its first reader."""
    rows: dict[str, list[torch.Tensor]] = {site.first: [] for site in found}
    inputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _, args: rows[name].append(args[0].flatten(0, -2))

    handles = [site.readers[site.first].register_forward_pre_hook(hook(site.first)) for site in found]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
    inputs |= {name: torch.cat(kept) for name, kept in rows.items()}


@contextmanager
def _collecting(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
    """Sum `x x^T` f32[K,K] of what flows into each of the layers, once for those of one input."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: Any, args: Any) -> None:
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    first = {_input_of(name): part for name, part in reversed(list(linears.items()))}
    handles = [part.register_forward_pre_hook(hook(name)) for name, part in first.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
