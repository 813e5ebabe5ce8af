"""The torch ops of any adapter method, made from the names of its factors and options.

`NAME_linear` is the definition, run literally. `NAME_linear_fused` rebuilds the effective weight W' row block by row
block and keeps only its inputs for backward. Without dropout a training step then costs three products of the
layer's size: Y = X W'ᵀ, dX = dY W' and G = dYᵀ X, which `Method.pullback` takes to the factors; with dropout the two
branches see different inputs, and it costs five. The ops of packed weights run the same code on packed rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.functional import linear

from spp_fx.adapters.method import FactorSpec, Kernels, MaskedUpdate, Method, option_types
from spp_fx.adapters.rows import DENSE, PACKINGS, DenseRows, Rows, Storage, row_ranges, workspace
from spp_fx.compiled import optional_module
from spp_fx.errors import UsageError

BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements of one row block by device: every temporary of the size of W is at most this large."""
TILE_ELEMENTS = 1 << 18
"""Elements of a CPU tile: 1 MiB of float32, within the cache that a core or two have to themselves.

`pull_back` reads a tile of its products twice; `build`, which reads once, takes tiles of twice the size.
"""
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
DENSE_UPDATE = "dense_update"
"""The last option of the ops of a method that is not `masked`: whether the update is dense, as in training."""


