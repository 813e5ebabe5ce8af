"""Tracing: the program is the model, to the bit, and leaves the model as it was."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from spp_fx.errors import SppFxError, UsageError
from spp_fx.ir.trace import trace
from spp_fx.passes import Canonicalize, Inject, Lower, Match, run_pipeline
from tests.families import FAMILIES, batch, make_model


@pytest.fixture(scope="module", params=FAMILIES)
def traced(request):
    model = make_model(request.param)
    return model, trace(model)


def padding(rows: int, columns: int, side: str) -> torch.Tensor:
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return mask


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 17), (4, 1)], ids=str)
@torch.no_grad()
def test_logits_and_loss_are_the_models_to_the_bit(traced, shape):
    model, program = traced
    ids = batch(*shape)
    ours = program(ids, labels=ids)
    theirs = model(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss.nan_to_num(-1), theirs.loss.nan_to_num(-1))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_masked_as_in_the_model(traced, side):
    model, program = traced
    ids, mask = batch(2, 9), padding(2, 9, side)
    ours, theirs = program(ids, mask).logits, model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_no_attention_mask_is_a_mask_of_ones(traced):
    model, program = traced
    ids = batch(2, 9)
    assert torch.equal(program(ids).logits, model(ids, use_cache=False).logits)


def test_parameters_are_the_models_own_under_its_names(traced):
    model, program = traced
    theirs = dict(model.named_parameters())
    ours = dict(program.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is parameter for name, parameter in theirs.items())


@torch.no_grad()
def test_a_copy_of_a_program_computes_the_same_on_its_own_weights(traced):
    _, program = traced
    other = copy.deepcopy(program)
    assert torch.equal(other(batch()).logits, program(batch()).logits)
    shared = {p.data_ptr() for p in program.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert not shared


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
@torch.no_grad()
def test_train_and_eval_switch_the_dropout_that_the_model_has(family):
    model = make_model(family)
    program = trace(model)
    ids = batch()
    kept = program(ids).logits
    for mode in (True, False):
        model.train(mode)
        program.train(mode)
        torch.manual_seed(5)
        theirs = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        torch.manual_seed(5)
        ours = program(ids).logits
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, kept) != mode


@torch.no_grad()
def test_a_bfloat16_model_is_computed_in_bfloat16():
    model = make_model("llama", dtype=torch.bfloat16)
    ids = batch()
    ours = trace(model)(ids).logits
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, model(ids, use_cache=False).logits)


def test_a_model_without_weights_is_traced_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"]()).eval()
    program = trace(model)
    run_pipeline(program, [Canonicalize()])
    assert {p.device.type for p in program.parameters()} == {"meta"}
    assert program.sites["model.layers.1.mlp.up_proj.weight"].shape == (64, 32)


def test_the_model_keeps_its_state_after_a_trace():
    model = make_model("mixtral")
    model.set_experts_implementation("eager")
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    forward = model.forward
    trace(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config._experts_implementation == "eager"
    assert model.forward == forward


def test_the_model_keeps_its_state_after_a_failed_trace(monkeypatch):
    model = make_model("mixtral")
    model.set_experts_implementation("eager")
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]

    def fail(*_args, **_kwargs):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(SppFxError, match=r"MixtralForCausalLM cannot be traced: .*no such operator$"):
        trace(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config._experts_implementation == "eager"
    assert "forward" not in vars(model)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(UsageError, match="Linear is no Hugging Face causal language model"):
        trace(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_layer_drop_is_refused():
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, layerdrop=0.5,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(SppFxError, match=r"OPTForCausalLM.*(layer ?drop|cannot be traced)"):
        trace(model)


def adapted_llama():
    program = trace(make_model("llama"))
    run_pipeline(program, [Canonicalize(), Match(dense=True), Inject(rank=4), Lower()])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in program.named_parameters():
        if name.endswith("beta"):
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return program


def test_a_compiled_program_has_the_same_loss_and_gradients():
    program = adapted_llama()
    results = []
    for call in (program, torch.compile(program, backend="aot_eager")):
        program.zero_grad()
        loss = call(batch(), labels=batch()).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    assert len(results[0][1]) == 2 * len(program.adapters)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)  # fusing may reorder sums


def test_an_export_of_an_adapted_program_holds_one_op_a_site():
    program = adapted_llama()
    exported = torch.export.export(program, (batch(),), strict=False)
    ops = [node for node in exported.graph.nodes if str(node.target).startswith("spp_fx.")]
    assert len(ops) == len(program.adapters) == 14


MEMORY = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from spp_fx.ir.trace import trace
wide = int(sys.argv[1])
config = LlamaConfig(vocab_size=96, hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=4)
model = AutoModelForCausalLM.from_config(config).eval()
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
trace(model)
print(sum(p.nbytes for p in model.parameters()) // 1024, status("VmHWM") - before)
"""


def traced_memory(wide: int) -> tuple[int, int]:
    """KiB of a model's weights, and by how much tracing it raises the peak of resident memory."""
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(wide)], capture_output=True, text=True, check=True, timeout=100
    )
    weights, raised = map(int, out.stdout.split())
    return weights, raised


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_tracing_copies_no_weights():
    _, fixed = traced_memory(32)
    weights, raised = traced_memory(1280)
    assert weights > 200_000
    assert raised < fixed + 0.1 * weights
