"""A trace holds for the sizes whose branches it has; the program is the model at all others that the model takes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from spp_fx.errors import SppFxError
from spp_fx.exporters.onnx.graph_export import plain_signature
from spp_fx.graph import program as programs
from spp_fx.graph.sizes import Sizes
from spp_fx.graph.task import CAUSAL_LM, find_task
from spp_fx.graph.trace import trace
from spp_fx.passes.pipeline import parse_pipeline, run_pipeline
from tests.families import VOCABULARY, shallow

pytestmark = pytest.mark.usefixtures("real_exports")


class Halving(LlamaForCausalLM):
    """Has one path for even lengths and one for odd ones, and none for more than 16 tokens."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        out = super().forward(input_ids, attention_mask, **kwargs)
        length = input_ids.shape[1]
        table = self.lm_head.weight.new_zeros(16)[:length].view(1, length, 1)
        out.logits = out.logits * (2 if length % 2 else 3) + table
        return out


def halving() -> Halving:
    torch.manual_seed(0)
    return Halving(shallow("llama")).eval()


class Counting(LlamaForCausalLM):
    """Makes a table of its own for every length."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        out = super().forward(input_ids, attention_mask, **kwargs)
        out.logits = out.logits * torch.tensor(list(range(input_ids.shape[1]))).view(1, -1, 1)
        return out


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(shallow("llama")).eval()


def counting() -> Counting:
    torch.manual_seed(0)
    return Counting(shallow("llama")).eval()


def gpt_neo() -> GPTNeoForCausalLM:
    """Its attention cuts a table of positions: one path for fewer tokens than positions, one for as many."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32,
        max_position_embeddings=16, attention_types=[[["global"], 1]], embed_dropout=0.0,
        attention_dropout=0.0, resid_dropout=0.0,
    )  # fmt: skip
    return GPTNeoForCausalLM(config).eval()


def mamba2() -> Mamba2ForCausalLM:
    """Runs over chunks of 8 tokens, by another path where there is only one."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=8, num_heads=4, head_dim=8,
        n_groups=1, chunk_size=8, expand=2,
    )  # fmt: skip
    return Mamba2ForCausalLM(config).eval()


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    ("conditions", "taken", "said"),
    [
        ((), range(1, 31), "any length"),
        (("length <= 12",), range(1, 13), "1 to 12 tokens"),
        (("length == 7",), [7], "7 tokens"),
        (("length > 3",), range(4, 31), "4 and more tokens"),
        (("length % 8 == 0",), [8, 16, 24], "8, 16, 24 tokens"),
        (("(length + 7) // 8 == batch", "length != 12"), [9, 10, 11, *range(13, 17)], "9 to 11, 13 to 16 tokens"),
        (("batch > 2",), [], "no length"),
    ],
)  # fmt: skip
def test_sizes_are_those_that_meet_every_condition(conditions, taken, said):
    sizes = Sizes(conditions)
    assert [n for n in range(1, 31) if sizes.admit(batch=2, length=n)] == list(taken)
    assert sizes.described(30) == said


def test_many_lengths_are_not_all_named():
    assert Sizes(("length % 2 == 0",)).described() == "2, 4, 6, 8 and others tokens"


@pytest.mark.parametrize(
    ("make", "first", "lengths"),
    [
        (halving, "3, 5, 7, 9 and others", (1, 2, 7, 12, 15, 16)),
        (counting, "7", (5, 7, 9)),
        (gpt_neo, "2 to 16", (1, 2, 15, 16)),
        (mamba2, "2 to 7, 9 to 15, 17 to 23, 25 to 31 and others", (1, 7, 8, 9, 30)),
    ],
)
@torch.no_grad()
def test_a_program_is_its_model_at_every_length(make, first, lengths):
    model = make()
    program = trace(model)
    assert program.sizes.described() == f"{first} tokens"
    for length in lengths:
        for rows in (1, 2, 3):
            ids = ids_of(rows, length)
            mask = torch.ones_like(ids)
            mask[0, length // 2 :] = 0
            wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            assert torch.equal(program(ids, mask).logits, wanted), (rows, length)


def test_a_length_that_the_model_does_not_take_is_refused_with_the_models_reason():
    program = trace(halving())
    with pytest.raises(
        SppFxError, match=r"2 rows of 17 tokens: .* holds for 3, 5, 7, 9 .*traced for these, Halving"
    ):
        program(ids_of(2, 17))


def test_no_more_than_some_traces_are_made(monkeypatch):
    monkeypatch.setattr(programs, "MOST_TRACES", 0)
    with pytest.raises(SppFxError, match="pad or cut to fewer lengths"):
        trace(halving())(ids_of(2, 8))


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_other_traces_share_factors_and_weights_and_go_through_the_same_passes(storage):
    passes = parse_pipeline(
        "canonicalize,causal,match{dense=true},prune,inject{method=spp,rank=4,dropout=0.5},"
        f"lower{{storage={storage}}},train-norms,partition,checkpoint"
    )
    model = halving()
    program, wanted = trace(model), trace(copy.deepcopy(model), {"length": 8})
    for each in (program, wanted):
        run_pipeline(each, passes)
        generator = torch.Generator().manual_seed(0)
        for factor in each.parameters():
            if factor.requires_grad:
                nn.init.normal_(factor, std=0.1, generator=generator)
        each.train()
    assert not program.sizes.admit(batch=2, length=8)
    ids, grads = ids_of(2, 8), []
    for each in (program, wanted):
        torch.manual_seed(1)
        loss = each(ids, labels=ids).loss
        loss.backward()
        grads.append([(name, p.grad) for name, p in each.named_parameters() if p.requires_grad])
    for (name, got), (_, expected) in zip(*grads, strict=True):
        assert torch.equal(got, expected), name
    for each in (program, wanted):
        run_pipeline(each, parse_pipeline("fold"))
    assert torch.equal(program.eval()(ids).logits, wanted.eval()(ids).logits)


@torch.no_grad()
def test_copies_and_moved_programs_trace_for_other_lengths_as_well():
    model = halving()
    ids = ids_of(2, 8)
    wanted = model(input_ids=ids).logits
    program = trace(model)
    assert torch.equal(copy.deepcopy(program)(ids).logits, wanted)
    assert torch.equal(pickle.loads(pickle.dumps(program))(ids).logits, wanted)
    assert torch.equal(program.to("cpu")(ids).logits, wanted)


def test_a_rewritten_trace_is_no_other_trace_any_more():
    program = trace(halving())
    other = program.at(batch=2, length=8)
    run_pipeline(other, parse_pipeline("canonicalize"))
    assert program.at(batch=2, length=8) is not other
    assert other.at(batch=2, length=8) is other


@pytest.mark.parametrize(
    ("make", "said"), [(counting, None), (gpt_neo, "1 to 15 tokens"), (llama, "any length")]
)
def test_a_graph_for_onnx_says_its_lengths_and_takes_one_row(make, said):
    if said is None:
        with pytest.raises(SppFxError):
            plain_signature(make(), find_task(CAUSAL_LM))
        return
    sizes = plain_signature(make(), find_task(CAUSAL_LM)).sizes
    assert sizes.described() == said
    assert sizes.admit(batch=1, length=1)


def test_an_export_of_a_program_keeps_its_lengths():
    program = trace(gpt_neo())
    exported = torch.export.export(
        program, (ids_of(2, 7),), dynamic_shapes={"args": ({1: torch.export.Dim.AUTO},)}, strict=False
    )
    with pytest.raises((RuntimeError, AssertionError)):
        exported.module()(ids_of(2, 16))
