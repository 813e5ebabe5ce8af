"""Models of other tasks than language modelling through the command line, their data and their scores."""

import json
import shutil

import pytest
import torch
from torchmetrics.functional.text import sacre_bleu_score, word_error_rate

from spp_fx.errors import UsageError
from spp_fx.graph.task import EagerModel, find_task
from spp_fx.training.task_rows import HiddenRows, score, task_rows
from spp_fx.verbs.load import load_processor
from tests.command import command, must
from tests.tasks import MODELS, make, save, tokenizer, write

SCORES = {
    "masked-lm": {"perplexity", "accuracy"},
    "sequence-classification": {"accuracy", "f1"},
    "token-classification": {"accuracy", "f1"},
    "question-answering": {"exact_match", "f1"},
    "feature-extraction": {"similarity"},
    "seq2seq-lm": {"perplexity", "accuracy"},
    "image-classification": {"accuracy", "f1"},
    "speech-seq2seq": {"perplexity", "accuracy"},
}
IN_EVERY_RUN = ("sequence-classification", "feature-extraction", "seq2seq-lm", "image-classification")


@pytest.mark.parametrize(
    "task", [task if task in IN_EVERY_RUN else pytest.param(task, marks=pytest.mark.slow) for task in SCORES]
)
def test_a_model_of_each_task_is_pruned_trained_merged_and_measured(tmp_path, task):
    dense, data = tmp_path / "dense", write(task, tmp_path / "data.jsonl")
    save(task, dense)
    must("prune", dense, "-o", tmp_path / "sparse")
    must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 2)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["task"] == task
    teacher = ("--teacher", dense)
    line = ("--data", data, "--steps", 3, "--lr", 0.05, "--batch-size", 4, "--seq-len", 32)
    said = must("train", tmp_path / "adapter", *line, *teacher, "--eval-data", data, "--json").json
    assert said["metrics_before"].keys() == said["metrics"].keys() == SCORES[task]
    assert said["loss_parts"]["teacher"] > 0
    assert said["loss"] > 0
    must("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--verify-sparsity")
    assert must("verify", tmp_path / "merged", "--pattern", "2:4", "--json").json["ok"]
    reference = teacher if task == "feature-extraction" else ()
    both = must(
        "eval",
        tmp_path / "merged",
        tmp_path / "adapter",
        "--data",
        data,
        "--seq-len",
        32,
        *reference,
        "--json",
    ).json["models"]
    for name in SCORES[task]:
        assert both[0][name] == pytest.approx(both[1][name], rel=1e-5)
        assert both[0][name] == pytest.approx(said["metrics"][name], rel=1e-4)
    assert both[0]["task"] == task


def test_options_of_language_models_are_refused(tmp_path):
    save("sequence-classification", tmp_path / "dense")
    data = write("sequence-classification", tmp_path / "data.jsonl")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse")
    must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 2)
    for option in (("--packing",), ("--loss-on", "answer")):
        result = command("train", tmp_path / "adapter", "--data", data, *option)
        assert result.code == 2
        assert "is not for sequence-classification" in result.err
    assert "--stride is for" in command("eval", tmp_path / "dense", "--data", data, "--stride", 8).err
    said = command("eval", tmp_path / "dense", "--data", data, "--generate")
    assert "--generate is for models that write a text" in said.err
    assert "not for sequence-classification" in said.err


def test_what_cannot_be_compared_is_refused_before_it_is_measured(tmp_path):
    save("sequence-classification", tmp_path / "dense")
    save("seq2seq-lm", tmp_path / "other")
    data = write("sequence-classification", tmp_path / "data.jsonl")
    said = command("eval", tmp_path / "dense", tmp_path / "other", "--data", data)
    assert said.code == 2
    assert "for several tasks (seq2seq-lm, sequence-classification)" in said.err
    assert (
        "--teacher is for feature-extraction"
        in command("eval", tmp_path / "dense", "--data", data, "--teacher", tmp_path / "dense").err
    )
    config = json.loads((tmp_path / "dense/config.json").read_text())
    config |= {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}
    shutil.copytree(tmp_path / "dense", tmp_path / "teacher")
    (tmp_path / "teacher/config.json").write_text(json.dumps(config))
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse")
    must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 2)
    said = command(
        "train", tmp_path / "adapter", "--data", data, "--teacher", tmp_path / "teacher", "--steps", 1
    )
    assert said.code == 2
    assert "has the id2label {0: 'yes', 1: 'no'}" in said.err


def test_an_encoder_of_texts_is_not_trained_without_a_teacher(tmp_path):
    save("feature-extraction", tmp_path / "dense")
    data = write("feature-extraction", tmp_path / "data.jsonl")
    must("prune", tmp_path / "dense", "-o", tmp_path / "sparse")
    must("inject", tmp_path / "sparse", "-o", tmp_path / "adapter", "--rank", 2)
    assert "has no labels: give --teacher" in command("train", tmp_path / "adapter", "--data", data).err


