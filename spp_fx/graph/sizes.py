"""The sizes of inputs that a trace holds for: what torch.export assumed, kept as conditions."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import sympy
from torch import SymInt
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter

from spp_fx.errors import SppFxError, UsageError
from spp_fx.graph.task import BATCH, EXAMPLE, LENGTH, Input

LONGEST = 4096
"""Lengths up to which `described` looks."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that a program computes what its model computes for.

    A model's code may branch on the batch size and the sequence length; a trace has the branches of its example.

    Attributes:
        conditions: Python expressions in the names of axes (`task.Input`), all of which hold for those sizes; none if
            any do.
    """

    conditions: tuple[str, ...] = ()

    def admit(self, **sizes: Any) -> bool:
        """Whether a batch of such sizes, by the names of axes, meets every condition; symbolic sizes are guarded."""
        return all(holds(**sizes) for holds in map(_compiled, self.conditions))

    def cover(self, batch: int, longest: int) -> bool:
        """Whether every length from 2 on is admitted."""
        return all(self.admit(**EXAMPLE | {BATCH: batch, LENGTH: n}) for n in range(2, longest + 1))

    def described(self, longest: int = LONGEST, batch: int = 2) -> str:
        """The lengths of so many rows that are admitted, in words."""
        if not self.conditions:
            return "any length"
        admitted = [n for n in range(1, longest + 1) if self.admit(**EXAMPLE | {BATCH: batch, LENGTH: n})]
        runs = list(_runs(admitted))
        if runs and runs[-1][1] == longest:
            runs[-1] = (runs[-1][0], 0)
        said = [f"{a} and more" if b == 0 else f"{a}" if a == b else f"{a} to {b}" for a, b in runs[:4]]
        more = " and others" if len(runs) > len(said) else ""
        return f"{', '.join(said)}{more} tokens" if said else "no length"


ANY_SIZES = Sizes()


def sizes_of(exported: ExportedProgram, inputs: Iterable[Input]) -> Sizes:
    """What torch.export assumed of the sizes of an export's inputs.

    Args:
        inputs: those that the exported program has, in its order.

    Raises:
        SppFxError: an assumption is about something else than these sizes.
    """
    env: ShapeEnv | None = None
    known: dict[Any, Any] = {}
    conditions: list[Any] = []
    placeholders = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    given = [placeholders[name] for name in exported.graph_signature.user_inputs]
    for node, entry in zip(given, inputs, strict=True):
        for name, size in zip(entry.axes, node.meta["val"].shape, strict=True):
            if isinstance(name, int):
                continue
            conditions += _bind(size, sympy.Symbol(name, integer=True, positive=True), known)
            env = size.node.shape_env if isinstance(size, SymInt) else env
    if env is None:
        return Sizes(_printed(conditions))
    assumed = [env.replace(guard.expr) for guard in env.guards]
    for symbol, sizes in exported.range_constraints.items():
        if symbol in known and sizes.lower > 2:  # export itself excludes 0 and 1
            assumed.append(sympy.Ge(symbol, sizes.lower))
        if symbol in known and sizes.upper != int_oo:
            assumed.append(sympy.Le(symbol, sizes.upper))
    for each in assumed:
        if each.free_symbols - known.keys():
            raise SppFxError(f"its code branches on what it computes ({each})")
        conditions.append(each.xreplace(known))
    return Sizes(_printed(conditions))


def sizes_in(inputs: Iterable[Input], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The size of each axis of a batch, by its name, of the inputs that are given.

    Raises:
        UsageError: a tensor has another number of dimensions, or two have different sizes of one axis.
    """
    found: dict[str, Any] = {}
    for entry in inputs:
        shape = tuple(tensors[entry.name].shape) if entry.name in tensors else None
        if shape is None:
            continue
        if len(shape) != len(entry.axes):
            raise UsageError(f"{entry.name} must be {entry.described()}, got shape {shape}")
        for axis, size in zip(entry.axes, shape, strict=True):
            wanted = found.setdefault(axis, size) if isinstance(axis, str) else axis
            if isinstance(size, int) and isinstance(wanted, int) and size != wanted:
                raise UsageError(
                    f"{entry.name} must be {entry.described()} with {axis} {wanted}, got {shape}"
                )
    return found


def _bind(size: Any, wanted: sympy.Symbol, known: dict[Any, Any]) -> Iterator[Any]:
    """Solve `size = wanted` for the symbol in it; what must hold for that."""
    expression: Any = size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)
    if not expression.free_symbols or expression in known:
        yield sympy.Eq(wanted, known.get(expression, expression))
        return
    (symbol,) = expression.free_symbols
    factor, rest = sympy.Poly(expression, symbol).all_coeffs()
    known[symbol] = (wanted - rest) / factor
    yield sympy.Eq(sympy.Mod(wanted - rest, factor), 0)


def _printed(conditions: list[Any]) -> tuple[str, ...]:
    kept = dict.fromkeys(each for each in conditions if each not in (True, sympy.true))
    return tuple(PythonPrinter().doprint(each) for each in kept)


@cache
def _compiled(condition: str) -> Callable[..., Any]:
    axes = [name for name in compile(condition, "<condition>", "eval").co_names if name in EXAMPLE]
    return eval(f"lambda {', '.join((*axes, '**others'))}: {condition}", {"math": math})


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    for _, group in groupby(enumerate(numbers), lambda each: each[1] - each[0]):
        run = [number for _, number in group]
        yield run[0], run[-1]
