"""What is around our own kernels in a program: traced once for all formats; what depends on a format is put in.

The traced shell looks tokens up, turns positions into angles and calls our operators. How tokens are looked up depends
on the format of the table, so an operator stands for it too: for a kernel, where the table is the output matrix, else
for a look-up that is traced by itself. The types of stored weights are those that the kernels name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from iree.compiler import ir
from torch import nn

from llmbuild.frontend import importer, operators, splice
from llmbuild.frontend.cache import new_cache
from llmbuild.frontend.modules import ScaledColumns
from llmbuild.frontend.own import LOOK
from llmbuild.frontend.tracing import Call, entries, traced
from llmbuild.spec.program import PARAMETER_SCOPE, Abi

_LOOK = "torch.llmbuild_shell.look"
_LOAD, _FROM_BUILTIN = "util.global.load", "torch_c.from_builtin_tensor"
_TORCH_ELEMENTS = {"i8": "si8", "i16": "si16", "i32": "si32", "i64": "si64"}


class Look(nn.Module):
    """Stands for a table of token vectors while a shell is traced."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return f32[1,T,width] of tokens i64[1,T]."""
        found: torch.Tensor = operators.look(tokens, self.width)
        return found


class _Table(nn.Module):
    """The look-up alone; the whole model is in it, so that weights have the names that they have in the shell."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.model.embed_tokens(tokens)
        return found


@contextmanager
def _without_table(model: Any, width: int) -> Iterator[None]:
    table = model.model.embed_tokens
    model.model.embed_tokens = Look(width)
    try:
        yield
    finally:
        model.model.embed_tokens = table


def trace(model: Any, abi: Abi, width: int) -> ir.Module:
    """Return the shell of a model in which our kernels are; its hidden states are f32[1,T,width]."""
    with _without_table(model, width):
        programs = entries(model, abi, new_cache(abi.kv))
    return importer.import_programs(programs, importer.canonical(model), model.config.num_hidden_layers)[0]


def module(model: Any, context: int, shell: bytes, kernels: Mapping[str, str]) -> tuple[ir.Module, dict[str, int]]:
    """Return the module of a model in which `kernels` are, and the sizes of its tensors in bytes.

    `shell` is the bytecode of what `trace` returned, for this or another format.
    """
    own = LOOK in kernels
    table = b"" if own else importer.bytecode(_look_up(model, context))
    with ir.Context() as here, ir.Location.unknown():
        here.allow_unregistered_dialects = True
        made = ir.Module.parse(shell)
        splice.append(made, kernels)
        _retype(made, kernels)
        if own:
            splice.append_all(made, [kernels[LOOK]])
            _call_look(made, look_operands(model))
        else:
            _put_in(made, ir.Module.parse(table))
        splice.replace(made)
        made.operation.verify()
        return made, sizes(made)


def _look_up(model: Any, context: int) -> ir.Module:
    """Return a module with the look-up of any number of tokens."""
    length = torch.export.Dim("T", min=2, max=context)
    several = torch.zeros(1, min(8, context), dtype=torch.int64)
    calls: dict[str, Call] = {"look_up": (_Table(model), (several,), ({1: length},))}
    return importer.import_programs(traced(calls), importer.canonical(model), 0)[0]


def sizes(module: ir.Module) -> dict[str, int]:
    """Return the sizes in bytes of the tensors that a module names, by name."""
    found = {}
    for operation in _globals(module).values():
        kind = ir.RankedTensorType(ir.TypeAttr(operation.attributes["type"]).value)
        bits = getattr(kind.element_type, "width", 0)
        name = ir.StringAttr(operation.attributes["sym_name"]).value
        found[name] = prod(kind.shape) * bits // 8
    return found


def look_operands(model: Any) -> list[str]:
    """Return the names of the tensors that the kernel of a look-up takes after the tokens."""
    head = next(name for name, part in model.named_modules() if part is model.lm_head)
    table = next(name for name, part in model.named_modules() if part is model.model.embed_tokens)
    factor = [f"{table}.factor"] if isinstance(model.model.embed_tokens, ScaledColumns) else []
    return [f"{head}.data", f"{head}.scale", *factor]


def _globals(module: ir.Module) -> dict[str, Any]:
    return {
        ir.StringAttr(op.attributes["sym_name"]).value: op.operation
        for op in module.body.operations
        if op.operation.name == "util.global"
    }


# --- types of weights ---------------------------------------------------------------------------------------------


def _retype(module: ir.Module, kernels: Mapping[str, str]) -> None:
    """Give every weight that a kernel reads the type that this one names."""
    table, declared = ir.SymbolTable(module.operation), _globals(module)
    for operator in splice.operators(module.operation, splice.NAMESPACE):
        kinds = splice.signature(operator, table).inputs
        for index, wanted in zip(splice.places(operator), kinds, strict=True):
            if index is None or not (name := _loaded(operator.operands[index])):
                continue
            _declare_as(declared[name], wanted)
            old = _maker(operator.operands[index], _FROM_BUILTIN)
            operator.operands[index] = _load(name, wanted, operator)
            _erase_unused(old)


def _loaded(value: Any) -> str:
    """Return the name of the weight that a value is, or nothing."""
    conversion = _maker(value, _FROM_BUILTIN)
    load = conversion and _maker(conversion.operands[0], _LOAD)
    return str(ir.FlatSymbolRefAttr(load.attributes["global"]).value) if load else ""


def _maker(value: Any, name: str) -> Any:
    """Return the operation of that name whose result a value is, or nothing."""
    found = value.owner
    return None if isinstance(found, ir.Block) or found.operation.name != name else found.operation


def _declare_as(declared: Any, wanted: ir.Type) -> None:
    declared.attributes["type"] = ir.TypeAttr.get(wanted)
    name = ir.StringAttr(declared.attributes["sym_name"]).value
    value = f'#flow.parameter.named<"{PARAMETER_SCOPE}"::"{name}"> : {wanted}'
    declared.attributes["initial_value"] = ir.Attribute.parse(value)


def _load(name: str, kind: ir.Type, before: Any) -> ir.Value:
    tensor = ir.RankedTensorType(kind)
    element = str(tensor.element_type)
    shape = ",".join(map(str, tensor.shape))
    torch_type = ir.Type.parse(f"!torch.vtensor<[{shape}],{_TORCH_ELEMENTS.get(element, element)}>")
    with ir.InsertionPoint(before):
        return ir.Operation.create(_FROM_BUILTIN, results=[torch_type], operands=[_builtin_load(name, kind)]).result


def _builtin_load(name: str, kind: ir.Type) -> ir.Value:
    return ir.Operation.create(_LOAD, results=[kind], attributes={"global": ir.FlatSymbolRefAttr.get(name)}).result


def _erase_unused(conversion: Any) -> None:
    if list(conversion.results[0].uses):
        return
    load = _maker(conversion.operands[0], _LOAD)
    conversion.erase()
    if not list(load.results[0].uses):
        load.erase()


# --- the look-up --------------------------------------------------------------------------------------------------


def _call_look(module: ir.Module, names: list[str]) -> None:
    """Call the look-up's kernel where the shell looks tokens up, with tokens and the tensors of these names."""
    function = ir.SymbolTable(module.operation)[LOOK]
    kind = ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value)
    tokens, *tensors = kind.inputs
    declared = _globals(module)
    for name, wanted in zip(names, tensors, strict=True):
        if name not in declared:
            parsed = ir.Module.parse(f'util.global private @"{name}" : {wanted}')
            operation = parsed.body.operations[0].operation
            _declare_as(operation, wanted)
            operation.detach_from_parent()
            module.body.append(operation)
    for operator in splice.operators(module.operation, _LOOK):
        with ir.InsertionPoint(operator):
            loaded = [_builtin_load(name, wanted) for name, wanted in zip(names, tensors, strict=True)]
            call = ir.Operation.create(
                "util.call",
                results=kind.results,
                operands=[splice.to_builtin(operator.operands[0], tokens), *loaded],
                attributes={"callee": ir.FlatSymbolRefAttr.get(LOOK)},
            )
            found = splice.from_builtin(call.result, operator.results[0].type)
        operator.results[0].replace_all_uses_with(found)
        operator.erase()


