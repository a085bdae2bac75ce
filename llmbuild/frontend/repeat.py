"""Structure that repeats is traced once: two decoder layers of a model, of which the second stands for all later ones.

The layers of a decoder differ in their weights and caches alone. Marks before and behind the traced layers, operators
that do nothing, say in the imported module where the second begins and ends; its operations are then repeated for every
further layer, with the names of that layer's weights and with further arguments for its caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from iree.compiler import ir
from torch import nn

from llmbuild.frontend.splice import operators

TRACED = 2
"""Layers that are traced."""

_MARK = "torch.llmbuild_layer.mark"
_PREFIX = "model.layers."


@torch.library.custom_op("llmbuild_layer::mark", mutates_args=())
def mark(x: torch.Tensor) -> torch.Tensor:
    """Return x, as it is."""
    return x.clone()


@mark.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@contextmanager
def shortened(decoder: Any) -> Iterator[int]:
    """Leave the first layers in a decoder, with marks around them; give how many layers it has.

    A decoder of no more layers stays as it is.
    """
    layers: nn.ModuleList = decoder.layers
    if len(layers) <= TRACED:
        yield len(layers)
        return
    decoder.layers = nn.ModuleList(list(layers)[:TRACED])
    hooks = [layer.register_forward_pre_hook(_before, with_kwargs=True) for layer in decoder.layers]
    hooks.append(decoder.layers[-1].register_forward_hook(lambda _, __, out: mark(out)))
    try:
        yield len(layers)
    finally:
        for hook in hooks:
            hook.remove()
        decoder.layers = layers


def _before(_: nn.Module, positional: tuple[torch.Tensor, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return (mark(positional[0]), *positional[1:]), named


def repeat(module: ir.Module, layers: int) -> dict[str, str]:
    """Repeat the last traced layer in every function of a module until there are `layers`.

    Returns the names of the further weights, each with that of the weight that it is like. A module without marks has
    all of its layers.
    """
    added: dict[str, str] = {}
    with module.context, ir.Location.unknown():
        for function in [op for op in module.body.operations if op.operation.name == "func.func"]:
            marks = operators(function.operation, _MARK)
            if marks:
                added |= _Function(function, marks).repeat(layers)
        for name, like in added.items():
            _declare(module, name, like)
    return added


class _Function:
    """A function with marked layers, and what its last layer reads and makes."""

    def __init__(self, function: Any, marks: Sequence[Any]) -> None:
        self.function, self.block = function, function.regions[0].blocks[0]
        self.before, self.begin, self.end = marks
        operations = [op.operation for op in self.block.operations]
        first, last = (next(i for i, op in enumerate(operations) if op == each) for each in (self.begin, self.end))
        self.layer = operations[first + 1 : last]

    def repeat(self, layers: int) -> dict[str, str]:
        """Repeat the layer; return the names of further weights, and what each is like."""
        added: dict[str, str] = {}
        caches = self._caches()
        state = self.end.operands[0]
        for number in range(TRACED, layers):
            mapping = {self.begin.results[0]: state}
            mapping |= {old: self.block.add_argument(old.type, ir.Location.unknown()) for old in caches}
            self._copy(mapping, number, added)
            state = mapping[self.end.operands[0]]
        self.end.results[0].replace_all_uses_with(state)
        self.begin.results[0].replace_all_uses_with(self.begin.operands[0])
        self.before.results[0].replace_all_uses_with(self.before.operands[0])
        for operation in (self.end, self.begin, self.before):
            operation.erase()
        results = ir.FunctionType(ir.TypeAttr(self.function.attributes["function_type"]).value).results
        kinds = [argument.type for argument in self.block.arguments]
        self.function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(kinds, results))
        return added

    def _caches(self) -> list[Any]:
        """Return the arguments that only the last layer reads: its caches, the last arguments there are."""
        read = {ir.BlockArgument(value).arg_number for op in self.layer for value in op.operands if _is_argument(value)}
        shared = self._read_before()
        return [argument for argument in self.block.arguments if argument.arg_number in read - shared]

    def _read_before(self) -> set[int]:
        found: set[int] = set()
        for op in self.block.operations:
            if op.operation == self.begin:
                return found
            found |= {ir.BlockArgument(value).arg_number for value in op.operation.operands if _is_argument(value)}
        return found

    def _copy(self, mapping: dict[Any, Any], number: int, added: dict[str, str]) -> None:
        for operation in self.layer:
            copied = operation.clone(ip=ir.InsertionPoint(self.end))
            for index, value in enumerate(operation.operands):
                if value in mapping:
                    copied.operands[index] = mapping[value]
            mapping.update(zip(operation.results, copied.results, strict=True))
            if operation.name == "util.global.load":
                like = ir.FlatSymbolRefAttr(operation.attributes["global"]).value
                name = like.replace(f"{_PREFIX}{TRACED - 1}.", f"{_PREFIX}{number}.", 1)
                if name != like:
                    added[name] = like
                    copied.attributes["global"] = ir.FlatSymbolRefAttr.get(name)


def _is_argument(value: Any) -> bool:
    return isinstance(value, ir.BlockArgument)


def _declare(module: ir.Module, name: str, like: str) -> None:
    """Add a global that is like another one, under its own name in the archive."""
    source = next(op for op in module.body.operations if _symbol(op) == like)
    text = str(source).replace(f'"{like}"', f'"{name}"').replace(f"@{like} ", f'@"{name}" ')
    parsed = ir.Module.parse(text)
    for operation in list(parsed.body.operations):
        operation.detach_from_parent()
        module.body.append(operation)


def _symbol(operation: Any) -> str:
    attributes = operation.attributes
    return ir.StringAttr(attributes["sym_name"]).value if "sym_name" in attributes else ""
