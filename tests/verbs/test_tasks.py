"""eval --tasks: local tasks, and the numbers of lm-evaluation-harness run on the merged folder itself."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.command import command, must, one_line, randomize

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed; 'make test-tasks' installs it",
)

CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
TEXT = """
task: wording
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{choices[answer]}}}}"
metric_list:
  - {{metric: word_perplexity}}
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    rows = [
        {"question": " ".join(words[i : i + 3]), "choices": words[i : i + 4], "answer": i % 4}
        for i in range(6)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in {"choice": CHOICE, "wording": TEXT, "writing": WRITING}.items():
        (folder / f"{name}.yaml").write_text(task.format(data=data))
    return folder


def directly(folder: Path, files: list[Path], **options: Any) -> dict[str, dict[str, float]]:
    """The harness as its own command line runs it."""
    import lm_eval

    result = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(folder)},
        [str(file) for file in files],
        device="cpu",
        batch_size=1,
        **options,
    )
    return {
        task: {key: value for key, value in values.items() if "," in key and isinstance(value, float)}
        for task, values in result["results"].items()
    }


def numbers(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {key: value for key, value in values.items() if "," in key and value is not None}
        for task, values in report["tasks"].items()
    }


@needs_harness
@pytest.mark.slow
def test_scores_are_those_of_the_harness_on_the_merged_folder(made, tasks, tmp_path):
    must("inject", made / "sparse", "-o", tmp_path / "adapter", "--rank", 4, "-q")
    randomize(tmp_path / "adapter", spread=1.0)
    must("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "-q")
    files = sorted(tasks.glob("*.yaml"))
    asked = ("--tasks", ",".join(map(str, files)), "--json", "-q")
    names = (made / "sparse", tmp_path / "adapter", tmp_path / "merged")
    sparse, adapter, merged = must("eval", *names, *asked).json["models"]
    assert numbers(adapter) == numbers(merged) == directly(tmp_path / "merged", files)
    assert numbers(sparse) == directly(made / "sparse", files) != numbers(merged)
    assert {task: values["n-samples"] for task, values in merged["tasks"].items()} == dict.fromkeys(
        ("choice", "wording", "writing"), 6
    )


@needs_harness
@pytest.mark.slow
def test_shots_and_a_limit_are_the_harness_own(made, tasks):
    file = tasks / "choice.yaml"
    words = ("--tasks", file, "--limit", 4, "--shots", 2, "--json")
    ran = must("eval", made / "sparse", *words)
    assert ran.err == ""  # neither the bars nor the log of the harness
    assert numbers(ran.json) == directly(made / "sparse", [file], limit=4, num_fewshot=2)
    assert (ran.json["tasks"]["choice"]["n-shot"], ran.json["tasks"]["choice"]["n-samples"]) == (2, 4)


@needs_harness
@pytest.mark.slow
def test_a_folder_is_all_its_tasks_and_a_text_goes_with_them(made, tasks):
    table = must("eval", made / "sparse", "--tasks", tasks, "-q").out
    assert all(name in table for name in ("choice", "wording", "writing"))
    both = must(
        "eval",
        made / "dense",
        made / "sparse",
        "--tasks",
        tasks,
        "--data",
        made / "text.txt",
        "--seq-len",
        32,
        "-q",
    )
    assert both.out.splitlines()[0].split()[:3] == ["model", "perplexity", "tokens"]


@needs_harness
@pytest.mark.slow
def test_a_group_of_tasks_has_its_own_number(made, tasks):
    (tasks / "pair.yaml").write_text(
        "group: pair\ntask: [choice]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    )
    words = ("--batch-size", "auto", "--json", "-q")  # the harness prints the size that it finds
    found = must("eval", made / "sparse", "--tasks", tasks, *words).json["tasks"]
    assert found["pair"]["acc,none"] == found["choice"]["acc,none"]


@needs_harness
@pytest.mark.slow
def test_a_group_without_a_number_is_its_tasks(made, tasks):
    (tasks / "both.yaml").write_text("group: both\ntask: [choice, wording]\n")
    (tasks / "all.yaml").write_text("group: all\ntask: [both, writing]\n")
    table = must("eval", made / "sparse", made / "sparse", "--tasks", tasks, "-q").out
    assert all(name in table for name in ("choice acc", "wording word_perplexity", "writing exact_match"))
    report = must("eval", made / "sparse", "--tasks", tasks, "--json", "-q").json
    assert report["tasks"].keys() == {"choice", "wording", "writing"}


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.unlink(), "there is no such file"),
        (lambda file: file.write_text("task: [\n"), "cannot be"),
        (lambda file: file.write_text(file.read_text().replace("data.jsonl", "none.jsonl")), "none.jsonl"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_refused_before_the_model(made, tasks, monkeypatch, change, said):
    change(tasks / "choice.yaml")
    monkeypatch.setattr(
        "spp_fx.verbs.evaluate.load_evaluated", lambda *args: pytest.fail("a model was loaded")
    )
    result = command("eval", made / "sparse", "--tasks", tasks / "choice.yaml", "-q")
    assert result.code == 2
    line = one_line(result.err)
    assert "choice.yaml" in line
    assert said in line


@needs_harness
@pytest.mark.slow
def test_names_are_the_papers_tasks_and_near_ones_are_offered(made):
    from lm_eval.tasks import TaskManager

    from spp_fx.training.tasks import SHOTS, SUITES

    known = set(TaskManager().all_tasks)
    assert {*SUITES["zero-shot"], *SHOTS} <= known
    result = command("eval", made / "sparse", "--tasks", "mmlu,hellaswagg", "-q")
    assert result.code == 2
    assert "hellaswag" in one_line(result.err).split("did you mean")[1]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_message_says_how_to_install_it(made):
    result = command("eval", made / "sparse", "--tasks", "zero-shot", "-q")
    assert result.code == 2
    assert "pip install 'spp-fx[tasks]'" in one_line(result.err)
    missing = command("eval", made / "sparse", "--tasks", "zero-shot,nowhere.yaml", "-q")
    assert missing.code == 2
    assert "nowhere.yaml: there is no such file" in one_line(missing.err)
