"""Roles: routers and gates by what the graph does; every matrix is a site or is named with its reason."""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spp_fx.graph.program import GATES, ROUTES, Program
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from tests.effort import nightly

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
DEEPSEEK = SMALL | {
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
}
INKLING = SMALL | {
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "d_rel": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "rel_extent": 16,
    "sliding_window": 16,
    "mlp_layer_types": ["dense", "sparse"],
    "layer_types": ["hybrid_sliding", "hybrid"],
}
CONFIGS = {
    # as many heads as experts
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**DEEPSEEK, num_key_value_heads=4),
    "phimoe": lambda: hf.PhimoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": lambda: hf.JetMoeConfig(
        **{k: v for k, v in SMALL.items() if k != "num_attention_heads"},
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    # more outputs of the router than experts
    "inkling": lambda: hf.InklingTextConfig(**INKLING),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1
    ),
}
ROUTERS = {
    "mixtral": {"model.layers.0.mlp.gate.weight"},
    "qwen2_moe": {"model.layers.0.mlp.gate.weight"},
    "deepseek_v3": {"model.layers.0.mlp.gate.weight"},
    "phimoe": {"model.layers.0.mlp.router.weight"},
    "jetmoe": {f"model.layers.0.{block}.router.layer.weight" for block in ("mlp", "self_attention.experts")},
    "inkling": {"model.layers.1.mlp.gate.weight"},
    "gpt2": set(),
}
families = pytest.mark.parametrize("family", [nightly(f) if f == "phimoe" else f for f in CONFIGS])
ONE_ROW = {"qwen2_moe": {"model.layers.0.mlp.shared_expert_gate.weight"}}


@functools.cache
def canonical(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Program]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype).eval()
    program = trace(model)
    run_pipeline(program, [Canonicalize()])
    return model, program


def with_role(program: Program, role: str) -> set[str]:
    return {name for name, site in program.sites.items() if site.role == role}


@families
def test_routers_and_gates_are_known_by_what_the_graph_does(family):
    _, program = canonical(family)
    assert with_role(program, ROUTES) == ROUTERS[family]
    assert with_role(program, GATES) == ONE_ROW.get(family, set())


@families
def test_every_matrix_of_the_model_is_a_site_or_left_out_with_a_reason(family):
    model, program = canonical(family)
    matrices = {name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2}
    assert not program.sites.keys() & program.left_out.keys()
    assert program.sites.keys() | program.left_out.keys() == matrices
    linears = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert linears <= program.sites.keys()
    tables = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert {name for name, why in program.left_out.items() if why.known} >= tables


def test_the_kernels_of_convolutions_are_left_out_with_that_reason():
    left_out = canonical("inkling")[1].left_out
    kernels = [why for name, why in left_out.items() if ".conv1d.weight" in name]
    assert len(kernels) == 8
    assert all(why.known and why.reason == "is the kernel of a depthwise convolution" for why in kernels)
    assert all(why.known for why in left_out.values())


def test_expert_stacks_that_a_loop_slices_may_be_linears_and_their_routers_are_not_pruned():
    program = canonical("jetmoe")[1]
    stacks = {name: why for name, why in program.left_out.items() if name.endswith("_linear.weight")}
    assert len(stacks) == 4
    assert {(why.known, why.reason) for why in stacks.values()} == {
        (False, "reaches aten.linear.default through aten.select.int, which cannot be followed")
    }
    (report,) = run_pipeline(program, [Match(dense=True)])
    assert ROUTERS["jetmoe"] <= report.skipped.keys()


def test_a_gate_with_one_output_is_left_as_it_is_unless_it_is_named():
    program = canonical("qwen2_moe")[1]
    (report,) = run_pipeline(program, [Match(dense=True)])
    for name in ONE_ROW["qwen2_moe"]:
        assert report.skipped[name] == "gates a branch by one number; name it in the targets to take it"
    (report,) = run_pipeline(program, [Match(dense=True, targets=("shared_expert_gate",))])
    assert set(program.matched) == ONE_ROW["qwen2_moe"]


def test_a_router_that_is_cast_before_use_is_known_to_be_a_router():
    _, program = canonical("deepseek_v3", torch.bfloat16)
    (name,) = ROUTERS["deepseek_v3"]
    assert name not in program.sites
    assert program.left_out[name].known
    assert program.left_out[name].reason.startswith(ROUTES)


