"""An adapter whose matrices are not the base's tensors is refused before anything is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import command, one_line

Q, K, UP = (
    f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
)


@pytest.mark.parametrize(
    ("site", "matrix", "message"),
    [
        (Q, {"start": 4}, "rows 4 to"),
        (Q, {"start": -4}, "rows -4 to"),
        (UP, {"transposed": True}, "rows in the base"),
        (Q, {"whole": True}, "which is not a stack"),
        (Q, {"tensor": UP}, "is part of"),
        (Q, {"tensor": K}, "is part of"),
        (Q, {"expert": 0}, "expected [1, 4, 32]"),
        (Q, {"tensor": "model.layers.9.self_attn.q_proj.weight"}, "has no entry for"),
    ],
)
def test_a_stored_matrix_that_cannot_be_is_named(world, site, matrix, message):
    path = world / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["sites"][site][0] |= matrix
    path.write_text(json.dumps(config))
    result = command("merge", world / "adapter", "-o", world / "new", "-q")
    assert result.code == 1
    assert message in one_line(result.err)
    assert not (world / "new").exists()


def test_factors_of_another_floating_type_fold_to_the_same(world):
    """Half precision holds these factors exactly."""
    path = world / "adapter" / "adapter_model.safetensors"
    rounded = {name: value.bfloat16() for name, value in load_file(path).items()}
    for name, kind in (("one", torch.float32), ("two", torch.bfloat16)):
        save_file({key: value.to(kind) for key, value in rounded.items()}, path)
        assert command("merge", world / "adapter", "-o", world / name, "-q").code == 0
    one, two = (world / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
