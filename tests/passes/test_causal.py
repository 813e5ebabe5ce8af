"""causal: batches without padding need no mask, all others keep theirs."""

import copy
import operator
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, FalconConfig, MistralConfig

from spp_fx.errors import PostconditionError
from spp_fx.graph.trace import trace
from spp_fx.passes.causal import Causal, MaskUnlessCausal, attention, is_causal_mask
from spp_fx.passes.partition import Checkpoint, Partition
from spp_fx.passes.pipeline import parse_pipeline, run_pipeline
from tests.families import FAMILIES, SMALL, batch
from tests.passes.programs import adapted, canonical, loss_of, sparse

WITHOUT_SDPA = {"gpt-oss"}


class Attentions(TorchDispatchMode):
    """Records of every attention kernel that ran whether it took a mask, and whether it was told is_causal."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
            self.seen.append((kwargs.get("attn_mask") is not None, causal))
        return func(*args, **kwargs)


def attentions(program, *inputs) -> list[tuple[bool, bool]]:
    with Attentions() as mode, torch.no_grad():
        program(*inputs)
    return mode.seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_program_computes_what_the_model_computes(family):
    model, program = sparse(family)
    (report,) = run_pipeline(program, [Causal()])
    assert len(report.changed) == (0 if family in WITHOUT_SDPA else 2)
    assert not report.skipped
    ids = batch(3, 17)
    torch.testing.assert_close(program(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    for left in (True, False):
        padding = torch.ones_like(ids)
        padding[1, slice(0, 5) if left else slice(-5, None)] = 0
        assert torch.equal(program(ids, padding).logits, model(ids, attention_mask=padding).logits)


# Falcon's heads share one key, which the flash kernel of the CPU does not take.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITHOUT_SDPA - {"falcon"}))
def test_flash_kernels_are_told(family):
    program = canonical(family)
    ids = batch(3, 17)
    padding = torch.ones_like(ids)
    padding[0, :2] = 0
    assert set(attentions(program, ids)) == {(True, False)}
    run_pipeline(program, [Causal()])
    assert attentions(program, ids) == [(False, True)] * 2
    assert attentions(program, ids, padding) == [(True, False)] * 2
    program(ids[:1, :1])  # one token is traced apart
    assert attentions(program, ids[:1, :1]) == [(False, True)] * 2


def test_gradients_are_the_same_also_with_checkpointing():
    plain = adapted(canonical("llama"))
    causal = copy.deepcopy(plain)
    run_pipeline(causal, [Causal(), Partition(), Checkpoint()])
    ids = batch(3, 17)
    for program in (plain.train(), causal.train()):
        loss_of(program, ids).backward()
    expected = dict(plain.named_parameters())
    for name, value in causal.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, expected[name].grad, rtol=1e-5, atol=1e-7)


def test_a_sliding_window_is_causal_only_where_it_is_longer_than_the_batch():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MistralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=8)
    ).eval()
    program = trace(model)
    (report,) = run_pipeline(program, [Causal()])
    assert len(report.changed) == 2
    short, long = batch(2, 8), batch(2, 9)
    assert attentions(program, short) == [(False, True)] * 2
    assert attentions(program, long) == [(True, False)] * 2
    assert torch.equal(program(long).logits, model(long).logits)


def test_a_bias_by_distance_is_no_causal_mask():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FalconConfig(**SMALL, alibi=True)).eval()
    program = trace(model)
    run_pipeline(program, [Causal()])
    ids = batch()
    assert torch.equal(program(ids).logits, model(ids).logits)
    proven = [module.proven for module in program.modules() if isinstance(module, MaskUnlessCausal)]
    assert [list(each.values()) for each in proven] == [[False]]


def test_a_mask_that_something_else_reads_is_left_with_the_reason():
    program = canonical("llama")
    module = program.get_submodule("model.layers.0.self_attn")
    assert isinstance(module, torch.fx.GraphModule)
    (node,) = (
        n for n in module.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default
    )
    with module.graph.inserting_after(node):
        read = module.graph.call_function(torch.ops.aten.any.default, (node.args[3],))
    module.recompile()
    (report,) = run_pipeline(program, [Causal()])
    assert not report.changed
    assert set(report.skipped) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert all(f"{read.name} in model.layers.0.self_attn reads" in why for why in report.skipped.values())


def test_a_mask_of_the_tokens_themselves_is_left_with_the_reason():
    program = canonical("llama")
    module = program.get_submodule("model")
    assert isinstance(module, torch.fx.GraphModule)
    (mask,) = (n for n in module.graph.nodes if n.name == "expand")
    ids = next(n for n in module.graph.nodes if n.name == "input_ids")
    with module.graph.inserting_after(mask):
        first = module.graph.call_function(torch.ops.aten.ne.Scalar, (ids, -1))
    with module.graph.inserting_after(first):
        wide = module.graph.call_function(torch.ops.aten.view.default, (first, [2, 1, 1, 12]))
    with module.graph.inserting_after(wide):
        both = module.graph.call_function(torch.ops.aten.logical_and.default, (mask, wide))
    mask.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
    module.recompile()
    (report,) = run_pipeline(program, [Causal()])
    assert not report.changed
    assert all("depends on input_ids" in why for why in report.skipped.values())


@pytest.mark.parametrize("several", [False, True], ids=["view", "one of several"])
def test_a_write_through_a_view_is_seen(several):
    program = canonical("llama")
    module = program.get_submodule("model")
    assert isinstance(module, torch.fx.GraphModule)
    (mask,) = (n for n in module.graph.nodes if n.name == "expand")
    made = mask.args[0]
    assert isinstance(made, torch.fx.Node)
    with module.graph.inserting_before(mask):
        if several:
            views = module.graph.call_function(torch.ops.aten.split.Tensor, (made, 1, 3))
            view = module.graph.call_function(operator.getitem, (views, 0))
        else:
            view = module.graph.call_function(torch.ops.aten.slice.Tensor, (made, 3, 0, 1))
        write = module.graph.call_function(torch.ops.aten.fill_.Scalar, (view, False))
    module.recompile()
    (report,) = run_pipeline(program, [Causal()])
    assert not report.changed
    assert all(f"{write.name} writes into" in why for why in report.skipped.values())


def test_who_exports_gets_the_masked_graph():
    program = canonical("llama")
    run_pipeline(program, [Causal()])
    ids = batch(3, 12)
    exported = torch.export.export(program.root, (ids, torch.ones_like(ids)))
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    assert torch.equal(exported.module()(ids, padding), program(ids, padding).logits)


def test_copies_and_state_are_as_before():
    program = canonical("llama")
    names = list(program.state_dict())
    run_pipeline(program, [Causal()])
    assert list(program.state_dict()) == names
    ids = batch()
    expected = program(ids).logits
    assert torch.equal(copy.deepcopy(program)(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(program))(ids).logits, expected)
    assert [p.name for p in parse_pipeline("causal")] == ["causal"]


def test_running_it_again_changes_nothing():
    program = canonical("llama")
    run_pipeline(program, [Causal()])
    (report,) = run_pipeline(program, [Causal()])
    assert not report.changed
    assert not report.skipped


def test_a_lost_mask_is_noticed():
    program = canonical("llama")
    run_pipeline(program, [Causal()])
    module = program.get_submodule("model.layers.1.self_attn")
    assert isinstance(module, torch.fx.GraphModule)
    (node,) = (n for n in module.graph.nodes if n.target is attention)
    node.args = (*node.args[:3], None, *node.args[4:])
    with pytest.raises(PostconditionError, match=r"layers\.1\.self_attn lost its mask"):
        Causal().ensures(program)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_every_entry_of_a_mask_counts(dtype):
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask = (
        seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    )
    assert is_causal_mask(mask, 5)
    assert not is_causal_mask(mask, 6)
    for index in range(mask.numel()):
        damaged = mask.clone()
        entry = damaged.view(-1)[index : index + 1]
        entry.copy_(~entry if dtype == torch.bool else torch.where(entry == 0, -torch.inf, 0.0))
        assert not is_causal_mask(damaged, 5), index
    assert not is_causal_mask(mask[..., :4], 5)
    if dtype != torch.bool:
        assert is_causal_mask(mask.clamp(min=torch.finfo(dtype).min), 5)
        assert not is_causal_mask(mask.clamp(min=-1e4), 5)
