"""A single changed zero among all weights is found, named and counted."""

import json
from pathlib import Path

import pytest
import torch

from tests.command import command, rewrite, tensors

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


def file_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor."""
    index = folder / "model.safetensors.index.json"
    return folder / (
        json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    )


def place_of(weight: torch.Tensor, zero: bool) -> tuple[int, int]:
    """A late (row, column) that is zero, or is not."""
    row, column = ((weight == 0) == zero).nonzero()[-7].tolist()
    return row, column


@pytest.mark.parametrize("model", ["sparse", "half", "merged", "sharded"])
@pytest.mark.parametrize("name", [Q, DOWN])
def test_a_zero_that_became_a_value_is_named(world, model, name):
    folder = world / model
    row, column = place_of(tensors(folder)[name], zero=True)
    rewrite(file_of(folder, name), lambda values: values[name].__setitem__((row, column), 1e-30))
    result = command("verify", folder, "--lock", folder / "sparsity.lock.json")
    assert result.code == 1
    (line,) = [line for line in result.out.splitlines() if line.startswith("FAIL")]
    assert name in line
    assert f"row {row}, column {column}: zero in the lock, non-zero now" in line
    site = next(s for s in command("verify", folder, "--json").json["sites"] if not s["ok"])
    assert (site["name"], site["lost_zeros"], site["new_zeros"], site["mask_equal"]) == (name, 1, 0, False)
    assert site["violations"] == 1


def test_a_zero_flipped_in_a_group_with_room_breaks_the_mask_but_not_the_pattern(world):
    path = world / "sparse" / "model.safetensors"
    rewrite(path, lambda values: values[Q].__setitem__((3, slice(8, 12)), 0.0))
    (world / "again").mkdir()
    assert command("verify", world / "sparse", "--pattern", "2:4").code == 1, "two non-zeros are gone"
    (world / "sparse" / "sparsity.lock.json").unlink()
    assert command("inject", world / "sparse", "-o", world / "roomy", "--rank", 4).code == 0
    rewrite(path, lambda values: values[Q].__setitem__((3, 9), 0.5))
    result = command("verify", path, "--lock", world / "roomy" / "sparsity.lock.json", "--json")
    assert result.code == 1
    site = next(s for s in result.json["sites"] if not s["ok"])
    assert (site["name"], site["lost_zeros"], site["new_zeros"], site["violations"]) == (Q, 1, 0, 0)
    assert "row 3, column 9" in site["reason"]


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_a_value_that_became_a_zero_is_named(world, value):
    folder = world / "merged"
    row, column = place_of(tensors(folder)[DOWN], zero=False)
    rewrite(folder / "model.safetensors", lambda values: values[DOWN].__setitem__((row, column), value))
    result = command("verify", folder, "--json")
    assert result.code == 1
    site = next(s for s in result.json["sites"] if not s["ok"])
    assert (site["name"], site["lost_zeros"], site["new_zeros"], site["violations"]) == (DOWN, 0, 1, 0)
    assert f"row {row}, column {column}" in site["reason"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_fails_although_the_mask_is_equal(world, value):
    row, column = place_of(tensors(world / "merged")[Q], zero=False)
    path = world / "merged" / "model.safetensors"
    rewrite(path, lambda values: values[Q].__setitem__((row, column), value))
    result = command("verify", world / "merged")
    assert result.code == 1
    assert f"first at row {row}, column {column}" in result.out


def test_against_another_artifact_both_directions_are_counted(world):
    row, column = place_of(tensors(world / "merged")[Q], zero=True)
    path = world / "merged" / "model.safetensors"
    rewrite(path, lambda values: values[Q].__setitem__((row, column), 1.0))
    forth = command("verify", world / "merged", "--against", world / "sparse", "--json").json
    back = command("verify", world / "sparse", "--against", world / "merged", "--json").json
    found = [next(s for s in data["sites"] if not s["ok"]) for data in (forth, back)]
    assert [(s["lost_zeros"], s["new_zeros"]) for s in found] == [(1, 0), (0, 1)]


def test_a_damaged_export_is_refused(world):
    rewrite(
        world / "packed" / "packed.safetensors", lambda values: values[f"{Q}.values"].__setitem__((1, 1), 9.0)
    )
    result = command("verify", world / "packed")
    assert result.code == 1
    assert "packed.safetensors" in result.err
    assert "SHA-256" in result.err
