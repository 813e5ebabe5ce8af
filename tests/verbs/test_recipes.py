"""Recipes: the papers' settings are options that exist; recipe < --config < command line; a dump is a --config."""

import json
from typing import Any

import pytest
import yaml
from transformers import TrainerCallback

from spp_fx.adapters.method import make_method
from spp_fx.errors import FormatError, UsageError
from spp_fx.verbs import train as training
from spp_fx.verbs.recipes import all_recipes, find_recipe, parse_recipes, to_yaml
from spp_fx.verbs.settings import InjectSettings, PruneSettings, TrainSettings
from tests.command import command, must, one_line

RECIPES = all_recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_made_of_valid_options(name):
    recipe = RECIPES[name]
    PruneSettings(**recipe.options("prune"))
    inject = recipe.options("inject")
    made = InjectSettings(
        **{key: inject.pop(key) for key in list(inject) if key in InjectSettings.__dataclass_fields__}
    )
    assert make_method(made.method, **inject).parameters().items() >= inject.items()
    for devices in (1, 2, 4, 8, 16):
        train = TrainSettings(**recipe.options("train", devices))
        assert train.batch_size * train.accumulate * devices == recipe.rows
        assert train.seq_len == 512
    assert set(yaml.safe_load(to_yaml(recipe))) == {"prune", "inject", "train"}


