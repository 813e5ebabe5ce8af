"""Which sites must be sparse: what is required, what may be dense, what the lock has to name."""

import json

import pytest

from spp_fx.verbs.verify import verify
from tests.command import command, must, rewrite

Q, UP, DOWN = (
    f"model.layers.0.{word}.weight" for word in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
)
DOWN_1 = "model.layers.1.mlp.down_proj.weight"


def leave_out(world, *names: str) -> None:
    """Take sites out of the lock of sparse/."""
    path = world / "sparse" / "sparsity.lock.json"
    lock = json.loads(path.read_text())
    lock["sites"] = [site for site in lock["sites"] if site["name"] not in names]
    path.write_text(json.dumps(lock))


def fill(world, *names: str) -> None:
    """Make weights of sparse/ dense."""
    rewrite(
        world / "sparse" / "model.safetensors", lambda values: [values[name].fill_(0.5) for name in names]
    )


def failures(verdict) -> dict[str, str]:
    return {site.name: site.findings[0].rule for site in verdict.failed}


@pytest.mark.parametrize("target", ["down_proj", "*mlp.down_proj*", DOWN, "mlp.down_proj"])
def test_a_required_site_that_is_dense_and_not_locked_fails(world, target):
    leave_out(world, DOWN)
    fill(world, DOWN)
    assert verify(world / "sparse").ok, "the lock does not speak of it"
    assert failures(verify(world / "sparse", require=[target])) == {DOWN: "dense-site"}


def test_what_is_required_and_sparse_holds(world):
    verdict = verify(world / "sparse", require=["down_proj", "*self_attn*"])
    assert verdict.ok
    assert len(verdict.sites) == 14


def test_without_a_lock_only_the_required_sites_are_checked(world):
    (world / "sparse" / "sparsity.lock.json").unlink()
    verdict = verify(world / "sparse", require=["down_proj"])
    assert verdict.ok
    assert [site.name for site in verdict.sites] == [DOWN, DOWN_1]


@pytest.mark.parametrize("target", ["dwn_proj", "*.experts.*", "model.layers.9.mlp.up_proj.weight"])
def test_a_required_name_that_matches_nothing_fails(world, target):
    result = command("verify", world / "sparse", "--require", target, "--json")
    assert result.code == 1
    assert target in result.json["problems"][0]
    assert result.json["summary"]["failed"] == 0


def test_a_matrix_that_is_not_a_site_can_be_required_by_name(world):
    assert failures(verify(world / "sparse", require=["lm_head"])) == {"lm_head.weight": "dense-site"}


def test_a_pattern_is_not_asked_of_what_may_be_dense(world):
    leave_out(world, DOWN, DOWN_1)
    fill(world, DOWN, DOWN_1)
    assert set(failures(verify(world / "sparse", pattern="2:4"))) == {DOWN, DOWN_1}
    verdict = verify(world / "sparse", pattern="2:4", allow_dense=["down_proj"])
    assert verdict.ok
    assert verdict.allowed_dense == (DOWN, DOWN_1)
    result = must("verify", world / "sparse", "--pattern", "2:4", "--allow-dense", "down_proj")
    assert "all 12 sites hold 2:4" in result.out
    assert "2 allowed to be dense" in result.out


def test_a_lock_holds_also_for_what_may_be_dense(world):
    fill(world, DOWN)
    assert set(failures(verify(world / "sparse", allow_dense=["down_proj"]))) == {DOWN}


def test_to_be_allowed_is_an_exception_from_what_is_required(world):
    leave_out(world, DOWN_1)
    fill(world, DOWN_1)
    assert verify(world / "sparse", require=["down_proj"], allow_dense=["model.layers.1.*"]).ok


def test_all_of_the_model_must_be_in_the_lock(world):
    assert verify(world / "sparse", coverage="all").ok
    leave_out(world, DOWN, UP)
    fill(world, DOWN)
    verdict = verify(world / "sparse", coverage="all")
    assert failures(verdict) == {DOWN: "dense-site", UP: "dense-site"}
    dense, unlocked = (site.reason or "" for site in verdict.failed)
    assert "is dense (0.00% zeros), and the lock does not name it" in dense
    assert "holds 2:4, and the lock does not name it" in unlocked
    assert command("verify", world / "sparse", "--coverage", "all").code == 1
    must(
        "verify",
        world / "sparse",
        "--coverage",
        "all",
        "--allow-dense",
        "up_proj",
        "--allow-dense",
        "down_proj",
    )


def test_without_a_lock_all_of_the_model_must_be_sparse(world):
    (world / "sparse" / "sparsity.lock.json").unlink()
    assert verify(world / "sparse", coverage="all").ok
    fill(world, Q)
    assert failures(verify(world / "sparse", coverage="all")) == {Q: "dense-site"}


def test_a_weight_of_the_lock_that_is_missing_fails(world):
    rewrite(world / "sparse" / "model.safetensors", lambda values: values.pop(DOWN))
    verdict = verify(world / "sparse")
    assert failures(verdict) == {DOWN: "missing-weight"}


def test_the_first_rule_that_names_a_site_applies(world):
    rules = [(["model.layers.0.mlp.down_proj"], "1:2"), (["down_proj"], "4:8")]
    verdict = verify(world / "sparse", pattern="2:4", rules=rules)
    patterns = {site.name: site.pattern for site in verdict.sites}
    assert (patterns[DOWN], patterns[DOWN_1], patterns[UP]) == ("1:2", "4:8", "2:4")
    assert failures(verdict) == {DOWN: "pattern-broken"}
    assert verdict.pattern is None


def test_a_rule_that_names_nothing_fails(world):
    verdict = verify(world / "sparse", pattern="2:4", rules=[(["dwn_proj"], "4:8")])
    assert not verdict.ok
    assert "dwn_proj" in verdict.problems[0]
