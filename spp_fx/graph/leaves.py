"""Leaves: modules whose code depends on the data, which torch.export cannot trace; a graph calls them as they are.

A leaf is the smallest module whose forward fails in the export. Its structure, without tensors, becomes a `Leaf` of
the program, and a node `run_leaf` calls it with the program's parameters. What shapes its results have, and which
of its weights it multiplies by, is found by running it on stand-ins for its weights and inputs.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations_with_replacement
from math import prod
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import sympy
import torch
from torch import SymInt, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_flatten, tree_map_only

from spp_fx.errors import SppFxError
from spp_fx.graph.followed import Followed, is_transposed, products
from spp_fx.graph.program import SITE, Program, opaque
from spp_fx.graph.rewrite import change_call

aten = torch.ops.aten


ATTRIBUTE = "spp_fx_leaf"
"""The name of a `Leaf` in the module of the tree that calls it."""
MOST_TRIES = 8
RUNS = 3
"""Runs of different sizes that show what the sizes of the results are made of."""
_ERRORS = (
    *(RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError),
    *(NameError, ImportError),
)
_CONSTANTS = (bool, int, float, str, torch.dtype, type(None))


class NotALeaf(RuntimeError):
    """Why a module cannot be a leaf, in words that follow its name."""


@dataclass(frozen=True)
class Slot:
    """The place of a tensor or size in a structure of arguments or results."""

    index: int


@dataclass(frozen=True)
class Result:
    """A tensor that a leaf makes.

    Attributes:
        dtype: of it.
        sizes: of each dimension, a factor and what multiplies it: places (input, dimension) in the leaf's inputs; an
            input that is a size has no dimension.
    """

    dtype: torch.dtype
    sizes: tuple[tuple[int, tuple[tuple[int, int | None], ...]], ...]

    def shape(self, inputs: Sequence[Any]) -> list[Any]:
        """The shape for some inputs; symbolic for symbolic ones."""
        return [prod((_size_at(inputs, place) for place in places), start=k) for k, places in self.sizes]


def _size_at(inputs: Sequence[Any], place: tuple[int, int | None]) -> Any:
    index, dim = place
    return inputs[index] if dim is None else inputs[index].shape[dim]


class Leaf(nn.Module):
    """A call of a module that runs as it is.

    Attributes:
        path, kind: of the module in its model, and the name of its class.
        module: its structure; every parameter and buffer is None.
        names: of its tensors, which a call takes first; the inputs follow: tensors, then sizes.
        given: the arguments, with a `Slot` for each input.
        made: what it returns, with a `Slot` for each of `results`.
        linears: for each weight, whether it is stored (in, out), or why it is not known to be that of a linear.
    """

    def __init__(self, path: str, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.path, self.kind, self.names, self.module = path, type(module).__name__, names, module
        self.given: Any = None
        self.made: Any = None
        self.results: tuple[Result, ...] = ()
        self.linears: dict[str, bool | str] = {}

    def __str__(self) -> str:
        return f"{self.path} ({self.kind}), whose code depends on the data"

    def forward(self, *operands: Any) -> list[Tensor]:
        """The results for the tensors of `names` and the inputs, as the module's own code makes them.

        Raises:
            SppFxError: they have other shapes than the graph was traced with.
        """
        inputs = operands[len(self.names) :]
        made, _ = _take_out(self.call(operands))
        for result, tensor in zip(self.results, made, strict=True):
            if (expected := result.shape(inputs)) != list(tensor.shape):
                raise SppFxError(
                    f"{self}, made a result of shape {list(tensor.shape)} where the graph was traced with {expected}"
                )
        return [tensor.contiguous() for tensor in made]

    def call(self, operands: Sequence[Any]) -> Any:
        """What the module returns. It runs in a copy of its structure, so that no call leaves a trace in the next."""
        count = len(self.names)
        module = _filled(self.module, dict(zip(self.names, operands[:count], strict=True)))
        args, kwargs = tree_map_only(Slot, lambda slot: operands[count + slot.index], self.given)
        return module.forward(*args, **kwargs)

    def handle(self) -> int:
        """What the op of a leaf knows it by."""
        _LEAVES[id(self)] = self
        return id(self)


_LEAVES: "WeakValueDictionary[int, Leaf]" = WeakValueDictionary()


@torch.library.custom_op("spp_fx::leaf", mutates_args=())
def leaf_op(tensors: list[Tensor], sizes: list[int], leaf: int) -> list[Tensor]:
    """A leaf in an exported graph, where a call of Python has no place; it has no gradient."""
    return [tensor.clone() for tensor in _LEAVES[leaf](*tensors, *sizes)]


@leaf_op.register_fake
def _(tensors: list[Tensor], sizes: list[int], leaf: int) -> list[Tensor]:
    known = _LEAVES[leaf]
    inputs = [*tensors[len(known.names) :], *sizes]
    return [
        torch.empty(result.shape(inputs), dtype=result.dtype, device=tensors[-1].device)
        for result in known.results
    ]


OP = torch.ops.spp_fx.leaf.default


@opaque
def run_leaf(leaf: Leaf, *operands: Any) -> list[Tensor]:
    """Run a leaf on its tensors and inputs; where nothing is computed, that is one op."""
    tensors = [each for each in operands if isinstance(each, Tensor)]
    if any(isinstance(t, FakeTensor | FunctionalTensor) or t.device.type == "meta" for t in tensors):
        return OP(tensors, list(operands[len(tensors) :]), leaf.handle())
    return leaf(*operands)


@opaque
def held(weight: Tensor) -> Tensor:
    """The weight of a site on its way into a leaf, which multiplies by it: the node that `SITE` marks."""
    return weight


def sites_in_leaves(program: Program) -> frozenset[str]:
    """The sites whose weights are multiplied by inside of leaves."""
    return frozenset(n for n, uses in program.uses().items() if any(use.node.target is held for use in uses))


def held_sites(node: fx.Node) -> dict[int, str]:
    """The sites whose weights a `run_leaf` node hands to its leaf, by their position among its arguments."""
    places = enumerate(node.args)
    return {i: each.meta[SITE] for i, each in places if isinstance(each, fx.Node) and each.target is held}


class Leaves:
    """The modules of a model that are leaves of its trace: none until an export fails.

    Attributes:
        classes: theirs. A class whose code depends on the data at one layer does at all.
        refused: classes that cannot be leaves, with reasons.
        reason: of the first failure.
    """

    def __init__(self, model: nn.Module, classes: Collection[type[nn.Module]] = ()) -> None:
        self.model = model
        self.classes = set(classes)
        self.refused: dict[type[nn.Module], str] = {}
        self.reason: str | None = None
        self.made: list[Leaf] = []

    def grow(self, error: BaseException, reason: str) -> bool:
        """After a failed export, make the innermost module that failed a leaf; whether another try may succeed.

        The model itself is never a leaf.
        """
        self.reason = self.reason or reason
        if len(self.classes) + len(self.refused) >= MOST_TRIES:
            return False
        paths = {id(module): path for path, module in self.model.named_modules()}
        for module in _running(error, paths):
            kind = type(module)
            if isinstance(error, NotALeaf) and kind in self.classes:
                self.classes.discard(kind)
                self.refused[kind] = str(error)
            path = paths[id(module)]
            if not path:
                break
            # A class of torch's is in many places, most of which can be traced.
            if (
                kind not in self.classes
                and kind not in self.refused
                and not kind.__module__.startswith("torch.")
            ):
                self.classes.add(kind)
                return True
        return False

    def why(self) -> str:
        """Why the export failed, and which modules could not be leaves."""
        tried = "".join(
            f"; {kind.__name__} cannot run as it is: {said}" for kind, said in self.refused.items()
        )
        return f"{self.reason}{tried}"

    def put_in_place(self) -> None:
        """Let every leaf be one op from now on; `untouched` puts back what that replaces."""
        found = self.model.named_modules() if self.classes else ()
        leaves = [(path, module) for path, module in found if type(module) in self.classes]
        calls = [
            partial(self._call, _Original(path, module, _filled(module, {}), _tensors_of(module)))
            for path, module in leaves
        ]
        for (_, module), instead in zip(leaves, calls, strict=True):
            vars(module)["forward"] = instead

    def _call(self, original: "_Original", *args: Any, **kwargs: Any) -> Any:
        """What stands for the forward of a leaf while the model is exported."""
        leaf = Leaf(original.path, _filled(original.structure, {}), tuple(original.tensors))
        leaf.given, tensors, sizes = _arguments((args, kwargs))
        own = [_get(original.module, name) for name in leaf.names]
        _Trial(leaf, original, [*tensors, *sizes]).describe()
        self.made.append(leaf)
        made = OP([*own, *tensors], sizes, leaf.handle())
        return tree_map_only(Slot, lambda slot: made[slot.index], leaf.made)

    def place(self, root: fx.GraphModule) -> None:
        """Let the graphs of a tree call the leaves in place of their ops."""
        for module in list(root.modules()):
            if not isinstance(module, fx.GraphModule):
                continue
            for number, node in enumerate(module.graph.find_nodes(op="call_function", target=OP)):
                tensors, sizes, handle = node.args
                name = f"{ATTRIBUTE}_{number}"
                module.register_module(name, _LEAVES[handle])
                with module.graph.inserting_before(node):
                    leaf = module.graph.get_attr(name)
                change_call(node, run_leaf, leaf, *tensors, *sizes)
                module.recompile()


def without_leaves(model: nn.Module, error: BaseException, reason: str) -> str:
    """Why an export failed that takes no leaves, as those to ONNX."""
    paths = {id(module): path for path, module in model.named_modules()}
    for module in _running(error, paths)[:1]:
        if paths[id(module)]:
            where = f"{paths[id(module)]} ({type(module).__name__})"
            return f"{reason}; it is the code of {where}, which can run in a program as it is, and not in this graph"
    return reason


def leaf_classes(program: nn.Module) -> frozenset[type[nn.Module]]:
    """The classes of the modules that are leaves of a program."""
    return frozenset(type(each.module) for each in program.modules() if isinstance(each, Leaf))


class _Original(NamedTuple):
    """A module that is a leaf: its structure, and its tensors before the export replaces them."""

    path: str
    module: nn.Module
    structure: nn.Module
    tensors: dict[str, Tensor]


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    every = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name: tensor for each in every for name, tensor in each}


def _get(module: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def _filled(module: nn.Module, tensors: Mapping[str, Any], prefix: str = "") -> nn.Module:
    """A module of the same structure with other tensors, None for those that are not given."""
    copy = object.__new__(type(module))
    copy.__dict__ = dict(module.__dict__)
    for table in ("_parameters", "_buffers"):
        copy.__dict__[table] = {name: tensors.get(prefix + name) for name in getattr(module, table)}
    copy._modules = {
        name: child and _filled(child, tensors, f"{prefix}{name}.") for name, child in module._modules.items()
    }
    return copy


def _running(error: BaseException | None, paths: Mapping[int, str]) -> list[nn.Module]:
    """The modules of a model whose methods an error passed through, the innermost first."""
    while error is not None:
        found: list[nn.Module] = []
        trace = error.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in paths and owner not in found:
                found.insert(0, owner)
            trace = trace.tb_next
        if found:
            return found
        error = error.__cause__ or error.__context__
    return []


def _arguments(value: Any) -> tuple[Any, list[Tensor], list[SymInt]]:
    """Arguments with a `Slot` for each tensor and each size, and these."""
    flat, spec = tree_flatten(value)
    tensors = [each for each in flat if isinstance(each, Tensor)]
    sizes = [each for each in flat if isinstance(each, SymInt)]
    places = {id(each): Slot(i) for i, each in enumerate([*tensors, *sizes])}
    for each in flat:
        if id(each) not in places and not isinstance(each, _CONSTANTS):
            raise NotALeaf(f"it is given a {type(each).__name__}")
    return spec.unflatten([places.get(id(each), each) for each in flat]), tensors, sizes


def _take_out(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a result, and the result with a `Slot` for each."""
    flat, spec = tree_flatten(value)
    tensors = [each for each in flat if isinstance(each, Tensor)]
    places = iter(range(len(tensors)))
    return tensors, spec.unflatten([Slot(next(places)) if isinstance(e, Tensor) else e for e in flat])


