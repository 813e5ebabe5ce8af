"""A traced program is the model: same numbers to the bit, same names, same parameters, no copies."""

import copy
import pickle
import re
from collections import deque
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Phi3Config,
    PreTrainedModel,
    RobertaConfig,
    RoFormerConfig,
)

from spp_fx.errors import SppFxError, UsageError
from spp_fx.exporters.onnx.graph_export import cached_signature
from spp_fx.graph.model import load_model, meta_model
from spp_fx.graph.printer import print_program
from spp_fx.graph.program import Program
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.pipeline import parse_pipeline, run_pipeline
from tests.effort import nightly
from tests.families import FAMILIES, MULTIMODAL, SMALL, VOCABULARY, batch, make_model, shallow
from tests.memory import peak

pytestmark = pytest.mark.usefixtures("real_exports")


DEEP = ("llama", "gpt-oss")
"""Two layers; those of gpt-oss differ. One is enough for the other families."""


@cache
def traced(family: str) -> tuple[PreTrainedModel, Program]:
    """A model and its program, in eval mode; not to be changed."""
    model = make_model(family, one_layer=family not in DEEP)
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
    with pytest.raises(UsageError, match=r"must be \(batch, length\), got shape \(12,\)"):
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
    assert {f: traced(f)[1].head_weight for f in FAMILIES} == dict.fromkeys(FAMILIES, "lm_head.weight")


