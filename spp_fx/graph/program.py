"""The traced model and its sites: the weights that passes may treat."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function
from transformers import PretrainedConfig
from transformers.modeling_outputs import ModelOutput

from spp_fx.adapters.method import Method
from spp_fx.errors import SppFxError, UsageError
from spp_fx.graph.names import in_model, layer_of
from spp_fx.graph.rewrite import move_constants
from spp_fx.graph.sizes import ANY_SIZES, sizes_in
from spp_fx.graph.task import BATCH, LENGTH, TARGET, Input, Task, vocabulary_of
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern

F = TypeVar("F", bound=Callable[..., Any])


def opaque(function: F) -> F:
    """Make every fx tracer take a call as one node instead of looking inside.

    Unpickling traces the generated code of a graph module. `fx.wrap` takes only calls by a module's global name, and
    tracing into the function would freeze its branches.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        return function(*args, **kwargs)

    return cast(F, call)


Kind = Literal["linear", "conv1d", "matmul", "experts"]


ROUTES = "routes tokens to experts"
GATES = "gates a branch by one number"


@dataclass(frozen=True)
class LeftOut:
    """Why a parameter of two or more dimensions is not a site.

    Attributes:
        reason: in words that follow the parameter's name.
        known: the graph proves that the parameter is not the weight of a linear that could be sparse
            (a table of embeddings, one that is only added or multiplied elementwise, a router). False for
            everything else: the parameter may be a linear that was not understood, or not reached.
    """

    reason: str
    known: bool


@dataclass(frozen=True)
class Site:
    """One weight in its canonical orientation, however it is stored.

    Attributes:
        name: the checkpoint's name of the weight, such as `model.layers.0.mlp.up_proj.weight`.
        kind: the form the graph used it in; `experts` is a 3-D stack, the others are matrices.
        shape: (out, in), or (experts, out, in).
        dtype: the stored dtype.
        transposed: the weight is stored (in, out); N:M groups still run along `in`.
        layer: path of the layer that owns it, such as `model.decoder.layers.3`; None outside the layers.
        uses: how many nodes of the program use the weight as a linear.
        tied_to: name of the embedding that shares the weight, if one does.
        is_head: the linear produces the logits.
        role: what the graph does with its result, where that is a reason to leave the weight as it is:
            `ROUTES` or `GATES`; None for every other linear.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    layer: str | None
    uses: int
    tied_to: str | None
    is_head: bool
    role: str | None = None

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def factor_attribute(parameter: str, factor: str) -> str:
    """Attribute under which the module that owns `parameter` holds an adapter's factor."""
    return factor if parameter == "weight" else f"{parameter}_{factor}"


def matrices(weight: Tensor) -> list[Tensor]:
    """The matrices (out, in) of a canonical weight as views: itself, or one for each expert."""
    return list(weight) if weight.ndim == 3 else [weight]


SITE = "spp_fx_site"
"""Key of `fx.Node.meta`: the name of the site whose weight the node contracts; left by canonicalize."""
ADAPTER = "spp_fx_adapter"
"""Key of `fx.Node.meta`: the name of the site whose adapter the node computes; left by inject."""


@dataclass(frozen=True)
class Use:
    """One node that contracts a site's weight with an activation.

    `module` is the graph module that owns `node`, `path` its dotted path in the program.
    """

    path: str
    module: fx.GraphModule
    node: fx.Node

    def owner(self, site: str) -> tuple[nn.Module, str]:
        """The module that holds the parameter of a site in this graph, and the prefix of what it holds in the graph."""
        inside = site.rpartition(".")[0].removeprefix(in_model(self.path)).lstrip(".")
        return self.module.get_submodule(inside), f"{inside}." if inside else ""


class Rewrite(Protocol):
    """What rewrote a program, and can do it to another trace of its model."""

    def again(self, program: "Program", first: "Program") -> None:
        """Do to `program` what was done to `first`, whose tensors it will share."""


MOST_TRACES = 8
"""Traces of one model for sizes that its first does not hold for: each takes seconds and the memory of its graphs."""


def child_path(path: str, node: fx.Node) -> str:
    """The path in the program of the module, parameter or buffer that a node of the graph at `path` names."""
    return f"{path}.{node.target}".lstrip(".")