def _put_in(module: ir.Module, table: ir.Module) -> None:
    """Put the operations of `table` where the shell looks tokens up."""
    declared = _globals(module)
    for name, operation in _globals(table).items():
        if name not in declared:
            operation.detach_from_parent()
            module.body.append(operation)
        elif operation.attributes["type"] != declared[name].attributes["type"]:
            raise AssertionError(f"{name}: kernels read {declared[name]}, the look-up reads {operation}")
    function = next(op.operation for op in table.body.operations if op.operation.name == "func.func")
    for operator in splice.operators(module.operation, _LOOK):
        _inline(function.regions[0].blocks[0], operator)


def _inline(body: Any, operator: Any) -> None:
    """Copy a function's operations to where an operator stands, and give its result the operator's users."""
    token, number = (ir.RankedTensorType.get([], kind) for kind in (ir.IntegerType.get_signless(64), ir.F32Type.get()))
    mapping = {body.arguments[0]: _as_type(operator.operands[0], body.arguments[0].type, token, operator)}
    for operation in (op.operation for op in body.operations):
        if operation.name == "func.return":
            found = _as_type(mapping[operation.operands[0]], operator.results[0].type, number, operator)
            operator.results[0].replace_all_uses_with(found)
            break
        copied = operation.clone(ip=ir.InsertionPoint(operator))
        for index, value in enumerate(operation.operands):
            copied.operands[index] = mapping[value]
        mapping.update(zip(operation.results, copied.results, strict=True))
    operator.erase()


def _as_type(value: Any, wanted: Any, element: Any, before: Any) -> Any:
    """Return a tensor with the sizes of another type: of one token, or of any number of them.

    Cast as a builtin tensor: `torch.tensor_static_info_cast` is folded into what the compiler cannot lower (IREE 3.13).
    """
    if value.type == wanted:
        return value
    with ir.InsertionPoint(before):
        return splice.from_builtin(splice.to_builtin(value, splice.builtin(wanted, element)), wanted)
