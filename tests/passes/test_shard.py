"""shard, in a group of one process: every family computes what it did. Groups of two: tests/verbs."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from spp_fx.errors import PostconditionError, PreconditionError, UsageError
from spp_fx.passes import shard
from spp_fx.passes.causal import Causal
from spp_fx.passes.partition import Checkpoint, Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.passes.shard import Shard
from spp_fx.version import release
from tests.effort import nightly
from tests.families import FAMILIES, REQUIRED, batch
from tests.passes.programs import adapted, canonical, loss_of


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def random_factors(program):
    torch.manual_seed(3)
    for parameter in program.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    return program


INTEGERS = pytest.mark.skipif(
    release(torch.__version__) < shard.SPLITS_INTEGERS,
    reason="this torch shards no integers (pytorch issue 177844)",
)
CASES = [
    *((family, "dense") if family in REQUIRED else nightly(family, "dense") for family in FAMILIES),
    *(pytest.param(family, "packed", marks=INTEGERS) for family in ("llama", "gpt2", "mixtral")),
]


@pytest.mark.parametrize(("family", "storage"), CASES)
def test_a_sharded_program_computes_what_it_did(group, family, storage):
    whole = random_factors(adapted(canonical(family)))
    run_pipeline(whole, [Causal()])
    parts = copy.deepcopy(whole)
    names = {name for name, _ in parts.named_parameters()}
    _, _, report = run_pipeline(parts, [Partition(), Checkpoint(), Shard(storage=storage)])
    assert set(parts.units) <= set(report.changed)
    if storage == "dense":
        assert {name for name, _ in parts.named_parameters()} == names
    else:
        taken = {name for name, site in parts.sites.items() if site.kind != "experts"} & set(parts.adapters)
        assert set(parts.packings) == taken
    ids = batch(3, 8)
    torch.manual_seed(5)
    expected = loss_of(whole.train(), ids)
    torch.manual_seed(5)
    got = loss_of(parts.train(), ids)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    got.backward()
    gradients = {name: p.grad for name, p in parts.named_parameters() if p.grad is not None}
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients.pop(name), parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert not gradients
    # What was gathered is let go of: between steps only parts are held.
    for path in parts.units:
        assert all(
            isinstance(p, DTensor) == (not p.requires_grad) for p in parts.get_submodule(path).parameters()
        )


def test_what_it_needs(group, monkeypatch):
    program = adapted(canonical("llama"))
    with pytest.raises(PreconditionError, match="run partition first"):
        run_pipeline(program, [Shard()])
    run_pipeline(program, [Partition()])
    with pytest.raises(UsageError, match="over must be one of world, node, got all"):
        run_pipeline(program, [Shard(over="all")])
    with pytest.raises(UsageError, match="storage must be one of dense, packed"):
        run_pipeline(program, [Shard(storage="tight")])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="needs LOCAL_WORLD_SIZE"):
        run_pipeline(program, [Shard(over="node")])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="as many processes on every node"):
        run_pipeline(program, [Shard(over="node")])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    run_pipeline(program, [Shard(over="node")])
    with pytest.raises(PreconditionError, match="sharded already"):
        run_pipeline(program, [Shard()])
    factor = next(p for p in program.parameters() if p.requires_grad)
    factor.requires_grad_(False)
    with pytest.raises(PostconditionError, match="frozen, but whole"):
        Shard().ensures(program)


def test_a_weight_of_two_units_is_refused(group):
    program = adapted(canonical("llama"))
    run_pipeline(program, [Partition()])
    first, second = (program.get_submodule(f"model.layers.{i}.input_layernorm") for i in (0, 1))
    second.weight = first.weight
    with pytest.raises(PreconditionError, match=r"layers\.1\.input_layernorm\.weight and model\.layers\.0"):
        run_pipeline(program, [Shard()])


def test_it_needs_a_group():
    with pytest.raises(PreconditionError, match="start with torchrun"):
        run_pipeline(adapted(canonical("llama")), [Partition(), Shard()])


def test_packed_weights_are_refused_where_torch_splits_no_integers(group, monkeypatch):
    program = adapted(canonical("llama"))
    run_pipeline(program, [Partition()])
    monkeypatch.setattr(shard, "SPLITS_INTEGERS", (99,))
    with pytest.raises(PreconditionError, match=r"cannot split packed weights.*torch 2\.12 or later"):
        run_pipeline(program, [Shard(storage="packed")])
    assert not program.packings
