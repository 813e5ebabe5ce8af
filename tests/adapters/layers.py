"""One linear layer with the factors of a method, in every execution that the toolkit has."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from transformers import PretrainedConfig

from spp_fx.adapters.method import Method, make_method
from spp_fx.adapters.op import apply_dropout, op_options, ops_of
from spp_fx.adapters.rows import PACKINGS
from spp_fx.graph.program import Program
from spp_fx.graph.task import Task
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.lower import Lower
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline

OUTSIDE = Path(__file__).parent / "outside"
"""What another package would bring: a method called grouped, and its entry point."""
if str(OUTSIDE) not in sys.path:
    sys.path.append(str(OUTSIDE))

SCALE = 1.5
SPP = make_method("spp", rank=3, scale=SCALE)
METHODS = {
    "spp": SPP,
    "sqft": make_method("sqft", rank=2, scale=SCALE, dropout=0.0),
    "lors": make_method("lors", rank=2, scale=SCALE),
    "hira": make_method("hira", rank=2, scale=SCALE),
    "masked-full": make_method("masked-full"),
    "scale-lora": make_method("scale-lora", rank=2),
    "lora-star": make_method("lora-star", rank=2, scale=SCALE, dropout=0.0),
    "grouped": make_method("grouped", gain=0.5),
}
OPS = ("definition", "fused", *PACKINGS)
KERNELS = OPS[1:]
EXECUTIONS = (*OPS, "reference")
EXACT = 1e-12  # float64, relative: a few roundings of sums of some ten terms


@dataclass
class Layer:
    """Inputs of a layer: x (..., n), weight (m, n), factors by name, bias (m,) or None."""

    method: Method
    x: Tensor
    weight: Tensor
    factors: dict[str, Tensor]
    bias: Tensor | None

    def leaves(self) -> list[Tensor]:
        """What a gradient is asked for."""
        return [t for t in (self.x, *self.factors.values(), self.bias) if t is not None]

    def detached(self) -> "Layer":
        """The same numbers as leaves of their own, every one requiring its gradient."""
        own = {key: value.detach().clone().requires_grad_() for key, value in self.factors.items()}
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        return replace(self, x=self.x.detach().clone().requires_grad_(), factors=own, bias=bias)


def make_layer(
    method: Method, m: int, n: int, rows: tuple[int, ...] = (3,), *, bias: bool = True, seed: int = 0
) -> Layer:
    """A random float64 layer with a 2:4 weight, every leaf requiring its gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scores = torch.rand(m, -(-n // 4), 4, generator=generator)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    factors = {key: draw(*spec.shape) for key, spec in method.factors((m, n)).items()}
    weight = draw(m, n) * kept.flatten(1)[:, :n]
    layer = Layer(method, draw(*rows, n), weight, factors, draw(m) if bias else None)
    return layer.detached()


def expected(layer: Layer, seed: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The layer's output from the method's formula alone, differentiable."""
    update = layer.method.update(layer.weight, **layer.factors)
    y = layer.x @ layer.weight.t() + apply_dropout(layer.x, seed, dropout) @ update.t()
    return y if layer.bias is None else y + layer.bias


def arguments(
    execution: str, layer: Layer, seed: Tensor | None = None, dropout: float = 0.0, training: bool = True
):
    """An op and what it is called with; the execution is one of OPS."""
    ops = ops_of(layer.method, tuple(layer.weight.shape))
    rest = (*layer.factors.values(), layer.bias, seed, *op_options(layer.method, training), dropout)
    if execution in PACKINGS:
        tensors = PACKINGS[execution].pack(layer.weight.detach())
        return ops.packed[execution], (layer.x, *tensors.values(), *rest)
    op = {"definition": ops.linear, "fused": ops.fused}[execution]
    return op, (layer.x, layer.weight, *rest)


def run(
    execution: str, layer: Layer, seed: Tensor | None = None, dropout: float = 0.0, training: bool = True
) -> Tensor:
    """The layer's output by one of EXECUTIONS."""
    if execution == "reference":
        return lowered(layer, dropout, training)(layer.x, seed, dropout)
    op, given = arguments(execution, layer, seed, dropout, training)
    return op(*given)


def linear_program(weight: Tensor, bias: Tensor | None) -> Program:
    """A program that is one linear layer called `layer`: root(x) = x weight^T + bias."""
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    graph = fx.Graph()
    operands = [graph.placeholder("x"), graph.get_attr("weight")]
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
        operands.append(graph.get_attr("bias"))
    graph.output(graph.call_function(torch.ops.aten.linear.default, tuple(operands)))
    outer = nn.Module()
    outer.layer = fx.GraphModule(module, graph)
    calls = fx.Graph()
    calls.output(calls.call_module("layer", (calls.placeholder("x"),)))
    return Program(fx.GraphModule(outer, calls), Task(), (), PretrainedConfig(), None, {}, None)


def lowered(layer: Layer, dropout: float, training: bool = True):
    """The reference expansion of a layer, as a function of (x, seed, dropout) on the layer's own tensors."""
    bias = None if layer.bias is None else layer.bias.detach()
    program = linear_program(layer.weight.detach(), bias)
    options = layer.method.parameters() | ({"dropout": 0.5} if dropout else {})
    inject = Inject(make_method(layer.method.name, **options))
    passes = [Canonicalize(), Match(targets=("layer",), dense=True), inject, Lower(kernel="reference")]
    run_pipeline(program, passes)
    module = program.get_submodule("layer").train(training)
    targets = {str(node.target) for node in module.graph.nodes}
    assert not any("_linear" in target for target in targets), targets
    own = {"weight": layer.weight, "bias": layer.bias} | layer.factors

    def call(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
        return _Feed(module, own, seed, dropout).run(x)

    return call


class _Feed(fx.Interpreter):
    """Runs a graph on given tensors instead of its parameters, with a given seed and probability of dropout."""

    def __init__(
        self, module: fx.GraphModule, own: dict[str, Tensor | None], seed: Tensor | None, p: float
    ) -> None:
        super().__init__(module)
        self.own, self.seed, self.p = own, seed, p

    def get_attr(self, target, args, kwargs):
        return self.own[target] if target in self.own else super().get_attr(target, args, kwargs)

    def call_function(self, target, args, kwargs):
        if target is torch.ops.spp_fx.dropout_seed.default:
            return self.seed
        if target is torch.ops.spp_fx.dropout.default:
            args = (args[0], args[1], self.p)
        return super().call_function(target, args, kwargs)
