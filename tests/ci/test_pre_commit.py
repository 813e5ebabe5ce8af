""".pre-commit-hooks.yaml: which files start the hook, and its entry as pre-commit runs it."""

import re

import pytest
import yaml

from tests.ci.shell import ROOT, break_file, environment, shell, sparse_file

(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("models/a/model-00001-of-00002.safetensors", True),
        ("a/sparsity.lock.json", True),
        ("locks/a.lock.json", True),
        ("a/model.safetensors.index.json", True),
        ("a/model.onnx", True),
        ("a/model.onnx.data", True),
        ("spp-fx.toml", True),
        ("a/export.json", True),
        ("README.md", False),
        ("a/config.json", True),
        ("a/adapter_config.json", True),
        ("config.json", True),
        ("tsconfig.json", False),
        ("a/generation_config.json", False),
        ("package-lock.json", False),
        ("safetensors.py", False),
    ],
)
def test_weights_and_their_requirements_start_the_hook(name, starts):
    assert bool(re.search(HOOK["files"], name)) is starts


def test_the_entry_fails_a_commit_that_breaks_what_the_policy_names(tmp_path):
    repo = tmp_path / "repo"
    model = sparse_file(repo / "models" / "m.safetensors")
    (repo / "spp-fx.toml").write_text('[[verify.artifact]]\npath = "models/m.safetensors"\npattern = "2:4"\n')
    assert HOOK["pass_filenames"] is False
    variables = environment(tmp_path / "bin")
    assert shell(HOOK["entry"], repo, variables).returncode == 0
    break_file(model)
    ran = shell(HOOK["entry"], repo, variables)
    assert ran.returncode == 1
    assert "row 3" in ran.stdout


def test_the_hook_is_a_command_of_the_package():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert HOOK["language"] == "python"
    assert HOOK["entry"].split()[0] in scripts
