"""Quantize a model for the text it is meant for: what flows into each linear layer decides how its weights are rounded.

The library's own layers are run here, one after another, on calibration tokens; each sees what the layers before it
make of the text once they are quantized, and can make good some of their error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from llmbuild.errors import ChoiceRefused
from llmbuild.frontend.attention import causal_mask
from llmbuild.frontend.cache import CallerCache, cache_name
from llmbuild.frontend.formats import TABLES, Formats
from llmbuild.frontend.modules import FUSED_GROUPS
from llmbuild.frontend.scaling import Site, fitting_scale, fold, sites, spread
from llmbuild.spec.formats import INTEGERS
from llmbuild.transform.gptq import DAMPING, gptq, nearest
from llmbuild.transform.quantized import Quantized, dequantize, quantize

SHARES_INPUT = {name: group[0] for group in FUSED_GROUPS for name in group}
TIED_DAMPING = 10 * DAMPING
SENSITIVE_SHARE = 0.25
"""Part of the layers' weights that keeps 8 bits when the sensitive ones do."""

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
            "quantization=gptq, scaling=activation and mixed=sensitive need calibration text: name some in the recipe"
        )
    try:
        tokens = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ChoiceRefused(f"calibration {path}: cannot be read: {error}") from None
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int64:
        raise ChoiceRefused(f"calibration {path}: tokens must be i64[W,L]")
    return tokens


