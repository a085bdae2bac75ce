"""Whether our kernels apply to a model: from its facts alone, so that a search can ask before anything is loaded."""

from __future__ import annotations

from llmbuild.kernels.matvec import LEAST_COALESCED, Work, plan, stored_as
from llmbuild.spec.decoder import Decoder

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu_squared",
}
"""What our kernels do with a gate (`elementwise.ACTIVATIONS`), by the library's names."""


def cpu_problem(decoder: Decoder, layers: str, head: str) -> str:
    """Return why our kernels for CPUs do not take a model in these formats of layers and head; '' where they do.

    Formats themselves are a matter of the target: see `choose`. All of them take the same models.
    """
    if decoder.activation not in ACTIVATIONS:
        return f"its own kernels compute {', '.join(ACTIVATIONS)}; found hidden_act {decoder.activation}"
    if decoder.head_dim % 2:
        return f"its own kernels rotate halves of a head: its size must be even, found {decoder.head_dim}"
    return ""


def gpu_problem(decoder: Decoder, layers: str, head: str, work: Work) -> str:
    """Return why our kernels for GPUs read no matrix of a model in these formats; '' where they read one.

    What they do not read is left to the compiler.
    """
    sizes = [
        (decoder.vocabulary, decoder.hidden, head),
        (decoder.attended, decoder.hidden, layers),
        (decoder.hidden, decoder.attended, layers),
        (decoder.inner, decoder.hidden, layers),
        (decoder.hidden, decoder.inner, layers),
    ]
    stored = [stored_as(rows, columns, form) for rows, columns, form in sizes]
    if any(matrix and plan(matrix, work) for matrix in stored):
        return ""
    return (
        f"it finds no matrix to read in {' and '.join(sorted({layers, head}))}: "
        f"on a GPU it takes 16, 8 or 4 bits, and rows of a multiple of {LEAST_COALESCED} bytes"
    )
