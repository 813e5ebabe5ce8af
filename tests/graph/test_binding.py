"""Binding: the stored tensors of every site, and which part of it each one is."""

import pytest

from spp_fx.graph.binding import bind
from tests.passes.programs import sparse


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_a_checkpoint_with_the_models_own_names_binds_to_itself(family):
    model, program = sparse(family)
    binding = bind(model, program.sites, shapes(model))
    assert binding.refused == {}
    assert {name: [p.tensor for p in matrices] for name, matrices in binding.matrices.items()} == {
        name: [name] for name in program.sites
    }


def test_a_missing_prefix_is_found():
    model, program = sparse("gpt2")
    stored = {name.removeprefix("transformer."): shape for name, shape in shapes(model).items()}
    (matrix,) = bind(model, program.sites, stored).matrices["transformer.h.0.mlp.c_fc.weight"]
    assert (matrix.tensor, matrix.transposed, matrix.start, matrix.stop) == (
        "h.0.mlp.c_fc.weight",
        True,
        0,
        128,
    )


def test_experts_stored_one_by_one_tile_the_stack():
    model, program = sparse("mixtral")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {k: v for k, v in shapes(model).items() if ".experts." not in k}
    for layer in range(2):
        for expert in range(4):
            base = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            stored |= {f"{base}.w1.weight": (64, 32), f"{base}.w3.weight": (64, 32)}
            stored |= {f"{base}.w2.weight": (32, 64)}
    binding = bind(model, program.sites, stored)
    found = {(p.expert, p.start, p.stop, p.tensor.split(".")[-2]) for p in binding.matrices[name]}
    assert found == {(e, s, s + 64, w) for e in range(4) for s, w in ((0, "w1"), (64, "w3"))}


def test_another_shape_is_refused_with_both():
    model, program = sparse("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    refused = bind(model, program.sites, shapes(model) | {name: (65, 32)}).refused
    assert refused == {name: f"is stored as {name} of shape [65, 32], the model expects [64, 32]"}


def test_a_site_without_a_tensor_is_refused():
    model, program = sparse("llama")
    stored = shapes(model)
    del stored["model.layers.0.mlp.up_proj.weight"]
    refused = bind(model, program.sites, stored).refused
    assert refused == {"model.layers.0.mlp.up_proj.weight": "the checkpoint holds no tensor for it"}
