"""`spp-fx prune` with calibration: what it writes, what it refuses, and that nothing done is lost."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from spp_fx.graph.trace import trace
from spp_fx.verbs import prune as workflow
from spp_fx.verbs.demo import train_tokenizer
from spp_fx.verbs.load import Calibration, draw_windows
from tests.command import command, listing, must
from tests.effort import nightly
from tests.verbs.conftest import save_with_tokenizer

CALIBRATION = ("--samples", 8, "--seq-len", 32)
WANDA = ("--method", "wanda", "--calib", "TEXT")


@pytest.mark.parametrize("family", ["gpt2", "mixtral", nightly("gpt-oss")])
def test_a_folder_of_every_family_streams(tmp_path, text_file, family):
    """Layer by layer from the folder, and verified from the bytes that were written."""
    save_with_tokenizer(tmp_path / "dense", text_file, family, max_shard_size="40KB")
    options = ("--method", "wanda", "--calib", text_file, *CALIBRATION)
    result = must("prune", tmp_path / "dense", "-o", tmp_path / "out", *options, "--json").json
    assert result["calibration"] == {"samples": 8, "seq_len": 32}
    for site in result["sites"]:
        assert site["pattern"] == "2:4"
        if site["notes"] != ["received no token: pruned by magnitude"]:
            assert 0 < site["error_before"] == site["error_after"] < 1
    assert must("verify", tmp_path / "out", "--json").json["ok"]
    assert not (tmp_path / ".out.work").exists()
    after = weights(tmp_path / "out")
    for name, tensor in weights(tmp_path / "dense").items():
        assert torch.equal(after[name][after[name] != 0], tensor[after[name] != 0])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("method", ["magnitude", "ria"])
def test_a_share_holds_for_every_stored_matrix_of_experts(tmp_path, text_file, method):
    """Mixtral's files hold three matrices of each expert, two of which the model joins."""
    save_with_tokenizer(tmp_path / "dense", text_file, "mixtral")
    options = ("--method", method, "--pattern", "50%", "--calib", text_file, *CALIBRATION)
    result = must("prune", tmp_path / "dense", "-o", tmp_path / "out", *options, "--json").json
    experts = [site for site in result["sites"] if "experts" in site["name"]]
    assert len(experts) == 2 * 4 * 3
    assert all(site["sparsity"] == 0.5 for site in experts)
    if method == "magnitude":
        must("prune", tmp_path / "dense", "-o", tmp_path / "streamed", "--pattern", "50%")
        assert weights(tmp_path / "out").keys() == weights(tmp_path / "streamed").keys()
        for name, tensor in weights(tmp_path / "streamed").items():
            assert torch.equal(weights(tmp_path / "out")[name], tensor)


