"""A program of any task computes what its model computes, and its loss is the model's own."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from spp_fx.errors import UsageError
from spp_fx.graph.task import TASKS, EagerModel, Input, find_task, task_of, task_of_model
from spp_fx.graph.trace import forward_of, trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from tests.families import MULTIMODAL
from tests.tasks import IMAGE, MODELS, TEXT, make

SIZES = (
    {"batch": 2, "length": 7, "target": 5},
    {"batch": 1, "length": 12, "target": 9},
    {"batch": 3, "length": 5, "target": 2},
)


def drawn(
    inputs: tuple[Input, ...], sizes: dict[str, int], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sizes["length"])
    given = {entry.name: entry.drawn(sizes, dtype, generator) for entry in inputs}
    if {"input_ids", "pixel_values"} <= given.keys():
        image = torch.full((sizes["batch"], 4), IMAGE)
        given["input_ids"] = torch.cat([image, given["input_ids"].clamp(max=IMAGE - 1)], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    return given


@pytest.mark.parametrize("task", MODELS)
@torch.no_grad()
def test_a_program_is_its_model(task):
    model = make(task)
    program = trace(model, task=task)
    assert program.task.name == task
    for sizes in SIZES:
        given = drawn(program.inputs, sizes)
        wanted = forward_of(model, program.task)(*given.values())
        made = program(**given)
        for name, each in zip(
            program.task.outputs, wanted if isinstance(wanted, tuple) else (wanted,), strict=True
        ):
            assert torch.equal(made[name], each), (name, sizes)


@pytest.mark.parametrize(
    ("attention", "dtype"), [("sdpa", torch.bfloat16), ("eager", torch.float16)], ids=str
)
@pytest.mark.parametrize("task", MODELS)
@torch.no_grad()
def test_of_any_dtype_and_attention_and_of_padded_and_single_rows(task, attention, dtype):
    model = make(task).to(dtype)
    model.set_attn_implementation(attention)
    program = trace(model, task=task)
    for sizes in (*SIZES[:1], {"batch": 1, "length": 1, "target": 1}):
        given = drawn(program.inputs, sizes, dtype)
        for padded in (slice(0), slice(0, 2), slice(-2, None)):  # none, left, right
            if "attention_mask" in given:
                given["attention_mask"] = torch.ones_like(given["attention_mask"])
                given["attention_mask"][0, padded] = 0
            wanted = model(**given)
            made = program(**given)
            for name in program.task.outputs:
                assert made[name].dtype == dtype
                torch.testing.assert_close(made[name], wanted[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("masked-lm", torch.tensor([[1, -100, 3, 4, -100, 6, 7], [-100, 9, -100, 3, 2, 1, 0]])),
        ("sequence-classification", torch.tensor([1, 0])),
        ("token-classification", torch.tensor([[1, 0, -100, 1, 0, 1, -100], [0, 0, 0, 1, -100, 1, 1]])),
        ("question-answering", torch.tensor([[1, 3], [0, 6]])),
        ("seq2seq-lm", torch.tensor([[5, 6, 7, 2, -100], [9, 9, 2, -100, -100]])),
        ("image-classification", torch.tensor([1, 0])),
    ],
)
@torch.no_grad()
def test_the_loss_is_the_models_own(task, labels):
    model = make(task)
    program = trace(model)
    given = drawn(program.inputs, SIZES[0])
    named = {"labels": labels}
    if task == "question-answering":
        named = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    wanted = model(**given, **named).loss
    torch.testing.assert_close(program(**given, labels=labels).loss, wanted)
    count = int((labels != -100).sum())
    torch.testing.assert_close(program(**given, labels=labels, num_items_in_batch=2 * count).loss, wanted / 2)


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"num_labels": 1, "problem_type": "regression"}, torch.tensor([0.5, -1.0])),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    ],
)  # fmt: skip
@torch.no_grad()
def test_classes_may_be_numbers_or_several(options, labels):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TEXT, **options)).eval()
    program = trace(model)
    given = drawn(program.inputs, SIZES[0])
    torch.testing.assert_close(
        program(**given, labels=labels).loss, model(**given, labels=labels.clone()).loss
    )


@pytest.mark.parametrize("task", [name for name in MODELS if name != "image-text-to-text"])
@torch.no_grad()
def test_no_model_is_far_from_itself_and_every_other_is(task):
    model = make(task)
    facts = EagerModel(find_task(task), model)
    given = drawn(facts.inputs, SIZES[0])
    ours = facts.answer(given)
    labels = torch.zeros(given["decoder_input_ids"].shape) if "decoder_input_ids" in given else torch.zeros(2)
    batch = given | {"labels": labels}
    other = {name: value + torch.randn_like(value) for name, value in ours.items()}
    assert abs(float(facts.task.distance(ours, ours, batch))) < 1e-6
    assert float(facts.task.distance(ours, other, batch)) > 1e-3
    assert float(facts.task.distance(ours, other, batch, 2.0)) > 1e-3


def test_every_task_claims_its_own_classes():
    for task in MODELS:
        model = make(task)
        # A language model that sees images is one of texts unless it is asked for.
        wanted = "causal-lm" if task == "image-text-to-text" else task
        assert task_of_model(model).name == wanted
        model.config.architectures = [type(model).__name__]
        found = task_of(model.config)
        assert found is not None
        assert found.name == wanted
    assert set(MODELS) | {"causal-lm"} == set(TASKS)


def test_a_model_without_a_head_is_a_language_model_in_a_folder_and_an_encoder_as_a_module():
    config = LlamaConfig(**TEXT, architectures=["LlamaModel"])
    found = task_of(config)
    assert found is not None
    assert found.name == "causal-lm"  # loading ties or misses the head
    assert task_of_model(LlamaModel(config)).name == "feature-extraction"


@pytest.mark.parametrize(("task", "towers"), [("causal-lm", False), ("image-text-to-text", True)])
def test_linears_of_a_vision_tower_are_taken_by_name(task, towers):
    program = trace(Gemma3ForConditionalGeneration(MULTIMODAL["gemma3"]()).eval(), task=task)
    (_, report) = run_pipeline(program, [Canonicalize(), Match(dense=True)])
    assert all(".language_model.layers." in name for name in program.matched)
    inside = {name for name in program.sites if "vision_tower" in name}
    assert bool(inside) == towers
    assert all("name it in the targets" in report.skipped[name] for name in inside)
    if towers:
        run_pipeline(program, [Match(targets=("*vision_tower*q_proj",), dense=True)])
        assert program.matched


def test_what_is_missing_or_has_another_shape_is_named():
    program = trace(make("seq2seq-lm"))
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(UsageError, match=r"decoder_input_ids \(batch, target\) is missing"):
        program(ids)
    with pytest.raises(
        UsageError, match=r"decoder_input_ids must be \(batch, target\) with batch 2, got \(3, 4\)"
    ):
        program(ids, None, torch.ones(3, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (lambda: RobertaForMaskedLM(RobertaConfig(**TEXT | {"max_position_embeddings": 66})), 64),
        (lambda: make("masked-lm"), 64),
        (lambda: make("image-classification"), None),
    ],
)
def test_positions_are_those_that_tokens_can_have(model, positions):
    assert trace(model()).positions == positions