@torch.library.custom_op("spp_fx::dropout_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def dropout_seed(p: float) -> Tensor:
    """A seed drawn from torch's own generator: (), int64, on the CPU; 0 and no draw if nothing is dropped."""
    if p == 0:
        return torch.zeros((), dtype=torch.int64)
    return torch.randint(2**62, (), dtype=torch.int64)


@dropout_seed.register_fake
def _(p: float) -> Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("spp_fx::dropout", mutates_args=())
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x with each element kept with probability 1 - p and divided by it; the choice is a function of seed.

    The mask is made again from the seed in backward instead of being kept.

    Args:
        x: any shape and floating dtype.
        seed: (), int64, as `dropout_seed` draws it.
        p: probability of dropping, in [0, 1).
    """
    return apply_dropout(x, seed, p)


@dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


def _keep_seed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


dropout.register_autograd(
    lambda ctx, grad: (dropout(grad, ctx.saved_tensors[0], ctx.p), None, None), setup_context=_keep_seed
)


def apply_dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """The definition of `dropout`, for kernels; a fresh tensor in every case."""
    if p == 0 or seed is None:
        return x.clone()
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * kept / (1 - p)


DROPOUT = torch.ops.spp_fx.dropout.default
DROPOUT_SEED = torch.ops.spp_fx.dropout_seed.default


@dataclass(frozen=True)
class AdaptedWeight:
    """A frozen weight (m, n) and the factors of a method, whole."""

    method: Method
    rows: Rows
    factors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if any(value.shape != self.specs[key].shape for key, value in self.factors.items()):
            shapes = " and ".join(str(tuple(value.shape)) for value in self.factors.values())
            raise ValueError(f"factors {shapes} do not fit a weight {self.rows.shape}")

    @cached_property
    def specs(self) -> Mapping[str, FactorSpec]:
        return self.method.factors(self.rows.shape)

    @cached_property
    def group(self) -> int:
        """Rows of W that are treated together, see `Method.row_group`."""
        return self.method.row_group(self.rows.shape)

    @property
    def device(self) -> torch.device:
        return next(iter(self.factors.values())).device

    def build(self, start: int, stop: int, base: float, out: Tensor) -> Tensor:
        """Write rows start..stop of base * W + update into out, rounded once.

        Args:
            start, stop: a range as `row_ranges` gives it.
            base: 1 for the effective weight, 0 for the update alone.
            out: at least stop - start rows of n elements, of any floating dtype.

        Returns:
            The rows of `out` that were written.
        """
        target = out[: stop - start]
        if (kernels := self._kernels(out.dtype)) is not None:
            kernels.tile(self, start, stop, base, target)
            return target
        for first, last in self.tiles(start, stop, 2 * TILE_ELEMENTS):
            own = {key: value[self.specs[key].index((first, last))] for key, value in self.factors.items()}
            self.method.tile(self.rows.take(first, last), own, base, target[first - start : last - start])
        return target

    def pull_back(self, grad: Tensor, start: int, stop: int, grads: dict[str, Tensor]) -> None:
        """Add the factors' gradients from rows start..stop of G = dL/dW' to grads, which has their shapes."""
        if (kernels := self._kernels(grad.dtype)) is not None:
            kernels.pullback(self, grad, start, stop, grads)
            return
        for first, last in self.tiles(start, stop, TILE_ELEMENTS):
            block, weight = grad[first - start : last - start], self.rows.take(first, last)
            self.add_grads(first, last, grads, partial(self.method.pullback, block, weight))

    def add_grads(
        self,
        start: int,
        stop: int,
        grads: dict[str, Tensor],
        add: Callable[[dict[str, Tensor], dict[str, Tensor]], None],
    ) -> None:
        """Call `add` with the factors of some rows and with what takes their gradients."""
        at = {key: self.specs[key].index((start, stop)) for key in self.factors}
        own = {key: value[at[key]] for key, value in self.factors.items()}
        parts = {
            key: grads[key][at[key]] if isinstance(at[key][1], slice) else torch.zeros_like(own[key])
            for key in own
        }
        add(own, parts)
        for key, (_, rows, _) in at.items():
            if not isinstance(rows, slice):  # not a view of grads: rows share entries
                grads[key].index_add_(-2, torch.from_numpy(rows).to(grads[key].device), parts[key])

    def _kernels(self, other: torch.dtype) -> Kernels | None:
        kernels = self.method.kernels(self.device.type)
        return kernels if kernels is not None and kernels.takes(self, other) else None

    def tiles(self, start: int, stop: int, elements: int) -> Iterable[tuple[int, int]]:
        """Rows start..stop in tiles of at most so many elements on a CPU, else in one piece."""
        if self.device.type != "cpu":
            return [(start, stop)]
        return row_ranges(start, stop, self.rows.shape[1], self.group, elements)


def fused_forward(
    adapted: AdaptedWeight, x: Tensor, bias: Tensor | None, seed: Tensor | None, p: float
) -> Tensor:
    """x W'ᵀ + bias, with dropout on the branch of the update; temporaries are bounded by row blocks."""
    m, _ = adapted.rows.shape
    branches = _Branches.of(x, seed, p)
    blocks = _blocks(adapted)
    scratch = _scratch(adapted, blocks, x)
    y = x.new_empty(len(branches.x), m) if len(blocks) != 1 else None
    for start, stop in blocks:
        w = _base(adapted, start, stop, branches, scratch)
        own_bias = None if bias is None else bias[start:stop].to(x.dtype)
        out = gemm(branches.x, w.t(), own_bias, None if y is None else y[:, start:stop])
        if branches.masked:
            out += gemm(branches.dropped, adapted.build(start, stop, 0.0, scratch).t())
        y = out if y is None else y
    assert y is not None
    # Not a view: what comes next may write to it in place.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], m))


def fused_backward(
    grad: Tensor, adapted: AdaptedWeight, x: Tensor, seed: Tensor | None, p: float, needs_x: bool
) -> tuple[Tensor, ...]:
    """Gradients of x (an empty tensor unless needs_x) and of the factors."""
    dy = _flatten(grad)
    branches = _Branches.of(x, seed, p)
    dx, dbranch = _Sum(branches.x), _Sum(branches.x)
    grads = {key: torch.zeros_like(value) for key, value in adapted.factors.items()}
    blocks = _blocks(adapted)
    scratch = _scratch(adapted, blocks, x)
    for start, stop in blocks:
        dy_block = dy[:, start:stop]
        if needs_x:
            dx.add_product(dy_block, _base(adapted, start, stop, branches, scratch))
            if branches.masked:
                dbranch.add_product(dy_block, adapted.build(start, stop, 0.0, scratch))
        if adapted.method.factor_grads is not None:
            add = partial(adapted.method.factor_grads, branches.dropped, dy_block)
            adapted.add_grads(start, stop, grads, add)
            continue
        _pull_back_products(adapted, branches.dropped, dy_block, start, stop, scratch, grads)
    if not needs_x:
        return x.new_empty(0), *grads.values()
    result = dx.total()
    if branches.masked:
        result += apply_dropout(dbranch.total(), seed, p)
    return result.view(x.shape), *grads.values()


def _pull_back_products(
    adapted: AdaptedWeight,
    x: Tensor,
    dy: Tensor,
    start: int,
    stop: int,
    scratch: Tensor,
    grads: dict[str, Tensor],
) -> None:
    """Form rows start..stop of G = dyᵀ x, only where W is non-zero if that is faster, and pull them back."""
    g = scratch[: stop - start]
    sparse = optional_module("spp_fx.adapters.sparse_products") if adapted.method.masked_gradient else None
    if (
        sparse is not None
        and sparse.takes(x, dy)
        and sparse.may_take(adapted.rows.take(start, min(stop, start + sparse.LOOKED_AT)))
    ):
        weight = adapted.rows.take(start, stop)
        parts = -(-len(x) // sparse.MOST_BATCH)
        for x_part, dy_part in zip(x.chunk(parts), dy.chunk(parts), strict=True):
            if not sparse.kept_gradient(x_part, dy_part, weight, g):
                break  # the weight is not sparse enough, which the first part has shown
            adapted.pull_back(g, start, stop, grads)
        else:
            return
    torch.mm(dy.t(), x, out=g)
    adapted.pull_back(g, start, stop, grads)


@dataclass(frozen=True)
class _Branches:
    """The activations of both branches: x itself, and x after dropout, which is x where nothing drops."""

    x: Tensor
    dropped: Tensor
    masked: bool

    @classmethod
    def of(cls, x: Tensor, seed: Tensor | None, p: float) -> "_Branches":
        rows = _flatten(x)
        masked = seed is not None and p != 0
        return cls(rows, apply_dropout(rows, seed, p) if masked else rows, masked)


def _flatten(x: Tensor) -> Tensor:
    """(..., n) as (b, n)."""
    return x.reshape(-1, x.shape[-1])


def _blocks(adapted: AdaptedWeight) -> list[tuple[int, int]]:
    m, n = adapted.rows.shape
    return list(row_ranges(0, m, n, adapted.group, BLOCK_ELEMENTS[adapted.device.type]))


def _scratch(adapted: AdaptedWeight, blocks: list[tuple[int, int]], x: Tensor) -> Tensor:
    """One buffer for every block's W' and G, in x's dtype."""
    largest = max((stop - start for start, stop in blocks), default=0)
    return workspace("block", largest, adapted.rows.shape[1], x.dtype, x.device)


def _base(adapted: AdaptedWeight, start: int, stop: int, branches: _Branches, scratch: Tensor) -> Tensor:
    """What x itself is multiplied with: the whole W', or W alone where dropout separates the branches."""
    if branches.masked:
        return adapted.rows.take(start, stop).to(scratch.dtype)
    return adapted.build(start, stop, 1.0, scratch)


class _Sum:
    """A sum of matrix products; accumulated in float32 where the inputs are of half precision."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.sum: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        product = gemm(a, b)
        if self.sum is None:
            self.sum = product
            return
        if self.like.dtype in (torch.float16, torch.bfloat16):
            self.sum = self.sum.float()
        self.sum += product

    def total(self) -> Tensor:
        return self.like.new_zeros(self.like.shape) if self.sum is None else self.sum.to(self.like.dtype)


def gemm(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a (p, q) times b (q, r), plus bias (r,), in a's dtype.

    In float32 on a CPU torch calls BLAS. Its oneDNN, which it calls for half precision, is 10 to 20 % faster for
    X W^T and dY W (AMD Zen 4), at the same precision, with another order of sums.

    Args:
        out: where to write (p, r); a fresh tensor if None.
    """
    plain = a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.enabled
    onednn = _onednn_linear() if plain else None
    if onednn is not None and a.numel() and b.numel():
        result = onednn(a, b.t(), bias, "none", [], "")
        return result if out is None else out.copy_(result)
    if bias is None:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    return torch.addmm(bias, a, b) if out is None else torch.addmm(bias, a, b, out=out)


@cache
def _onednn_linear():  # pyright: ignore[reportUnknownParameterType] - ops have no types
    """oneDNN's linear on plain tensors, or None in a torch that was built without it."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@dataclass(frozen=True)
class MethodOps:
    """The torch ops of a method; `*options` are its options in the order of its fields, without dropout.

    Attributes:
        factors: names of the factors.
        linear: `(x, weight, *factors, bias, seed, *options, dropout) -> y`: the definition, as one op.
        fused: the same, in row blocks.
        packed: the same on a packed weight, by packing, whose tensors stand in the weight's place.
        weight: `(weight, *factors, *options, base) -> base * weight + update`, for stacks of experts.
    """

    factors: tuple[str, ...]
    linear: OpOverload
    fused: OpOverload
    packed: Mapping[str, OpOverload]
    weight: OpOverload


def ops_of(method: Method, shape: tuple[int, ...]) -> MethodOps:
    """The ops of a method; `shape` is that of any site it takes."""
    return _make_ops(type(method), tuple(method.factors(shape)))


def op_options(method: Method, training: Any = True) -> tuple[Any, ...]:
    """The options of a method as its ops take them.

    Args:
        training: whether the update of a method that is not `masked` is to be dense: a bool, or a node that gives it.
    """
    own = [name for name in _option_types(type(method)) if name != DENSE_UPDATE]
    return (*(getattr(method, name) for name in own), *(() if method.masked else (training,)))


@cache
def _option_types(method: type[Method]) -> dict[str, str]:
    """The options that ops take, in order, with their types as a schema spells them."""
    own = {name: kind.__name__ for name, kind in option_types(method).items() if name != "dropout"}
    return own | ({} if method.masked else {DENSE_UPDATE: "bool"})


@cache
def _make(method: type[Method], options: tuple[Any, ...]) -> Method:
    values = dict(zip(_option_types(method), options, strict=True))
    dense = values.pop(DENSE_UPDATE, True)
    return method(**values) if dense else MaskedUpdate(method(**values))


@cache
def _make_ops(method: type[Method], factors: tuple[str, ...]) -> MethodOps:
    make = _OpFactory(method, factors)
    packed = {
        name: make.linear(f"linear_{name.replace(':', '_')}", storage) for name, storage in PACKINGS.items()
    }
    return MethodOps(factors, make.definition(), make.linear("linear_fused", DENSE), packed, make.weight())


@dataclass(frozen=True)
class _OpFactory:
    """Registers the ops of a method: schema, fake and autograd implementations, autocast, and checks."""

    method: type[Method]
    factors: tuple[str, ...]

    def definition(self) -> OpOverload:
        """x Wᵀ + b + dropout(x) updateᵀ, run literally; it decomposes, and trains the weight as well."""
        count = len(self.factors)

        def definition(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
            (bias, seed, *options, p), factors = arguments[count:], self._named(arguments)
            delta = _make(self.method, tuple(options)).update(weight, **factors).to(weight.dtype)
            if seed is None or p == 0:
                return linear(x, weight + delta, bias)
            return linear(x, weight, bias) + linear(DROPOUT(x, seed, p), delta)

        name = self._name("linear")
        torch.library.define(name, self._linear_schema(("weight",)))
        torch.library.impl(name, "CompositeImplicitAutograd", definition)
        return _overload(name)

    def linear(self, suffix: str, storage: Storage) -> OpOverload:
        """The fused execution on a kept weight; torch.compile, export and checkpointing see one node."""
        kept, count = len(storage.tensors), len(self.factors)

        def adapt(x: Tensor, tensors: Sequence[Any], options: Iterable[Any]) -> AdaptedWeight:
            rows = storage.rows(*tensors[:kept], (tensors[storage.by_row].shape[0], x.shape[-1]))
            return AdaptedWeight(_make(self.method, tuple(options)), rows, self._named(tensors[kept:]))

        def forward(x: Tensor, *arguments: Any) -> Tensor:
            bias, seed, *options, p = arguments[kept + count :]
            return fused_forward(adapt(x, arguments, options), x, bias, seed, p)

        def fake(x: Tensor, *arguments: Any) -> Tensor:
            return x.new_empty(*x.shape[:-1], arguments[storage.by_row].shape[0])

        def backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
            seed, *options, p, needs_x = arguments[kept + count :]
            return fused_backward(grad, adapt(x, arguments, options), x, seed, p, needs_x)

        def fake_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if arguments[-1] else x.new_empty(0)
            return dx, *(torch.empty_like(each) for each in arguments[kept : kept + count])

        name = self._name(suffix)
        op = _custom_op(name, forward, fake, self._linear_schema(storage.tensors))
        op_backward = _custom_op(
            f"{name}_backward",
            backward,
            fake_backward,
            f"({_declare('Tensor', ('grad', 'x', *storage.tensors, *self.factors))}, Tensor? seed{self._options()}, "
            f"float dropout, bool needs_x) -> ({_declare('Tensor', [''] * (1 + count))})",
        )

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            tensors, (_, seed, *ctx.rest) = inputs[: 1 + kept + count], inputs[1 + kept + count :]
            _refuse_weight_gradient(ctx, position=1)
            ctx.save_for_backward(*tensors, seed)

        def differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[1 + kept + count]
            dx, *factors = op_backward(grad, *ctx.saved_tensors, *ctx.rest, needs_x)
            dbias = _flatten(grad).sum(0) if needs_bias else None
            others = (None,) * (1 + len(ctx.rest))
            return dx if needs_x else None, *(None,) * kept, *factors, dbias, *others

        op.register_autograd(differentiate, setup_context=keep)
        overload = _overload(name)
        _follow_autocast(name, overload)
        return overload

    def weight(self) -> OpOverload:
        """base * W + update of a matrix or a stack of experts, for contractions that are not a plain linear."""
        count = len(self.factors)

        def experts(
            weight: Tensor, arguments: tuple[Any, ...], *others: Tensor
        ) -> Iterable[tuple[AdaptedWeight, tuple[Tensor, ...]]]:
            options = arguments[count : count + len(_option_types(self.method))]
            tensors = (weight, *arguments[:count], *others)
            stacks = tensors if weight.ndim == 3 else [tensor[None] for tensor in tensors]
            for w, *each in zip(*stacks, strict=True):
                adapted = AdaptedWeight(_make(self.method, options), DenseRows(w), self._named(each))
                yield adapted, tuple(each[count:])

        def forward(weight: Tensor, *arguments: Any) -> Tensor:
            out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            for adapted, (target,) in experts(weight, arguments, out):
                adapted.build(0, len(target), arguments[-1], target)
            return out

        def backward(grad: Tensor, weight: Tensor, *arguments: Any) -> Any:
            grads = [torch.zeros_like(each) for each in arguments[:count]]
            for adapted, (g, *own) in experts(weight, arguments, grad, *grads):
                adapted.pull_back(g, 0, len(g), self._named(own))
            return self._result(grads)

        def fake(weight: Tensor, *arguments: Any) -> Tensor:
            return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)

        def fake_backward(grad: Tensor, weight: Tensor, *arguments: Any) -> Any:
            return self._result(map(torch.empty_like, arguments[:count]))

        name = self._name("weight")
        signature = f"{_declare('Tensor', ('weight', *self.factors))}{self._options()}"
        result = "Tensor" if count == 1 else f"({_declare('Tensor', [''] * count)})"
        op = _custom_op(name, forward, fake, f"({signature}, float base) -> Tensor")
        op_backward = _custom_op(
            f"{name}_backward", backward, fake_backward, f"(Tensor grad, {signature}) -> {result}"
        )

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            _refuse_weight_gradient(ctx, position=0)
            ctx.save_for_backward(*inputs[: 1 + count])
            ctx.options = inputs[1 + count : -1]

        def differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            found = op_backward(grad, *ctx.saved_tensors, *ctx.options)
            found = found if count > 1 else (found,)
            return None, *found, *(None,) * (len(ctx.options) + 1)

        op.register_autograd(differentiate, setup_context=keep)
        return _overload(name)

    def _named(self, tensors: Sequence[Any]) -> dict[str, Tensor]:
        return dict(zip(self.factors, tensors, strict=False))

    @staticmethod
    def _result(tensors: Iterable[Tensor]) -> Any:
        """Several outputs as a tuple, a single one as itself, as schemas have it."""
        found = list(tensors)
        return tuple(found) if len(found) > 1 else found[0]

    def _name(self, suffix: str) -> str:
        return f"spp_fx::{self.method.name.replace('-', '_')}_{suffix}"

    def _options(self) -> str:
        return "".join(f", {kind} {name}" for name, kind in _option_types(self.method).items())

    def _linear_schema(self, storage: tuple[str, ...]) -> str:
        tensors = _declare("Tensor", ("x", *storage, *self.factors))
        return f"({tensors}, Tensor? bias, Tensor? seed{self._options()}, float dropout) -> Tensor"


def _custom_op(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], schema: str
) -> torch.library.CustomOpDef:
    op = torch.library.custom_op(name, run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def _declare(kind: str, names: Sequence[str]) -> str:
    return ", ".join(f"{kind} {name}".rstrip() for name in names)


def _overload(name: str) -> OpOverload:
    return getattr(torch.ops.spp_fx, name.removeprefix("spp_fx::")).default


def _refuse_weight_gradient(ctx: Any, position: int) -> None:
    """UsageError if the gradient of the frozen weight is needed: the kernels do not compute it."""
    if ctx.needs_input_grad[position]:
        raise UsageError(
            "the weight of an adapted site is frozen: call requires_grad_(False) on it, "
            "or lower with kernel=reference, which differentiates everything"
        )


def _follow_autocast(name: str, op: OpOverload) -> None:
    """Let an op take its activations (its first argument) in autocast's dtype, as linear does.

    Weight and factors stay as they are: the effective weight is built in their dtype and rounded once.
    """

    def on(device: str) -> Callable[..., Any]:
        def call(x: Tensor, *arguments: Any) -> Any:
            dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return op(x.to(dtype), *arguments)

        return call

    for device, key in AUTOCAST_KEYS.items():
        torch.library.impl(name, key, on(device))