class Block(nn.Module):
    """An MLP in place of a decoder layer's own, made for one question."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.choice = nn.Linear(32, outputs, bias=False)
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)
        self.bank = nn.Parameter(torch.zeros(4, 32))


class DenseExperts(Block):
    """A top-1 choice whose value scales the input; no index leaves the router."""

    def forward(self, x):
        scores = self.choice(x).softmax(-1) + self.bank[:, 0]
        weight, expert = scores.max(-1, keepdim=True)
        return self.down(self.up(x)) * weight + F.one_hot(expert.squeeze(-1), 4).to(x.dtype) @ self.bank


class Winners(Block):
    """The largest of many features are kept: `up` computes features, and no expert is chosen."""

    def forward(self, x):
        features = self.up(x)
        values, places = features.topk(8, dim=-1)
        kept = torch.zeros_like(features).scatter(-1, places, values)
        return self.down(kept) + self.choice(x) @ self.bank


class Pruned(Block):
    """Tokens are chosen by a linear's output, along the tokens."""

    def forward(self, x):
        values, _ = self.choice(x).topk(2, dim=1)
        return self.down(self.up(x)) + values.sum((1, 2))[:, None, None]


class Shared(Block):
    """One activation is called with the features and with the scores, of another shape."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.act = nn.Sigmoid()

    def forward(self, x):
        scores = self.act(self.choice(x.flatten(0, 1)))
        weight, expert = scores.topk(1, dim=-1)
        features = self.act(self.up(x)).cumsum(1)
        chosen = (self.bank[expert.squeeze(-1)] * weight).view(x.shape)
        return self.down(features) + chosen


class Gate(Block):
    """One number a token scales a branch, through a cast and arithmetic with itself and constants."""

    def forward(self, x):
        gate = self.choice(x).float()
        gate = 1 - gate * torch.sigmoid(gate) + self.bank[0, 0]
        return self.down(self.up(x)) * gate.to(x.dtype)


class Score(Block):
    """One number a token that is added, which is not a gate."""

    def forward(self, x):
        return self.down(self.up(x)) + self.choice(x)


class MulSums(Block):
    """Linears spelt as a product and a sum, with something done between the two, each with a matrix of its own."""

    def __init__(self, forms) -> None:
        super().__init__()
        self.forms = forms
        self.banks = nn.ParameterDict({form: torch.zeros(4, 32) for form in forms})

    def forward(self, x):
        extra = sum(
            form(x.unsqueeze(-2), self.banks[name]).mean(-1, keepdim=True)
            for name, form in self.forms.items()
        )
        return self.down(self.up(x)) + extra + self.choice(x).mean(-1, keepdim=True)


CONTRACTIONS = {
    "product": lambda x, w: (x * w).sum(-1),
    "factor": lambda x, w: ((x * w) * 2).sum(-1),
    "activation": lambda x, w: F.relu(x * w).sum(-1),
    "bias and mean": lambda x, w: (x * w + x).mean(-1),
    "cast": lambda x, w: (x * w).double().mul(2).sum(-1).to(x.dtype),
    "moved": lambda x, w: ((x * w).transpose(-1, -2) * 2).unflatten(-2, (4, 8)).sum((-3, -2)),
    "norm": lambda x, w: torch.linalg.vector_norm((x * w).tanh(), dim=-1),
    "matmul": lambda x, w: (x * w * 2) @ x.new_ones(32),
    "einsum": lambda x, w: torch.einsum("bsoi->bso", F.gelu(x * w)),
    "distance": lambda x, w: (x - w).pow(2).sum(-1),
    "scaled weight": lambda x, w: F.linear(x.squeeze(-2), w * x.mean()),
    "one row": lambda x, w: F.relu(x * w[:1] * 2).sum(-1),
}
TABLES = {
    "added": lambda x, w: F.relu(x.squeeze(-2) + w[0]).pow(2).mean(-1, keepdim=True),
    "scale": lambda x, w: F.rms_norm(x.squeeze(-2) * w[0].exp() + x.squeeze(-2), (32,)),
    "scale before a linear": lambda x, w: (x.squeeze(-2) * w[0]) @ x.new_ones(32, 4),
    "decay": lambda x, w: (x * w).exp().sum(-1),
    "other dimension": lambda x, w: (x.squeeze(-2) * w[0] * 2).sum(1, keepdim=True),
}


class Before(Block):
    """Linears whose weight is the first operand of the product, of two, three and one dimension."""

    def forward(self, x):
        up = (self.up.weight @ x.transpose(1, 2)).transpose(1, 2)
        one = self.choice.weight @ x[0, 0]
        return (self.down.weight.mm(up.flatten(0, 1).t()).t()).view(x.shape) + one.sum() * self.bank[0]


class Unused(Block):
    """A module that the forward does not call, a stack that is sliced, a table that is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Conv2d(3, 4, 2)
        self.stack = nn.Parameter(torch.zeros(4, 8, 32))
        self.scale = nn.Parameter(torch.zeros(1, 32))

    def forward(self, x):
        extra = F.linear(x, self.stack.flatten(0, 1)) @ x.new_ones(32, 32)
        return self.down(self.up(x)) * self.scale.exp() + extra