def is_size(node: fx.Node) -> bool:
    """Whether a node of a traced graph computes a number, such as a size, and not a tensor."""
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def _said(sizes: dict[str, int]) -> str:
    """A batch in words."""
    counted = ((LENGTH, "tokens"), (TARGET, "target tokens"))
    rest = " and ".join(f"{sizes[axis]} {word}" for axis, word in counted if axis in sizes)
    return f"{sizes[BATCH]} rows of {rest}" if rest else f"{sizes[BATCH]} rows"


class Program(nn.Module):
    """A model as nested fx graphs; called like the Hugging Face model it was traced from.

    Module paths, parameter and buffer names are the checkpoint's own (a packed weight is several). The
    graphs are plain `torch.fx.GraphModule`s that run generated code, so `torch.compile`, `torch.export` and every
    fx tool take them; `train()` and `eval()` switch the dropout that the source model has.

    Attributes:
        task: what the model is for.
        inputs: what it is called with, in order.
        config: the source model's configuration.
        sites: by checkpoint name; filled by `canonicalize`.
        left_out: every other parameter of two or more dimensions, by checkpoint name, with the reason why it
            is not a site; filled by `canonicalize`.
        patterns: what is known of each site's pattern (None: dense); sites on the meta device are
            missing until their weights are read.
        matched: the sites that later passes treat, with their patterns; filled by `match`.
        adapters: the method that each injected site carries; filled by `inject`.
        trained: parameters of the model that are trained themselves, and the dtype that each has in the
            model; filled by `train-norms`.
        units: paths of the decoder layers' graph modules, in order; filled by `partition`.
        packings: how the weight of a site is packed, if it is; see `passes.frozen_weights`.
        masks: the mask that each injected site had before injection; `verify` compares with it.
        untraced: why there are no graphs and nothing can be computed; see `outline`.
        tied: parameters that share another's storage: name -> the first name.
        head_weight: name of the weight that makes the logits, if the model has one.
        dtype: of the numbers that it is given, such as pixels.
        calibration: what calibrated passes run it on: tokens (samples, length) int64, or rows of its inputs, each
            (1, ...), by name.
        loss_type: what transformers calls the loss; its Trainer counts a step's tokens by it.
        history: spellings of the passes that ran, in order.
        sizes: what its graphs hold for; `at` gives a program for others.
        constants: names of the buffers that its trace made, and the model does not have.
        again: traces the model for another example, given it and a device; None where that cannot be.
        applied: what makes another trace of the model the same program; left by `run_pipeline`.
    """

    root: fx.GraphModule

    def __init__(
        self,
        root: fx.GraphModule,
        task: Task,
        inputs: tuple[Input, ...],
        config: PretrainedConfig,
        loss_function: Callable[..., Any] | None,
        tied: dict[str, str],
        head: str | None,
    ) -> None:
        super().__init__()
        # The root graph shares its children with this module, so that names carry no prefix.
        object.__setattr__(self, "root", root)
        self._modules, self._parameters, self._buffers = root._modules, root._parameters, root._buffers
        self._transient = {
            path: names
            for path, module in self.named_modules()
            if (names := module._non_persistent_buffers_set)
        }
        self.task = task
        self.inputs = inputs
        self.config = config
        self.loss_function = loss_function
        self.tied = tied
        self.head_weight = head
        self.sites: dict[str, Site] = {}
        self.left_out: dict[str, LeftOut] = {}
        self.untraced: str | None = None
        self.patterns: dict[str, Pattern | None] = {}
        self.matched: dict[str, Pattern | None] = {}
        self.adapters: dict[str, Method] = {}
        self.trained: dict[str, torch.dtype] = {}
        self.units: list[str] = []
        self.packings: dict[str, str] = {}
        self.masks: dict[str, PackedMask] = {}
        self.calibration: Tensor | Sequence[Mapping[str, Tensor]] | None = None
        self.language = ""
        self.positions: int | None = None
        self.dtype = torch.float32
        self.loss_type: str | None = None
        self.history: list[str] = []
        self.sizes = ANY_SIZES
        self.constants: frozenset[str] = frozenset()
        self.again: Callable[[dict[str, int], torch.device], Program] | None = None
        self.applied: list[Rewrite] = []
        self._traces: list[Program] = [self]

    def forward(self, *args: Tensor | None, labels: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        """The model's outputs, and the loss when labels are given.

        Args:
            args, kwargs: the `inputs`; what else is named goes to the task's loss, such as `num_items_in_batch`.
            labels: as the task has them: of causal language models (batch, length) int64, -100 where nothing is to be
                predicted.

        Returns:
            `Task.output_class`, such as `loss` (scalar or None) and `logits` (batch, length, vocabulary).
        """
        if self.untraced is not None:
            raise SppFxError(self.untraced)
        given = self.take(args, kwargs)
        program = self.at(**sizes_in(self.inputs, given))
        made = program.root(*given.values())
        outputs = dict(
            zip(self.task.outputs, made if isinstance(made, tuple | list) else (made,), strict=True)
        )
        loss = None if labels is None else self.task.loss(self, outputs, labels, **kwargs)
        return self.task.output_class(
            **{"loss": loss} if "loss" in self.task.output_class.__annotations__ else {}, **outputs
        )

    def take(self, args: Sequence[Tensor | None], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Every input, in order, taken out of arguments, or filled with its default.

        Raises:
            UsageError: one is missing, or has another shape.
        """
        given = dict(zip((entry.name for entry in self.inputs), args, strict=False))
        if len(args) > len(self.inputs):
            raise UsageError(f"takes {len(self.inputs)} inputs ({', '.join(given)}), got {len(args)}")
        names = [entry.name for entry in self.inputs if kwargs.get(entry.name) is not None]
        given |= {name: kwargs.pop(name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        sizes = sizes_in(self.inputs, given)
        device = next((each.device for each in given.values()), None)
        for entry in self.inputs:
            kwargs.pop(entry.name, None)
            if entry.name in given:
                continue
            if entry.default is None:
                raise UsageError(f"{entry.name} {entry.described()} is missing")
            given[entry.name] = entry.filled(sizes, self.dtype, device or self.device)
        return {entry.name: entry.cast(given[entry.name], self.dtype) for entry in self.inputs}

    def at(self, **sizes: Any) -> "Program":
        """This program, or where its graphs do not hold for such a batch, one that shares its tensors.

        It shares those of the first call: a tensor that is replaced later, and not written to, is replaced in one.

        Args:
            sizes: by the names of axes: `batch`, `length` and what else the `inputs` have.

        Raises:
            SppFxError: the model takes no such batch, or was traced for too many sizes already.
        """
        if not self.sizes.conditions:
            return self
        found = next((each for each in self._traces if each.sizes.admit(**sizes)), None)
        if found is None:
            found = self._traced_for(sizes)
            found.again, found.applied, found._traces = self.again, self.applied, self._traces
            self._traces.append(found)
        return found

    def rewritten(self, how: Rewrite) -> None:
        """Remember a rewrite for other traces; those that were made before it are forgotten."""
        self.applied = [*self.applied, how]
        self._part()

    def _part(self) -> None:
        """Be no other trace of any program from now on, and have none."""
        self._traces[:] = [each for each in self._traces if each is not self]
        self._traces = [self]

    def _traced_for(self, sizes: dict[str, int]) -> "Program":
        what = _said(sizes)
        takes = f"this program holds for {self.sizes.described()}"
        if self.again is None:
            raise SppFxError(f"{what}: {takes}, and its model cannot be traced again")
        if len(self._traces) > MOST_TRACES:
            raise SppFxError(
                f"{what}: the model's code branches on the sequence length, and was traced for {MOST_TRACES} others; "
                "pad or cut to fewer lengths"
            )
        # Constants of the graphs are real also where parameters are yet to be read.
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        # More than one row where that will do; two sizes that are equal would be taken for one.
        others = {size for name, size in sizes.items() if name != BATCH}
        rows = next(n for n in (sizes[BATCH], 2, 3, 4, 5) if n > 1 and n not in others)
        try:
            other = self.again(sizes | {BATCH: rows}, device)
            if not other.sizes.admit(**sizes):
                other = self.again(sizes, device)
        except SppFxError as error:
            raise SppFxError(f"{what}: {takes}; traced for these, {error}") from error
        if not other.sizes.admit(**sizes):
            raise SppFxError(f"{what}: {takes}; traced for these, {other.sizes.described()}")
        for rewrite in self.applied:
            rewrite.again(other, self)
        other._share(self)
        return other.train(self.training)

    def _share(self, first: "Program") -> None:
        """Take over the tensors of another trace of the same model that went through the same passes."""
        theirs = first._tensors()
        for path, module in self.named_modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    key = in_model(f"{path}.{name}".lstrip("."))
                    if tensor is not None and key in theirs and key not in self.constants:
                        table[name] = theirs[key]
        missing = {name for name, t in self._tensors().items() if isinstance(t, nn.Parameter)} - theirs.keys()
        if missing or first.adapters != self.adapters:
            raise SppFxError(f"the model has other parameters at other sizes: {sorted(missing)[:4]}")

    def _tensors(self) -> dict[str, Any]:
        """Parameters and buffers by the names that they have in the model."""
        every = (self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False))
        return {in_model(name): tensor for each in every for name, tensor in each}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Copied or unpickled, the root has tables of its own, and its graphs forget which buffers are
        # not part of the state.
        root = self.root
        root._modules, root._parameters, root._buffers = self._modules, self._parameters, self._buffers
        for path, names in self._transient.items():
            self.get_submodule(path)._non_persistent_buffers_set = set(names)

    def train(self, mode: bool = True) -> "Program":
        for program in self._traces:
            super(Program, program).train(mode)
            program.root.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Program":
        """Move the program: torch's `to`, `cuda` and the like call this.

        Raises:
            UsageError: `fn` changes a dtype. The dtypes a model computes in are written into its graphs.
        """
        for dtype in {p.dtype for p in self.parameters()}:
            probe = fn(torch.empty(0, dtype=dtype, device=self.device))
            if probe.dtype != dtype:
                raise UsageError(
                    f"a program computes in the dtype it was traced in, {dtype}: load the model in {probe.dtype} "
                    "and trace that, or run it under torch.autocast"
                )
        before = self.device
        self._part()
        super()._apply(fn, recurse)
        if self.device != before:
            self.move_constants(before, self.device)
        return self

    def move_constants(self, before: torch.device, after: torch.device) -> None:
        """Let the graphs create their own tensors (positions, masks) on another device."""
        for _, module in self.graphs():
            move_constants(module, before, after)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are: ids lie below it."""
        return vocabulary_of(self.config)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def graphs(self) -> Iterator[tuple[str, fx.GraphModule]]:
        """Every graph of the tree with its dotted path, the root ('') first."""
        yield "", self.root
        for path, module in self.named_modules():
            if path and isinstance(module, fx.GraphModule):
                yield path, module

    def calls(self) -> dict[str, list[Use]]:
        """The nodes that call each module, or hand it to an op that does, by the module's path."""
        found: dict[str, list[Use]] = {}
        for path, module in self.graphs():
            for node in module.graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    found.setdefault(child_path(path, node), []).append(Use(path, module, node))
        return found

    def uses(self, mark: str = SITE) -> dict[str, list[Use]]:
        """The nodes that carry a mark, by the site that it names, in one walk of the tree."""
        found: dict[str, list[Use]] = {}
        for path, module in self.graphs():
            for node in module.graph.nodes:
                if mark in node.meta:
                    found.setdefault(node.meta[mark], []).append(Use(path, module, node))
        return found

    def names_of(self, parameter: str) -> list[str]:
        """Every name of a parameter, which is several if it is tied, in the order of the model."""
        first = self.tied.get(parameter, parameter)
        return [first, *(other for other, owner in self.tied.items() if owner == first)]

    def make_site(
        self, name: str, kind: Kind, *, transposed: bool, embeddings: Collection[str], uses: int = 1,
        role: str | None = None,
    ) -> Site:  # fmt: skip
        """The site of a parameter; `embeddings` are the parameters whose rows are looked up."""
        weight, names = self.get_parameter(name), self.names_of(name)
        shape = tuple(weight.shape)
        return Site(
            name=name,
            kind=kind,
            shape=(*shape[:-2], shape[-1], shape[-2]) if transposed else shape,
            dtype=weight.dtype,
            transposed=transposed,
            layer=self._layer_of(name),
            uses=uses,
            tied_to=min((other for other in names if other in embeddings), default=None),
            is_head=self.head_weight in names,
            role=role,
        )

    def _layer_of(self, name: str) -> str | None:
        """The layer that owns a parameter, or where that has no graph of its own what has: a leaf may hold layers."""
        layer = layer_of(name)
        if layer is None or self.untraced is not None:
            return layer
        while layer and not isinstance(self.get_submodule(layer), fx.GraphModule):
            layer = layer.rpartition(".")[0]
        return layer or None

    def weight(self, site: str) -> nn.Parameter:
        """The parameter of a site as it is stored, which may be (in, out)."""
        return self.get_parameter(site)

    def canonical_weight(self, site: str) -> Tensor:
        """The weight of a site as (out, in) or (experts, out, in): a view, no copy."""
        weight = self.weight(site)
        return weight.transpose(-1, -2) if self.sites[site].transposed else weight
