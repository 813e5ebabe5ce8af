"""Sparse models of every family and their programs, for the tests of passes."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spp_fx.adapters.method import make_method
from spp_fx.graph.program import Program
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.lower import Lower
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from tests.families import batch, make_model, prune_2_4


@functools.cache
def _traced(family: str, experts: str | None) -> tuple[PreTrainedModel, Program]:
    """Tracing takes seconds and copying a program does not: one trace a family, then copies."""
    model = make_model(family)
    if experts is not None:
        model.set_experts_implementation(experts)
    program = trace(model)
    run_pipeline(program, [Canonicalize(), Match(dense=True)])
    for name in program.matched:
        prune_2_4(program.weight(name), transposed=program.sites[name].transposed)
    program.patterns.clear()
    program.matched.clear()
    program.history.clear()
    return model, program


def sparse(family: str, *, experts: str | None = None) -> tuple[PreTrainedModel, Program]:
    """A model whose decoder layers are 2:4 (routers and embeddings dense) and its canonical program.

    Both are the caller's own, and share their parameters.
    """
    return copy.deepcopy(_traced(family, experts))


def canonical(family: str, *, experts: str | None = None) -> Program:
    """The program of `sparse` alone."""
    return sparse(family, experts=experts)[1]


def adapted(
    program: Program, kernel: str | None = "fused", method: str = "spp", seed: int = 0, **options: Any
) -> Program:
    """A canonical program given adapters of rank 4, lowered to a kernel, unless that is None."""
    run_pipeline(program, [Match(), Inject(make_method(method, **{"rank": 4} | options), seed=seed)])
    if kernel is not None:
        run_pipeline(program, [Lower(kernel=kernel)])
    return program


def train(program: Program, steps: int = 3, lr: float = 0.05) -> list[float]:
    """The losses of some AdamW steps on one batch, and the loss after them, in eval mode at both ends."""
    trained = [p for p in program.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    ids = batch()
    losses = [loss_of(program, ids).item()]
    program.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(program, ids).backward()
        optimizer.step()
    program.eval()
    return [*losses, loss_of(program, ids).item()]


def loss_of(program: Program, ids: Tensor) -> Tensor:
    loss = program(ids, labels=ids).loss
    assert loss is not None
    return loss


def masks(program: Program) -> dict[str, Tensor]:
    """Where each site's stored weight is non-zero, told by torch alone."""
    return {name: (program.weight(name).detach() != 0).clone() for name in program.sites}
