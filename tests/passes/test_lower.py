"""lower: every kernel takes every adapter node, once, and says what it cannot do."""

import pytest
import torch

from spp_fx.adapters.op import ops_of
from spp_fx.adapters.spp import SPP
from spp_fx.errors import PreconditionError, UsageError
from spp_fx.graph.program import ADAPTER
from spp_fx.passes.lower import Lower
from spp_fx.passes.pipeline import run_pipeline
from tests.families import batch
from tests.passes.programs import adapted, canonical

OP = {"reference": None, "fused": ops_of(SPP(), (16, 16)).fused}


def calls(program, namespace: str = "spp_fx") -> set:
    """The toolkit's own ops that the graphs call."""
    return {
        node.target
        for _, module in program.graphs()
        for node in module.graph.nodes
        if node.op == "call_function" and getattr(node.target, "namespace", None) == namespace
    }


@pytest.mark.parametrize("kernel", OP)
def test_only_the_chosen_op_is_left(kernel):
    program = adapted(canonical("llama"), kernel)
    assert calls(program) == ({OP[kernel]} if OP[kernel] else set())


@pytest.mark.parametrize("kernel", OP)
def test_dropout_keeps_its_seed_in_the_graph(kernel):
    program = adapted(canonical("llama"), kernel, dropout=0.1)
    ops = torch.ops.spp_fx
    expected = {ops.dropout_seed.default, OP[kernel] or ops.dropout.default}
    assert calls(program) == expected


@pytest.mark.parametrize("kernel", OP)
def test_every_adapter_node_keeps_its_mark(kernel):
    program = adapted(canonical("llama"), kernel)
    assert program.uses(ADAPTER).keys() == program.adapters.keys()


@pytest.mark.parametrize("kernel", OP)
def test_the_report_names_each_site_and_its_kernel(kernel):
    program = adapted(canonical("llama"), None)
    (report,) = run_pipeline(program, [Lower(kernel=kernel)])
    assert report.changed == dict.fromkeys(program.adapters, kernel)


def test_an_unknown_kernel_names_the_known_ones():
    with pytest.raises(UsageError, match="kernel must be one of reference, fused, got fast"):
        run_pipeline(adapted(canonical("llama"), None), [Lower(kernel="fast")])


def test_a_program_is_lowered_once():
    program = adapted(canonical("llama"), "reference")
    with pytest.raises(PreconditionError, match="lowered already"):
        run_pipeline(program, [Lower(kernel="fused")])


@pytest.mark.parametrize("kernel", OP)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_program_trains_under_bfloat16_autocast(family, kernel):
    """What Trainer(bf16=True) does with float32 weights: near the float32 loss, gradients in float32."""
    program = adapted(canonical(family), kernel, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    factors = [p for p in program.parameters() if p.requires_grad]
    for p in factors:
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    ids = batch()
    exact = program(ids, labels=ids).loss
    exact_grads = torch.autograd.grad(exact, factors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = program(ids, labels=ids).loss
    grads = torch.autograd.grad(loss, factors)
    assert abs(loss.item() - exact.item()) < 0.02 * exact.item()
    for got, want in zip(grads, exact_grads, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.1 * want.norm()
