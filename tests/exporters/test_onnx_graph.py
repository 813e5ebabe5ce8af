"""A causal language model as one ONNX graph: same logits, weights under their own names."""

import onnx
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from spp_fx.errors import SppFxError
from spp_fx.exporters.onnx_check import compare_logits
from spp_fx.exporters.onnx_graph import WeightLocation, build_onnx, locate
from spp_fx.exporters.onnx_sparse import save

VOCAB = 97
LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCAB, n_positions=64, **TOKENS)
FALCON = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB, **TOKENS)
MIXTRAL = MixtralConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    num_local_experts=4,
)


def tiny(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **options: str) -> nn.Module:
    """A random model whose linear weights are 2:4 along their input dimension."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()
    model.config.use_cache = False
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "emb" not in name and "wte" not in name and "wpe" not in name:
                along = weight.T if isinstance(config, GPT2Config) else weight
                along[:, 0::4] = 0
                along[:, 3::4] = 0
    return model


def logits_of(model: nn.Module):
    return lambda input_ids, attention_mask: model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param(LLAMA, {}, id="llama-tied"),
        pytest.param(GPT2, {}, id="gpt2-conv1d"),
        pytest.param(FALCON, {}, id="falcon-permute-matmul"),
        pytest.param(MIXTRAL, {"experts_implementation": "batched_mm"}, id="mixtral-batched"),
        pytest.param(MIXTRAL, {"experts_implementation": "grouped_mm"}, id="mixtral-grouped"),
    ],
)
def test_the_graph_gives_the_same_logits_and_every_weight_is_found_as_stored(tmp_path, config, options):
    model = tiny(config, **options)
    exported = build_onnx(model)

    onnx.checker.check_model(exported, full_check=True)
    save(exported, tmp_path / "model.onnx")
    comparison = compare_logits(tmp_path / "model.onnx", logits_of(model), VOCAB, tolerance=1e-5)
    assert comparison.argmax_agreement == 1

    parameters = dict(model.named_parameters(remove_duplicate=False))
    locations = locate(exported, model)
    assert set(locations) == set(parameters)
    assert not any(location.transposed for location in locations.values())
    first_names = {id(tensor): name for name, tensor in reversed(parameters.items())}
    assert all(loc.initializer == first_names[id(parameters[name])] for name, loc in locations.items())
    names = [tensor.name for tensor in exported.graph.initializer]
    assert len(names) == len(set(names))


@pytest.fixture(scope="module")
def llama():
    model = tiny(LLAMA)
    return model, build_onnx(model)


def test_batch_and_sequence_are_dynamic_and_named(llama):
    _, exported = llama
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*exported.graph.input, *exported.graph.output]
    }
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "logits": ["batch", "sequence", VOCAB],
    }


def test_tied_weights_are_stored_once(llama):
    _, exported = llama
    vocabulary_sized = [t.name for t in exported.graph.initializer if VOCAB in t.dims]
    assert vocabulary_sized == ["model.embed_tokens.weight"]


def test_equal_weights_of_different_layers_stay_apart(llama):
    names = {tensor.name for tensor in llama[1].graph.initializer}
    assert {f"model.layers.{i}.input_layernorm.weight" for i in range(2)} <= names  # both all ones


def test_a_module_traced_before_exports_as_well(tmp_path):
    model = tiny(GPT2)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits

    example = {name: torch.ones(2, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    traced = torch.export.unflatten(
        torch.export.export(Plain(), (), kwargs=example, dynamic_shapes=dynamic, strict=False)
    ).eval()
    exported = build_onnx(traced)
    save(exported, tmp_path / "model.onnx")
    compare_logits(tmp_path / "model.onnx", Plain(), VOCAB, tolerance=1e-5)
    assert locate(exported, traced)["inner.transformer.h.0.mlp.c_fc.weight"] == WeightLocation(
        "inner.transformer.h.0.mlp.c_fc.weight", transposed=False
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type(tmp_path, dtype):
    model = tiny(LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 1}), dtype)
    exported = build_onnx(model)
    expected = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    assert {t.data_type for t in exported.graph.initializer if len(t.dims) == 2} == {expected}
    onnx.checker.check_model(exported, full_check=True)
    save(exported, tmp_path / "model.onnx")
    compare_logits(tmp_path / "model.onnx", logits_of(model), VOCAB)


def test_the_same_model_gives_the_same_bytes_nothing_printed_and_no_trace_of_the_machine(llama, capfd):
    first, second = (m.SerializeToString(deterministic=True) for m in (llama[1], build_onnx(tiny(LLAMA))))
    assert first == second
    assert capfd.readouterr().out == ""
    assert b".py" not in first


def test_a_transposed_initializer_is_recognised_by_its_bytes(llama):
    model, exported = llama[0], onnx.ModelProto()
    exported.CopyFrom(llama[1])
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = next(t for t in exported.graph.initializer if t.name == name)
    transposed = onnx.numpy_helper.to_array(tensor).T.copy()
    tensor.CopyFrom(onnx.numpy_helper.from_array(transposed, "folded"))
    assert locate(exported, model)[name] == WeightLocation("folded", transposed=True)


def test_training_mode_is_refused():
    with pytest.raises(SppFxError, match="training mode"):
        build_onnx(tiny(LLAMA).train())


def test_meta_weights_are_refused_by_name():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA).eval()
    with pytest.raises(SppFxError, match=r"model\.embed_tokens\.weight is on the meta device"):
        build_onnx(model)


def test_an_operator_without_onnx_form_is_named():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(VOCAB, 4, 4))

        def forward(self, input_ids, attention_mask):
            return torch.linalg.eigvalsh(self.table)[input_ids] * attention_mask.unsqueeze(-1)

    with pytest.raises(SppFxError, match=r"no ONNX form.*eigh"):
        build_onnx(Strange().eval())


def test_a_fixed_sequence_length_is_refused():
    class Fixed(nn.Module):
        def forward(self, input_ids, attention_mask):
            return (input_ids * attention_mask + torch.arange(8)).unsqueeze(-1).float()

    with pytest.raises(SppFxError, match="cannot be traced"):
        build_onnx(Fixed().eval())
