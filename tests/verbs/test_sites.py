"""Ranks and scales site by site, and a budget, from inject to merge."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch

import spp_fx
from spp_fx.adapters.adapter_folder import AdapterFolder
from spp_fx.adapters.method import METHODS, register
from spp_fx.adapters.sqft import SQFT
from spp_fx.errors import UsageError
from spp_fx.options import option
from tests.command import command, listing, must, one_line, randomize, tensors


@dataclass(frozen=True)
class Worded(SQFT):
    """As another package may have it."""

    words: tuple[str, ...] = option((), "No number, and so nothing that a site has of its own.")


def test_a_list_among_a_methods_options_is_called_that(pristine, tmp_path):
    register("worded")(Worded)
    try:
        ran = command(
            "inject", pristine / "sparse", "-o", tmp_path / "out", "--method", "worded", "--words", "a"
        )
    finally:
        del METHODS["worded"]
    assert ran.code == 2
    assert "worded: the option words must be an int, float, bool or str" in one_line(ran.err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", 4], ""),
        (["--rank", 32], "14 of 14 sites train more numbers than their weights have, such as "),
        (["--rank", 4, "--rank", "0.mlp.up_proj@32"], "1 of 14 sites train more numbers than their weights have, "
         "such as model.layers.0.mlp.up_proj.weight: 3,072 for 64x32; lower the rank"),
    ],
)  # fmt: skip
def test_a_rank_that_trains_more_than_the_weight_itself_is_said(made, words, said):
    ran = must("inject", made / "sparse", "--dry-run", "--method", "sqft", *words)
    assert said in ran.err
    assert bool(said) == ("more numbers" in ran.err)


LINE = ["--seq-len", "16", "--steps", "2", "--batch-size", "4", "-q"]


@pytest.fixture
def mixed(pristine, tmp_path):
    """An adapter whose sites differ in rank, scale and dropout, with random factors."""
    out = tmp_path / "adapter"
    words = ["--rank", 4, "--rank", "down_proj@8", "--rank", "model.layers.0.*@2", "--scale", "q_proj@0.5"]
    must("inject", pristine / "sparse", "-o", out, *words, "--dropout", "v_proj@0.2", "-q")
    randomize(out)
    return out


def test_sites_with_options_of_their_own_train_merge_and_verify(mixed, pristine, text_file, tmp_path):
    config = json.loads((mixed / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["method_parameters"] == {"rank": 4, "scale": 2.0, "dropout": 0.0}
    assert config["rank_pattern"]["model.layers.1.mlp.down_proj"] == 8
    assert set(config["scale_pattern"].values()) == {0.5}
    folder = AdapterFolder.open(mixed)
    for site, method in folder.methods.items():
        rank = 2 if ".layers.0." in site else 8 if "down_proj" in site else 4
        assert (method.rank, method.scale) == (rank, 0.5 if "q_proj" in site else 2.0)
        assert folder.shard.info(f"{site}.spp_alpha").shape[0] == rank
    before = tensors(mixed)
    must(
        "train",
        mixed,
        "--data",
        text_file,
        *["--seq-len", "16", "--steps", "2", "--batch-size", "4", "--packed", "--no-lr-trials", "-q"],
    )
    assert all(not torch.equal(value, before[name]) for name, value in tensors(mixed).items())
    must("merge", mixed, "-o", tmp_path / "merged", "-q")
    must("verify", tmp_path / "merged", "--pattern", "2:4", "--against", pristine / "sparse", "-q")
    merged, base, factors = tensors(tmp_path / "merged"), tensors(pristine / "sparse"), tensors(mixed)
    for site, method in folder.methods.items():
        own = {key: factors[f"{site}.{key}"].double() for key in ("spp_alpha", "spp_beta")}
        exact = method.effective_weight(base[site].double(), **own).float()
        torch.testing.assert_close(merged[site], exact, rtol=3e-7, atol=0)


def test_the_fold_of_a_program_is_the_merge_of_the_folder(mixed, tmp_path):
    from spp_fx.passes.fold_adapters import Fold
    from spp_fx.passes.pipeline import run_pipeline
    from spp_fx.verbs.load import load_program

    program = load_program(mixed).program
    run_pipeline(program, [Fold()])
    must("merge", mixed, "-o", tmp_path / "merged", "-q")
    merged = tensors(tmp_path / "merged")
    assert all(torch.equal(value, merged[name]) for name, value in program.named_parameters())


def test_an_adapter_without_differences_is_written_as_before(pristine, tmp_path):
    spp_fx.inject(pristine / "sparse", tmp_path / "a", rank=4, overrides=("rank:down_proj@4",))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert not [key for key in config if key.endswith("_pattern")]
    assert list(config)[-1] == "sites"


def test_the_command_line_adds_sites_to_the_ranks_of_a_file(pristine, tmp_path):
    (tmp_path / "run.yaml").write_text("rank: [2, 'up_proj@16', 'down_proj@16']\nscale: 0.5\n")
    line = ["inject", pristine / "sparse", "--config", tmp_path / "run.yaml", "--dry-run", "--json"]
    for words, rank, up in (([], 2, 16), (["--rank", "down_proj@8"], 2, 16), (["--rank", 4], 4, 4)):
        report = must(*line, *words).json
        assert (report["rank"], report["scale"]) == (rank, 0.5)
        ranks = {site["name"].split(".")[-2]: site["rank"] for site in report["sites"]}
        assert ranks["up_proj"] == up
        assert ranks["down_proj"] == (8 if "down_proj@8" in words else up)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank nosuch@4", "'nosuch' names no site; there are: down_proj, gate_proj"),
        ("--rank q_proj@48", "(2 of 2 sites that 'q_proj' names); ranks that fit all matched sites: 1, 2, 4"),
        ("--rank q_proj@x", "'x' is not a valid integer"),
        ("--rank @4", "'--rank': '@4' names no site before the @"),
        ("--rank q_proj@0", "rank must be at least 1, got 0"),
        ("--scale q_proj@0", "scale must be a finite number other than 0"),
        ("--rank 4 --budget 1%", "--budget chooses the ranks; leave --rank out"),
        ("--rank q_proj@4 --budget 1%", "--budget chooses the ranks; leave --rank out"),
        ("--budget lots", "--budget takes a share of the model's parameters"),
        ("--budget 10", "10 parameters give no site a rank"),
        ("--budget 1% --budget-by error", "compares with the dense model: give it with --teacher MODEL"),
        ("--budget-by error", "--budget-by error needs a budget"),
        ("--budget 1% --budget-by gradient", "--budget-by gradient needs a text: give it with --calib FILE"),
        ("--budget 1% --teacher {dense}", "--teacher is the dense model for --budget-by error"),
        ("--budget 9% --budget-by error --teacher {dense}/..", "config.json"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(words, message, pristine, tmp_path):
    line = words.format(dense=pristine / "dense").split()
    result = command("inject", pristine / "sparse", "-o", tmp_path / "a", *line)
    assert result.code in (1, 2)
    assert message in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["", "--budget-by error --teacher {dense}"])
def test_a_budget_is_spread_and_reported_site_by_site(words, pristine, tmp_path):
    line = ["inject", pristine / "sparse", "--budget", "8%", *words.format(dense=pristine / "dense").split()]
    report = must(*line, "--dry-run", "--json").json
    total = report["total_parameters"]
    assert 0.9 * 0.08 * total < report["trainable_parameters"] <= 0.08 * total
    ranks = {site["name"]: site["rank"] for site in report["sites"]}
    assert report["trainable_parameters"] == sum(site["trainable_parameters"] for site in report["sites"])
    table = must(*line, "--dry-run").out
    assert "rank" in table.splitlines()[0].split()
    if not words:
        most = must("inject", pristine / "sparse", "--budget", "95%", "--dry-run").err
        assert f"of {95 * total // 100:,} parameters are used: every weight has its highest rank" in most
    assert report["rank"] is None  # no rank is that of all
    least, *_, most = sorted(ranks.values())
    assert f"\n  rank {least} to {most}\n" in must(*line, "-o", tmp_path / "a", "-q").out
    folder = AdapterFolder.open(tmp_path / "a")
    assert {site: method.rank for site, method in folder.methods.items()} == ranks
    if words:
        dense, sparse = tensors(pristine / "dense"), tensors(pristine / "sparse")
        lost = {name: float((dense[name] - sparse[name]).norm()) for name in ranks}
        least, most = min(lost, key=lost.__getitem__), max(lost, key=lost.__getitem__)
        assert ranks[least] <= ranks[most]
        assert len(set(ranks.values())) > 1


def test_the_budgets_error_needs_the_model_that_was_pruned(pristine, tmp_path):
    from spp_fx.errors import FormatError

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((pristine / "dense" / "config.json").read_text())
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(4)}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"has no tensor .* so it is not the dense model"):
        spp_fx.inject(pristine / "sparse", None, budget="5%", budget_by="error", teacher=other)


def test_a_budget_by_the_gradient_follows_the_norm_of_weight_times_gradient(pristine, text_file, tmp_path):
    text = ["--calib", text_file, "--samples", 4, "--seq-len", 16]
    line = ["inject", pristine / "sparse", "--budget", "8%", "--budget-by", "gradient", *text]
    report = must(*line, "--dry-run", "--json").json
    must(*line, "-o", tmp_path / "a", "-q")
    ranks = {site["name"]: site["rank"] for site in report["sites"]}
    assert {site: method.rank for site, method in AdapterFolder.open(tmp_path / "a").methods.items()} == ranks
    step = json.loads((tmp_path / "a" / "sparsity.provenance.json").read_text())["steps"][-1]
    assert step["settings"]["budget_by"] == "gradient"
    assert "calibration" in step["inputs"]

    from spp_fx.verbs.load import draw_windows, load_program
    from spp_fx.verbs.settings import Calibration

    program = load_program(pristine / "sparse").program.train(False)
    drawn = draw_windows(pristine / "sparse", program, Calibration(text_file, samples=4, seq_len=16))
    program(drawn.tokens, labels=drawn.tokens).loss.backward()
    norms = {name: float((p * p.grad).norm()) for name, p in program.named_parameters() if name in ranks}
    ordered = sorted(ranks, key=norms.__getitem__)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    shapes = {site["name"]: tuple(site["shape"]) for site in report["sites"]}
    for name in ordered:
        by_shape.setdefault(shapes[name], []).append(ranks[name])
    assert all(found == sorted(found) for found in by_shape.values())
    assert len(set(ranks.values())) > 1


def test_the_teacher_is_not_replaced(pristine, tmp_path):
    dense = shutil.copytree(pristine / "dense", tmp_path / "dense")
    options = f"--budget 9% --budget-by error --teacher {dense} -o {dense} --force"
    result = command("inject", pristine / "sparse", *options.split())
    assert result.code == 2
    assert "is the input" in result.err
    assert listing(dense) == listing(pristine / "dense")


@pytest.mark.parametrize("options", [{"init": "gradients"}, {"budget": "5%", "budget_by": "errors"}])
def test_a_word_that_is_not_a_choice_is_refused_in_python_too(options, pristine):
    with pytest.raises(UsageError, match="must be one of"):
        spp_fx.inject(pristine / "sparse", None, **options)
