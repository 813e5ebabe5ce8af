"""A model as one ONNX graph: named as the model names things, without its numbers."""

import pytest
import torch
from onnxruntime import InferenceSession
from transformers import AutoModelForCausalLM, BertConfig, BertModel, Lfm2Config
from transformers.modeling_outputs import CausalLMOutput

from spp_fx.errors import SppFxError
from spp_fx.exporters.onnx.graph_export import build_graph
from tests.exporters.onnx_files import axes
from tests.families import SMALL, VOCABULARY, make_model


@pytest.fixture(scope="module")
def llama():
    return build_graph(make_model("llama-tied", one_layer=True))


def test_batch_and_sequence_are_dynamic_and_named(llama):
    assert axes(llama.proto) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "sequence_length"],
        "logits": ["batch_size", "sequence_length", VOCABULARY],
    }


def test_hidden_states_have_the_axes_of_their_text():
    model = BertModel(BertConfig(**SMALL | {"num_hidden_layers": 1}, intermediate_size=64)).eval()
    assert axes(build_graph(model).proto)["last_hidden_state"] == ["batch_size", "sequence_length", 32]


def test_tied_weights_are_one_and_equal_weights_stay_apart(llama):
    names = [parameter.name for parameter in llama.parameters]
    assert len(names) == len(set(names))
    assert [p.name for p in llama.parameters if VOCABULARY in p.shape] == ["model.embed_tokens.weight"]
    norms = {f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")}
    assert norms <= set(names)  # both all ones


def test_no_number_nothing_printed_and_no_trace_of_the_machine_is_in_the_graph(llama, capfd):
    other = make_model("llama-tied", one_layer=True)
    for parameter in other.parameters():
        parameter.data.fill_(torch.nan)
    again = build_graph(other)
    first, second = (g.proto.SerializeToString(deterministic=True) for g in (llama, again))
    assert first == second
    assert llama.parameters == again.parameters
    assert not {t.name for t in llama.proto.graph.initializer} & {each.name for each in llama.parameters}
    assert capfd.readouterr().out == ""
    assert b".py" not in first


def test_training_mode_is_refused():
    with pytest.raises(SppFxError, match="training mode"):
        build_graph(make_model("llama").train())


def test_a_cache_that_is_no_keys_and_values_is_refused():
    config = Lfm2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    )
    with pytest.raises(SppFxError, match=r"keeps .* not keys and values alone.*without --with-past"):
        build_graph(AutoModelForCausalLM.from_config(config).eval(), with_past=True)


def with_forward(forward):
    model = make_model("llama", one_layer=True)
    model.forward = lambda input_ids, attention_mask, use_cache: CausalLMOutput(
        logits=forward(input_ids, attention_mask)
    )
    return model


def test_an_operator_without_onnx_form_is_named():
    table = torch.randn(VOCABULARY, 4, 4)
    model = with_forward(lambda ids, mask: torch.linalg.eigvalsh(table)[ids] * mask.unsqueeze(-1))
    with pytest.raises(SppFxError, match=r"no ONNX form.*eigh"):
        build_graph(model)


def test_complex_numbers_and_the_inverse_of_erf_have_onnx_forms():
    def forward(ids, mask):
        x = ids.unsqueeze(-1) * torch.linspace(-0.007, 0.007, 8)
        turn = torch.polar(torch.ones(4), torch.arange(4.0)).unsqueeze(0).unsqueeze(-2)
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn
        return torch.erfinv(torch.view_as_real(turned).flatten(-2)) * mask.unsqueeze(-1)

    graph = build_graph(with_forward(forward))
    ids = torch.arange(96).view(3, 32)
    session = InferenceSession(graph.proto.SerializeToString())
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
    expected = forward(ids, torch.ones_like(ids))
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_a_fixed_sequence_length_is_refused():
    model = with_forward(lambda ids, mask: (ids * mask + torch.arange(8)).unsqueeze(-1).float())
    with pytest.raises(SppFxError, match=r"fixes a size of its inputs|must stay dynamic"):
        build_graph(model)