@dataclass(frozen=True)
class _Trial:
    """Runs a leaf on stand-ins, of several sizes, to see what it makes of them."""

    leaf: Leaf
    original: _Original
    inputs: Sequence[Any]
    seen: dict[str, set[bool | str]] = field(default_factory=dict)

    def describe(self) -> None:
        """Fill in the leaf's `made`, `results` and `linears`.

        Raises:
            NotALeaf: it does not run alone, or what its results' sizes are made of is not clear.
        """
        symbols = _symbols(self.inputs)
        runs = [
            {s: hint + run * (step + 2) for step, (s, hint) in enumerate(symbols.items())}
            for run in range(RUNS)
        ]
        # A thread of its own has none of the modes that export runs the model in.
        with ThreadPoolExecutor(1) as thread:
            found = [thread.submit(self._run, run, seed).result() for seed, run in enumerate(runs)]
        self.leaf.linears = {
            name: self._use(name, self.seen.get(name, set()))
            for name, tensor in self.original.tensors.items()
            if tensor.ndim > 1 and isinstance(tensor, nn.Parameter)
        }
        made, structure = found[0]
        if not made or any(repr(other) != repr(structure) or len(m) != len(made) for m, other in found):
            raise NotALeaf("what it returns depends on the data" if made else "it returns no tensor")
        self.leaf.made = structure
        places = self._places()
        results: list[Result] = []
        for index, first in enumerate(made):
            shapes = [tuple(each[index].shape) for each, _ in found]
            if len({len(shape) for shape in shapes}) > 1 or any(
                m[index].dtype != first.dtype for m, _ in found
            ):
                raise NotALeaf("what it returns depends on the data")
            dims = (self._size([shape[d] for shape in shapes], runs, places) for d in range(first.ndim))
            results.append(Result(first.dtype, tuple(dims)))
        self.leaf.results = tuple(results)

    def _places(self) -> dict[Any, tuple[int, int | None]]:
        """Where each symbolic size of the inputs is first."""
        found: dict[Any, tuple[int, int | None]] = {}
        for index, each in enumerate(self.inputs):
            sizes = [(None, each)] if isinstance(each, SymInt) else list(enumerate(each.shape))
            for dim, size in sizes:
                if isinstance(size, SymInt) and (expression := _expression(size)).free_symbols:
                    found.setdefault(expression, (index, dim))
        return found

    @staticmethod
    def _size(
        seen: Sequence[int], runs: Sequence[Mapping[Any, int]], places: Mapping[Any, tuple[int, int | None]]
    ) -> tuple[int, tuple[tuple[int, int | None], ...]]:
        """What a size is made of: a number, or a multiple of a size of the inputs or of a product of two."""
        if len(set(seen)) == 1:
            return seen[0], ()
        for count in (1, 2):
            fits: dict[Any, tuple[int, tuple[tuple[int, int | None], ...]]] = {}
            for chosen in combinations_with_replacement(places, count):
                product = sympy.expand(sympy.Mul(*chosen))
                values = [int(product.subs(run)) for run in runs]
                factor = seen[0] // values[0] if values[0] else 0
                if factor and all(size == factor * value for size, value in zip(seen, values, strict=True)):
                    fits.setdefault(product, (factor, tuple(places[each] for each in chosen)))
            if len(fits) == 1:
                return next(iter(fits.values()))
            if fits:
                break
        raise NotALeaf(
            f"it made {', '.join(map(str, seen))} entries for inputs of different sizes, and nothing shows how many it "
            "makes for others"
        )

    def _run(self, sizes: Mapping[Any, int], seed: int) -> tuple[list[Tensor], Any]:
        """The results for inputs of some sizes."""
        failure: Exception | None = None
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for whole in (_alternating, _zeros):
                try:
                    return self._try(sizes, torch.Generator().manual_seed(seed), whole)
                except NotALeaf:
                    raise
                except _ERRORS as error:  # of the module's own code, on numbers that it may not take
                    failure = error
        said = " ".join(str(failure).split())[:200]
        raise NotALeaf(f"it does not run on stand-ins for its inputs ({type(failure).__name__}: {said})")

    def _try(
        self, sizes: Mapping[Any, int], generator: torch.Generator, whole: Any
    ) -> tuple[list[Tensor], Any]:
        inputs = [_stand_in(each, sizes, generator, whole) for each in self.inputs]
        versions = [each._version for each in inputs if isinstance(each, Tensor)]
        tensors = [self._tensor(*each) for each in self.original.tensors.items()]
        made, structure = _take_out(self.leaf.call([*tensors, *inputs]))
        if versions != [each._version for each in inputs if isinstance(each, Tensor)]:
            raise NotALeaf("it writes to its inputs")
        return [each.value if isinstance(each, Followed) else each for each in made], structure

    def _tensor(self, name: str, own: Tensor) -> Tensor:
        """What stands for a parameter or buffer: numbers of no memory for one that may have none yet."""
        if own.device.type != "meta" and not isinstance(own, nn.Parameter):
            return own.detach().cpu().clone()
        value = torch.full((), 0.02 if own.dtype.is_floating_point else 0, dtype=own.dtype).expand(own.shape)
        follow = own.ndim > 1 and isinstance(own, nn.Parameter)
        return Followed.whole(value, name, self._show) if follow else value.clone()

    def _show(self, weight: Followed, op: Any, _: int, summed: int | None, *__: Any) -> None:
        use = f"is used by {op}" if summed is None else is_transposed(weight, summed)
        self.seen.setdefault(weight.key, set()).add(use)

    def _use(self, name: str, uses: set[bool | str]) -> bool | str:
        said = sorted(use for use in uses if isinstance(use, str))
        if said:
            return f"{said[0]} in {self.leaf}"
        if len(uses) != 1:
            what = (
                "is used in two orientations"
                if uses
                else "is not used by the runs that show what is done with it"
            )
            return f"{what} in {self.leaf}"
        return next(iter(uses))


