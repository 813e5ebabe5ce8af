"""Binding: the stored tensors of every site, and which part of it each one is."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from spp_fx.graph.binding import Parameter, assemble, bind, take_apart
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


@pytest.mark.parametrize(
    ("model_type", "options", "parameter", "stored"),
    [
        # rows of one stored matrix are those of several linears
        ("hrm_text", {"intermediate_size": 64}, "L_module.layers.0.mlp.up_proj", "mlp.gate_up_proj"),
        # one kernel is stored as three
        ("kimi_linear", {"layer_types": ["linear_attention"]}, "layers.0.self_attn.conv1d", "q_conv1d"),
    ],
)
def test_tensors_that_are_stored_together_or_in_parts(model_type, options, parameter, stored, tmp_path):
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **small | options)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(stored in name for name in tensors)
    state = model.state_dict()
    slots = {name: Parameter(name, tuple(value.shape)) for name, value in state.items()}
    binding = bind(model, slots, {name: tuple(value.shape) for name, value in tensors.items()})
    assert binding.refused == {}
    assert f"model.{parameter}.weight" in binding.matrices
    rebuilt = {name: torch.full_like(value, torch.nan) for name, value in tensors.items()}
    for name, matrices in binding.matrices.items():
        assert torch.equal(assemble(matrices, slots[name].shape, tensors.__getitem__), state[name])
        for matrix, part in take_apart(matrices, state[name]):
            rebuilt[matrix.tensor][matrix.held] = part
    assert all(torch.equal(rebuilt[name], value) for name, value in tensors.items())


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


def test_a_tied_weight_that_one_layer_uses_is_found_under_its_first_name():
    model, program = sparse("llama")
    first, second = (f"model.layers.{n}.mlp.up_proj.weight" for n in range(2))
    model.get_submodule("model.layers.1.mlp.up_proj").weight = model.get_parameter(first)
    stored = {name: shape for name, shape in shapes(model).items() if name != second}
    both = bind(model, program.sites, stored)
    assert both.matrices[first][0].tensor == first
    assert set(both.refused) == {second}  # of two sites it is the one that has the name
    alone = bind(model, {second: program.sites[second]}, stored)
    assert alone.matrices[second][0].tensor == first
