"""The whole way on a real model, checked with plain torch and not with the project's own code."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spp_fx import runtime
from spp_fx.cli import run
from spp_fx.exporters.onnx.onnxruntime_check import OnnxModel
from spp_fx.verbs.load import load_program
from tests.command import command
from tests.exporters.onnx_files import greedy
from tests.real_data import data_folder
from tests.worlds import made_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def way(tmp_path_factory) -> Path:
    """A folder in which every verb has been typed once."""
    data_folder()  # skips where there is none
    return made_once(tmp_path_factory, "way", type_every_verb)


def type_every_verb(folder: Path) -> None:
    data = data_folder()
    text, sm90 = data / "tinystories" / "generated.txt", folder / "sm90"
    cached = ("--with-past", "--no-compare-logits")
    for line in (
        ["prune", data / "story-656k", "-o", folder / "sparse", "--pattern", "2:4"],
        ["inject", folder / "sparse", "-o", folder / "adapter"],
        ["train", folder / "adapter", "--data", text, "--steps", 12, "--seq-len", 128, "--batch-size", 4],
        ["merge", folder / "adapter", "-o", folder / "merged", "--verify-sparsity"],
        ["export", folder / "merged", "--format", "cusparselt", "-o", folder / "neutral"],
        ["export", folder / "merged", "--format", "cusparselt", "--sm", 90, "--dtype", "bfloat16", "-o", sm90],
        ["export", folder / "merged", "--format", "cutlass", "--dtype", "bfloat16", "-o", folder / "cutlass"],
        ["export", folder / "merged", "--format", "onnx", "--with-past", "--indices", "int64", "-o", folder / "onnx"],
        ["export", folder / "merged", "--format", "onnx-packed", *cached, "-o", folder / "onnx-packed"],
        ["export", folder / "merged", "--format", "onnx-dense", *cached, "-o", folder / "onnx-dense"],
        ["export", folder / "merged", "--format", "safetensors", "-o", folder / "plain"],
        ["export", folder / "merged", "--format", "sparse-bitmask", "-o", folder / "bitmask"],
    ):  # fmt: skip
        assert run([*map(str, line), "-q"]) == 0, line


def digest(weight: torch.Tensor) -> str:
    """BLAKE3 over the shape as int64 and the row-major mask packed LSB first."""
    state = blake3(np.array(weight.shape, dtype="<i8").tobytes())
    state.update(np.packbits((weight != 0).numpy().ravel(), bitorder="little").tobytes())
    return state.hexdigest()


def test_every_mask_is_the_locks_and_the_pruned_models(way):
    before, after = (load_file(way / name / "model.safetensors") for name in ("sparse", "merged"))
    lock = json.loads((way / "merged" / "sparsity.lock.json").read_text())
    assert len(lock["sites"]) == 14
    for site in lock["sites"]:
        weight = after[site["name"]]
        assert torch.equal(weight != 0, before[site["name"]] != 0)
        assert digest(weight) == site["mask"]
        assert int((weight != 0).sum()) == site["nnz"]
        assert int((weight.view(-1, 4) != 0).sum(1).max()) <= 2


def test_merged_weights_are_the_formula_to_half_a_unit_in_the_last_place(way):
    base, merged = (load_file(way / name / "model.safetensors") for name in ("sparse", "merged"))
    factors = load_file(way / "adapter" / "adapter_model.safetensors")
    sites = [name.removesuffix(".spp_beta") for name in factors if name.endswith(".spp_beta")]
    assert len(sites) == 14
    for name in sites:
        alpha, beta = factors[f"{name}.spp_alpha"].double(), factors[f"{name}.spp_beta"].double()
        w = base[name].double()
        exact = w * (1 + 2.0 * beta * alpha.repeat_interleave(w.shape[0] // alpha.shape[0], dim=0))
        assert float(beta.abs().max()) > 0
        stored = merged[name]
        up = (
            torch.nextafter(stored.abs(), torch.full_like(stored, torch.inf)).double() - stored.abs().double()
        )
        assert bool(((stored.double() - exact).abs() <= up / 2).all())


def test_all_else_has_the_bases_bytes(way):
    base, merged = (way / name / "model.safetensors" for name in ("sparse", "merged"))
    headers = []
    for path in (base, merged):
        raw = path.read_bytes()
        headers.append(raw[: 8 + int.from_bytes(raw[:8], "little")])
    assert headers[0] == headers[1]
    before, after = load_file(base), load_file(merged)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    locked = {
        site["name"] for site in json.loads((way / "merged" / "sparsity.lock.json").read_text())["sites"]
    }
    assert changed == locked
    names = {p.name for p in (way / "sparse").iterdir()}
    assert {p.name for p in (way / "merged").iterdir()} == names


def test_the_merged_folder_loads_and_gives_the_programs_logits(way):
    ids = torch.arange(5, 69).view(2, 32)
    model = AutoModelForCausalLM.from_pretrained(way / "merged").eval()
    program = load_program(way / "adapter").program.eval()
    with torch.no_grad():
        theirs, ours = model(ids).logits, program(ids).logits
    assert float((theirs - ours).abs().max()) <= 1e-4


def test_the_neutral_export_decodes_to_the_weights(way):
    merged, packed = load_file(way / "merged" / "model.safetensors"), way / "neutral" / "packed.safetensors"
    manifest = json.loads((way / "neutral" / "export.json").read_text())
    assert {t["layout"] for t in manifest["tensors"]} == {"neutral"}
    assert all("float32" in t["reason"] for t in manifest["tensors"])
    with safe_open(packed, "pt") as file:
        for tensor in manifest["tensors"]:
            values, positions = (
                file.get_tensor(f"{tensor['name']}.{part}") for part in ("values", "positions")
            )
            assert torch.equal(decode(values, positions), merged[tensor["name"]])


def decode(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Dense rows from two values and two 2-bit positions for each group of four."""
    m, half = values.shape
    nibbles = torch.stack((positions & 15, positions >> 4), dim=2).view(m, -1)
    columns = torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()
    dense = torch.zeros(m, half // 2, 4, dtype=values.dtype)
    return dense.scatter_(2, columns, values.view(m, -1, 2)).view(m, 2 * half)


def test_the_packed_export_holds_values_then_metadata(way):
    manifest = json.loads((way / "sm90" / "export.json").read_text())
    merged = load_file(way / "merged" / "model.safetensors")
    packed = [t for t in manifest["tensors"] if t["layout"] == "cusparselt"]
    assert len(packed) == 14
    assert manifest["requirements"]["sm"] == 90
    with safe_open(way / "sm90" / "packed.safetensors", "pt") as file:
        for tensor in packed:
            m, k = tensor["shape"]
            pack = file.get_tensor(f"{tensor['name']}.packed")
            assert pack.shape == (m, 9 * k // 16)
            values, meta = pack.flatten()[: m * k // 2].view(m, k // 2), pack.flatten()[m * k // 2 :]
            positions = row_major(meta.view(torch.uint8), m, k)
            assert torch.equal(decode(values, positions), merged[tensor["name"]].bfloat16())


def row_major(meta: torch.Tensor, m: int, k: int) -> torch.Tensor:
    """Two-bit positions of each row, from sm90's order: byte after byte as it is documented."""
    nibbles = torch.zeros(m, k // 4, dtype=torch.uint8)
    for row in range(m):
        for group in range(k // 4):
            column, r = 4 * group, row % 16
            base = column // 32 * 256 + row % 64 // 16 * 64 + row // 64 * 8 * k
            byte = int(meta[base + r % 8 * 8 + [0, 4, 1, 5, 2, 6, 3, 7].index(group % 8)])
            nibbles[row, group] = byte >> 4 if r >= 8 else byte & 15
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


ONNX = ["onnx", "onnx-packed", "onnx-dense"]
EXPORTS = ["neutral", "sm90", "cutlass", *ONNX, "plain", "bitmask"]


@pytest.mark.parametrize("name", ["sparse", "adapter", "merged", *EXPORTS])
def test_every_artifact_verifies(way, name):
    ran = command("verify", way / name, "--pattern", "2:4", "--json")
    assert ran.code == 0
    verdict = ran.json
    assert verdict["ok"] is True
    assert verdict["pattern"] == "2:4"
    assert verdict["summary"] == {"sites": 14, "ok": 14, "failed": 0, "sparsity": 0.5}
    keys = [
        "name",
        "shape",
        "nnz",
        "sparsity",
        "violations",
        "lost_zeros",
        "new_zeros",
        "mask_equal",
        "ok",
        "reason",
    ]
    assert all(list(site) == keys for site in verdict["sites"])
    assert all(site["mask_equal"] is True for site in verdict["sites"])


@pytest.fixture(scope="module")
def greedy_text(way) -> torch.Tensor:
    """A prompt and the 100 tokens that transformers puts after it."""
    model = AutoModelForCausalLM.from_pretrained(way / "merged").eval()
    return continued(model, tokens_of(way, "One day, a little girl named Lily"))


def tokens_of(way: Path, text: str) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(way / "merged")(text, return_tensors="pt").input_ids


def continued(model, ids: torch.Tensor) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=100, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", ONNX)
def test_onnxruntime_writes_the_same_text_token_by_token(way, greedy_text, name):
    prompt = greedy_text[:, :-100].numpy()
    found = greedy(way / name / "model.onnx", prompt, np.ones_like(prompt), 100)
    np.testing.assert_array_equal(found, greedy_text.numpy())


def test_the_documents_loop_runs_as_written(way, capsys):
    page = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text()
    (loop,) = (
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in block
    )
    loop = loop.replace('"my-model-onnx-packed"', repr(str(way / "onnx-packed")))
    exec(compile(loop, "runtime.md", "exec"), {})
    tokenizer = AutoTokenizer.from_pretrained(way / "merged")
    model = AutoModelForCausalLM.from_pretrained(way / "merged").eval()
    expected = continued(model, tokens_of(way, "Once upon a time"))
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected[0]).strip()


@pytest.mark.parametrize("name", ["neutral", "plain", "bitmask"])
def test_the_loader_writes_the_same_text_on_a_cpu(way, greedy_text, name):
    model = runtime.load(way / name)
    assert torch.equal(continued(model, greedy_text[:, :-100]), greedy_text)


@pytest.mark.parametrize("name", ["sm90", "cutlass"])
def test_packs_are_loaded_as_the_rounded_model(way, greedy_text, name):
    rounded = AutoModelForCausalLM.from_pretrained(way / "merged", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(runtime.load(way / name)(greedy_text).logits, rounded(greedy_text).logits)


def test_openvino_has_the_same_logits(way, greedy_text):
    openvino = pytest.importorskip("openvino", reason="the extra 'openvino' is not installed")
    path, precise = way / "onnx-packed" / "model.onnx", {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", precise)
    model = AutoModelForCausalLM.from_pretrained(way / "merged").eval()
    graph, ids = OnnxModel(path), greedy_text.numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **graph.empty_past(1)}
    feeds["position_ids"] = np.arange(ids.shape[1])[None]
    with torch.no_grad():
        expected = model(greedy_text).logits.numpy()
    np.testing.assert_allclose(compiled(feeds)["logits"], expected, rtol=0, atol=1e-3)


def test_eval_prints_the_perplexity_of_the_formula(way):
    text = data_folder() / "tinystories" / "valid.txt"
    ran = command("eval", way / "merged", "--data", text, "--seq-len", 256, "--json")
    result = ran.json
    assert ran.code == 0
    assert result["tokens"] == 7891
    assert 30 < result["perplexity"] < 184
