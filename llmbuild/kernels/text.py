"""A writer of MLIR text: names values, places constants, nests regions. It knows no kernel.

Integers are i64 and pointers are `!llvm.ptr`, so that addresses are plain arithmetic; a vector is sixteen lanes of
f32 or i32.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

F32, I32, I64, PTR = "f32", "i32", "i64", "!llvm.ptr"
VF, VI = "vector<16xf32>", "vector<16xi32>"
BYTES = "vector<64xi8>"
ALIGNED = 64


class Writer:
    """Writes the body of one function; those beside it are named by its name: executables are linked into one."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._lines: list[str] = []
        self._constants: dict[tuple[str, str], str] = {}
        self._rooms: dict[int, str] = {}
        self._functions: dict[Hashable, tuple[str, str]] = {}
        self._count = 0

    def text(self) -> str:
        """Return what was written, constants and rooms on the stack first."""
        rooms = [
            f"{name} = llvm.alloca {self.integer(size)} x i8 {{alignment = {ALIGNED} : i64}} : ({I64}) -> {PTR}"
            for size, name in self._rooms.items()
        ]
        constants = [f"{name} = arith.constant {value} : {kind}" for (value, kind), name in self._constants.items()]
        return "\n".join(constants + rooms + self._lines)

    @property
    def functions(self) -> list[str]:
        """The functions that are called."""
        return [text for _, text in self._functions.values()]

    def room(self, size: int) -> str:
        """Return the pointer to so many bytes on the stack, the same ones for every use of this size."""
        if size not in self._rooms:
            self._rooms[size] = self.name()
        return self._rooms[size]

    def function(self, key: Hashable, arguments: Sequence[str], body: Callable[[Writer], None]) -> str:
        """Return the name of a function beside this one that takes pointers; it is written once for each key."""
        if key not in self._functions:
            own, name = Writer(), f"{self._name}_part{len(self._functions)}"
            body(own)
            assert not own._functions, "functions call no others"
            taken = ", ".join(f"{argument}: {PTR}" for argument in arguments)
            head = f"func.func private @{name}({taken}) attributes {{no_inline}} {{"
            self._functions[key] = name, f"{head}\n{own.text()}\nreturn\n}}"
        return self._functions[key][0]

    def line(self, text: str) -> None:
        """Write one operation without a result."""
        self._lines.append(text)

    def name(self) -> str:
        """Return a name that no other value has."""
        self._count += 1
        return f"%v{self._count}"

    def let(self, text: str) -> str:
        """Write one operation and return the name of its result."""
        name = self.name()
        self.line(f"{name} = {text}")
        return name

    def constant(self, value: str, kind: str) -> str:
        """Return a constant, one for every use in the function."""
        key = (value, kind)
        if key not in self._constants:
            self._constants[key] = self.name()
        return self._constants[key]

    def integer(self, value: int | str) -> str:
        """Return an i64; a name passes through."""
        return value if isinstance(value, str) else self.constant(str(value), I64)

    def real(self, value: float) -> str:
        """Return an f32 constant."""
        return self.constant(f"{value:.9e}", F32)

    def lanes(self, value: float | int, kind: str = VF) -> str:
        """Return a vector constant with the value in every lane."""
        return self.constant(f"dense<{value:.9e}>" if "f32" in kind else f"dense<{value}>", kind)

    def add(self, *terms: int | str) -> str:
        """Return the sum of i64 terms."""
        return self._chain("arith.addi", terms, 0)

    def mul(self, *factors: int | str) -> str:
        """Return the product of i64 factors."""
        return self._chain("arith.muli", factors, 1)

    def _chain(self, operation: str, operands: Sequence[int | str], neutral: int) -> str:
        kept = [operand for operand in operands if operand != neutral] or [neutral]
        result = self.integer(kept[0])
        for operand in kept[1:]:
            result = self.let(f"{operation} {result}, {self.integer(operand)} : {I64}")
        return result

    def integers(self, operation: str, left: int | str, right: int | str) -> str:
        """Return `left operation right` of i64 by the operation's name in `arith`."""
        return self.let(f"arith.{operation} {self.integer(left)}, {self.integer(right)} : {I64}")

    def rounded_up(self, left: int | str, right: int | str) -> str:
        """Return `left / right` of i64, none negative, rounded up."""
        return self.integers("divui", self.add(left, self.add(right, -1)), right)

    def below(self, left: int | str, right: int | str) -> str:
        """Return `left < right` as i1."""
        return self.let(f"arith.cmpi slt, {self.integer(left)}, {self.integer(right)} : {I64}")

    def either(self, condition: str, left: str, right: str) -> str:
        """Return the left pointer if the condition (i1) holds, else the right one."""
        return self.let(f"llvm.select {condition}, {left}, {right} : i1, {PTR}")

    def op(self, operation: str, *operands: str, kind: str = VF) -> str:
        """Return an operation whose operands and result are of one type."""
        return self.let(f"{operation} {', '.join(operands)} : {kind}")

    def cast(self, operation: str, value: str, source: str, result: str) -> str:
        """Return a conversion from one type to another."""
        return self.let(f"{operation} {value} : {source} to {result}")

    def splat(self, scalar: str, kind: str = VF) -> str:
        """Return a vector with the scalar in every lane."""
        return self.cast("vector.broadcast", scalar, F32 if "f32" in kind else I32, kind)

    def total(self, vector: str, kind: str = VF) -> str:
        """Return the sum of the lanes, in any order."""
        real = "f32" in kind
        order = " fastmath<reassoc>" if real else ""
        return self.let(f"vector.reduction <add>, {vector}{order} : {kind} into {F32 if real else I32}")

    def top(self, vector: str, kind: str = VF) -> str:
        """Return the largest lane of f32; none may be NaN."""
        return self.let(f"vector.reduction <maxnumf>, {vector} fastmath<nnan,nsz> : {kind} into {F32}")

    def larger(self, left: str, right: str, kind: str = VF) -> str:
        """Return the larger of both, lane by lane; the right one where the left is NaN. One instruction, unlike
        maximumf.
        """
        greater = self.let(f"arith.cmpf ogt, {left}, {right} : {kind}")
        flags = "" if kind == F32 else kind.replace(F32, "i1") + ", "
        return self.let(f"arith.select {greater}, {left}, {right} : {flags}{kind}")

    def at(self, pointer: str, *offset: int | str) -> str:
        """Return the pointer moved by the sum of offsets in bytes."""
        if all(part == 0 for part in offset):
            return pointer
        return self.let(f"llvm.getelementptr {pointer}[{self.add(*offset)}] : ({PTR}, {I64}) -> {PTR}, i8")

    def load(self, pointer: str, kind: str, align: int = 4) -> str:
        """Return a value of the type from memory."""
        return self.let(f'"llvm.load"({pointer}) <{{alignment = {align} : i64}}> : ({PTR}) -> {kind}')

    def store(self, value: str, pointer: str, kind: str, align: int = 4) -> None:
        """Write a value to memory."""
        self.line(f'"llvm.store"({value}, {pointer}) <{{alignment = {align} : i64}}> : ({kind}, {PTR}) -> ()')

    def prefetch(self, pointer: str) -> None:
        """Ask for the cache line there, into the second level; any address will do."""
        self.line(
            f'"llvm.intr.prefetch"({pointer}) <{{cache = 1 : i32, hint = 2 : i32, rw = 0 : i32}}> : ({PTR}) -> ()'
        )

    def loop(
        self,
        start: int | str,
        stop: int | str,
        step: int | str,
        body: Callable[..., Sequence[str]],
        carried: Sequence[tuple[str, str]] = (),
    ) -> list[str]:
        """Write a counted loop over i64. `body(i, *values)` returns the next values; `carried` are (first value,
        type).
        """
        index, names = self.name(), [self.name() for _ in carried]
        bounds = f"{index} = {self.integer(start)} to {self.integer(stop)} step {self.integer(step)}"
        kinds = ", ".join(kind for _, kind in carried)
        result = self.name()
        if carried:
            firsts = ", ".join(f"{n} = {first}" for n, (first, _) in zip(names, carried, strict=True))
            self.line(f"{result}:{len(carried)} = scf.for {bounds} iter_args({firsts}) -> ({kinds}) : {I64} {{")
        else:
            self.line(f"scf.for {bounds} : {I64} {{")
        last = body(index, *names)
        if carried:
            self.line(f"scf.yield {', '.join(last)} : {kinds}")
        self.line("}")
        return [f"{result}#{i}" for i in range(len(carried))]

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Write what runs only if the condition holds."""
        self.line(f"scf.if {condition} {{")
        yield
        self.line("}")

    def call(self, function: str, *arguments: tuple[str, str]) -> None:
        """Call a function without results; arguments are (value, type)."""
        values, kinds = (", ".join(part) for part in zip(*arguments, strict=True))
        self.line(f"func.call @{function}({values}) : ({kinds}) -> ()")
