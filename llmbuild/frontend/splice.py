"""Puts our own kernels where an imported module calls our torch operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from iree.compiler import ir

OPERATOR = "torch.operator"
NAMESPACE = "torch.llmbuild."


def splice(module: ir.Module, kernels: Mapping[str, str]) -> None:
    """Replace every operator of ours by a call of the kernel that its last operand names.

    `kernels` maps a name to the MLIR that defines the function of that name, and perhaps others.
    """
    with module.context, ir.Location.unknown():
        append(module, kernels)
        replace(module)


def append(module: ir.Module, kernels: Mapping[str, str]) -> None:
    """Append the kernels that operators of ours in a module name."""
    names = sorted({_kernel_name(operator) for operator in operators(module.operation, NAMESPACE)})
    append_all(module, dict.fromkeys(kernels[name] for name in names))  # functions of one executable are in one text


def append_all(module: ir.Module, texts: Iterable[str]) -> None:
    """Append what texts define."""
    for text in texts:
        parsed = ir.Module.parse(text)
        for operation in list(parsed.body.operations):
            operation.detach_from_parent()
            module.body.append(operation)


def replace(module: ir.Module) -> None:
    """Replace operators of ours by calls of their kernels, which the module has."""
    table = ir.SymbolTable(module.operation)
    for operator in operators(module.operation, NAMESPACE):
        _replace(operator, table)


def signature(operator: Any, table: ir.SymbolTable) -> Any:
    """Return the type of the function of an operator's kernel."""
    return ir.FunctionType(ir.TypeAttr(table[_kernel_name(operator)].attributes["function_type"]).value)


def places(operator: Any) -> list[int | None]:
    """Return, for each tensor that an operator's kernel reads, which operand it is; None for one of a list."""
    found: list[int | None] = []
    for index, value in enumerate(list(operator.operands)[:-1]):
        flat = _flat(value)
        found += [None] * len(flat) if is_list(value) else [index]
    return found


def operators(root: Any, prefix: str) -> list[Any]:
    """Return the torch operators below `root` whose names begin with `prefix`."""
    found: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name == OPERATOR and ir.StringAttr(operation.attributes["name"]).value.startswith(prefix):
            found.append(operation)
        return ir.WalkResult.ADVANCE

    root.walk(visit)
    return found


def _kernel_name(operator: Any) -> str:
    constant = operator.operands[len(operator.operands) - 1].owner
    return str(ir.StringAttr(constant.attributes["value"]).value)


def _replace(operator: Any, table: ir.SymbolTable) -> None:
    name, kind = _kernel_name(operator), signature(operator, table)
    with ir.InsertionPoint(operator):
        tensors = [tensor for value in list(operator.operands)[:-1] for tensor in _flat(value)]
        operands = [to_builtin(value, wanted) for value, wanted in zip(tensors, kind.inputs, strict=True)]
        call = ir.Operation.create(
            "util.call", results=kind.results, operands=operands, attributes={"callee": ir.FlatSymbolRefAttr.get(name)}
        )
        for old, new in zip(operator.results, call.results, strict=True):
            old.replace_all_uses_with(from_builtin(new, old.type))
    operator.erase()


def _flat(value: Any) -> list[Any]:
    """Return the tensors of a list, or the one tensor."""
    return list(value.owner.operands) if is_list(value) else [value]


def is_list(value: Any) -> bool:
    """Return whether an operand is a list of tensors."""
    return str(value.type).startswith("!torch.list")


def to_builtin(value: Any, wanted: Any) -> Any:
    """Return a tensor of torch as a builtin one of a wanted type, cast where sizes are dynamic in one of both."""
    plain = ir.Operation.create(
        "torch_c.to_builtin_tensor", results=[builtin(value.type, wanted)], operands=[value]
    ).result
    return plain if plain.type == wanted else _cast(plain, wanted)


def from_builtin(value: Any, wanted: Any) -> Any:
    """Return a builtin tensor as one of torch of a wanted type, cast where sizes are dynamic in one of both."""
    kind = builtin(wanted, value.type)
    plain = value if value.type == kind else _cast(value, kind)
    return ir.Operation.create("torch_c.from_builtin_tensor", results=[wanted], operands=[plain]).result


def _cast(value: Any, wanted: Any) -> Any:
    return ir.Operation.create("tensor.cast", results=[wanted], operands=[value]).result


def builtin(torch_type: Any, like: Any) -> Any:
    """Return the builtin tensor of a `!torch.vtensor<[1,?,64],f32>`: its shape, the element type of the other side."""
    shape = str(torch_type).partition("[")[2].partition("]")[0]
    dynamic = ir.ShapedType.get_dynamic_size()
    sizes = [dynamic if size == "?" else int(size) for size in shape.split(",") if size]
    return ir.RankedTensorType.get(sizes, ir.RankedTensorType(like).element_type)
