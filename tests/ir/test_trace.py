"""A traced program is the model: same numbers to the bit, same names, same parameters, no copies."""

import copy
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from spp_fx.errors import SppFxError, UsageError
from spp_fx.ir.model import load_model, meta_model
from spp_fx.ir.program import Program
from spp_fx.ir.trace import trace
from spp_fx.passes import Canonicalize
from tests.families import FAMILIES, VOCABULARY, batch, make_model


@cache
def traced(family: str) -> tuple[PreTrainedModel, Program]:
    """A model and its program, in eval mode; not to be changed."""
    model = make_model(family)
    return model, trace(model)


def padded(side: str, rows: int = 2, columns: int = 12) -> torch.Tensor:
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[0, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    return mask


MASKS = {
    "none": None,
    "ones": torch.ones(2, 12, dtype=torch.int64),
    "left": padded("left"),
    "right": padded("right"),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_model_to_the_bit(family, mask):
    model, program = traced(family)
    ids = batch()
    labels = ids.masked_fill(ids % 5 == 0, -100)
    wanted = model(input_ids=ids, attention_mask=MASKS[mask], labels=labels)
    got = program(input_ids=ids, attention_mask=MASKS[mask], labels=labels)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 7), (7, 7), (5, 33)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batch_and_sequence_may_have_any_size(family, shape):
    model, program = traced(family)
    ids = batch(*shape)
    assert torch.equal(program(ids).logits, model(ids).logits)


def test_without_labels_there_is_no_loss():
    assert traced("llama")[1](batch()).loss is None


def test_the_loss_takes_the_number_of_items_of_a_whole_step():
    model, program = traced("llama")
    ids = batch()
    wanted = model(ids, labels=ids, num_items_in_batch=50).loss
    assert torch.equal(program(ids, labels=ids, num_items_in_batch=50).loss, wanted)
    assert not torch.equal(program(ids, labels=ids).loss, wanted)


def test_ids_of_another_rank_are_refused():
    with pytest.raises(UsageError, match=r"must be \(batch, sequence\), got shape \(12,\)"):
        traced("llama")[1](batch()[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_model(family):
    model, program = copy.deepcopy(traced(family))
    twin, ids = copy.deepcopy(model), batch()
    program(ids, labels=ids).loss.backward()
    twin(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_objects_of_parameters_and_buffers_are_the_models_own(family):
    model, program = traced(family)
    for duplicates in (True, False):
        own = dict(model.named_parameters(remove_duplicate=duplicates))
        ours = dict(program.named_parameters(remove_duplicate=duplicates))
        assert ours.keys() == own.keys()
        assert all(ours[name] is own[name] for name in own)
    ours = dict(program.named_buffers())
    assert all(ours[name] is buffer for name, buffer in model.named_buffers() if name in ours)
    assert program.state_dict().keys() == model.state_dict().keys()


def test_tied_weights_and_the_head_are_known():
    assert traced("llama-tied")[1].tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert traced("llama")[1].tied == {}
    assert {f: traced(f)[1].head for f in FAMILIES} == dict.fromkeys(FAMILIES, "lm_head.weight")


def test_a_change_of_the_models_weight_is_a_change_of_the_program():
    model, program = copy.deepcopy(traced("llama"))
    ids = batch()
    before = program(ids).logits
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert not torch.equal(program(ids).logits, before)
    assert torch.equal(program(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gpt-oss"])
def test_a_model_without_numbers_is_traced_without_numbers(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    program = trace(model)
    assert {p.device.type for p in program.parameters()} == {"meta"}
    assert program.device.type == "meta"
    Canonicalize().apply(program)
    cpu = copy.deepcopy(traced(family)[1])
    Canonicalize().apply(cpu)
    assert program.sites == cpu.sites


@torch.no_grad()
def test_bfloat16_is_computed_in_bfloat16_to_the_bit():
    dtype = torch.bfloat16
    model = make_model("llama", dtype=dtype)
    program, ids = trace(model), batch()
    assert program(ids).logits.dtype == dtype
    assert torch.equal(program(ids).logits, model(ids).logits)


# Families whose models have dropout of their own: on attention weights, on hidden states, or on both.
DROPOUT = {
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.1},
    "falcon": {"attention_dropout": 0.2, "hidden_dropout": 0.3},
    "gpt-oss": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize("family", DROPOUT)
@torch.no_grad()
def test_train_and_eval_switch_the_models_dropout(family):
    config = FAMILIES[family]()
    for key, value in DROPOUT[family].items():
        assert hasattr(config, key)
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    program, ids, mask = trace(model), batch(), padded("left")

    def both(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = []
        for one in (program, model):
            torch.manual_seed(seed)
            outputs.append(one(input_ids=ids, attention_mask=mask).logits)
        return outputs[0], outputs[1]

    quiet, wanted = both(1)
    assert torch.equal(quiet, wanted)
    program.train()
    model.train()
    for seed in (1, 2):
        loud, wanted = both(seed)
        assert torch.equal(loud, wanted)
        assert not torch.equal(loud, quiet)
    program.eval()
    model.eval()
    assert torch.equal(both(1)[0], quiet)


def test_a_program_starts_in_the_mode_of_its_model():
    assert not traced("llama")[1].training
    program = trace(make_model("llama").train())
    assert program.training
    assert all(module.training for module in program.modules())
    assert program.root.training


def test_tracing_leaves_the_model_as_it_was():
    model = make_model("mixtral").train()
    model.model.layers[0].eval()
    model.set_experts_implementation("eager")
    before = {name: module.training for name, module in model.named_modules()}
    instance = set(model.__dict__)
    trace(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert set(model.__dict__) == instance
    assert model.config._experts_implementation == "eager"
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())


def test_a_forward_that_was_put_on_the_instance_stays():
    model = make_model("llama")
    calls = []
    own = model.forward
    model.forward = hook = lambda **kwargs: calls.append(1) or own(**kwargs)
    trace(model)
    assert model.forward is hook
    assert calls == [1]


class Unexportable(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        if input_ids.sum() > 3:  # depends on the data
            raise AssertionError
        return super().forward(input_ids, attention_mask, **kwargs)


def test_a_failed_trace_says_why_and_leaves_the_model_as_it_was():
    model = Unexportable(FAMILIES["llama"]()).train()
    with pytest.raises(SppFxError, match=r"^Unexportable cannot be traced: torch.export says: .+") as raised:
        trace(model)
    assert "\n" not in str(raised.value)
    assert "forward" not in model.__dict__
    assert model.training
    assert all(module.training for module in model.modules())


T5 = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 2),
        lambda: LlamaModel(FAMILIES["llama"]()),
        lambda: LlamaForSequenceClassification(FAMILIES["llama"]()),
        lambda: T5ForConditionalGeneration(T5),
    ],
    ids=["Linear", "LlamaModel", "LlamaForSequenceClassification", "T5ForConditionalGeneration"],
)
def test_what_is_no_causal_language_model_is_refused(make, request):
    name = request.node.callspec.id
    with pytest.raises(UsageError, match=f"trace: {name} is no Hugging Face causal language model"):
        trace(make())


def test_a_folder_is_loaded_in_its_stored_dtype(tmp_path):
    model = make_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    program = trace(tmp_path)
    assert {p.dtype for p in program.parameters()} == {torch.bfloat16}
    assert torch.equal(program(batch()).logits, model(batch()).logits)
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_a_folder_with_only_a_configuration_gives_shapes(tmp_path):
    make_model("llama", dtype=torch.bfloat16).config.save_pretrained(tmp_path)
    model = meta_model(tmp_path)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert trace(model).get_parameter("lm_head.weight").shape == (VOCABULARY, 32)


def test_a_copy_of_a_program_is_its_own_program():
    _, program = traced("llama-tied")
    twin, ids = copy.deepcopy(program), batch()
    before = program(ids).logits
    assert torch.equal(twin(ids).logits, before)
    assert twin.state_dict().keys() == program.state_dict().keys()
    assert twin.get_parameter("lm_head.weight") is twin.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        twin.get_parameter("model.norm.weight").zero_()
    assert twin(ids).logits.abs().max() == 0
    assert torch.equal(program(ids).logits, before)


def test_a_module_put_into_a_copy_is_the_one_that_runs():
    twin = copy.deepcopy(traced("llama")[1])
    calls = []

    class Watched(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            calls.append(1)
            return self.inner(*args)

    twin.lm_head = Watched(twin.lm_head)
    twin(batch())
    assert calls == [1]


MEMORY = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from spp_fx.ir.trace import trace
torch.set_num_threads(1)
def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
def make(hidden, inner):
    config = LlamaConfig(vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=3,
        num_attention_heads=4, attention_dropout=0.1)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    return model
trace(make(16, 16))  # what any first trace takes: imports, caches
model = make(1024, 4096)
weights = sum(p.nbytes for p in model.parameters())
before = peak()
program = trace(model)
print(weights, (peak() - before) / weights)
"""


def test_tracing_takes_no_memory_for_weights():
    result = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    weights, share = map(float, result.stdout.split())
    assert weights > 190e6
    assert share < 0.1


@pytest.mark.parametrize(
    "cast", [lambda p: p.bfloat16(), lambda p: p.double(), lambda p: p.to(torch.float16)]
)
def test_a_cast_is_refused_and_changes_nothing(cast):
    _, program = copy.deepcopy(traced("llama"))
    ids = batch()
    before = program(ids).logits
    with pytest.raises(UsageError, match=r"traced in, torch.float32: load the model in torch\.\w+ and trace"):
        cast(program)
    assert torch.equal(program(ids).logits, before)
    assert torch.equal(program.float()(ids).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_moves_to_another_device_with_the_tensors_its_graphs_make(family):
    _, program = copy.deepcopy(traced(family))
    ids = batch()
    shape = program(ids).logits.shape
    logits = program.to("meta")(ids.to("meta")).logits
    assert (logits.device.type, logits.shape) == ("meta", shape)


@pytest.mark.parametrize("longest", [5, 100])
def test_code_that_goes_another_way_for_long_sequences_is_refused(longest):
    """The way that the example takes would be taken for every length."""
    model = make_model("llama")
    true = model.forward

    def forward(input_ids, **options):
        out = true(input_ids=input_ids, **options)
        if input_ids.shape[1] > longest:
            out.logits = -out.logits
        return out

    model.forward = forward
    with pytest.raises(SppFxError, match="LlamaForCausalLM cannot be traced"):
        trace(model)
