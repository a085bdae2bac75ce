"""Exported torch programs to one MLIR module whose weights live in a parameter archive beside it.

It names tensors; what the programs compute, and what the weights are, is not its business.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from iree.compiler import ir
from iree.compiler.extras import fx_importer
from torch.export.graph_signature import OutputKind

from llmbuild.frontend import fusion_barrier, nibbles, repeat
from llmbuild.spec.program import PARAMETER_SCOPE

BUILTIN_TYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


class _NoLocations(fx_importer.ContextCache):  # type: ignore[misc]
    """A context cache that drops stack traces: they name files of this machine, and bytes must not depend on it."""

    def get_node_location(self, node: torch.fx.Node) -> ir.Location:
        return ir.Location.unknown(self._c)


class Parameters(fx_importer.FxImporterHooks):  # type: ignore[misc]
    """Turns every parameter and buffer into a module global backed by the archive; one tensor becomes one global.

    `names` says which name each of a tensor's names stands for: tied weights have several.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names = names

    def resolve_input(self, gni: Any, value: Any, info: Any) -> ir.Value | None:
        """Load the global of a parameter or buffer."""
        tensor, target = value.detach(), info.input_spec.target.removeprefix("model.")
        name = self._names.get(target, target)
        if name not in self.tensors:
            self.tensors[name] = tensor
            _declare(gni.fx_importer.module, name, tensor)
        return _load(gni, name, tensor, info.ir_type)

    def sizes(self) -> dict[str, int]:
        """Return the size of each tensor in bytes."""
        return {name: tensor.nbytes for name, tensor in self.tensors.items()}


def canonical(model: torch.nn.Module) -> dict[str, str]:
    """Return the first name of each tensor of a model, by all of its names."""
    first: dict[int, str] = {}
    found = {}
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            found[name] = first.setdefault(id(tensor), name)
    return found


def _builtin_type(tensor: torch.Tensor) -> str:
    return f"tensor<{''.join(f'{n}x' for n in tensor.shape)}{BUILTIN_TYPES[tensor.dtype]}>"


def _declare(module: ir.Module, name: str, tensor: torch.Tensor) -> None:
    kind = _builtin_type(tensor)
    text = f'util.global private @"{name}" = #flow.parameter.named<"{PARAMETER_SCOPE}"::"{name}"> : {kind}'
    with module.context:
        parsed = ir.Module.parse(text)
        for operation in list(parsed.body.operations):
            operation.detach_from_parent()
            module.body.append(operation)


def _load(gni: Any, name: str, tensor: torch.Tensor, torch_type: ir.Type) -> ir.Value:
    with gni._c, ir.Location.unknown(gni._c):
        point = ir.InsertionPoint(gni._b)
        loaded = ir.Operation.create(
            "util.global.load",
            results=[ir.Type.parse(_builtin_type(tensor))],
            attributes={"global": ir.FlatSymbolRefAttr.get(name)},
            ip=point,
        ).result
        return ir.Operation.create(
            "torch_c.from_builtin_tensor", results=[torch_type], operands=[loaded], ip=point
        ).result


def import_programs(
    programs: dict[str, torch.export.ExportedProgram], names: Mapping[str, str], layers: int
) -> tuple[ir.Module, dict[str, int]]:
    """Import exported programs, by function name, into one module; also return the sizes of its parameters in bytes.

    `names` are those of `canonical`; `layers` is how many the programs have once what was traced of them is repeated.
    """
    parameters = Parameters(names)
    importer = fx_importer.FxImporter(hooks=parameters)
    importer._cc = _NoLocations(importer._c, py_attr_tracker=importer._py_attr_tracker)
    for name, program in programs.items():
        _write_in_place(program)
        importer.import_program(program, func_name=name)
    sizes = parameters.sizes()
    sizes |= {name: sizes[like] for name, like in repeat.repeat(importer.module, layers).items()}
    nibbles.lower(importer.module)
    fusion_barrier.lower(importer.module)
    importer.module.operation.verify()
    return importer.module, sizes


def _write_in_place(program: torch.export.ExportedProgram) -> None:
    """Forget which inputs the program mutates: the compiler then writes them in place, and copies none.

    An input that is declared as mutated is written in place as well, but its new content is also copied to a fresh
    result of its size at the end of each call (IREE 3.13: `hal.tensor.alias` joined in a barrier). Undeclared, the
    import of the caller's buffer has the write as its last use, so the write takes it over. The check data proves
    it for every program: decoding reads what prefill wrote.
    """
    signature = program.graph_signature
    kept = [spec for spec in signature.output_specs if spec.kind != OutputKind.USER_INPUT_MUTATION]
    signature.output_specs = kept


def bytecode(module: ir.Module) -> bytes:
    """Return the module as bytecode."""
    buffer = io.BytesIO()
    module.operation.write_bytecode(buffer)
    return buffer.getvalue()


def save_module(module: ir.Module, path: Path) -> None:
    """Write the module as bytecode."""
    path.write_bytes(bytecode(module))
