"""partition and checkpoint: one unit a decoder layer, less memory kept, the same gradients."""

import copy
import pickle

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from spp_fx.errors import PreconditionError
from spp_fx.graph.names import layer_of
from spp_fx.graph.outline import outline
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.fold_adapters import Fold
from spp_fx.passes.partition import Checkpoint, Partition
from spp_fx.passes.pipeline import run_pipeline
from tests.families import SPREAD, batch
from tests.passes.programs import adapted, canonical, loss_of


@pytest.mark.parametrize("family", SPREAD)
def test_a_unit_is_a_decoder_layer(family):
    program = canonical(family)
    (report,) = run_pipeline(program, [Partition()])
    layers = {site.layer for site in program.sites.values() if site.layer is not None}
    assert len(program.units) == len(layers) > 1
    assert list(report.changed) == program.units
    assert {site.name for site in program.sites.values() if site.name.startswith(tuple(layers))} == {
        site.name for site in program.sites.values() if site.layer is not None
    }


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.encoder.layers.3.fc1.weight", "model.encoder.layers.3"),
        ("model.decoder.layers.3.fc1.weight", "model.decoder.layers.3"),
        ("model.layers.10.mlp.experts.2.w1.weight", "model.layers.10"),
        ("lm_head.weight", None),
        ("model.alphas.5", None),
    ],
)
def test_a_layer_is_the_path_up_to_its_number(name, layer):
    assert layer_of(name) == layer


class Autoencoder(BartForConditionalGeneration):
    """BART that decodes the tokens it encodes, so that it is called with one text."""

    def forward(self, input_ids, attention_mask, use_cache=False):
        return super().forward(input_ids, attention_mask, decoder_input_ids=input_ids, use_cache=use_cache)


def test_layers_of_encoder_and_decoder_do_not_collide():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=128, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, dropout=0.0,
    )  # fmt: skip
    config.is_encoder_decoder = False
    model = Autoencoder(config).eval()
    layers = [f"model.{part}.layers.{i}" for part in ("decoder", "encoder") for i in (0, 1)]
    program = trace(model)
    (_, report) = run_pipeline(program, [Canonicalize(), Partition()])
    assert program.units == list(report.changed) == layers
    linears = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    inside = {name: site.layer for name, site in program.sites.items() if site.layer is not None}
    assert inside == {name: name[: len(layers[0])] for name in linears - {"lm_head.weight"}}
    assert {name: site.layer for name, site in outline(model, "").sites.items() if site.layer} == inside
    run_pipeline(program, [Checkpoint()])
    assert torch.equal(program(batch()).logits, model(batch(), torch.ones_like(batch())).logits)


def gradients(program, ids) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    program.train()
    program.zero_grad()
    loss_of(program, ids).backward()
    return {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}


def kept_bytes(program, ids) -> int:
    """Bytes of all that a step keeps for backward, less the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in program.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    program.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(program, ids)
    return sum(sizes.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", SPREAD)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(family, dropout):
    plain = adapted(canonical(family), dropout=dropout)
    for p in plain.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.2)
    light = copy.deepcopy(plain)
    run_pipeline(light, [Partition(), Checkpoint()])
    ids = batch(4, 24)
    expected, got = gradients(plain, ids), gradients(light, ids)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    assert kept_bytes(light, ids) < 0.7 * kept_bytes(plain, ids)


def test_evaluation_and_fold_are_as_without():
    plain = adapted(canonical("llama"))
    light = copy.deepcopy(plain)
    run_pipeline(light, [Partition(), Checkpoint()])
    ids = batch()
    assert torch.equal(light.eval()(ids).logits, plain.eval()(ids).logits)
    assert light.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(copy.deepcopy(light)(ids).logits, plain(ids).logits)
    read = pickle.loads(pickle.dumps(light))
    assert torch.equal(read(ids).logits, plain(ids).logits)
    assert kept_bytes(read, ids) == kept_bytes(light, ids) < kept_bytes(plain, ids)
    light.eval()
    plain.eval()
    run_pipeline(light, [Fold()])
    run_pipeline(plain, [Fold()])
    assert torch.equal(light(ids).logits, plain(ids).logits)


def test_order_is_asked_for():
    with pytest.raises(PreconditionError, match="run partition first"):
        run_pipeline(canonical("llama"), [Checkpoint()])
    with pytest.raises(PreconditionError, match="checkpointed already"):
        run_pipeline(canonical("llama"), [Partition(), Checkpoint(), Checkpoint()])
