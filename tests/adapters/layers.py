"""One linear layer with SPP factors, in every execution that the toolkit has."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from transformers import PretrainedConfig

from spp_fx.adapters.ops import spp_blockwise, spp_fused, spp_linear
from spp_fx.adapters.spp import SPP
from spp_fx.graph.program import Program
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.lower import Lower
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline

SCALE = 1.5
OPS = {"definition": spp_linear.OP, "blockwise": spp_blockwise.OP, "fused": spp_fused.OP}
EXECUTIONS = (*OPS, "reference")


@dataclass
class Layer:
    """Inputs of a layer: x (..., n), weight (m, n), alpha (r, n), beta (m, 1), bias (m,) or None."""

    x: Tensor
    weight: Tensor
    alpha: Tensor
    beta: Tensor
    bias: Tensor | None

    def leaves(self) -> list[Tensor]:
        """What a gradient is asked for."""
        return [t for t in (self.x, self.alpha, self.beta, self.bias) if t is not None]


def make_layer(
    m: int, n: int, r: int, rows: tuple[int, ...] = (3,), *, bias: bool = True, seed: int = 0
) -> Layer:
    """A random float64 layer with half of its weights zero, every leaf requiring its gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = draw(m, n) * (torch.rand(m, n, generator=generator) < 0.5)
    layer = Layer(draw(*rows, n), weight, draw(r, n), draw(m, 1), draw(m) if bias else None)
    for leaf in layer.leaves():
        leaf.requires_grad_()
    return layer


def run(execution: str, layer: Layer, seed: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The layer's output by one of EXECUTIONS."""
    if execution == "reference":
        return lowered(layer, dropout > 0)(layer.x, seed, dropout)
    return OPS[execution](layer.x, layer.weight, layer.alpha, layer.beta, layer.bias, seed, SCALE, dropout)


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
    return Program(fx.GraphModule(outer, calls), PretrainedConfig(), lambda **_: None, {}, None)


def lowered(layer: Layer, with_dropout: bool):
    """The reference expansion of a layer, as a function of (x, seed, dropout) on the layer's own tensors."""
    bias = None if layer.bias is None else layer.bias.detach()
    program = linear_program(layer.weight.detach(), bias)
    rate = 0.5 if with_dropout else 0.0
    inject = Inject(SPP(rank=layer.alpha.shape[0], scale=SCALE, dropout=rate))
    passes = [Canonicalize(), Match(targets=("layer",), dense=True), inject, Lower(kernel="reference")]
    run_pipeline(program, passes)
    module = program.get_submodule("layer")
    targets = {str(node.target) for node in module.graph.nodes}
    assert not any("spp_linear" in target for target in targets), targets
    own = {
        "weight": layer.weight,
        "spp_alpha": layer.alpha,
        "spp_beta": layer.beta,
        "bias": layer.bias,
    }

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
