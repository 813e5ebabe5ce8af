"""docs/verify.md says what there is: its policy is read, its tables name every option, key, rule and field."""

import re
from pathlib import Path

from spp_fx.verification.policy import ArtifactTable, Policy, VerifyTable
from spp_fx.verification.verdict import RULES
from tests.command import must
from tests.handmade import save, sparse

PAGE = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()


def test_every_option_is_on_the_page_and_in_the_help():
    synopsis = PAGE.split("```")[1]
    known = set(re.findall(r"--[a-z-]+", must("verify", "--help").out)) - {"--help"}
    assert set(re.findall(r"--[a-z-]+", synopsis)) | {"--quiet"} == known


def test_the_policy_of_the_page_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "spp-fx.toml").write_text(text)
    for name in ("models/my-model", "exports/one", "exports/two"):
        (tmp_path / name).mkdir(parents=True)
    first, *exports = Policy.load(tmp_path / "spp-fx.toml").checks()
    assert (first.lock, first.against) == (tmp_path / "models/my-model.lock.json", tmp_path / "models/base")
    assert str(first.requirements.pattern_of("model.layers.0.mlp.down_proj.weight")) == "4:8"
    assert [check.path.name for check in exports] == ["one", "two"]


def test_every_rule_and_every_field_is_on_the_page(tmp_path):
    save(tmp_path / "w.safetensors", {"layers.0.weight": sparse(8, 16)})
    data = must("verify", tmp_path / "w.safetensors", "--pattern", "2:4", "--json").json
    for word in (*RULES, *data, *data["sites"][0], *data["summary"]):
        assert f"`{word}`" in PAGE, word


def test_every_key_of_the_policy_is_on_the_page():
    for table in (VerifyTable, ArtifactTable):
        for key in table.model_fields:
            assert f"`{key}`" in PAGE or f"[[verify.{key}]]" in PAGE, key