BLOCKS = [
    (DenseExperts, 4, ROUTES),
    (Shared, 4, ROUTES),
    (Winners, 4, None),
    (Pruned, 4, None),
    (Gate, 1, GATES),
    (Score, 1, None),
]


def with_block(block: nn.Module) -> Program:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf.LlamaConfig(**GROUPED)).eval()
    model.model.layers[0].mlp = block
    program = trace(model)
    run_pipeline(program, [Canonicalize()])
    return program


class Sum(nn.Module):
    """Blocks side by side: one trace answers for all."""

    def __init__(self, blocks: dict[str, Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)

    def forward(self, x):
        return sum(block(x) for block in self.blocks.values())


@pytest.fixture(scope="module")
def blocks():
    return with_block(Sum({block.__name__: block(outputs) for block, outputs, _ in BLOCKS}))


@pytest.mark.parametrize(("block", "role"), [(block.__name__, role) for block, _, role in BLOCKS])
def test_the_use_of_a_result_decides_what_a_linear_is(blocks, block, role):
    roles = {
        name.split(".")[-2]: site.role
        for name, site in blocks.sites.items()
        if name.startswith(f"model.layers.0.mlp.blocks.{block}.")
    }
    roles.pop(block, None)  # the bank, where it is multiplied with
    assert roles == {"choice": role, "up": None, "down": None}


@pytest.fixture(scope="module")
def products():
    return with_block(MulSums(CONTRACTIONS | TABLES))


@pytest.mark.parametrize("form", CONTRACTIONS)
def test_a_linear_spelt_as_product_and_sum_is_not_taken_for_a_table(products, form):
    assert not products.left_out[f"model.layers.0.mlp.banks.{form}"].known


@pytest.mark.parametrize("form", TABLES)
def test_a_table_whose_own_dimension_is_not_summed_in_its_product_is_known(products, form):
    assert products.left_out[f"model.layers.0.mlp.banks.{form}"].known


def test_a_weight_that_stands_before_its_input_is_a_site():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf.LlamaConfig(**GROUPED)).eval()
    model.model.layers[0].mlp = Before()
    ids = torch.arange(24).view(2, 12)
    program = trace(model)
    run_pipeline(program, [Canonicalize(), Match(dense=True)])
    sites = {name: site for name, site in program.sites.items() if ".mlp." in name}
    assert {name.split(".")[-2]: (site.kind, site.shape) for name, site in sites.items()} == {
        "choice": ("matmul", (4, 32)),
        "up": ("matmul", (64, 32)),
        "down": ("matmul", (32, 64)),
    }
    torch.testing.assert_close(program(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


def test_what_is_not_followed_or_not_read_is_named_apart_from_tables():
    found = {
        name.removeprefix("model.layers.0.mlp."): why
        for name, why in with_block(Unused()).left_out.items()
        if ".mlp." in name
    }
    assert {name: why.known for name, why in found.items()} == {
        "bank": False,
        "choice.weight": False,
        "stack": False,
        "tower.weight": False,
        "scale": True,
    }
    assert found["tower.weight"].reason == "is not read when the model is called with tokens"
    assert "aten.linear.default through aten.flatten.using_ints" in found["stack"].reason
    assert found["scale"].reason == "is a table: it is only added or multiplied elementwise"