PUBLISHED = {  # rate, rows of a forward and epochs: the settings of the paper
    "spp-llama-7b": (4e-3, 8, 3), "spp-llama-13b": (2e-3, 4, 3), "spp-llama-30b": (4e-3, 16, 3),
    "spp-llama-65b": (5e-4, 8, 1), "spp-llama2-7b": (4e-3, 8, 3), "spp-llama2-13b": (2e-3, 4, 3),
    "spp-llama2-70b": (5e-4, 8, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_of_spp_are_its_published_settings(name):
    recipe = find_recipe(name)
    train, inject = recipe.options("train"), recipe.options("inject")
    assert (train["lr"], train["batch_size"], train["epochs"]) == PUBLISHED[name]
    assert (train["weight_decay"], train["schedule"], train["warmup"], train["loss_on"]) == (
        1e-3,
        "linear",
        0.03,
        "all",
    )
    assert (inject["method"], inject["rank"], inject["scale"], inject["dropout"]) == ("spp", 16, 2.0, 0.05)
    assert 128 <= recipe.rows <= 256


def test_devices_share_the_rows_of_a_step():
    recipe = find_recipe("spp-llama-7b")
    assert [recipe.options("train", n)["accumulate"] for n in (1, 8, 16)] == [16, 2, 1]
    many = recipe.options("train", 32)
    assert (many["batch_size"], many["accumulate"]) == (4, 1)
    with pytest.raises(UsageError, match="128 rows, which 3 devices"):
        recipe.options("train", 3)


def test_an_option_that_does_not_exist_is_named():
    text = to_text({"train": {"epoch": 3}})
    with pytest.raises(FormatError, match="train has no option epoch"):
        parse_recipes(text, "file")


def to_text(own: dict[str, object]) -> str:
    return yaml.safe_dump(
        {"paper": "P", "inject": {"method": "spp"}, "recipes": {"r": {"model": "M", "rows": 8, **own}}}
    )


def test_they_are_listed_and_dumped():
    table = must("recipes").out
    assert all(name in table for name in RECIPES)
    listed = must("recipes", "--json").json["recipes"]
    assert [each["name"] for each in listed] == list(RECIPES)
    one = must("recipes", "spp-llama-30b", "--devices", 8, "--json").json
    assert one["train"] == yaml.safe_load(must("recipes", "spp-llama-30b", "--devices", 8).out)["train"]
    assert one["train"]["accumulate"] == 2
    refused = command("recipes", "sqft-lama3-8b")
    assert refused.code == 2
    assert "did you mean sqft-llama3-8b" in one_line(refused.err)
    refused = command("recipes", "--devices", 8)
    assert refused.code == 2
    assert "give its NAME" in one_line(refused.err)


@pytest.mark.parametrize(
    ("words", "file", "said"),
    [
        (
            "",
            "",
            "--init gradient needs a text: give it with --calib FILE (--init is from --recipe {recipe})",
        ),
        ("--init gradient", "", "needs a text: give it with --calib FILE"),
        ("--method masked-full", "", "has no option rank"),
        ("", "init: reconstruct\n", "(--init is from run.yaml)"),
        ("", "method: nosuch\n", "hira, lora-star"),
        (
            "",
            "rank: [8, 'q_proj@0']\n",
            "rank must be at least 1, got 0 in 'q_proj@0' (--rank is from run.yaml)",
        ),
        ("", "sede: 3\n", "did you mean seed?"),
    ],
)
def test_an_error_names_the_file_or_recipe_that_set_an_option(here, words, file, said):
    recipe = "lors-llama2-7b"
    (here / "run.yaml").write_text(file or "{}")
    result = command("inject", "sparse", "--recipe", recipe, "--config", "run.yaml", *words.split())
    line = one_line(result.err)
    assert result.code == 2
    assert said.format(recipe=recipe) in line
    assert ("is from" in line) == ("--init" not in words and "sede" not in file)


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def injected(*words: object) -> dict[str, object]:
    done = must("inject", "sparse", "--dry-run", "--json", "-q", *words).json
    return {key: done[key] for key in ("method", "rank", "scale", "dropout")} | {"sites": len(done["sites"])}


def test_inject_takes_a_recipe_a_file_and_the_command_line_in_this_order(here):
    plain = {"method": "spp", "rank": 16, "scale": 2.0, "dropout": 0.05, "sites": 14}
    assert injected("--recipe", "spp-llama-7b") == plain
    (here / "run.yaml").write_text("rank: 8\nscale: 3\ntargets: q_proj,v_proj\n")
    for words in (
        ("--recipe", "spp-llama-7b", "--config", "run.yaml"),
        ("--config", "run.yaml", "--recipe", "spp-llama-7b"),
    ):
        assert injected(*words) == plain | {"rank": 8, "scale": 3.0, "sites": 4}
    assert injected("--scale", 4, *words) == plain | {"rank": 8, "scale": 4.0, "sites": 4}
    assert injected("--recipe", "sqft-llama3-8b")["method"] == "sqft"
    (here / "method.yaml").write_text("method: hira\n")
    assert injected("--recipe", "sqft-llama3-8b", "--config", "method.yaml")["method"] == "hira"
    # A budget is given instead of a rank.
    must("inject", "sparse", "--dry-run", "--recipe", "spp-llama-7b", "--budget", "5%", "-q")


def settings_of(here, monkeypatch, *words: object) -> TrainSettings:
    seen: list[TrainSettings] = []

    def stop(adapter: object, data: object, settings: TrainSettings, **options: object) -> None:
        seen.append(settings)
        raise UsageError("stopped")

    monkeypatch.setattr(training, "train", stop)
    result = command("train", "adapter", "--data", "text.txt", *words)
    assert "stopped" in result.err
    return seen[0]


def test_train_takes_a_recipe_a_file_and_the_command_line_in_this_order(here, monkeypatch):
    recipe = settings_of(here, monkeypatch, "--recipe", "spp-llama-7b")
    assert recipe == TrainSettings(**find_recipe("spp-llama-7b").options("train"))
    (here / "run.yaml").write_text("lr: 0.1\nsteps: 7\n")
    both = settings_of(here, monkeypatch, "--recipe", "spp-llama-7b", "--config", "run.yaml", "--lr", 0.2)
    assert (both.lr, both.steps, both.epochs, both.weight_decay) == (0.2, 7, None, 1e-3)
    typed = settings_of(here, monkeypatch, "--recipe", "spp-llama-7b", "--steps", 5)
    assert (typed.steps, typed.epochs, typed.lr) == (5, None, 4e-3)
    typed = settings_of(here, monkeypatch, "--config", "run.yaml", "--epochs", 2)
    assert (typed.steps, typed.epochs) == (None, 2.0)


def test_a_recipe_knows_how_many_processes_share_a_step(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    shared = settings_of(here, monkeypatch, "--recipe", "spp-llama-7b")
    assert (shared.batch_size, shared.accumulate) == (8, 2)


def test_a_step_keeps_the_rows_of_a_recipe_or_file_whatever_the_batch_size(here, monkeypatch):
    (here / "dump.yaml").write_text(must("recipes", "spp-llama-7b").out)
    (here / "batch.yaml").write_text("batch-size: 32\n")
    recipe, dump, batch = ("--recipe", "spp-llama-7b"), ("--config", "dump.yaml"), ("--config", "batch.yaml")
    for words, step in (
        ((*recipe, "--batch-size", 4), (4, 32)),
        ((*dump, "--batch-size", 4), (4, 32)),
        ((*batch, *recipe), (32, 4)),
        ((*recipe, "--accumulate", 2), (8, 2)),
        (batch, (32, 1)),
    ):
        found = settings_of(here, monkeypatch, *words)
        assert (found.batch_size, found.accumulate) == step, words
    said = command("train", "adapter", "--data", "text.txt", *recipe, "--batch-size", 4).err
    assert "--accumulate 32: with --batch-size 4 a step keeps the 128 rows of --recipe spp-llama-7b" in said
    assert "warning" not in said
    said = command("train", "adapter", "--data", "text.txt", "--recipe", "sqft-llama3-8b").err
    assert "its method is spp, and the settings of recipe sqft-llama3-8b are for sqft" in said
    said = command("train", "adapter", "--data", "text.txt", *dump, "--accumulate", 2).err
    assert "a step has 16 rows on each device, that of dump.yaml 128" in said
    refused = command("train", "adapter", "--data", "text.txt", *recipe, "--batch-size", 12)
    assert refused.code == 2
    assert "--batch-size 12 does not divide the 128 rows" in one_line(refused.err)


@pytest.mark.parametrize("name", ["spp-llama-65b", "sqft-mistral-7b", "lors-llama2-7b"])
def test_a_dump_is_a_file_for_config(here, monkeypatch, name):
    (here / "run.yaml").write_text(must("recipes", name).out)
    recipe, dumped = (
        settings_of(here, monkeypatch, *words) for words in (("--recipe", name), ("--config", "run.yaml"))
    )
    assert recipe == dumped
    assert injected("--recipe", name) == injected(
        "--config", "run.yaml"
    )  # a start needs no text in a dry run


def test_a_file_with_sections_has_nothing_outside_of_them(here):
    (here / "run.yaml").write_text("inject: {rank: 8}\nlr: 0.1\n")
    result = command("inject", "sparse", "--config", "run.yaml", "--dry-run")
    assert result.code == 2
    assert "'lr' stands outside" in one_line(result.err)
    (here / "run.yaml").write_text("train: {lr: 0.1}\ninject: {rnk: 8}\n")
    result = command("inject", "sparse", "--config", "run.yaml", "--dry-run")
    said = one_line(result.err)
    assert "unknown option 'rnk'" in said
    assert said.endswith("did you mean rank?")
    assert {"seq-len", "strict-data", "json"} <= {*said.partition("known: ")[2].partition(";")[0].split(", ")}
    assert "as_json" not in said
    assert "strict_data" not in said


@pytest.mark.parametrize(("value", "said"), [("[8, {a: 1}]", "{'a': 1}"), ("true", "True")])
def test_a_file_has_numbers_and_text_where_an_option_takes_them(here, value, said):
    (here / "run.yaml").write_text(f"rank: {value}\n")
    result = command("inject", "sparse", "--config", "run.yaml", "--dry-run")
    assert result.code == 2
    assert f"run.yaml: rank does not take {said}" in one_line(result.err)


class LastRate(TrainerCallback):
    """Keeps the rates of the schedule at the end of training."""

    rates: tuple[float, ...] = ()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates = tuple(kwargs["lr_scheduler"].get_last_lr())


def test_a_recipe_trains_a_small_model(here):
    must("inject", "sparse", "-o", "new", "--recipe", "spp-llama-7b", "--rank", 4, "-q")
    config = json.loads((here / "new" / "adapter_config.json").read_text())
    assert config["method_parameters"] == {"rank": 4, "scale": 2.0, "dropout": 0.05}
    small = {"seq_len": 16, "batch_size": 2, "accumulate": 1, "epochs": None, "steps": 3}
    options = find_recipe("lors-llama2-7b").options("train") | small | {"bf16": False}
    last = LastRate()
    done = training.train("new", "text.txt", TrainSettings(**options), callbacks=[last])
    assert (done.steps, done.lr) == (3, 2e-5)
    assert last.rates == pytest.approx([1e-6] * len(last.rates))  # LoRS: from 2e-5 down to 1e-6


def test_cosine_ends_at_the_lowest_rate():
    with pytest.raises(UsageError, match="--min-lr needs --schedule cosine"):
        TrainSettings(min_lr=1e-6)
    with pytest.raises(UsageError, match="above --lr"):
        TrainSettings(min_lr=1e-3, lr=1e-4, schedule="cosine")
