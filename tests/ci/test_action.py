"""action.yml: its steps, run by a shell under the variables that they define."""

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.ci.shell import ROOT, SITE, break_file, environment, shell, sparse_file

ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}


def inputs(**given: str) -> dict[str, str]:
    return {name: given.get(name, entry["default"]) for name, entry in ACTION["inputs"].items()}


def run_step(name: str, folder: Path, **given: str):
    """Run a step of the action with inputs, as the runner would: expressions only in `env`."""
    values = inputs(**given)
    step = STEPS[name]
    expand = {
        key: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda match: values[match[1]], text)
        for key, text in step["env"].items()
    }
    variables = environment(folder.parent / "bin", {"GITHUB_ACTION_PATH": str(ROOT), **expand})
    return shell(step["run"], folder, variables)


@pytest.fixture
def folder(tmp_path):
    sparse_file(tmp_path / "repo" / "model.safetensors")
    return tmp_path / "repo"


def test_no_script_holds_an_expression():
    scripts = [step["run"] for step in STEPS.values() if "run" in step]
    assert len(scripts) == 2
    assert all("${{" not in script for script in scripts)


def test_every_input_is_described_and_used():
    text = json.dumps(ACTION["runs"])
    for name, entry in ACTION["inputs"].items():
        assert entry["description"]
        assert f"inputs.{name}" in text


def test_a_model_that_holds_passes_and_leaves_reports(folder):
    ran = run_step("Verify", folder, artifact="model.safetensors", pattern="2:4")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("ok: safetensors model.safetensors")
    (suite,) = ElementTree.parse(folder / "spp-fx-junit.xml").getroot()
    assert suite.get("failures") == "0"
    assert json.loads((folder / "spp-fx.sarif").read_text())["runs"][0]["results"] == []


def test_a_model_that_does_not_fails_with_annotation_and_reports(folder):
    break_file(folder / "model.safetensors")
    ran = run_step("Verify", folder, artifact="model.safetensors", pattern="2:4", junit="r/j.xml")
    assert ran.returncode == 1
    assert "::error" in ran.stdout
    assert f"{SITE}" in ran.stdout
    (suite,) = ElementTree.parse(folder / "r" / "j.xml").getroot()
    assert suite.get("failures") == "1"
    assert len(json.loads((folder / "spp-fx.sarif").read_text())["runs"][0]["results"]) == 1


def test_lock_policy_and_more_options_reach_the_command(folder):
    words = "--require up_proj\n--allow-dense 'a name with blanks'"
    ran = run_step("Verify", folder, artifact="model.safetensors", pattern="2:4", args=words)
    assert ran.returncode == 0, ran.stderr
    assert run_step("Verify", folder, artifact="model.safetensors", lock="nowhere.json").returncode == 2
    assert run_step("Verify", folder, artifact="model.safetensors", policy="nowhere.toml").returncode == 2
    ran = run_step("Verify", folder, artifact="model.safetensors", args="--require nowhere")
    assert ran.returncode == 1
    assert "is named 'nowhere', which must be sparse" in ran.stdout


def options_of(folder: Path, args: str) -> list[str]:
    """What the step calls spp-fx with, for one of the words of `args` each."""
    variables = environment(
        folder.parent / "bin", {**dict.fromkeys(STEPS["Verify"]["env"], ""), "ARGS": args}
    )
    (folder.parent / "bin" / "spp-fx").write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    ran = shell(STEPS["Verify"]["run"], folder, variables)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split("\0")[len(["verify", "--github", "--junit", "", "--sarif", ""]) : -1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", []),
        ("--jobs 1", ["--jobs", "1"]),
        ("--require 'a\nb'", ["--require", "a\nb"]),
        ("--pattern ''", ["--pattern", ""]),
        ("'' x '' ''", ["", "x", "", ""]),
        ("'caf\u00e9 *' \\$HOME", ["caf\u00e9 *", "$HOME"]),
    ],
)
def test_words_of_args_arrive_as_a_shell_would_split_them(folder, args, words):
    assert options_of(folder, args) == words


def test_a_quote_that_is_never_closed_fails_the_step(folder):
    ran = run_step("Verify", folder, artifact="model.safetensors", pattern="2:4", args="--require 'up")
    assert ran.returncode != 0
    assert "No closing quotation" in ran.stderr


@pytest.mark.parametrize("name", ["artifact", "pattern", "lock", "against", "policy", "args", "junit"])
def test_no_input_can_become_a_command(folder, name):
    hostile = '"; touch pwned; $(touch pwned) `touch pwned` #'
    run_step("Verify", folder, **({"artifact": "model.safetensors", "pattern": "2:4"} | {name: hostile}))
    assert not (folder / "pwned").exists()


def test_an_artifact_that_looks_like_an_option_is_a_name(folder):
    ran = run_step("Verify", folder, artifact="--help")
    assert ran.returncode != 0


def test_files_of_the_caller_are_not_taken_for_pythons_own(folder):
    for name in ("shlex.py", "os.py", "numpy.py"):
        (folder / name).write_text("raise SystemExit('the caller ran code')")
    ran = run_step("Verify", folder, artifact="model.safetensors", pattern="2:4", args="--jobs 1")
    assert "the caller ran code" not in ran.stderr + ran.stdout


def test_the_installation_takes_the_actions_own_checkout_or_the_release_asked_for(folder):
    script = STEPS["Install spp-fx"]["run"]
    for version, wanted in (("", "."), ("0.1.0", "spp-fx==0.1.0")):
        bin_folder = folder.parent / f"bin{version}"
        variables = environment(bin_folder, {"GITHUB_ACTION_PATH": str(ROOT), "VERSION": version})
        (bin_folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
        lines = shell(script, folder, variables).stdout.splitlines()
        assert lines[0] == str(ROOT)
        assert lines[1:4] == shlex.split("-m pip install")
        assert lines[-1] == wanted
