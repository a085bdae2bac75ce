"""Row-major matrices whose products with a single row are our GPU kernels; other products are the compiler's."""

from __future__ import annotations

import torch
from torch import nn

from llmbuild.frontend.modules import Matrix, RowMajor, Store
from llmbuild.kernels.matvec import Plan, Stored, Work, kernel, plan
from llmbuild.transform.quantized import unpack_nibbles
from llmbuild.transform.stored import Rows

PLANS: dict[str, Plan] = {}
"""By kernel name: an operator can carry a name, not a dataclass."""

ELEMENTS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "i8"}


@torch.library.custom_op("llmbuild::matvec", mutates_args=())
def matvec(x: torch.Tensor, data: torch.Tensor, scales: list[torch.Tensor], kernel: str) -> torch.Tensor:
    """Return y f32[N] of x f32 in `Plan.x_shape` and a matrix as `Matrix` stores it.

    `scales` are its scales and zeros, as far as it has them.
    """
    stored = PLANS[kernel].stored
    codes = torch.from_numpy(unpack_nibbles(data.numpy())) if stored.element == "i4" else data
    dense = codes.float().unflatten(1, (stored.groups, -1))
    if stored.zeros:
        dense = dense - scales[1].float().unsqueeze(-1)
    if stored.group:
        dense = dense * scales[0].float().unsqueeze(-1)
    row = x.transpose(1, 2) if PLANS[kernel].arranged else x
    y = nn.functional.linear(row.flatten(), dense.flatten(1))
    return y * scales[0] if stored.is_integer and not stored.group else y


@matvec.register_fake
def _(x: torch.Tensor, data: torch.Tensor, scales: list[torch.Tensor], kernel: str) -> torch.Tensor:
    return x.new_empty(PLANS[kernel].stored.rows)


class SingleRow(RowMajor):
    """A row-major matrix that a GPU of the kind that `work` describes multiplies with a single row by our kernel.

    `plan` is nothing where its rows do not fit the kernel: then all is left to the compiler.
    """

    def __init__(self, rows: Rows, columns: int, form: str, work: Work) -> None:
        super().__init__(rows, columns, form)
        stored = stored_as(self)
        self.plan = plan(stored, work) if stored else None
        if self.plan is not None:
            self.kernel = kernel_name(self.plan)
            PLANS[self.kernel] = self.plan

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.plan is None or x.shape[1] != 1:
            return super().multiply(x)
        shape = self.plan.x_shape
        if self.plan.arranged:
            steps, pieces, lanes, four = shape
            read = x.reshape(steps, lanes, pieces, four).transpose(1, 2).contiguous()
        else:
            read = x.reshape(shape)
        scales = [part for part in (self.scale, self.zero) if part is not None]
        y: torch.Tensor = matvec(read, self.data, scales, self.kernel)
        return y.view(1, 1, -1)


def stored_as(matrix: Matrix) -> Stored | None:
    """Return how the kernels see a row-major matrix; nothing for f32 and the blocks of GGUF, which they do not read."""
    if matrix.stored.blocks:
        return None
    element = "i4" if matrix.nibbles else ELEMENTS.get(matrix.data.dtype)
    if element is None:
        return None
    group = matrix.group if matrix.grouped else 0
    return Stored(matrix.rows, matrix.columns, element, group, matrix.zero is not None)


def kernel_name(plan: Plan) -> str:
    """Return a name that no other plan has."""
    stored, work = plan.stored, plan.work
    scales = f"_g{stored.group}" if stored.group else ""
    zeros = "a" if stored.zeros else ""
    shared = f"{plan.lanes}of{work.subgroup}x{plan.read}_{work.rows}x{work.groups}"
    return f"llmbuild_matvec_{stored.element}{zeros}{scales}_{stored.rows}x{stored.columns}_{shared}"


def kernels(model: nn.Module) -> dict[str, str]:
    """Return the MLIR of the kernels that a model calls, by name."""
    plans = {m.kernel: m.plan for m in model.modules() if isinstance(m, SingleRow) and m.plan is not None}
    return {name: kernel(name, plan) for name, plan in plans.items()}


def stored_for(work: Work) -> Store:
    """Return what stores matrices for a GPU."""
    return lambda rows, columns, form: SingleRow(rows, columns, form, work)