class Calibration:
    """A model of the library and calibration tokens i64[W,L]; weights are replaced in place by what is stored."""

    def __init__(self, model: Any, tokens: np.ndarray) -> None:
        """Take both.

        Raises:
            ChoiceRefused: the tokens are not of this model, or a window is longer than the model can read.
        """
        vocabulary = model.config.vocab_size
        if tokens.ndim != 2 or tokens.size == 0 or tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ChoiceRefused(f"calibration tokens must be i64[W,L] with values from 0 to {vocabulary - 1}")
        self.model, self.tokens = model, torch.from_numpy(tokens)
        config, length = model.config, tokens.shape[1]
        limit = getattr(config, "max_position_embeddings", length)
        if length > limit:
            raise ChoiceRefused(
                f"calibration windows of {length} tokens are longer than the {limit} that the model reads"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pair = 2 * config.num_hidden_layers
        cache = [torch.zeros(length, config.num_key_value_heads, head_dim) for _ in range(pair)]
        positions = torch.arange(length)[None]
        self._context = {
            "attention_mask": causal_mask(positions, length),
            "position_ids": positions,
            cache_name(model.model): CallerCache(cache, positions, torch.zeros(1, dtype=torch.int64)),
            "use_cache": True,
        }

    # --- running the model ---------------------------------------------------------------------------------------

    def hidden(self) -> list[torch.Tensor]:
        """Return the final hidden states f32[1,L,hidden] of each window, normalized: the head's inputs."""
        return [self.model.model(input_ids=w[None], **self._context).last_hidden_state for w in self.tokens]

    def logits(self, windows: int) -> torch.Tensor:
        """Return log-probabilities f32[windows*L,V] of the first windows."""
        rows = [self.model(input_ids=w[None], **self._context).logits[0] for w in self.tokens[:windows]]
        return torch.log_softmax(torch.cat(rows), -1)

    def _embedded(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Return the first layer's inputs for each window, and what every layer gets besides."""
        layer, taken = self.model.model.layers[0], {}

        def take(_: Any, args: Any, kwargs: Any) -> None:
            taken.update(kwargs)

        handle = layer.register_forward_pre_hook(take, with_kwargs=True)
        self.model.model(input_ids=self.tokens[:1], **self._context)
        handle.remove()
        taken.pop("hidden_states", None)
        return [self.model.model.embed_tokens(w[None]) for w in self.tokens], taken

    @property
    def tied(self) -> bool:
        """Whether the head and the embedding are one table."""
        model = self.model
        return bool(model.model.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr())

    # --- scaling -------------------------------------------------------------------------------------------------

    def scaled(self, formats: Formats, rounded: bool, clipped: bool = True) -> Formats:
        """Scale the channels that matrices of integers read so that rounding costs less; return the formats.

        The model's weights change, in place, what it computes does not. `rounded` says that the inputs are rounded too.
        If `clipped`, layers of 4 bits are rounded to the nearest, in ranges that clip what the text hardly needs.
        """
        ready: dict[str, Quantized] = {}
        states, extra = self._embedded()
        for index, layer in enumerate(self.model.model.layers):
            found = sites(layer, f"model.layers.{index}", self.model.config)
            with _keeping(found) as inputs:
                states = [_tensor(layer(state, **extra)) for state in states]
            for site, scale in [(site, self._fold(site, inputs[site.first], formats, rounded)) for site in found]:
                if scale is not None and clipped:
                    ready |= _clipped(site, inputs[site.first] / scale, formats)
        return replace(formats, ready=ready, looked_up=self._scale_head(formats, states, rounded))

    def _scale_head(self, formats: Formats, states: list[torch.Tensor], rounded: bool) -> torch.Tensor | None:
        """Scale what the head reads; return the factor f32[K] that undoes it in rows of a tied table."""
        norm, head = self.model.model.norm, self.model.lm_head
        inputs, tied = torch.cat([norm(state)[0] for state in states]), self.tied
        scale = self._fold(Site(norm, {TABLES[1]: head}), inputs, formats, rounded)
        if scale is None or not tied:
            return None
        factor = 1 / scale
        self.model.model.embed_tokens.register_forward_hook(lambda _, __, rows: rows * factor)
        return factor

    @staticmethod
    def _fold(site: Site, inputs: torch.Tensor, formats: Formats, rounded: bool) -> torch.Tensor | None:
        """Return the scale f32[K] that was folded in; None where the readers are not stored as integers."""
        if formats.of(site.first) not in INTEGERS:
            return None
        scale = fitting_scale(site, inputs, INTEGERS[formats.of(site.first)], rounded)
        fold(site, scale)
        return spread(site, scale)

    # --- gptq ----------------------------------------------------------------------------------------------------

    def fitted(self, formats: Formats) -> Formats:
        """Return the formats with every integer matrix rounded for the calibration text."""
        ready: dict[str, Quantized] = {}
        if formats.head in INTEGERS:
            ready |= self._fit_tables(formats)
        states, extra = self._embedded()
        for index, layer in enumerate(self.model.model.layers):
            prefix = f"model.layers.{index}."
            linears = {
                prefix + name: part
                for name, part in layer.named_modules()
                if isinstance(part, nn.Linear) and formats.of(prefix + name) in INTEGERS
            }
            with _collecting(linears) as sums:
                for state in states:
                    layer(state, **extra)
            for name, part in linears.items():
                hessian = sums[_input_of(name)].numpy()
                ready[name] = gptq(part.weight.numpy(), hessian, INTEGERS[formats.of(name)])
                part.weight.copy_(torch.from_numpy(dequantize(ready[name])))
            states = [_tensor(layer(state, **extra)) for state in states]
        return replace(formats, ready=ready)

    def _fit_tables(self, formats: Formats) -> dict[str, Quantized]:
        """Round the token tables: the head for its inputs, the embedding, whose rows are looked up, to the nearest.

        A tied table serves both. Looked up, every column counts alike, which is what more damping says.
        """
        form = INTEGERS[formats.head]
        tables = (self.model.model.embed_tokens, self.model.lm_head)
        table, head = (part.weight.numpy() for part in tables)
        tied, inputs = self.tied, torch.cat([x[0] for x in self.hidden()])
        fitted = gptq(head, (inputs.T @ inputs).numpy(), form, TIED_DAMPING if tied else DAMPING)
        ready = dict(zip(TABLES, (fitted if tied else quantize(table, form), fitted), strict=True))
        for part, name in zip(tables, TABLES, strict=True):
            part.weight.copy_(torch.from_numpy(dequantize(ready[name])))
        return ready

    # --- mixed precision -----------------------------------------------------------------------------------------

    def sensitive(self, formats: Formats) -> dict[str, str]:
        """Return the layers that keep 8 bits, with their format.

        Every unit (layers that one product computes, so that they share a format) is rounded alone, all else being
        exact, and the KL divergence of the next token is measured on the first windows. Those with the most of it for
        each weight are kept, as long as they are a quarter of all weights.
        """
        exact = self.logits(SENSITIVE_WINDOWS)
        units = self._units()
        harm, size = {}, {}
        for unit, parts in units.items():
            before = {name: part.weight.clone() for name, part in parts.items()}
            for name, part in parts.items():
                rounded = dequantize(quantize(part.weight.numpy(), INTEGERS[formats.of(name)]))
                part.weight.copy_(torch.from_numpy(rounded))
            now = self.logits(SENSITIVE_WINDOWS)
            for name, part in parts.items():
                part.weight.copy_(before[name])
            harm[unit] = float((exact.exp() * (exact - now)).sum(-1).mean())
            size[unit] = sum(part.weight.numel() for part in parts.values())
        left, kept = SENSITIVE_SHARE * sum(size.values()), {}
        for unit in sorted(units, key=lambda u: (-harm[u] / size[u], u)):
            if size[unit] <= left:
                left -= size[unit]
                kept.update(dict.fromkeys(units[unit], SENSITIVE_FORMAT))
        return kept

    def _units(self) -> Mapping[str, dict[str, nn.Linear]]:
        units: dict[str, dict[str, nn.Linear]] = {}
        for name, part in self.model.model.layers.named_modules():
            if isinstance(part, nn.Linear):
                full = f"model.layers.{name}"
                units.setdefault(_input_of(full), {})[full] = part
        return units


def _input_of(name: str) -> str:
    """Return the first of the layers that have the same input as this one."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{SHARES_INPUT.get(last, last)}"


def _tensor(out: Any) -> torch.Tensor:
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _clipped(site: Site, inputs: torch.Tensor, formats: Formats) -> dict[str, Quantized]:
    """Return the readers of 4 bits, each weight rounded to the nearest in the range that serves the inputs f32[T,K]."""
    form = INTEGERS[formats.of(site.first)]
    if form.bits != 4:
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
