"""A small Llama as a program whose sites are computed by one way or another."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from spp_fx.adapters.method import Method
from spp_fx.graph.program import ADAPTER, Program, opaque
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.causal import Causal
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline

SCALE = 2.0
Way = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


LLAMAS: dict[str, dict[str, int]] = {
    "7b-share": {
        "vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4,
        "num_attention_heads": 16,
    },
    "110m": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}  # fmt: skip
"""Shapes of small Llamas: one whose linears have the share that they have in a 7B, and llama2.c's 110M model, whose
vocabulary of 32,000 words takes a third of a step."""


def small_llama(shape: str, layers: int | None, dtype: torch.dtype) -> PreTrainedModel:
    """A model of one of LLAMAS, each decoder weight 2:4; `layers` replaces how many the shape has."""
    torch.manual_seed(0)
    sizes = LLAMAS[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**sizes, max_position_embeddings=4096, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if "layers." in name and parameter.ndim == 2:
            groups = parameter.data.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    return model


def abstract_program(model: PreTrainedModel, method: Method) -> Program:
    """The program with a method's adapters that are not lowered yet."""
    program = trace(model)
    run_pipeline(program, [Canonicalize(), Causal(), Match(), Inject(method)])
    return program.train()


def run_by(program: Program, way: Way, *, low_rank: bool) -> None:
    """Compute every adapted linear by `way(x (b, n), weight, factor, factor, scale)`.

    The factors are SPP's own, alpha (r, n) and beta (m, 1), or of a low-rank update, (m, r) and (r, n).
    """

    @opaque
    def run(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return way(x.flatten(0, -2), weight, first, second, SCALE).view(*x.shape[:-1], weight.shape[0])

    for site, uses in program.uses(ADAPTER).items():
        (use,) = uses
        node, module = use.node, use.module
        x, weight, alpha, beta, bias, *_ = node.args
        assert bias is None
        assert isinstance(alpha, fx.Node)
        assert isinstance(beta, fx.Node)
        if low_rank:
            (m, n), rank = program.sites[site].shape, module.get_parameter(str(alpha.target)).shape[0]
            for factor, shape in ((alpha, (m, rank)), (beta, (rank, n))):
                setattr(module, str(factor.target), nn.Parameter(0.02 * torch.randn(shape)))
        node.target, node.args, node.kwargs = run, (x, weight, alpha, beta), {}
        module.recompile()
