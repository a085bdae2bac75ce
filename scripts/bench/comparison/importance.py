"""llama.cpp's importance matrix of a recipe's model: how large what flows into each of its matrices is on its text.

For each matrix the mean square of each input, as llama-imatrix collects it, on the recipe's calibration text: the same
text that llmbuild's own calibration reads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmbuild.build.job import Job
from llmbuild.build.jobs import job_of
from llmbuild.build.request import BuildRequest
from llmbuild.build.steps import Steps
from llmbuild.catalog.writer import Catalog
from llmbuild.errors import InputError
from llmbuild.frontend import huggingface
from llmbuild.frontend.huggingface import LIBRARY_ATTENTION
from llmbuild.frontend.layerwise import Layers, embedded, own_vectors
from llmbuild.spec.variant import Failure

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What GGUF calls the matrices of a decoder layer, by the library's names."""


def write(recipe: Path, catalog: Path, out: Path) -> None:
    """Write an `.npz` with f32[K] for each matrix of the model, by its name in GGUF.

    Raises:
        InputError: the recipe has no calibration text.
    """
    job = job_of(recipe, "host", BuildRequest(recipes=(recipe,), catalog=catalog))
    if job.recipe.calibration is None:
        raise InputError(f"{recipe}: an importance matrix needs `calibration` with a text")
    files = huggingface.source_of(str(job.model.location.absolute()), False, 0, job.recipe.context)
    config, model = files.skeleton(LIBRARY_ATTENTION).model.config, files.weights
    layers, sums = Layers(config, LIBRARY_ATTENTION), dict[str, torch.Tensor]()
    with torch.inference_mode():
        states = embedded(own_vectors(model), _tokens(job, catalog))
        for index in range(config.num_hidden_layers):
            layers.layer(index, lambda name: np.array(model.whole(name), np.float32))
            handles = [
                layers.module.get_submodule(theirs).register_forward_pre_hook(_kept(sums, f"blk.{index}.{ours}.weight"))
                for theirs, ours in GGUF_NAMES.items()
            ]
            states = layers.run(states)
            for handle in handles:
                handle.remove()
        head = layers.normalized(states, model.whole("model.norm.weight")).flatten(0, -2)
    sums["token_embd.weight" if model.tied else "output.weight"] = head.square().mean(0)
    with open(out, "wb") as file:
        np.savez(file, **{name: found.numpy().astype(np.float32) for name, found in sums.items()})  # type: ignore[arg-type]


def _tokens(job: Job, folder: Path) -> NDArray[np.int64]:
    """Return the calibration tokens i64[W,L] that imports of a catalog read."""
    catalog = Catalog(folder)
    try:
        found = Steps(job, catalog).imports.calibration()
    finally:
        catalog.close()
    if isinstance(found, Failure):
        raise InputError(f"{job.recipe.name}: no calibration tokens: {found.reason}")
    return found


def _kept(sums: dict[str, torch.Tensor], name: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
    def hook(_: nn.Module, read: tuple[torch.Tensor]) -> None:
        sums[name] = read[0].flatten(0, -2).square().mean(0)

    return hook