@pytest.fixture(scope="module")
def deep(tmp_path_factory, text_file) -> Path:
    """Three bfloat16 layers with a tokenizer."""
    folder = tmp_path_factory.mktemp("deep")
    save_with_tokenizer(folder / "tokens", text_file)
    vocabulary = json.loads((folder / "tokens" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "dense", max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "dense" / name).write_bytes((folder / "tokens" / name).read_bytes())
    return folder


def arguments(deep: Path, out: Path, text: Path) -> list[str]:
    words = (
        "prune",
        deep / "dense",
        "-o",
        out,
        "--method",
        "sparsegpt",
        "--damp",
        0.1,
        "--calib",
        text,
        *CALIBRATION,
    )
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def uninterrupted(deep, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    must(*arguments(deep, out, text_file))
    return listing(out)


def done_layers(store: Path) -> int:
    return (store / "journal.jsonl").read_text().count('"layer-')


@pytest.mark.slow
def test_a_killed_run_goes_on_and_writes_the_same_bytes(deep, text_file, tmp_path, uninterrupted):
    """SIGKILL at the end of the second layer."""
    out, store = tmp_path / "out", tmp_path / ".out.work"
    killed_after_two = (
        "import os, signal, sys; from spp_fx.verbs.prune import LayerStore; from spp_fx.cli import run\n"
        "finish, done = LayerStore.finish, []\n"
        "def finish_two(self, *arguments):\n"
        "    finish(self, *arguments)\n"
        "    done.append(1)\n"
        "    if len(done) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "LayerStore.finish = finish_two\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", killed_after_two, *arguments(deep, out, text_file), "-q"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    assert done_layers(store) == 2

    calls = []
    real = workflow.prune_layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "prune_layers", lambda *a, **k: (calls.append(k["start"]), real(*a, **k)))
        must(*arguments(deep, out, text_file))
    assert calls == [2]
    assert listing(out) == uninterrupted
    assert not store.exists()


def test_an_error_on_the_way_keeps_what_is_done(deep, text_file, tmp_path, monkeypatch, uninterrupted):
    out, real = tmp_path / "out", workflow.prune_layers

    def stop(*positional, finish, **named):
        def finish_one(index, result):
            finish(index, result)
            raise KeyboardInterrupt

        real(*positional, finish=finish_one, **named)

    monkeypatch.setattr(workflow, "prune_layers", stop)
    with pytest.raises(KeyboardInterrupt):
        workflow.prune(
            deep / "dense", out, method="sparsegpt", pattern="2:4", damp=0.1,
            calibration=workflow.Calibration(text_file, 8, 32),
        )  # fmt: skip
    monkeypatch.undo()
    assert not out.exists()
    assert done_layers(tmp_path / ".out.work") == 1
    # Another plan starts afresh, the first one too after that.
    must("prune", deep / "dense", "-o", out, "--method", "wanda", "--calib", text_file, *CALIBRATION)
    assert listing(out) != uninterrupted
    must(*arguments(deep, out, text_file), "--force")
    assert listing(out) == uninterrupted


@pytest.fixture
def translator(tmp_path, text_file) -> Path:
    """A T5 of one layer in its encoder and one in its decoder, with a tokenizer and pairs of texts."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(text_file)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    lines = text_file.read_text().splitlines()[:12]
    pairs = [{"source": line[: 9 + 4 * n], "target": line[-20:]} for n, line in enumerate(lines)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path


def test_encoder_and_decoder_are_calibrated_on_pairs_of_texts_and_a_stopped_run_goes_on(
    translator, monkeypatch
):
    pairs, real = translator / "pairs.jsonl", workflow.prune_layers

    def arguments(out: str) -> list[str | int | Path]:
        options = ("--method", "wanda", "--calib", pairs, "--samples", 8, "--seed", 3)
        return ["prune", translator / "dense", "-o", translator / out, *options]

    whole = must(*arguments("whole"), "--json").json
    assert whole["calibration"] == {"samples": 8}
    kinds = {site["name"].partition(".")[0] for site in whole["sites"]}
    assert kinds == {"encoder", "decoder"}
    assert all(0 < site["error_after"] < 1 for site in whole["sites"])

    def stop(*positional, start, finish, **named):
        def finish_one(index, result):
            finish(index, result)
            if index == 0:
                raise KeyboardInterrupt

        real(*positional, start=start, finish=finish_one, **named)

    monkeypatch.setattr(workflow, "prune_layers", stop)
    assert command(*arguments("out")).code == 130
    assert done_layers(translator / ".out.work") == 1
    must(*arguments("out"))
    assert listing(translator / "out") == listing(translator / "whole")
    refused = command(*arguments("few")[:-4], "--samples", 13)
    assert refused.code == 2
    assert "has 12 rows, and 13 are drawn" in refused.err


def test_weight_files_that_are_finished_are_not_pruned_again(deep, tmp_path, monkeypatch):
    """Without calibration too: file by file, with the same reports and the same bytes."""
    whole = must("prune", deep / "dense", "-o", tmp_path / "whole", "--json").json
    real, calls = workflow.rewrite_shard, []

    def stop(shard, *rest):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(shard.name)
        return real(shard, *rest)

    monkeypatch.setattr(workflow, "rewrite_shard", stop)
    assert command("prune", deep / "dense", "-o", tmp_path / "out").code == 130
    first = list(calls)
    calls.clear()
    monkeypatch.setattr(
        workflow, "rewrite_shard", lambda shard, *rest: (calls.append(shard.name), real(shard, *rest))
    )
    again = must("prune", deep / "dense", "-o", tmp_path / "out", "--json").json
    assert not set(calls) & set(first)
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
    assert again["sites"] == whole["sites"]
    must("prune", deep / "dense", "-o", tmp_path / "out", "--fresh", "--force")
    assert len(set(calls)) == len(list((deep / "dense").glob("*.safetensors")))


def test_an_input_that_shrinks_on_the_way_is_named(deep, tmp_path, monkeypatch):
    shutil.copytree(deep / "dense", tmp_path / "dense")
    shards = sorted((tmp_path / "dense").glob("*.safetensors"))
    real = workflow.rewrite_shard

    def shrink(shard, *rest):
        if shard.name == shards[1].name:
            os.truncate(shard.path, shard.path.stat().st_size - 100)
        return real(shard, *rest)

    monkeypatch.setattr(workflow, "rewrite_shard", shrink)
    result = command("prune", tmp_path / "dense", "-o", tmp_path / "out")
    assert result.code == 1
    assert shards[1].name in result.err
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_work_on_one_output(deep, text_file, tmp_path):
    (tmp_path / ".out.work").mkdir()
    lock = os.open(tmp_path / ".out.work" / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        result = command(*arguments(deep, tmp_path / "out", text_file))
    finally:
        os.close(lock)
    assert result.code == 2
    assert "another process is writing it" in result.err


def test_seeds_draw_windows(deep, text_file):
    model, program = deep / "dense", trace(deep / "dense")
    first, again, other = (
        draw_windows(model, program, Calibration(text_file, 8, 32, seed)).tokens for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (8, 32)
    assert len({tuple(row.tolist()) for row in first}) == 8
    # More windows than the text fills: they overlap, begin apart, and that is said.
    said: list[str] = []
    count = len(text_file.read_text()) // 64
    many = draw_windows(model, program, Calibration(text_file, count, 64), say=said.append).tokens
    assert many.shape == (count, 64)
    assert "overlap" in said[0]


def test_weights_keep_the_type_they_are_stored_in(deep, text_file, tmp_path):
    """A float32 checkpoint of a model that computes in bfloat16: what is kept is kept to the bit."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in (deep / "dense").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import save_file

    for file in folder.glob("*.safetensors"):
        wide = {k: v.float() + 1e-4 * torch.rand(v.shape) for k, v in load_file(file).items()}
        save_file(wide, file, {"format": "pt"})
    must("prune", folder, "-o", tmp_path / "out", "--method", "wanda", "--calib", text_file, *CALIBRATION)
    before, after = weights(folder), weights(tmp_path / "out")
    for name, new in after.items():
        assert new.dtype == torch.float32
        assert torch.equal(new[new != 0], before[name][new != 0])


def test_permuted_models_compute_what_their_dense_weights_would(deep, text_file, tmp_path):
    options = ("--calib", text_file, *CALIBRATION, "--method", "ria", "--permute")
    result = must("prune", deep / "dense", "-o", tmp_path / "out", *options, "--json").json
    notes = {site["name"]: " ".join(site["notes"]) for site in result["sites"]}
    assert all(("keep their order" in note) or ("inputs reordered" in note) for note in notes.values())
    assert must("verify", tmp_path / "out", "--json").json["ok"]
    dense, out = weights(deep / "dense"), weights(tmp_path / "out")
    moved = [name for name, note in notes.items() if "inputs reordered" in note]
    assert moved
    for name in moved:
        gate = name.replace("down_proj", "gate_proj")
        # Rows of the producer are the dense rows in another order.
        kept = out[gate] != 0
        rows = [
            next(i for i, row in enumerate(dense[gate]) if torch.equal(row[k], new[k]))
            for new, k in zip(out[gate], kept, strict=True)
        ]
        assert sorted(rows) == list(range(len(rows)))
        assert rows != sorted(rows)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--method", "wanda"), 2, "--calib FILE"),
        (("--repair", "dsnot"), 2, "--calib FILE"),
        (("--method", "wanda", "--damp", 1), 2, "wanda has no option damp"),
        (("--method", "magnitude", "--permute"), 2, "magnitude has no option permute"),
        ((*WANDA, "--samples", 1000000), 2, "is too short"),
        ((*WANDA, "--samples", 0), 2, "--samples must be at least 1"),
        ((*WANDA, "--seq-len", 5000), 2, "more than the model's 2048 positions"),
        (("--method", "wanda", "--calib", "no-such.txt", *CALIBRATION), 2, "no-such.txt: there is no such file"),
        ((*WANDA, *CALIBRATION, "--pattern", "2:5"), 1, "not a multiple of the group of 2:5"),
        ((*WANDA, *CALIBRATION, "--targets", "lm_head"), 2, "outside the layers"),
        (("--method", "sparsegpt", "--damp", 0, "--calib", "TEXT", "--samples", 1, "--seq-len", 16), 1, "raise --damp"),
        ((*WANDA, *CALIBRATION, "--skip", "nothing"), 2, "names no site"),
        (("--ratio", "down_proj"), 2, "write NAME@PATTERN"),
        (("--pattern", "100%"), 2, "leave no weight at all"),
    ],
)  # fmt: skip
def test_refusals(pristine, text_file, tmp_path, words, code, message):
    words = [str(text_file) if word == "TEXT" else word for word in words]
    result = command("prune", pristine / "dense", "-o", tmp_path / "out", *words)
    assert result.code == code, result.err
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_ratios_and_skips_without_calibration(pristine, tmp_path):
    options = ("--ratio", "down_proj@1:4", "--ratio", "model.layers.0.*@50%", "--skip", "k_proj,v_proj")
    result = must("prune", pristine / "dense", "-o", tmp_path / "out", *options, "--json").json
    patterns = {site["name"]: site["pattern"] for site in result["sites"]}
    assert patterns["model.layers.0.mlp.down_proj.weight"] == "50%"
    assert patterns["model.layers.1.mlp.down_proj.weight"] == "1:4"
    assert patterns["model.layers.1.self_attn.q_proj.weight"] == "2:4"
    assert result["refused"]["model.layers.0.self_attn.k_proj.weight"] == "is excluded by --skip"
    assert must("verify", tmp_path / "out", "--json").json["ok"]
