"""train-norms on programs that are one linear with a bias."""

import pytest
import torch

from spp_fx.adapters.spp import SPP
from spp_fx.errors import PreconditionError, UsageError
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.fold_adapters import Fold
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.lower import Lower
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.passes.train_norms import TrainNorms, vectors
from tests.adapters.layers import linear_program

X = torch.linspace(-1, 1, 24).view(3, 8)


def program_of(dtype: torch.dtype, *more, head: str | None = None):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).view(4, 2, 4)
    weight[..., 1::2] = 0
    program = linear_program(weight.view(4, 8).to(dtype), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=dtype))
    program.head_weight = head
    run_pipeline(program, [Canonicalize(), Match(targets=("layer",)), Inject(SPP(rank=2)), *more])
    return program


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lower", [(), (Lower(),), (Lower("reference"),), (Lower(storage="packed"),)])
def test_the_bias_trains_in_float32_at_least_and_the_result_keeps_its_dtype(dtype, lower):
    plain, program = program_of(dtype, *lower), program_of(dtype, *lower, TrainNorms())
    bias = program.get_parameter("layer.bias")
    assert bias.dtype == torch.promote_types(dtype, torch.float32)
    assert program.trained == {"layer.bias": dtype}
    y = program.root(X.to(dtype))
    assert torch.equal(y, plain.root(X.to(dtype)))
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 3.0))
    assert {n for n, p in program.named_parameters() if p.grad is not None} == {
        "layer.bias", "layer.spp_alpha", "layer.spp_beta"
    }  # fmt: skip


def test_fold_rounds_it_once_and_leaves_the_graph_as_it_was():
    program = program_of(torch.bfloat16, Lower(), TrainNorms())
    with torch.no_grad():
        program.get_parameter("layer.bias")[:] = torch.tensor([1.003, -2.2, 1e-30, 7.77])
    expected = program.root(X.bfloat16())
    run_pipeline(program, [Fold()])
    assert not program.trained
    bias = program.get_parameter("layer.bias")
    assert torch.equal(bias, torch.tensor([1.003, -2.2, 1e-30, 7.77]).bfloat16())
    assert torch.equal(program.root(X.bfloat16()), expected)
    targets = [str(node.target) for node in program.get_submodule("layer").graph.nodes]
    assert not any("_to_copy" in target for target in targets)


def test_what_belongs_to_the_head_is_left_out():
    program = program_of(torch.float32, head="layer.weight")
    assert vectors(program) == ((), {"layer.bias": "belongs to the head"})
    with pytest.raises(UsageError, match="the model has no norm or bias to train"):
        run_pipeline(program, [TrainNorms()])
    with pytest.raises(UsageError, match=r"layer\.bias: belongs to the head"):
        run_pipeline(program, [TrainNorms(("layer.bias",))])


def test_it_needs_adapters_and_runs_once():
    program = program_of(torch.float32, TrainNorms())
    with pytest.raises(PreconditionError, match="they are trained already"):
        run_pipeline(program, [TrainNorms()])
    run_pipeline(program, [Fold()])
    with pytest.raises(PreconditionError, match="has no adapters; run inject first"):
        run_pipeline(program, [TrainNorms()])
