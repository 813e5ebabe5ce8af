"""Every tensor that a folder stores is in the graph as transformers loads it, or there is a reason why not."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from spp_fx.errors import FormatError
from spp_fx.exporters.format import Source
from spp_fx.exporters.onnx import model_writer
from spp_fx.exporters.onnx.graph_parameters import find_parameters
from spp_fx.exporters.onnx.graph_weights import GraphWeights
from spp_fx.graph.model import hollow_model
from spp_fx.storage.folder import ModelFolder
from spp_fx.verbs.export import export, open_source
from tests.effort import nightly
from tests.exporters.onnx_files import compare_logits, logits_of, write_graph
from tests.families import SMALL, VOCABULARY
from tests.runtime.exports import save_sparse

ONE = SMALL | {"num_hidden_layers": 1}
CONFIGS = {
    "llama": LlamaConfig(**ONE, intermediate_size=64, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1),
}
HEAD, EMBEDDING = "lm_head.weight", {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
NEW = torch.ones(32, 32)


def rewritten(folder, change):
    """The folder with `change(tensors)` as its weights."""
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in change(load_file(path)).items()}
    save_file(tensors, path, {"format": "pt"})
    return folder


def sparse_folder(path, family):
    torch.manual_seed(0)
    return save_sparse(path, AutoModelForCausalLM.from_config(CONFIGS[family]).eval())


def without_prefix(tensors):
    return {name.removeprefix("transformer."): value for name, value in tensors.items()}


HEADS = {
    "a head of its own": ("llama", "onnx-packed", lambda t: t | {HEAD: t[EMBEDDING["llama"]] * -1.5}),
    "a head of its own, no prefix": (
        "gpt2",
        "onnx-dense",
        lambda t: without_prefix(t | {HEAD: t[EMBEDDING["gpt2"]].flip(0)}),
    ),
    "the head alone": (
        "llama",
        "onnx",
        lambda t: {HEAD if name == EMBEDDING["llama"] else name: value for name, value in t.items()},
    ),
}


@pytest.mark.parametrize("case", [nightly(case) if case == "a head of its own" else case for case in HEADS])
def test_the_graph_has_the_head_that_transformers_loads(case, tmp_path):
    family, format, change = HEADS[case]
    folder = rewritten(sparse_folder(tmp_path / "sparse", family), change)
    done = export(folder, tmp_path / "out", format)
    real = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert done.checks["weights_equal"] == len(list(real.parameters()))
    path = tmp_path / "out" / "model.onnx"
    found = compare_logits(path, logits_of(real), VOCABULARY, tolerance=1e-5)
    assert found.argmax_agreement == 1
    written = GraphWeights(path)
    embedding = real.get_input_embeddings().weight
    assert torch.equal(written.read(EMBEDDING[family]), embedding)
    assert (HEAD in written.stored) == (real.lm_head.weight is not embedding)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama folder, its source, its hollow model and the graph of that."""
    folder = sparse_folder(tmp_path_factory.mktemp("stored") / "sparse", "llama")
    model = hollow_model(folder)
    return open_source(folder), model, model_writer.build_graph(model, with_past=False)


def changed(base, tmp_path, change):
    """A source of the same lock whose tensors are changed."""
    source = base[0]
    folder = rewritten(shutil.copytree(source.folder.path, tmp_path / "changed"), change)
    return Source(ModelFolder.open(folder), source.lock, False)


def found_in(base, tmp_path, change, graph=None):
    return find_parameters(changed(base, tmp_path, change), base[1], graph or base[2])


def test_a_folder_that_is_all_in_the_graph_needs_no_word(base, tmp_path):
    assert found_in(base, tmp_path, lambda t: t).left_out == ()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",  # config.json says there is none
        "model.layers.0.mlp.up_proj.weight_scale",
        "head.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "vision.layers.7.weight",
    ],
)
def test_a_tensor_that_nobody_reads_is_an_error(base, tmp_path, name):
    with pytest.raises(FormatError, match=f"neither transformers nor the graph reads 1 tensors \\({name}\\)"):
        found_in(base, tmp_path, lambda t: t | {name: NEW})


def test_scales_of_quantized_weights_are_said(base, tmp_path):
    source = changed(base, tmp_path, lambda t: t | {"model.layers.0.mlp.up_proj.weight_scale": NEW})
    source.folder.config["quantization_config"] = {"quant_method": "fp8"}
    (line,) = find_parameters(source, base[1], base[2]).left_out
    assert "weight_scale" in line
    assert "quantization_config" in line


def test_nothing_is_written_of_a_folder_with_a_tensor_that_nobody_reads(base, tmp_path, monkeypatch):
    source = changed(base, tmp_path, lambda t: t | {"model.norm.bias": NEW})
    AutoModelForCausalLM.from_pretrained(source.folder.path)  # which says so in a table, and goes on
    with pytest.raises(FormatError, match=r"model\.norm\.bias"):
        write_graph(source, base[2], tmp_path / "out", "onnx-packed", monkeypatch)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["model.layers.0.self_attn.rotary_emb.inv_freq"], "transformers computes or ignores them"),
        (["model.rotary_emb.inv_freq"], "transformers computes or ignores them"),
        (["mtp.0.weight", "mtp.1.weight"], "transformers computes or ignores them"),
        (
            ["model.layers.1.mlp.up_proj.weight", "model.layers.12.eh_proj.weight"],
            "beyond those of config.json",
        ),
        (["layers.1.mlp.up_proj.weight"], "beyond those of config.json"),
    ],
)
def test_what_transformers_does_not_load_on_purpose_is_said(base, tmp_path, names, reason, monkeypatch):
    monkeypatch.setattr(base[1], "_keys_to_ignore_on_load_unexpected", {r"^mtp\."})
    (line,) = found_in(base, tmp_path, lambda t: t | dict.fromkeys(names, NEW)).left_out
    assert line.startswith(f"not in the graph: {len(names)} tensors ({', '.join(names)}): ")
    assert reason in line


def test_integers_that_nobody_reads_change_no_result(base, tmp_path):
    assert found_in(base, tmp_path, lambda t: t | {"step": torch.tensor(7)}).left_out == ()


def test_a_weight_that_the_exporter_lost_is_an_error(base, tmp_path):
    graph = base[2]
    lost, *rest = graph.parameters
    assert {lost.name, *(p.name for p in rest)} == graph.reached
    with pytest.raises(FormatError, match=f"the ONNX exporter lost 1 tensors \\({lost.name}\\)"):
        found_in(base, tmp_path, lambda t: t, replace(graph, parameters=tuple(rest)))


def test_a_weight_that_the_logits_do_not_depend_on_is_said(base, tmp_path):
    graph, norm = base[2], "model.norm.weight"
    rest = tuple(parameter for parameter in graph.parameters if parameter.name != norm)
    without = replace(graph, parameters=rest, reached=graph.reached - {norm})
    (line,) = found_in(base, tmp_path, lambda t: t, without).left_out
    assert line == f"not in the graph: 1 tensors ({norm}): the outputs do not depend on them"


def test_layers_that_are_stored_and_not_configured_are_said_by_an_export(base, tmp_path, monkeypatch):
    source = changed(base, tmp_path, lambda t: t | {"model.layers.1.mlp.up_proj.weight": NEW})
    said = []
    checks = write_graph(source, base[2], tmp_path / "out", "onnx-dense", monkeypatch, said.append)
    assert any("layers beyond those of config.json" in line for line in said)
    assert checks["shipped_file"] == "run"
