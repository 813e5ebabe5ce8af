"""Modules whose code depends on the data are leaves of a trace: they run as they are, and the rest is a graph."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DbrxConfig, DbrxForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from spp_fx.errors import SppFxError
from spp_fx.exporters.onnx.graph_export import plain_signature
from spp_fx.graph.leaves import Leaf, sites_in_leaves
from spp_fx.graph.program import Program
from spp_fx.graph.task import find_task
from spp_fx.graph.trace import trace
from spp_fx.passes.pipeline import parse_pipeline, run_pipeline
from spp_fx.pruning.statistics import Inputs, Observer
from spp_fx.pruning.walk import Interpreter, Walk, fitted
from tests.families import SMALL, VOCABULARY, shallow

pytestmark = pytest.mark.usefixtures("real_exports")
IDS = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


class Sorted(nn.Module):
    """Sends positive rows through one linear and the others through another, as no trace can."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.other = nn.Parameter(torch.randn(width, width) / 8)
        self.table = nn.Parameter(torch.randn(3, width) / 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        rows = x.flatten(0, -2)
        positive = (rows.sum(-1) > 0).nonzero().flatten()
        negative = (rows.sum(-1) <= 0).nonzero().flatten()
        result = torch.zeros_like(rows)
        if len(positive):
            result[positive] = self.second(self.first(rows[positive]).relu())
        if len(negative):
            result[negative] = rows[negative] @ self.other + self.table[len(negative) % 3]
        return result.view(x.shape) * self.calls


class Longer(nn.Module):
    """Returns the rows on one side of zero, however many there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x.sum(-1) > 0] if bool(x.sum() > 0) else x[x.sum(-1) <= 0]


def sorting(**config: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shallow("llama").to_dict() | config)).eval()
    for layer in model.model.layers:
        layer.mlp = Sorted(model.config.hidden_size)
    return model


def dbrx() -> DbrxForCausalLM:
    """Its experts are stacked along the rows of matrices; those of w2 are stored (in, out)."""
    torch.manual_seed(0)
    experts = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16}
    attention = {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4}
    config = DbrxConfig(
        d_model=16, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=VOCABULARY, ffn_config=experts,
        attn_config=attention, pad_token_id=0,
    )  # fmt: skip
    return DbrxForCausalLM(config).eval()


def leaves_of(program: Program) -> list[str]:
    return [leaf.path for leaf in program.modules() if isinstance(leaf, Leaf)]


def test_a_module_that_cannot_be_traced_runs_as_it_is():
    model = sorting()
    program = trace(model)
    assert leaves_of(program) == ["model.layers.0.mlp"]
    assert program.state_dict().keys() == model.state_dict().keys()
    for rows, length in ((1, 1), (2, 9), (3, 20)):
        ids = torch.randint(VOCABULARY, (rows, length))
        model.model.layers[0].mlp.calls = 0
        assert torch.equal(program(ids).logits, model(ids).logits), (
            "a call leaves nothing behind for the next"
        )


def test_gradients_are_those_of_the_model():
    model = dbrx()
    program = trace(model)
    model(IDS, labels=IDS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    program(IDS, labels=IDS).loss.backward()
    assert expected.keys() == {name for name, p in program.named_parameters() if p.grad is not None}
    for name, grad in expected.items():
        assert torch.allclose(program.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("kernel", ["fused", "reference"])
def test_linears_of_a_leaf_are_sites_whose_adapters_fold(kernel: str):
    model = dbrx()
    program = trace(copy.deepcopy(model))
    run_pipeline(
        program, parse_pipeline("canonicalize,match{dense=true},inject{method=spp,rank=2,masks=false}")
    )
    inside = {name.rpartition(".")[2]: program.sites[name] for name in sites_in_leaves(program)}
    assert {name: (s.shape, s.transposed) for name, s in inside.items()} == {
        "w1": ((96, 16), False),
        "v1": ((96, 16), False),
        "w2": ((16, 96), True),
    }
    run_pipeline(program, parse_pipeline(f"lower{{kernel={kernel}}}"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in program.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 4
    program(IDS, labels=IDS).loss.backward()
    trained = {name: p for name, p in program.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    adapted = program(IDS).logits
    assert not torch.allclose(adapted, model(IDS).logits, atol=1e-3)
    for twin in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert torch.equal(twin(IDS).logits, adapted)
    run_pipeline(program, parse_pipeline("fold"))
    assert program.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(program.state_dict())
    assert torch.allclose(model(IDS).logits, adapted, atol=1e-5)


def test_what_a_leaf_does_with_each_weight_is_found_or_said():
    program = trace(sorting())
    run_pipeline(program, parse_pipeline("canonicalize"))
    mlp = "model.layers.0.mlp"
    assert {name: program.sites[name].transposed for name in sites_in_leaves(program)} == {
        f"{mlp}.first.weight": False,
        f"{mlp}.second.weight": False,
        f"{mlp}.other": True,
    }
    why = program.left_out[f"{mlp}.table"]
    assert not why.known
    assert f"{mlp} (Sorted), whose code depends on the data" in why.reason


def test_calibration_sees_what_a_leaf_multiplies_by():
    model = dbrx()
    program = trace(model)
    run_pipeline(program, parse_pipeline("canonicalize"))
    names = sites_in_leaves(program)
    observer = Observer(
        {name: program.sites[name] for name in names}, hessian=True, samples=1, device=torch.device("cpu")
    )
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    experts = model.transformer.blocks[0].ffn.experts
    experts.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        model(IDS)
        Interpreter(program.root, observer).run(IDS, torch.ones_like(IDS))
    (x, index, _), mlp = seen[0], experts.mlp
    chosen = torch.stack([x.flatten(0, 1)[(index == e).any(-1)].square().sum(0) for e in range(4)])
    by_name = {site.rpartition(".")[2]: inputs for (site, _), inputs in observer.inputs.items()}
    assert torch.allclose(by_name["w1"].norms, chosen.sum(0).sqrt(), rtol=1e-4)
    whole = torch.zeros(IDS.numel(), 96)
    for expert in range(4):
        rows, own = (index == expert).any(-1), slice(24 * expert, 24 * expert + 24)
        tokens = x.flatten(0, 1)[rows]
        whole[rows, own] = nn.functional.silu(tokens @ mlp.w1[own].t()) * (tokens @ mlp.v1[own].t())
    expected = Inputs(96, hessian=True)
    expected.add(whole)
    assert torch.allclose(by_name["w2"].norms, expected.norms, rtol=1e-4)
    blocks = torch.block_diag(*torch.ones(4, 24, 24)).bool()
    assert torch.allclose(by_name["w2"].hessian[blocks], expected.hessian[blocks], rtol=1e-3, atol=1e-6)


class DroppingSorted(Sorted):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.3, self.training) / self.calls


@torch.no_grad()
def test_a_leaf_drops_by_itself_while_training():
    model = sorting(attention_dropout=0.1)
    for layer in model.model.layers:
        layer.mlp = DroppingSorted(model.config.hidden_size)
    model.eval()
    program = trace(model)
    assert leaves_of(program) == ["model.layers.0.mlp"]
    for training in (False, True):
        for seed in (0, 1):
            logits = []
            for each in (program.train(training), model.train(training)):
                model.model.layers[0].mlp.calls = 0
                torch.manual_seed(seed)
                logits.append(each(IDS).logits)
            assert torch.equal(*logits)


class Deciding(LlamaModel):
    """Runs its layers again for some texts, so nothing smaller than the whole of it can be a leaf."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        made = super().forward(input_ids, **options)
        if bool(input_ids.sum() % 2):
            made["last_hidden_state"] = made["last_hidden_state"] * 2
        return made


def test_a_leaf_may_hold_layers_which_are_then_calibrated_as_one():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64)).eval()
    model.model.__class__ = Deciding
    program = trace(model)
    assert leaves_of(program) == ["model"]
    for ids in (IDS, IDS + 1, IDS[:1, :4]):
        assert torch.equal(program(ids).logits, model(ids).logits)
    run_pipeline(program, parse_pipeline("canonicalize,match{dense=true},partition"))
    assert program.units == ["model"]
    assert {site.layer for name, site in program.sites.items() if name != "lm_head.weight"} == {"model"}
    name = "model.layers.1.mlp.down_proj.weight"
    seen: list[Tensor] = []
    model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    observer = Observer({name: program.sites[name]}, hessian=False, samples=1, device=torch.device("cpu"))
    program, (sample,) = fitted(program, [{"input_ids": IDS}])
    walk = Walk(program, [sample])
    with torch.no_grad():
        model(IDS)
        values, shared = walk.enter(sample)
        walk.observe(0, values, shared, observer)
    expected = Inputs(64, hessian=False)
    expected.add(seen[0].flatten(0, 1))
    assert torch.allclose(observer.inputs[name, 0].norms, expected.norms, rtol=1e-5)


def test_dynamic_rope_is_that_of_a_model_that_has_seen_nothing_longer():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}

    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                **shallow("llama").to_dict() | {"max_position_embeddings": 8, "rope_parameters": rope}
            )
        ).eval()

    program = trace(model())
    for length in (5, 30, 12):
        ids = torch.randint(VOCABULARY, (2, length))
        assert torch.equal(program(ids).logits, model()(ids).logits)


def test_results_whose_shape_depends_on_the_data_are_refused():
    model = sorting()
    model.model.layers[0].mlp = Longer()
    with pytest.raises(
        SppFxError, match=r"Longer cannot run as it is: .*(depends on the data|nothing shows)"
    ):
        trace(model)


def test_onnx_names_the_module():
    with pytest.raises(SppFxError, match=r"transformer\.blocks\.0\.ffn\.experts \(DbrxExperts\)"):
        plain_signature(dbrx(), find_task("causal-lm"))
