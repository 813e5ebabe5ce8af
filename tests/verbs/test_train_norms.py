"""Norms and biases trained beside an adapter, from inject to merge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from spp_fx.adapters.adapter_folder import AdapterFolder
from spp_fx.adapters.fold import FLOATING, round_once, round_stored
from spp_fx.passes.fold_adapters import Fold
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.training.trainer import AdapterTrainer
from spp_fx.verbs.load import load_program
from tests.command import command, must, rewrite, save_tokenizer, tensors
from tests.effort import nightly
from tests.families import batch, make_model
from tests.verbs.test_distributed import LINE as ONE_PROCESS
from tests.verbs.test_distributed import launch

LINE = ["--seq-len", "16", "--batch-size", "4", "--lr", "0.01", "--steps", "4", "-q"]
FAMILIES = [
    nightly("llama"),
    "gpt2",
    "mixtral",
]  # norms; also biases and transposed weights; stacks of experts


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    """sparse/ in bfloat16, one norm of it stored in float32, and adapter/ over it, untrained."""
    root = tmp_path_factory.mktemp(f"norms-{request.param}")
    make_model(request.param, dtype=torch.bfloat16, one_layer=True).save_pretrained(root / "dense")
    save_tokenizer(root / "dense")
    generator = torch.Generator().manual_seed(0)

    def uneven(values: dict[str, torch.Tensor]) -> None:
        vectors = [name for name, value in values.items() if value.ndim == 1]
        for index, name in enumerate(vectors):
            noise = torch.randn(values[name].shape, generator=generator)
            values[name] = (values[name].float() + 0.1 * noise).to(torch.bfloat16 if index else torch.float32)

    rewrite(root / "dense" / "model.safetensors", uneven)
    must("prune", root / "dense", "-o", root / "sparse", "-q")
    must("inject", root / "sparse", "-o", root / "adapter", "--rank", 4, "--train-norms", "-q")
    (root / "text.txt").write_text("\n".join("a b c d e f g h i j" for _ in range(60)))
    return root


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    return shutil.copytree(folder / "adapter", tmp_path / "adapter")


def move_norms(adapter: Path) -> None:
    def move(values: dict[str, torch.Tensor]) -> None:
        for name in AdapterFolder.open(adapter).trained:
            noise = torch.randn(values[name].shape, generator=torch.Generator().manual_seed(len(name)))
            values[name] += 0.3 * noise

    rewrite(adapter / "adapter_model.safetensors", move)


def test_an_untrained_adapter_merges_to_the_same_bytes(folder, adapter, tmp_path):
    report = must("merge", adapter, "-o", tmp_path / "merged", "--json", "-q").json
    base = (folder / "sparse" / "model.safetensors").read_bytes()
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == base
    vectors = {name for name, value in tensors(folder / "sparse").items() if value.ndim == 1}
    assert {each["name"] for each in report["trained"]} == vectors
    assert all(each["changed"] == 0 for each in report["trained"])


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_the_lock_holds_no_norm_and_the_configuration_names_them(folder, tmp_path):
    must("inject", folder / "sparse", "-o", tmp_path / "plain", "--rank", 4, "-q")
    lock = "sparsity.lock.json"
    assert (tmp_path / "plain" / lock).read_bytes() == (folder / "adapter" / lock).read_bytes()
    plain, own = (
        json.loads((each / "adapter_config.json").read_text())
        for each in (tmp_path / "plain", folder / "adapter")
    )
    trained = own.pop("trained_parameters")
    assert own == plain
    file = tensors(folder / "adapter")
    assert all(file[name].dtype == torch.float32 for name in trained)
    assert len(file) - len(tensors(tmp_path / "plain")) == len(trained)


def test_with_factors_at_their_start_only_norms_change(folder, adapter, tmp_path):
    move_norms(adapter)
    report = must("merge", adapter, "-o", tmp_path / "merged", "--json", "-q").json
    base, merged, file = tensors(folder / "sparse"), tensors(tmp_path / "merged"), tensors(adapter)
    trained = AdapterFolder.open(adapter).trained
    stored = {tensor: name for name, held in trained.items() for tensor in held}
    for name, value in merged.items():
        if name in stored:
            assert torch.equal(value, file[stored[name]].to(base[name].dtype))
        else:
            assert torch.equal(value.view(torch.uint8), base[name].view(torch.uint8))
    assert {each["name"]: each["changed"] for each in report["trained"]} == {
        name: int((merged[name] != base[name]).sum()) for name in stored
    }
    assert all(each["changed"] for each in report["trained"])
    must("verify", tmp_path / "merged", "--against", folder / "sparse", "-q")


def test_the_forward_computes_with_the_values_that_merge_writes(adapter, tmp_path):
    move_norms(adapter)
    must("merge", adapter, "-o", tmp_path / "merged", "-q")
    program, merged = (load_program(each).program.eval() for each in (adapter, tmp_path / "merged"))
    ids = batch()
    with torch.no_grad():
        assert torch.equal(program(ids).logits, merged(ids).logits)
        run_pipeline(program, [Fold()])
        assert torch.equal(program(ids).logits, merged(ids).logits)
    own = dict(merged.named_parameters())
    for name, value in program.named_parameters():
        assert value.dtype == own[name].dtype
        assert torch.equal(value, own[name]), name
    assert not program.trained


def test_training_moves_them_without_weight_decay_and_resumes(folder, adapter, tmp_path, monkeypatch):
    groups = []
    optimizer = AdapterTrainer.create_optimizer

    def spy(self, *args):
        made = optimizer(self, *args)
        names = {id(value): name for name, value in self.factors.items()}
        for group in made.param_groups:
            groups.append((group["weight_decay"], {names[id(value)] for value in group["params"]}))
        return made

    monkeypatch.setattr(AdapterTrainer, "create_optimizer", spy)
    whole = shutil.copytree(adapter, tmp_path / "whole")
    line = ["--data", folder / "text.txt", *LINE]
    must("train", whole, *line, "--weight-decay", 0.1, "--save-steps", 2)
    trained = set(AdapterFolder.open(whole).trained)
    for decay, names in groups:
        assert names <= trained if decay == 0 else names.isdisjoint(trained)
    assert set().union(*(names for _, names in groups)) == tensors(whole).keys()
    before, after = tensors(adapter), tensors(whole)
    moved = {name for name in trained if not torch.equal(before[name], after[name])}
    still = trained - moved
    assert len(moved) > len(still)
    assert all("k_proj" in name or "c_attn" in name or "experts" in name for name in still), still
    shutil.rmtree(whole / "checkpoint-4")
    must("train", whole, *line, "--weight-decay", 0.1, "--resume")
    assert all(torch.equal(value, after[name]) for name, value in tensors(whole).items())
    must("eval", whole, "--data", folder / "text.txt", "--seq-len", 16, "-q")


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_value_that_is_not_finite_is_refused_and_nothing_is_written(value, adapter, folder, tmp_path):
    stored = tensors(folder / "sparse")
    name = next(
        n for n, held in AdapterFolder.open(adapter).trained.items() if stored[held[0]].dtype != torch.float32
    )
    large = 3.4e38 if value == 3e38 else value  # rounds to infinity in bfloat16

    def spoil(values: dict[str, torch.Tensor]) -> None:
        values[name][1] = large

    rewrite(adapter / "adapter_model.safetensors", spoil)
    result = command("merge", adapter, "-o", tmp_path / "merged")
    assert result.code == 1
    assert ("entry 1 becomes" if value == 3e38 else "first at entry 1") in result.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_the_proof_finds_a_value_that_is_not_the_nearest(adapter, tmp_path, monkeypatch):
    import spp_fx.verbs.merge as merge

    move_norms(adapter)

    def off_by_one(value, dtype):
        return (round_stored(value, dtype).view("<u2" if dtype == "BF16" else "<u4") + 1).view(
            FLOATING[dtype]
        )

    monkeypatch.setattr(merge, "round_stored", off_by_one)
    result = command("merge", adapter, "-o", tmp_path / "merged")
    assert result.code == 1
    assert "is not the adapter's, rounded to" in result.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config["trained_parameters"].update(nosuch=["nosuch"]),
            "the factor nosuch is missing",
        ),
        (lambda config: config.pop("trained_parameters"), "is not a factor of any site"),
        (lambda config: next(iter(config["trained_parameters"].values())).append("nosuch"), "nosuch"),
        (
            lambda config: next(iter(config["trained_parameters"].values())).append(
                next(iter(config["sites"].values()))[0]["tensor"]
            ),
            "is another parameter's, too",
        ),
    ],
)
def test_a_damaged_adapter_is_refused(change, message, adapter, tmp_path):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    result = command("merge", adapter, "-o", tmp_path / "merged")
    assert result.code != 0
    assert message in result.err


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_the_result_counts_them_and_a_budget_includes_them(folder):
    line = ["inject", folder / "sparse", "--train-norms", "--dry-run"]
    report = must(*line, "--rank", 4, "--json").json
    norms = sum(each["parameters"] for each in report["trained"])
    sites = sum(site["trainable_parameters"] for site in report["sites"])
    assert report["trainable_parameters"] == norms + sites
    assert f"{norms:,} of them in {len(report['trained'])} norms and biases" in must(*line, "--rank", 4).out
    budget = norms + sites // 2
    spread = must(*line, "--budget", budget, "--json").json
    assert norms < spread["trainable_parameters"] <= budget
    assert "the norms and biases alone take" in command(*line, "--budget", norms).err


def test_numbers_are_rounded_once_to_nearest_even():
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 16, 4000).astype(np.uint16)
    halves = torch.from_numpy(bits).view(torch.bfloat16).double().nan_to_num(1.0, 2.0, -2.0)
    middle = (halves[1:] + halves[:-1]) / 2
    values = torch.cat([halves, middle, middle * (1 + 2.0**-40), middle * (1 - 2.0**-40), torch.zeros(1)])
    values = values[values.abs() < 3e38]
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        kept = values[values.abs() < 6e4] if name == "F16" else values
        expected = round_once(kept, dtype).view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
        assert np.array_equal(round_stored(kept.numpy(), name).view(expected.dtype), expected)


@pytest.mark.slow
def test_two_processes_train_them_as_one_does(shallow, monkeypatch):
    monkeypatch.chdir(shallow)
    must("inject", "sparse", "-o", "adapter", "--rank", 4, "--train-norms", "--force", "-q")
    start = tensors(shallow / "adapter")
    alone = must(*ONE_PROCESS.split(), "--batch-size", 4).json
    one = tensors(shallow / "adapter")
    for more in ([], ["--shard", "world", "--gradient-checkpointing"]):
        must("inject", "sparse", "-o", "adapter", "--rank", 4, "--train-norms", "--force", "-q")
        both = launch(shallow, 2, "--batch-size", 2, *more)
        torch.testing.assert_close(
            torch.tensor(both["losses"]), torch.tensor(alone["losses"]), rtol=2e-4, atol=0
        )
        two = tensors(shallow / "adapter")
        for name in AdapterFolder.open(shallow / "adapter").trained:
            assert not torch.equal(one[name], start[name])
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)
