"""Whether our kernels apply to a model: from its facts alone, so that a search can ask before anything is loaded."""

from __future__ import annotations

from llmbuild.kernels.head import HeadShape
from llmbuild.kernels.matvec import LEAST_COALESCED, Work, plan, stored_as
from llmbuild.kernels.shapes import DecoderShape
from llmbuild.spec.decoder import Decoder

ACTIVATIONS = ("silu",)
"""What the layers' kernels compute of a gate."""


def cpu_problem(decoder: Decoder, layers: str, head: str) -> str:
    """Return why our kernels for CPUs do not take a model in these formats of layers and head; '' where they do."""
    if decoder.activation not in ACTIVATIONS:
        return f"its own kernels compute {' or '.join(ACTIVATIONS)}, found hidden_act {decoder.activation}"
    if decoder.head_norms:
        return "its own kernels take plain heads, found norms of queries and keys"
    shape = DecoderShape(
        decoder.hidden, decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.inner, 1e-5, 1.0, 1, False, 1, layers
    )
    return shape.problem() or HeadShape(decoder.hidden, decoder.vocabulary, 1e-5, 1, head).layout.problem() or ""


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