def test_a_change_of_the_models_weight_is_a_change_of_the_program():
    model, program = copy.deepcopy(traced("llama"))
    ids = batch()
    before = program(ids).logits
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert not torch.equal(program(ids).logits, before)
    assert torch.equal(program(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama-tied", nightly("gpt2"), "gpt-oss"])
def test_a_model_without_numbers_is_traced_without_numbers(family):
    with torch.device("meta"):
        model = make_model(family, one_layer=family not in DEEP)
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
    model = make_model("llama", dtype=dtype, one_layer=True)
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


@pytest.mark.parametrize("family", ["llama", "gpt2", nightly("falcon"), nightly("gpt-oss")])
@torch.no_grad()
def test_train_and_eval_switch_the_models_dropout(family):
    config = FAMILIES[family]() if family == "gpt2" else shallow(family)
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
    program = trace(make_model("llama", one_layer=True).train())
    assert program.training
    assert all(module.training for module in program.modules())
    assert program.root.training


def test_tracing_leaves_the_model_as_it_was():
    model = make_model("mixtral", one_layer=True).train()
    model.model.layers[0].eval()
    model.set_experts_implementation("eager")
    before = {name: module.training for name, module in model.named_modules()}
    instance = set(model.__dict__)
    trace(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert set(model.__dict__) == instance
    assert model.config._experts_implementation == "eager"
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())


def contents(value, path="model", found=None, seen=None):
    """Everything that hangs on an object, flat: identities, items in order, bytes of tensors."""
    found, seen = ({}, {}) if found is None else (found, seen)
    if id(value) in seen:
        found[path] = seen[id(value)]
        return found
    seen[id(value)] = path
    if isinstance(value, torch.Tensor):
        real = type(value) in (torch.Tensor, nn.Parameter)
        data = value.detach().reshape(-1).view(torch.uint8).tolist() if real else None
        found[path] = (id(value), type(value), value.requires_grad, value.shape, data)
    elif isinstance(value, nn.Module) or (
        hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value)
    ):
        found[path] = id(value)
        contents(vars(value), f"{path}.", found, seen)
    elif isinstance(value, dict):
        found[path] = (id(value), list(value))
        for key, item in value.items():
            contents(item, f"{path}{key}", found, seen)
    elif isinstance(value, list | tuple | deque):
        found[path] = (id(value), len(value))
        for position, item in enumerate(value):
            contents(item, f"{path}[{position}]", found, seen)
    else:
        found[path] = set(value) if isinstance(value, set) else value
    return found


def generated(program: Program) -> str:
    return print_program(program) + "".join(graph.code for _, graph in program.graphs())


def longrope(**options) -> PreTrainedModel:
    """As Phi-3 with 128k: other frequencies for sequences of more than 16 tokens, picked in the forward."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = Phi3Config(
        **SMALL | {"num_hidden_layers": 1}, **sizes, pad_token_id=0, rope_parameters=rope, **options
    )
    config.original_max_position_embeddings = 16
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def dynamic_ntk() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(**SMALL, intermediate_size=64, max_position_embeddings=16, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config).eval()


class Remembering(LlamaForCausalLM):
    """Writes wherever a forward can write."""

    def __init__(self, config, *, fails=False):
        super().__init__(config)
        self.fails, self.calls, self.last = fails, 0, None
        self.seen, self.sizes, self.kinds, self.recent = [], {}, {"a"}, deque([1], maxlen=2)
        self.nested = {"list": [[]], "state": SimpleNamespace(count=0)}
        self.mask = torch.ones(3, 3)
        self.register_buffer("steps", torch.zeros(2), persistent=False)
        self.config.told = {"length": 0}

    def forward(self, input_ids, attention_mask=None, **kwargs):
        self.calls += 1
        self.last = input_ids
        self.new = input_ids * 2
        self.seen.append(input_ids)
        self.sizes[input_ids.shape[1]] = input_ids
        self.kinds.add("b")
        self.recent.append(input_ids)
        self.nested["list"][0].append(input_ids)
        self.mask.mul_(2)
        self.steps.add_(1)
        self.model.layers[0].mlp.cached = input_ids
        self.model.norm.register_buffer("late", torch.zeros(1))
        self.config.told["length"] = input_ids.shape[1]
        self.config.use_cache = "told"
        self.model.norm.register_forward_pre_hook(lambda *_: None)
        if self.fails:
            raise ValueError("it gives up")
        return super().forward(input_ids, attention_mask, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        nightly(longrope, id="longrope"),
        pytest.param(
            lambda: longrope(attention_dropout=0.1), id="longrope-dropout"
        ),  # exported in both modes
        pytest.param(dynamic_ntk, id="dynamic"),
        pytest.param(lambda: Remembering(shallow("llama")), id="remembering"),
        pytest.param(lambda: Remembering(shallow("llama"), fails=True), id="failing"),
    ],
)
def test_every_attribute_is_as_before_and_a_second_trace_is_the_first(make):
    model = make()
    before = contents(model)
    told = []
    for _ in range(2):
        try:
            told.append(generated(trace(model)))
        except SppFxError as error:
            told.append(str(error))
    after = contents(model)
    assert list(after) == list(before)
    assert after == before
    assert told[0] == told[1]


@torch.no_grad()
def test_longrope_computes_what_the_model_computes_on_both_sides_of_its_original_length():
    model = longrope()
    program = trace(model)
    for length in (12, 50, 16, 17, 3, 64):
        ids = batch(2, length)
        assert torch.equal(program(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits), (
            length
        )


def test_an_export_with_a_cache_leaves_the_model_as_it_was_too():
    model = longrope()
    before = contents(model)
    assert len(cached_signature(model).outputs) == 1 + 2
    assert contents(model) == before


def test_a_forward_that_was_put_on_the_instance_stays():
    model = make_model("llama", one_layer=True)
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
    model = Unexportable(shallow("llama")).train()
    with pytest.raises(SppFxError, match=r"^Unexportable cannot be traced: torch.export says: .+") as raised:
        trace(model)
    assert "\n" not in str(raised.value)
    assert "forward" not in model.__dict__
    assert model.training
    assert all(module.training for module in model.modules())


class WithImages(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, pixel_values=None, **kwargs):
        if pixel_values is None:
            raise ValueError("pixel_values are needed")
        return super().forward(input_ids, attention_mask, **kwargs)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Unexportable(shallow("llama")),
            r"data-dependent .*test_trace\.py:\d+, if input_ids\.sum\(\) > 3",
        ),
        (
            lambda: WithImages(shallow("llama")),
            r"says: pixel_values are needed \(at .*test_trace\.py:\d+, raise V",
        ),
    ],
    ids=["data", "inputs"],
)
def test_a_refusal_names_reason_fix_and_place_in_one_line_and_prints_nothing(make, said, capfd):
    with pytest.raises(SppFxError) as raised:
        trace(make())
    message = str(raised.value)
    assert re.search(said, message), message
    assert "\\n" not in message
    assert len(message) < 1000
    assert "TORCH_LOGS" not in message
    assert capfd.readouterr() == ("", "")


def test_what_is_of_no_task_is_refused():
    with pytest.raises(
        UsageError, match="Linear is of none of the tasks that are known: causal-lm, seq2seq-lm"
    ):
        trace(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_model_is_not_run_for_another_task_than_its_class_does():
    with pytest.raises(UsageError, match="LlamaForSequenceClassification cannot be run for causal-lm"):
        trace(LlamaForSequenceClassification(FAMILIES["llama"]()), task="causal-lm")


def test_a_folder_is_loaded_in_its_stored_dtype(tmp_path):
    model = make_model("llama", dtype=torch.bfloat16, one_layer=True)
    model.save_pretrained(tmp_path)
    program = trace(tmp_path)
    assert {p.dtype for p in program.parameters()} == {torch.bfloat16}
    assert torch.equal(program(batch()).logits, model(batch()).logits)
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_a_folder_with_only_a_configuration_gives_shapes(tmp_path):
    make_model("llama", dtype=torch.bfloat16, one_layer=True).config.save_pretrained(tmp_path)
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


def test_tracing_takes_no_memory_for_weights():
    def make(hidden: int, inner: int) -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=4,
            attention_dropout=0.1,
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(0.01)
        return model

    trace(make(16, 16))  # what any first trace takes: imports, caches
    model = make(1024, 16384)
    weights = sum(p.nbytes for p in model.parameters())
    assert weights > 190e6
    assert peak(lambda: trace(model)) < 0.1 * weights


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
def test_a_function_that_goes_another_way_for_long_sequences_runs_for_the_examples_way_only(longest):
    """A copy of the model would run the function, and it the model: it cannot be traced again."""
    model = make_model("llama", one_layer=True)
    true = model.forward

    def forward(input_ids, **options):
        out = true(input_ids=input_ids, **options)
        if input_ids.shape[1] > longest:
            out.logits = -out.logits
        return out

    model.forward = forward
    program, other = trace(model), batch(2, 4 if longest == 5 else 101)
    assert torch.equal(program(batch(2, 7)).logits, model(batch(2, 7)).logits)
    with pytest.raises(SppFxError, match=f"2 rows of {other.shape[1]} tokens: .* cannot be traced again"):
        program(other)


SELF = {"is_decoder": True, "pad_token_id": 1, "intermediate_size": 64, "max_position_embeddings": 70}


def assert_trains_like(model: PreTrainedModel, program: Program) -> None:
    """Logits to the bit in both modes, and a gradient for every factor after inject and lower; also when pickled."""
    ids = batch() % 80 + 10
    ones = torch.ones_like(ids)
    assert program.state_dict().keys() == model.state_dict().keys()
    for training in (True, False):
        program.train(training)
        model.train(training)
        logits = []
        for one in (program, model, pickle.loads(pickle.dumps(program))):
            torch.manual_seed(1)
            logits.append(one(input_ids=ids, attention_mask=ones).logits)
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])
    run_pipeline(program, parse_pipeline("canonicalize,match{dense=true},inject{rank=4},lower{kernel=fused}"))
    program.train()(ids, labels=ids).loss.backward()
    factors = [p for p in program.parameters() if p.requires_grad]
    assert program.adapters
    assert len(factors) == 2 * len(program.adapters)
    assert all(p.grad is not None for p in factors)


@pytest.mark.parametrize("config", [RobertaConfig, nightly(RoFormerConfig)])
def test_a_module_called_self_is_traced_and_trained(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SMALL | {"num_hidden_layers": 1}, **SELF)).eval()
    assert any(name.endswith("attention.self") for name, _ in model.named_modules())
    assert_trains_like(model, trace(model))


class Named(LlamaForCausalLM):
    """Has linears of given names in a ModuleDict, which takes more names than an attribute can have."""

    def __init__(self, config, names):
        super().__init__(config)
        self.model.norm = nn.Sequential(self.model.norm, Sum({name: nn.Linear(32, 32) for name in names}))


class Sum(nn.ModuleDict):
    def forward(self, hidden):
        for module in self.values():
            hidden = hidden + nn.functional.dropout(module(hidden), 0.1, self.training)
        return hidden


def named(*names: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return Named(
        LlamaConfig(**SMALL | {"num_hidden_layers": 1}, intermediate_size=64, attention_dropout=0.1), names
    ).eval()


@pytest.mark.parametrize(
    "names",
    [
        ("self", "self_1", "forward_", "print", "len", "output", "class_", "input", "x_1"),
        ("in", "class", "None", "inf", "nan", "torch", "device", "operator", "getattr"),
    ],
    ids=lambda names: names[0],
)
def test_modules_may_be_called_as_anything_in_python_is(names):
    model = named(*names)
    assert_trains_like(model, trace(model))


@pytest.mark.parametrize("name", ["graph", "code", "meta", "arg_names"])
def test_a_name_that_torch_fx_keeps_for_itself_is_refused(name):
    with pytest.raises(
        SppFxError, match=rf"keeps the name '{name}' for itself, and model\.norm\.1\.{name} has it"
    ):
        trace(named(name))


def test_a_program_that_does_not_run_is_not_called_traced(monkeypatch, capfd):
    monkeypatch.setattr("spp_fx.graph.trace.spell", lambda graph: graph)
    with pytest.raises(SppFxError, match=r"^Named cannot be traced: .* what it exports does not run: 'FakeT"):
        trace(named("self"))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("family", ["gemma3", nightly("gemma4"), "got_ocr2"])
@torch.no_grad()
def test_a_model_whose_sizes_stand_in_its_text_configuration(family):
    model = AutoModelForCausalLM.from_config(MULTIMODAL[family]()).eval()
    program, ids = trace(model), batch() % 90
    assert (program.vocabulary, program.positions) == (VOCABULARY, 48)
    wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    got = program(ids, labels=ids)
    assert torch.equal(got.logits, wanted.logits)
    torch.testing.assert_close(got.loss, wanted.loss)