def _expression(size: SymInt) -> Any:
    """A size by the sizes of the example: those that are equal in it are taken for one, since it has no others."""
    env = size.node.shape_env
    expression = env.replace(size.node.expr)
    hints = {symbol: env.create_symintnode(symbol, hint=None).node.hint for symbol in expression.free_symbols}
    if None in hints.values():
        raise NotALeaf("the sizes of its inputs depend on the data")
    return expression.xreplace(
        {symbol: sympy.Symbol(f"n{hint}", integer=True, positive=True) for symbol, hint in hints.items()}
    )


def _symbols(inputs: Sequence[Any]) -> dict[Any, int]:
    """The symbols in the sizes of some inputs, with their values in the example of the export."""
    sizes = [s for each in inputs for s in ([each] if isinstance(each, SymInt) else each.shape)]
    found = {symbol for s in sizes if isinstance(s, SymInt) for symbol in _expression(s).free_symbols}
    return {symbol: int(symbol.name[1:]) for symbol in sorted(found, key=str)}


def _alternating(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return (torch.arange(prod(shape)) % 2).view(shape).to(dtype)


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _stand_in(like: Any, sizes: Mapping[Any, int], generator: torch.Generator, whole: Any) -> Any:
    """A number or a tensor on the CPU for an input: random, or for whole numbers as `whole` makes them."""
    if not isinstance(like, Tensor):
        return int(_expression(like).subs(sizes))
    shape = [int(_expression(s).subs(sizes)) if isinstance(s, SymInt) else int(s) for s in like.shape]
    if like.dtype.is_floating_point or like.dtype.is_complex:
        return torch.randn(shape, generator=generator).to(like.dtype)
    return torch.ones(shape, dtype=torch.bool) if like.dtype == torch.bool else whole(shape, like.dtype)


Inputs = dict[tuple[str, int], list[tuple[Tensor, Tensor]]]
"""By site and expert (0 for a matrix): inputs (tokens, k), and which k columns of the weight they are multiplied by."""


def site_inputs(node: fx.Node, arguments: Sequence[Any]) -> Inputs:
    """What the sites in a leaf are multiplied by when a `run_leaf` node has some arguments; runs the leaf."""
    leaf: Leaf = arguments[0]
    operands, found = list(arguments[1:]), Inputs()

    def show(
        weight: Followed,
        op: Any,
        position: int,
        summed: int | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if summed is None:
            return
        site, transposed = weight.key
        ((other, dim),) = ((p, d) for p, d in products()[op].items() if p != position)
        x, stacked = args[other].movedim(dim, -1), weight.value.ndim == 3
        columns = weight.places[-2 if transposed else -1].movedim(summed, -1)
        if not stacked:
            rows = [x]
        elif x.ndim == 2:  # a grouped product: tokens sorted by expert
            ends = (args[2] if len(args) > 2 else kwargs["offs"]).tolist()
            rows = [x[start:stop] for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
        else:
            rows = list(x)
        for index, part in enumerate(rows):
            expert = weight.places[0][index] if stacked else weight.places[0]
            own = (columns[index] if stacked else columns).reshape(-1, x.shape[-1])[0]
            key = site, int(expert.flatten()[0]) if len(weight.places) == 3 else 0
            found.setdefault(key, []).append((part.reshape(-1, x.shape[-1]), own))

    for position, site in held_sites(node).items():
        transposed = leaf.linears[leaf.names[position - 1]]
        operands[position - 1] = Followed.whole(operands[position - 1], (site, transposed), show)
    leaf.call(operands)
    return found
