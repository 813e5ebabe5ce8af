"""What the commands print: help, JSON, reports, defaults."""

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import spp_fx
from spp_fx.adapters.method import METHODS
from spp_fx.adapters.spp import SPP
from spp_fx.cli import cli
from spp_fx.console import Output
from spp_fx.verbs.settings import (
    EvaluateSettings,
    InjectSettings,
    LockSettings,
    MergeSettings,
    PruneSettings,
    ReconstructSettings,
    TeachSettings,
)
from tests.command import command, must

# Table 1 of the SPP paper: hidden, intermediate, layers, heads, key-value heads -> parameters, per mille.
TABLE_1 = {
    "LLaMA 7B": ((4096, 11008, 32, 32, 32), 2.0e7, 2.90),
    "LLaMA-2 70B": ((8192, 28672, 80, 64, 8), 1.1e8, 1.54),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_a_dry_run_counts_what_the_paper_counts(name, tmp_path):
    (hidden, intermediate, layers, heads, kv), parameters, per_mille = TABLE_1[name]
    # Every layer adds as much; outside of them are two tables of the vocabulary and a norm.
    one = dry_run(tmp_path, hidden, intermediate, 1, heads, kv)
    outside = 2 * 32000 * hidden + hidden
    trained = layers * one["trainable_parameters"]
    total = outside + layers * (one["total_parameters"] - outside)
    assert 1000 * trained / total == pytest.approx(per_mille, abs=0.01)
    assert trained == pytest.approx(parameters, rel=0.05)
    assert len(one["sites"]) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def dry_run(folder: Path, hidden: int, intermediate: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": 32000,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return command("inject", folder, "--dry-run", "--json").json


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_help_text_shows_an_example(name):
    ran = command(name, "--help")
    assert ran.code == 0
    assert f"spp-fx {name}" in ran.out.split("\n\n", 1)[1]


@pytest.mark.parametrize(
    ("verb", "settings"),
    [
        ("prune", PruneSettings),
        ("inject", InjectSettings),
        ("reconstruct", ReconstructSettings),
        ("merge", MergeSettings),
        ("lock", LockSettings),
        ("evaluate", EvaluateSettings),
        ("teach", TeachSettings),
    ],
)
def test_the_options_of_a_verb_are_its_keyword_arguments(verb, settings):
    parameters = inspect.signature(getattr(spp_fx, verb)).parameters
    for each in fields(settings):
        default = parameters[each.name].default
        assert each.default is MISSING or default in (each.default, inspect.Parameter.empty), each.name


def test_the_options_of_a_method_reach_the_command_line(monkeypatch):
    @dataclass(frozen=True)
    class Mirror(SPP):
        power: int = field(default=2, metadata={"help": "of the mirror"})

    monkeypatch.setitem(METHODS, "mirror", Mirror)
    shown = " ".join(command("inject", "--help").out.split())
    assert "--power [NAME@]INTEGER mirror: of the mirror [default: 2]" in shown
    refused = command("inject", "nowhere", "--power", "3")
    assert refused.code == 2
    assert "spp has no option power" in refused.err
    assert "mirror has it" in refused.err
    own = " ".join(command("inject", "--method=mirror", "--help").out.split())
    assert "--power [NAME@]INTEGER of the mirror [default: 2]" in own
    assert "--rank [NAME@]" not in command("inject", "--method", "masked-full", "--help").out
    assert "[default: 16 (spp, lora-star, lors, mirror, scale-lora), 32 (hira, sqft)]" in shown


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "spp_fx", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("spp-fx")


def test_folders_default_to_the_current_one(pristine, tmp_path, monkeypatch):
    shutil.copytree(pristine / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path / "adapter")
    assert must("merge", "--verify-sparsity", "-q").out.startswith("../adapter-merged: ")
    assert "spp-fx: ../adapter-merged: exists;" in command("merge").err
    monkeypatch.chdir(tmp_path / "adapter-merged")
    assert command("verify").out.startswith("ok: model")


def test_a_long_run_without_a_terminal_says_how_far_it_is(monkeypatch, capsys):
    with Output().steps_bar("pruning") as bar, Output().bytes_bar("folding") as tick:
        bar.update(1, 40, "layer 1")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr("spp_fx.console.SECONDS_BETWEEN_LINES", 0)
        bar.update(2000, 4000, "layer 2")
        assert capsys.readouterr().err == "pruning: 2,000 of 4,000, layer 2\n"
        tick("a.weight", 3_000_000)
        assert capsys.readouterr().err == "folding: 3.00 MB, a.weight\n"


def test_verify_writes_junit_and_annotations(pristine, tmp_path):
    ran = command(
        "verify", pristine / "sparse", "--pattern", "1:4", "--junit", tmp_path / "r.xml", "--github"
    )
    assert ran.code == 1
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    assert suite.get("failures") == suite.get("tests") == str(len(suite))
    assert len(suite) == 14
    assert ran.out.count("::error title=") == 10  # GitHub shows no more; the last one counts the rest


def test_verify_against_another_artifact_counts_what_differs(pristine):
    same = command("verify", pristine / "adapter", "--against", pristine / "sparse", "--json").json
    assert same["kind"] == "adapter"
    assert same["ok"] is True
    other = command("verify", pristine / "half", "--against", pristine / "sparse", "--json").json
    assert other["ok"] is False
    assert all(site["lost_zeros"] > 0 and site["mask_equal"] is False for site in other["sites"])


def test_inspect_says_what_would_be_matched_and_why_not(pristine):
    report = command("inspect", pristine / "sparse", "--json").json
    by_name = {site["name"]: site for site in report["sites"]}
    assert by_name["lm_head.weight"]["matched"] is False
    assert "logits" in by_name["lm_head.weight"]["reason"]
    assert by_name["model.layers.0.self_attn.q_proj.weight"]["pattern"] == "2:4"
    assert report["matched"] == 14


def test_opt_prints_the_program_after_every_pass(pristine):
    pipeline = "canonicalize,match{targets=q_proj},inject{rank=4},lower{kernel=fused}"
    ran = command("opt", pristine / "sparse", "-p", pipeline, "--print-after-all")
    assert ran.code == 0
    assert ran.out.count("program llama") == 4
    assert ran.out.count("spp_fx.spp_linear(") == 2
    assert ran.out.count("spp_fx.spp_linear_fused(") == 2


def test_the_vanish_policies_do_what_they_say(pristine, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(pristine / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    site = "model.layers.0.self_attn.q_proj.weight"
    tensors[f"{site}.spp_alpha"].fill_(0.5)
    tensors[f"{site}.spp_beta"][3] = -1.0
    save_file(tensors, path)

    def merge(policy: str) -> tuple[int, Path]:
        out = tmp_path / policy
        ran = command("merge", tmp_path / "adapter", "-o", out, "--vanish", policy, "-q")
        return ran.code, out

    assert merge("error")[0] == 1
    assert not (tmp_path / "error").exists()
    assert merge("keep")[0] == 0
    assert merge("allow")[0] == 0
    rows = {}
    for policy in ("keep", "allow"):
        index = json.loads((tmp_path / policy / "model.safetensors.index.json").read_text())
        rows[policy] = load_file(tmp_path / policy / index["weight_map"][site])[site][3]
    assert int((rows["keep"] != 0).sum()) == 16
    assert int((rows["allow"] != 0).sum()) == 0
    assert command("verify", tmp_path / "allow").code == 0
