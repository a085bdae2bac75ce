"""Scale the channels between layers so that rounding them costs less: exact in real numbers, free at run time.

What a matrix reads is divided by a scale for each channel, its columns are multiplied by it, and the division is folded
into the weights of what comes before (SmoothQuant, Xiao et al., 2022; AWQ, Lin et al., 2023). Scales are not searched
on a grid: the error that rounding makes in the outputs, modelled as noise, is convex in their logarithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmbuild.kernels.layouts import rounded_together
from llmbuild.spec.formats import Format, fit_group

STEPS, RATE = 40, 0.15
"""Of Adam, whose rate falls to zero; ten times as many lower the modelled error by 1 % at most."""

MAX_ROWS = 1024
"""Rows of the matrices, and vectors that they read, that the noise is modelled on, taken at even distances."""

ACTIVATION_CODES = 127
"""Our kernels round a block of activations to -127..127 times the largest of them."""


@dataclass(frozen=True)
class Site:
    """A vector that flows from one layer into others: `before` makes it, `readers` (by name) multiply it by matrices.

    `before` is a norm or a linear layer; `kin` i64[K] says which of its outputs each channel is, where several channels
    are the same one (a head of values that several query heads share).
    """

    before: nn.Module
    readers: Mapping[str, nn.Linear]
    kin: torch.Tensor | None = None

    @property
    def first(self) -> str:
        """Name of the first reader."""
        return next(iter(self.readers))


def sites(layer: Any, prefix: str, config: Any) -> list[Site]:
    """Return the four sites of a decoder layer whose name is `prefix`, in the order in which they are computed."""
    attention, mlp = layer.self_attn, layer.mlp

    def readers(parent: str, *names: str) -> dict[str, nn.Linear]:
        return {f"{prefix}.{parent}.{name}": layer.get_submodule(f"{parent}.{name}") for name in names}

    heads, size = config.num_key_value_heads, attention.head_dim
    values = torch.arange(heads * size).view(heads, 1, size)
    kin = values.expand(-1, config.num_attention_heads // heads, -1).reshape(-1)
    return [
        Site(layer.input_layernorm, readers("self_attn", "q_proj", "k_proj", "v_proj")),
        Site(attention.v_proj, readers("self_attn", "o_proj"), kin),
        Site(layer.post_attention_layernorm, readers("mlp", "gate_proj", "up_proj")),
        Site(mlp.up_proj, readers("mlp", "down_proj")),
    ]


def fold(site: Site, scale: torch.Tensor) -> None:
    """Divide a site's channels by positive scales f32[n] of what comes before, in place; all outputs stay the same."""
    before: Any = site.before
    before.weight.div_(scale if before.weight.dim() == 1 else scale[:, None])
    if getattr(before, "bias", None) is not None:
        before.bias.div_(scale)
    for part in site.readers.values():
        part.weight.mul_(spread(site, scale))


def spread(site: Site, scale: torch.Tensor) -> torch.Tensor:
    """Return f32[K], the scale of each channel."""
    return scale if site.kin is None else scale[site.kin]


def fitting_scale(site: Site, inputs: torch.Tensor, form: Format, rounded: bool) -> torch.Tensor:
    """Return the scales f32[n] with the least modelled error, their geometric mean 1.

    `inputs` f32[T,K] are typical vectors, `form` is what the matrices will be rounded to; `rounded` says that a kernel
    rounds each vector too.
    """
    with torch.inference_mode(False), torch.enable_grad():  # what inference mode made is copied by what is done to it
        noise = Noise(inputs, torch.cat([part.weight for part in site.readers.values()]), form, rounded)
        kin = torch.arange(inputs.shape[1]) if site.kin is None else site.kin.clone()
        logarithm = torch.zeros(int(kin.max()) + 1, requires_grad=True)
        adam = torch.optim.Adam([logarithm], RATE)
        for step in range(STEPS):
            adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            adam.zero_grad()
            noise(logarithm[kin]).backward()
            adam.step()
        found = logarithm.detach()
        return (found - found.mean()).exp()


class Noise:
    """The mean squared error of a matrix product's outputs, as the logarithm of a multiple of it.

    Rounding makes an error that is even within a step, so of a variance in proportion to the step's square; a step is
    the largest entry of a block of activations, or of a group of weights, over the number of codes. The error of each
    comes out multiplied by the other. All terms are maxima and sums of products of powers: convex in logarithms.
    """

    def __init__(self, inputs: torch.Tensor, matrix: torch.Tensor, form: Format, rounded: bool) -> None:
        rows, vectors = (each[:: -(-len(each) // MAX_ROWS)] for each in (matrix, inputs))
        self.columns = matrix.shape[1]
        self.group = fit_group(self.columns, form.group or self.columns)
        self.block = rounded_together(form.bits, self.group)
        self.inputs, self.rows = (2 * x.abs().clamp(min=1e-12).log() for x in (vectors, rows))
        self.input_power = inputs.square().mean(0).clamp(min=1e-12)
        self.row_power = rows.square().sum(0)
        self.input_share = 1 / ACTIVATION_CODES**2 if rounded else 0.0
        self.row_share = 1 / (0.5 * (1 << form.bits) - 0.5) ** 2

    def __call__(self, logarithm: torch.Tensor) -> torch.Tensor:
        """Return it for scales whose logarithms are f32[K]."""
        power = 2 * logarithm
        spread_steps = _largest(self.rows, power, self.group).exp().sum(0)
        read = (self.input_power / power.exp()).unflatten(0, (-1, self.group)).sum(1)
        error = self.row_share * (spread_steps * read).sum()
        if self.input_share:
            steps = _largest(self.inputs, -power, self.block).exp().mean(0)
            met = (self.row_power * power.exp()).unflatten(0, (-1, self.block)).sum(1)
            error = error + self.input_share * (steps * met).sum()
        return error.log()


def _largest(rows: torch.Tensor, added: torch.Tensor, group: int) -> torch.Tensor:
    """Return f32[R,K/group], the largest of f32[R,K] + f32[K] in each group.

    The gradient of `added` goes by where these are: that of `amax` is as large as the rows, and takes most of the time.
    """
    with torch.no_grad():
        inside = (rows + added).unflatten(1, (-1, group)).argmax(2)
        columns = inside + group * torch.arange(inside.shape[1])
    return rows.gather(1, columns) + added.index_select(0, columns.flatten()).view_as(columns)
