"""spp-fx.toml: artifacts and their requirements; errors name the file and the key."""

import json
import os
import shutil
from pathlib import Path

import pytest

from spp_fx.errors import UsageError
from spp_fx.sparsity.pattern import NM
from spp_fx.verification.policy import Overrides, Policy
from tests.command import command, must, one_line
from tests.handmade import lock_of, save, save_model, sparse

NAMES = [f"model.layers.{layer}.mlp.{word}_proj.weight" for layer in range(2) for word in ("up", "down")]


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """models/good and models/bad (one weight moved), with locks; the current folder."""
    tensors = {name: sparse(8, 16, seed=number) for number, name in enumerate(NAMES)}
    for folder in ("good", "bad"):
        save_model(tmp_path / "models" / folder, [tensors])
        (tmp_path / "models" / folder / "sparsity.lock.json").write_text(lock_of(tensors, NM(2, 4)).dumps())
    save_model(tmp_path / "models" / "bad", [tensors | {NAMES[0]: sparse(8, 16, seed=9)}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str) -> Path:
    path = Path("spp-fx.toml")
    path.write_text(text)
    return path


ONE = '[[verify.artifact]]\npath = "models/good"\n'
BOTH = ONE + '[[verify.artifact]]\npath = "models/bad"\n'


def test_all_artifacts_of_the_policy_are_checked(repository):
    write(BOTH)
    result = command("verify", "--json")
    assert result.code == 1
    assert result.json["ok"] is False
    found = {artifact["path"]: artifact["ok"] for artifact in result.json["artifacts"]}
    assert found == {"models/good": True, "models/bad": False}
    words = command("verify")
    assert words.code == 1
    assert "ok: model models/good: all 4 sites hold 2:4" in words.out
    assert f"FAIL models/bad: {NAMES[0]}" in words.out
    assert "policy: spp-fx.toml" in words.err


def test_a_byte_order_mark_is_skipped(repository):
    Path("spp-fx.toml").write_text(ONE, encoding="utf-8-sig")
    assert [check.path for check in Policy.find().checks()] == [Path("models/good")]


def test_one_artifact_keeps_the_form_of_one(repository):
    write(BOTH)
    result = must("verify", "models/good", "--json")
    assert "artifacts" not in result.json
    assert result.json["summary"]["ok"] == 4


def test_a_damaged_artifact_of_several_is_one_of_the_verdicts(repository):
    write(BOTH)
    (repository / "models" / "bad" / "sparsity.lock.json").write_text("{")
    result = command("verify", "--json")
    assert result.code == 1
    assert [artifact["ok"] for artifact in result.json["artifacts"]] == [True, False]
    words = command("verify")
    assert "FAIL models/bad: model: " in words.out
    assert "not ok: model models/bad" in words.out


def test_paths_are_relative_to_the_policy(repository, monkeypatch):
    write('[[verify.artifact]]\npath = "models/good"\nlock = "models/bad/sparsity.lock.json"\n')
    monkeypatch.chdir("models")
    check = Policy.load(Path("../spp-fx.toml")).checks()[0]
    assert check.lock is not None
    assert check.lock.resolve() == repository / "models" / "bad" / "sparsity.lock.json"
    must("verify", "--policy", "../spp-fx.toml")


def test_a_glob_names_several_artifacts_each_once(repository):
    write(ONE + '[[verify.artifact]]\npath = "models/*"\npattern = "1:4"\n')
    checks = Policy.find().checks()
    assert [(str(check.path), str(check.requirements.pattern)) for check in checks] == [
        ("models/good", "None"),
        ("models/bad", "1:4"),
    ]


def test_keys_of_an_artifact_replace_the_defaults(repository):
    write(
        '[verify]\npattern = "2:4"\nrequire = ["up_proj"]\nallow_dense = ["lm_head"]\n'
        '[[verify.artifact]]\npath = "models/good"\npattern = "50%"\nrequire = []\ncoverage = "all"\n'
        '[[verify.artifact.rule]]\nsites = ["down_proj"]\npattern = "4:8"\n'
    )
    (check,) = Policy.find().checks()
    requirements = check.requirements
    assert (str(requirements.pattern), requirements.require, requirements.coverage) == ("50%", (), "all")
    assert requirements.allow_dense == ("lm_head",)
    assert str(requirements.pattern_of(NAMES[1])) == "4:8"
    other = Policy.find().check(Path("models/bad")).requirements
    assert (str(other.pattern), other.require, other.rules) == ("2:4", ("up_proj",), ())


def test_options_replace_keys_and_a_pattern_applies_to_every_site(repository):
    write(ONE + 'allow_dense = ["a"]\n[[verify.artifact.rule]]\nsites = ["down_proj"]\npattern = "4:8"\n')
    lock = Path("other.json")
    (check,) = Policy.find().checks(Overrides(pattern="1:4", lock=lock, allow_dense=("b",)))
    assert str(check.requirements.pattern_of(NAMES[1])) == "1:4"
    assert (check.lock, check.requirements.allow_dense) == (lock, ("b",))


def test_the_entry_of_a_path_counts_however_it_is_spelt(repository):
    write(ONE + 'coverage = "all"\n')
    for path in ("models/good", "./models/../models/good", repository / "models" / "good"):
        check = Policy.find().check(Path(path))
        assert check.requirements.coverage == "all"
        assert check.path == Path(path)


def test_without_a_policy_the_current_folder_is_checked(repository, monkeypatch):
    monkeypatch.chdir("models/good")
    assert must("verify").out.startswith("ok: model .: all 4 sites")


def test_the_policy_of_the_current_folder_is_the_default_for_any_artifact(repository):
    save(Path("w.safetensors"), {"layers.0.weight": sparse(8, 16)})
    assert command("verify", "w.safetensors").code == 2
    write('[verify]\npattern = "2:4"\n')
    assert "hold 2:4" in must("verify", "w.safetensors").out
    write('[verify]\npattern = "1:4"\n')
    assert command("verify", "w.safetensors").code == 1


BAD = {
    "unknown table": ("[verfy]\n", "verfy: unknown key; known: verify"),
    "unknown key": ('[verify]\npatern = "2:4"\n', "verify.patern: unknown key; known: pattern, "),
    "unknown key of an artifact": (ONE + "cover = 1\n", "verify.artifact[0].cover: unknown key; known: "),
    "wrong type": ("[verify]\npattern = 24\n", "verify.pattern: "),
    "not a list": (ONE + 'allow_dense = "lm_head"\n', "verify.artifact[0].allow_dense: "),
    "no list of artifacts": ('[verify.artifact]\npath = "models/good"\n', "verify.artifact: "),
    "no pattern": ('[verify]\npattern = "5:4"\n', "verify.pattern: pattern 5:4"),
    "no coverage": (ONE + 'coverage = "some"\n', "verify.artifact[0].coverage: "),
    "no path": ("[[verify.artifact]]\n", "verify.artifact[0].path: "),
    "a rule for nothing": (ONE + '[[verify.artifact.rule]]\nsites = []\npattern = "2:4"\n', ".rule[0].sites: "),
    "the same path twice": (ONE + '[[verify.artifact]]\npath = "./models/good"\n', "two artifacts have the path"),
    "not TOML": ("[verify\n", "is not TOML"),
    "not text": ("\udcff", "is not TOML"),
    "no artifacts": ('[verify]\npattern = "2:4"\n', "names no artifact; add [[verify.artifact]]"),
    "empty": ("", "names no artifact; add [[verify.artifact]]"),
    "a path that is not there": ('[[verify.artifact]]\npath = "models/nope"\n', "'models/nope' does not exist"),
    "a glob that matches nothing": ('[[verify.artifact]]\npath = "out/*"\n', "'out/*' matches nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_policy_is_refused_with_file_and_key(repository, name):
    text, message = BAD[name]
    Path("spp-fx.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    result = command("verify", "--json", "-q")
    assert result.code == 2
    assert result.out == ""
    assert one_line(result.err).startswith("spp-fx: spp-fx.toml: ")
    assert message in result.err


def test_a_lock_is_not_given_for_several_artifacts(repository):
    write(BOTH)
    result = command("verify", "--lock", "models/good/sparsity.lock.json", "-q")
    assert result.code == 2
    assert "--lock takes one artifact" in one_line(result.err)


def test_a_folder_is_not_read_as_a_policy(repository):
    with pytest.raises(UsageError, match="is not a regular file"):
        Policy.load(repository)


def test_a_pipe_is_not_read_as_a_policy(repository):
    os.mkfifo("pipe")
    result = command("verify", "models/good", "--policy", "pipe", "-q")
    assert result.code == 2
    assert "pipe: is not a regular file" in one_line(result.err)


def test_a_policy_that_is_larger_than_any_is_not_read(repository):
    write("#" * (1 << 20) + "\n")
    with pytest.raises(UsageError, match="the limit is 1048576"):
        Policy.load(Path("spp-fx.toml"))


@pytest.mark.parametrize("break_", [lambda p: p.symlink_to("nowhere"), lambda p: p.mkdir(), os.mkfifo])
def test_a_broken_policy_is_not_ignored(repository, break_):
    break_(Path("spp-fx.toml"))
    result = command("verify", "models/good", "-q")
    assert result.code == 2
    assert one_line(result.err).startswith("spp-fx: spp-fx.toml: ")


@pytest.mark.parametrize("name", ["artifact", "policy", "rules"])
def test_an_empty_pattern_is_not_ignored(repository, name):
    texts = {"artifact": "", "policy": ONE + 'pattern = "2:4"\n', "rules": ONE}
    texts["rules"] += '[[verify.artifact.rule]]\nsites = ["down_proj"]\npattern = "4:8"\n'
    if name != "artifact":
        write(texts[name])
    result = command("verify", "models/good", "--pattern", "", "-q")
    assert result.code == 2
    assert "pattern" in one_line(result.err)


@pytest.mark.parametrize("glob", ["models/*", "models/**"])
def test_an_exact_path_takes_precedence_over_a_glob_above_it(repository, glob):
    write(f'[[verify.artifact]]\npath = "{glob}"\n' + ONE + 'pattern = "1:4"\n')
    asked = {str(check.path): str(check.requirements.pattern) for check in Policy.find().checks()}
    assert asked["models/good"] == "1:4"
    assert asked["models/bad"] == "None"
    assert str(Policy.find().check(Path("models/good")).requirements.pattern) == "1:4"


def test_an_artifact_under_two_names_is_refused(repository):
    Path("models/current").symlink_to("good")
    write(ONE + '[[verify.artifact]]\npath = "models/current"\npattern = "1:4"\n')
    for line in (["verify"], ["verify", "models/good"]):
        result = command(*line, "-q")
        assert result.code == 2
        assert "'models/good' and 'models/current' are the same artifact" in one_line(result.err)


def test_reports_hold_every_artifact(repository):
    write(BOTH)
    shutil.copytree("models/bad", "models/worse")
    write(BOTH + '[[verify.artifact]]\npath = "models/worse"\n')
    result = command("verify", "--junit", "r.xml", "--sarif", "r.sarif", "--github")
    assert result.code == 1
    assert Path("r.xml").read_text().count("<testsuite ") == 3
    run = json.loads(Path("r.sarif").read_text())["runs"][0]
    files = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in run["results"]}
    assert files == {"models/bad/model.safetensors", "models/worse/model.safetensors"}
    assert result.out.count("::error ") == 2
