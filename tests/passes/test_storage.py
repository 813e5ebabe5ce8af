"""Packed frozen weights: the same bits in, the same bits out, and the memory that was promised."""

import copy
from contextlib import nullcontext

import pytest
import torch

from spp_fx.adapters.rows import PACKINGS, choose_packing
from spp_fx.errors import PreconditionError, UsageError
from spp_fx.passes.fold_adapters import Fold
from spp_fx.passes.lower import Lower
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.passes.verify_masks import Verify
from spp_fx.pruning.select import keep
from spp_fx.sparsity.pattern import parse_pattern
from tests.effort import covering
from tests.exporters.packing import without_kernels
from tests.families import batch
from tests.passes.programs import adapted, canonical, loss_of


def pruned(m: int, n: int, pattern: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    return weight.masked_fill_(~keep(weight.abs(), parse_pattern(pattern), by_row=False), 0)


def rows(weight: torch.Tensor, packing: str):
    tensors = PACKINGS[packing].pack(weight)
    return PACKINGS[packing].rows(*(tensors[name] for name in PACKINGS[packing].tensors), tuple(weight.shape))


@pytest.fixture(params=["compiled", "torch"])
def backend(request):
    with without_kernels() if request.param == "torch" else nullcontext():
        yield


@covering(
    pattern=["2:4", "1:4", "50%", "0%", "90%"],
    columns=[4, 12, 16, 100],
    dtype=[torch.bfloat16, torch.float16, torch.float32, torch.float64],
)
def test_rows_come_back_to_the_bit(backend, pattern, columns, dtype):
    weight = pruned(10, columns, pattern, dtype) if pattern != "0%" else torch.ones(10, columns, dtype=dtype)
    weight[2] = 0
    for packing in {choose_packing(weight), "bitmask"}:
        packed = rows(weight, packing)
        assert torch.equal(packed.take(0, 10), weight)
        assert torch.equal(packed.take(3, 7), weight[3:7])
        assert packed.take(4, 4).shape == (0, columns)


def test_a_negative_zero_keeps_its_sign_where_a_slot_is_left(backend):
    weight = torch.tensor([[-0.0, 1, 0, 0, 1, -0.0, 2, 0]])
    assert choose_packing(weight) == "2:4"
    signs = rows(weight, "2:4").take(0, 1).signbit().tolist()
    assert signs == [[True, *[False] * 7]]
    assert torch.equal(rows(weight, "bitmask").take(0, 1).signbit(), weight.signbit())


@pytest.mark.parametrize(
    ("pattern", "packing"), [("2:4", "2:4"), ("1:4", "2:4"), ("4:8", "bitmask"), ("50%", "bitmask")]
)
def test_the_packing_follows_the_pattern(pattern, packing):
    assert choose_packing(pruned(64, 64, pattern, torch.float32)) == packing


def test_a_column_count_that_is_no_multiple_of_four_takes_the_bit_mask(backend):
    weight = torch.randn(5, 7)
    weight[:, ::2] = 0
    assert choose_packing(weight) == "bitmask"
    assert torch.equal(rows(weight, "bitmask").take(1, 5), weight[1:5])


def test_a_packed_bfloat16_weight_takes_0_5625_of_its_bytes():
    weight = pruned(256, 512, "2:4", torch.bfloat16)
    assert sum(t.nbytes for t in PACKINGS["2:4"].pack(weight).values()) == 0.5625 * weight.nbytes


@covering(1, family=["llama", "llama-tied", "gpt2", "falcon"], dropout=[0.0, 0.3])
def test_training_packed_is_training_to_the_bit(family, dropout):
    dense = adapted(canonical(family), dropout=dropout)
    packed = adapted(canonical(family), kernel=None, dropout=dropout)
    (report,) = run_pipeline(packed, [Lower(storage="packed")])
    assert packed.packings == dict.fromkeys(packed.adapters, "2:4")
    assert not report.skipped
    assert not any(name in dict(packed.named_parameters()) for name in packed.adapters)
    ids = batch()
    for program in (dense, packed):
        torch.manual_seed(3)
        for p in program.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.2)
        program.train()
        loss_of(program, ids).backward()
    trained = dict(dense.named_parameters())
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, trained[name].grad), name
    run_pipeline(packed, [Verify(), Fold(), Verify()])
    run_pipeline(dense, [Fold()])
    assert packed.state_dict().keys() == dense.state_dict().keys()
    for name, value in dense.state_dict().items():
        assert torch.equal(packed.state_dict()[name], value), name
    packed.eval(), dense.eval()
    assert torch.equal(packed(ids).logits, dense(ids).logits)


def test_another_pattern_is_kept_as_a_bit_mask():
    program = canonical("llama")
    for name in program.sites:
        weight = program.weight(name).data
        weight.copy_(pruned(*weight.shape, "50%", weight.dtype, seed=len(name)))
    program.patterns.clear()
    dense, packed = adapted(copy.deepcopy(program)), adapted(program, kernel=None)
    run_pipeline(packed, [Lower(storage="packed")])
    assert set(packed.packings.values()) == {"bitmask"}
    ids = batch()
    assert torch.equal(packed(ids).logits, dense(ids).logits)


def test_stacks_of_experts_stay_dense_with_the_reason():
    program = adapted(canonical("mixtral"), kernel=None)
    (report,) = run_pipeline(program, [Lower(storage="packed")])
    stacks = {
        name for name, site in program.sites.items() if site.kind == "experts" and name in program.adapters
    }
    assert stacks
    assert {name for name, reason in report.skipped.items() if "experts" in reason} == stacks
    assert program.packings.keys() == program.adapters.keys() - stacks


def test_a_copy_and_another_device_take_the_packed_weight_along():
    program = adapted(canonical("llama"), kernel=None)
    run_pipeline(program, [Lower(storage="packed")])
    ids = batch()
    expected = program(ids).logits
    assert torch.equal(copy.deepcopy(program)(ids).logits, expected)
    assert program.to("meta")(ids.to("meta")).logits.shape == expected.shape


def test_only_the_fused_kernel_unpacks():
    with pytest.raises(UsageError, match="kernel=fused"):
        run_pipeline(adapted(canonical("llama"), kernel=None), [Lower(kernel="reference", storage="packed")])


def test_there_is_nothing_to_pack_without_weights():
    with pytest.raises(PreconditionError, match="nothing to pack"):
        run_pipeline(adapted(canonical("llama"), kernel=None).to("meta"), [Lower(storage="packed")])