@pytest.mark.parametrize(
    ("task", "record", "said"),
    [
        ("sequence-classification", {"text": "w1"}, r"line 1: has no label \(label, labels\); it has: text"),
        (
            "sequence-classification",
            {"text": "w1", "label": 2},
            "has the label 2, and the model has 2 classes",
        ),
        ("sequence-classification", {"label": 1}, "has no text"),
        ("token-classification", {"tokens": ["w1"], "labels": [0, 1]}, "as many labels as words"),
        ("question-answering", {"question": "w1", "answers": {}}, "has no context"),
        ("seq2seq-lm", {"source": "w1"}, "has no target"),
        ("image-classification", {"image": "none.png", "label": 0}, "none.png"),
        ("speech-seq2seq", {"audio": "none.wav", "text": "w1"}, "none.wav: cannot be read as a recording"),
        ("feature-extraction", [1], "is not a record with keys but list"),
    ],
)
def test_a_record_that_lacks_something_is_named(tmp_path, task, record, said):
    model = EagerModel(find_task(task), save(task, tmp_path / "model"))
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    processor = load_processor(tmp_path / "model", model)
    with pytest.raises(UsageError, match=said):
        task_rows(tmp_path / "data.jsonl", model, processor, length=32)


def test_rows_with_nothing_in_them_are_skipped_or_refused(tmp_path):
    model = EagerModel(find_task("sequence-classification"), make("sequence-classification"))
    records = [{"text": "w1", "label": 0}, {"text": " ", "label": 1}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    rows, skipped = task_rows(path, model, tokenizer(), length=32)
    assert (len(rows), skipped.count) == (1, 1)
    with pytest.raises(UsageError, match="text is empty"):
        task_rows(path, model, tokenizer(), length=32, strict=True)


def test_a_folder_of_pictures_gives_their_classes(tmp_path):
    model = EagerModel(find_task("image-classification"), save("image-classification", tmp_path / "model"))
    write("image-classification", tmp_path / "data.jsonl")
    for number in range(2):
        (tmp_path / f"pictures/LABEL_{number}").mkdir(parents=True)
        (tmp_path / f"{number}.png").rename(tmp_path / f"pictures/LABEL_{number}/a.png")
    processor = load_processor(tmp_path / "model", model)
    rows, _ = task_rows(tmp_path / "pictures", model, processor, length=1)
    assert [int(row["labels"]) for row in (rows[0], rows[1])] == [0, 1]
    assert rows[0]["pixel_values"].shape == (3, 16, 16)


def test_hidden_tokens_are_drawn_anew_in_every_epoch_and_the_same_in_every_run():
    ids = torch.arange(5, 45)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows, again = (HiddenRows([row] * 50, tokenizer(), 45, seed=3) for _ in range(2))
    first = rows[7]
    assert torch.equal(first["input_ids"], again[7]["input_ids"])
    hidden = torch.stack([rows[n]["labels"] != -100 for n in range(50)]).float().mean()
    assert 0.12 < float(hidden) < 0.18
    seen = torch.where(first["labels"] == -100, first["input_ids"], first["labels"])
    assert torch.equal(seen, ids)
    rows.cut(1)
    assert not torch.equal(first["labels"], rows[7]["labels"])


@torch.no_grad()
def test_scores_are_those_of_the_whole_whatever_the_batches(tmp_path):
    model = EagerModel(find_task("token-classification"), make("token-classification"))
    rows, _ = task_rows(write("token-classification", tmp_path / "d.jsonl"), model, tokenizer(), length=32)
    one, many = (score(model, rows, model.answer, 0, batch_size=size) for size in (1, 5))
    assert one.metrics == many.metrics
    assert one.loss == pytest.approx(many.loss, rel=1e-5)
    assert set(MODELS) - set(SCORES) == {"image-text-to-text"}


def greedy(model, given: dict[str, torch.Tensor], most: int) -> list[int]:
    """What a decoder writes by its definition: the likeliest token each time, without a cache."""
    tokens = [model.config.decoder_start_token_id]
    while len(tokens) < most and tokens[-1] != model.config.eos_token_id:
        logits = model(**given, decoder_input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]


@pytest.mark.parametrize(
    ("task", "metric", "most", "compared"),
    [
        (
            "seq2seq-lm",
            "bleu",
            16,
            lambda texts, wanted: sacre_bleu_score(texts, [[text] for text in wanted]),
        ),
        ("speech-seq2seq", "word_error_rate", 17, word_error_rate),  # Whisper does not count its first token
    ],
)
@torch.no_grad()
def test_what_a_model_writes_is_compared_with_the_records(tmp_path, task, metric, most, compared):
    model, path = save(task, tmp_path / "model"), write(task, tmp_path / "data.jsonl")
    for parameter in model.parameters():  # else it writes one word again and again
        parameter.mul_(8)
    model.save_pretrained(tmp_path / "model")
    facts = EagerModel(find_task(task), model)
    rows, _ = task_rows(path, facts, load_processor(tmp_path / "model", facts), length=16)
    inputs = [
        {name: value[None] for name, value in row.items() if name not in ("labels", "decoder_input_ids")}
        for row in rows
    ]
    words = tokenizer()
    written = [words.decode(greedy(model, given, most), skip_special_tokens=True) for given in inputs]
    assert len({word for text in written for word in text.split()}) > 2
    records = [json.loads(line) for line in path.read_text().splitlines()]
    key = "text" if "audio" in records[0] else "target"
    found = []
    for every in (100, 3):  # a word is added to the first text, and to a third of them
        wanted = [("w39 " if n % every == 0 else "") + text for n, text in enumerate(written)]
        path.write_text(
            "".join(json.dumps(r | {key: t}) + "\n" for r, t in zip(records, wanted, strict=True))
        )
        said = must("eval", tmp_path / "model", "--data", path, "--generate", "--seq-len", 16, "--json").json
        cut = words.batch_decode(
            words(wanted, truncation=True, max_length=16)["input_ids"], skip_special_tokens=True
        )
        assert said[metric] == pytest.approx(float(compared(written, cut)))
        found.append(said[metric])
    assert 0 < min(found) < max(found) < 1
