"""docs/ci.md: every block of it is parsed, and every command that it shows is run."""

import contextlib
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.ci.shell import ROOT, break_file, environment, shell, sparse_file
from tests.command import must, rewrite
from tests.families import make_model, prune_2_4

PAGE = (ROOT / "docs" / "ci.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def scripts() -> list[str]:
    """The verify commands of all CI configurations on the page."""
    found: list[str] = []
    for text in blocks("yaml"):
        data = yaml.safe_load(text)
        steps = [step for job in data.get("jobs", {}).values() for step in job["steps"]]
        found += [step["run"] for step in steps if "run" in step]
        found += data.get("sparsity", {}).get("script", [])
    return [script for script in found if not script.startswith("pip ")]


def run_block(script: str, folder: Path) -> None:
    """Run a block line by line; spp-fx in this process, which has imported torch already."""
    with contextlib.chdir(folder):
        for line in script.splitlines():
            words = shlex.split(line)
            if words[0] == "spp-fx":
                must(*words[1:], "-q")
            else:
                ran = shell(line, folder, environment(folder.parent / "bin"))
                assert ran.returncode == 0, line + ran.stderr


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository with a 2:4 model, after the commands of the page's first section."""
    folder = tmp_path_factory.mktemp("ci") / "repo"
    model = make_model("llama")
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            prune_2_4(parameter)
    model.save_pretrained(folder / "models" / "my-model")
    subprocess.run(["git", "init", "-q", folder], check=True)
    (folder / "spp-fx.toml").write_text(blocks("toml")[0])
    run_block(blocks("sh")[0], folder)
    return folder


@pytest.fixture
def small(tmp_path):
    """A repository whose policy names a single file: checked without tracing a model."""
    sparse_file(tmp_path / "repo" / "m.safetensors")
    policy = '[verify]\npattern = "2:4"\n[[verify.artifact]]\npath = "m.safetensors"\n'
    (tmp_path / "repo" / "spp-fx.toml").write_text(policy)
    return tmp_path / "repo"


def test_every_block_is_of_a_kind_that_is_tested():
    assert {kind for kind, _ in BLOCKS} == {"sh", "toml", "yaml", "make", "python", "text"}


def test_every_shell_block_runs(repository):
    for script in blocks("sh")[1:]:
        run_block(script, repository)


def test_every_server_runs_the_check_and_fails_with_it(small):
    assert len(scripts()) == 2
    variables = environment(small.parent / "bin")
    for expected in (0, 1):
        for script in scripts():
            ran = shell(script, small, variables)
            assert ran.returncode == expected, script + ran.stderr
            assert (small / "report.xml").is_file()
            (small / "report.xml").unlink()
        break_file(small / "m.safetensors")


def test_the_makefile_releases_only_what_holds(small):
    (small / "Makefile").write_text(blocks("make")[0])
    variables = environment(small.parent / "bin")
    assert "every mask holds" in shell("make release", small, variables).stdout
    break_file(small / "m.safetensors")
    ran = shell("make release", small, variables)
    assert ran.returncode != 0
    assert "every mask holds" not in ran.stdout


def test_the_toml_says_what_the_page_says():
    (artifact,) = tomllib.loads(blocks("toml")[0])["verify"]["artifact"]
    assert artifact["path"] == "models/my-model"


def test_the_action_is_given_only_inputs_that_it_has():
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    steps = [
        step
        for text in blocks("yaml")
        for job in yaml.safe_load(text).get("jobs", {}).values()
        for step in job["steps"]
        if "spp-fx@" in step.get("uses", "")
    ]
    assert steps
    assert all(step["with"].keys() <= action["inputs"].keys() for step in steps)
    outputs = set(re.findall(r"steps\.sparsity\.outputs\.(\w+)", PAGE))
    assert outputs <= action["outputs"].keys()


def test_the_hook_of_the_page_is_the_hook_of_the_repository():
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    named = [
        entry["id"]
        for text in blocks("yaml")
        for repo in yaml.safe_load(text).get("repos", [])
        for entry in repo["hooks"]
    ]
    assert named == [hook["id"]]


def test_the_program_fails_for_a_broken_model_in_the_words_of_the_page(repository, capsys):
    broken = repository.parent / "broken"
    shutil.copytree(repository, broken)

    def flip(values):
        weight = values["model.layers.0.mlp.up_proj.weight"]
        weight[3, int((weight[3] == 0).nonzero()[0])] = 1.0

    rewrite(broken / "models" / "my-model" / "model.safetensors", flip)
    with contextlib.chdir(broken), pytest.raises(SystemExit) as ended:
        exec(compile(blocks("python")[0], "check.py", "exec"), {})
    assert ended.value.code == 1
    told = capsys.readouterr().out
    for words in ("row 3, column", "zero in the lock, non-zero now", "it changed afterwards"):
        assert words in told
        assert words in PAGE


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (Path(ROOT / "docs") / target).is_file(), target
