"""What LLVM's builder leaves to be said again and again: loops, broadcasts, addresses."""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

I8 = ir.IntType(8)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
POINTER = I8.as_pointer()


def define(module: ir.Module, name: str, result: Any, arguments: Sequence[Any]) -> tuple[ir.IRBuilder, Any]:
    """A function that C can call: (builder at its start, its arguments)."""
    function = ir.Function(module, ir.FunctionType(result, arguments), name)
    return ir.IRBuilder(function.append_basic_block("entry")), function.args


def pointer(builder: ir.IRBuilder, start: Any, offset: Any, kind: Any) -> Any:
    """`offset` bytes past `start`, as the address of a `kind`."""
    return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())


def broadcast(builder: ir.IRBuilder, scalar: Any, vector: Any) -> Any:
    """The scalar in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    everywhere = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, undefined, everywhere)


def loop(
    builder: ir.IRBuilder,
    count: Any,
    carried: Sequence[Any],
    body: Callable[[Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """`for index in range(count): carried = body(index, carried)`; returns the last `carried`.

    Args:
        builder: left after the loop. `body` may branch, as long as it ends in one block.
        count: a signed i64; none or less runs no step.
        carried: values of any types, which the steps hand on.
        body: takes the i64 index and the values, gives the next values.
    """
    zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
    before = builder.block
    step, after = builder.append_basic_block("step"), builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed(">", count, zero), step, after)

    builder.position_at_end(step)
    index = builder.phi(I64)
    values = [builder.phi(value.type) for value in carried]
    following = list(body(index, list(values)))
    next_index = builder.add(index, one)
    end = builder.block
    for phi, first, later in zip([index, *values], [zero, *carried], [next_index, *following], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
    builder.cbranch(builder.icmp_signed("<", next_index, count), step, after)

    builder.position_at_end(after)
    results = [builder.phi(value.type) for value in carried]
    for phi, first, later in zip(results, carried, following, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, end)
    return results
