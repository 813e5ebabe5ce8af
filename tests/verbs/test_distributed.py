"""Two processes on the CPU learn what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spp_fx.passes.shard import SPLITS_INTEGERS
from spp_fx.version import release
from tests.command import command, must, one_line, tensors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LINE = "train adapter --data text.txt --seq-len 16 --steps 6 --logging-steps 1 --json -q"


TORCHRUN = "torch.distributed.run --standalone --nproc-per-node"
ACCELERATE = (
    "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
)


def launch(world: Path, processes: int, *more: object, launcher: str = TORCHRUN) -> dict:
    """The report of a run of several processes."""
    line = [sys.executable, "-m", *launcher.split(), processes]
    result = subprocess.run(
        [*map(str, line), "-m", "spp_fx", *LINE.split(), *map(str, more)],
        cwd=world,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads(result.stdout)


@pytest.fixture
def start(world, monkeypatch) -> bytes:
    monkeypatch.chdir(world)
    return (world / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def start_shallow(shallow, monkeypatch) -> bytes:
    monkeypatch.chdir(shallow)
    return (shallow / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def instructions(world) -> None:
    """Rows of different lengths, so that processes have different numbers of tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [" ".join(letters[: 1 + 5 * number % 17]) for number in range(40)]
    lines = (json.dumps({"instruction": row, "output": row[::-1]}) for row in rows)
    (world / "data.jsonl").write_text("\n".join(lines))


def restore(world: Path, start: bytes) -> None:
    path = world / "adapter" / "adapter_model.safetensors"
    path.unlink()
    path.write_bytes(start)


WAYS = {
    "whole": (TORCHRUN, ""),
    "split-packed": (
        f"{ACCELERATE} --num_processes",
        "--shard node --packed --gradient-checkpointing --teacher dense --accumulate 2",
    ),
    "matched": (
        TORCHRUN,
        "--data data.jsonl --seq-len 64 --accumulate 2 --teacher dense --teacher-weight 0.5 --temperature 2 "
        "--match-hidden 1",
    ),
    "matched-split": (
        TORCHRUN,
        "--data data.jsonl --seq-len 64 --shard world --gradient-checkpointing --teacher dense --match-hidden 1",
    ),
}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_follow_the_loss_curve_of_one(world, start, way):
    if "packed" in way and release(torch.__version__) < SPLITS_INTEGERS:
        pytest.skip("this torch shards no integers (pytorch issue 177844)")
    launcher, options = WAYS[way]
    more = options.split()
    alone_options = [option for option in more if option not in ("--shard", "world", "node")]
    one = must(*LINE.split(), "--batch-size", 4, *alone_options).json
    alone = load_file(world / "adapter" / "adapter_model.safetensors")
    restore(world, start)
    two = launch(world, 2, "--batch-size", 2, *more, launcher=launcher)
    assert (one["processes"], two["processes"]) == (1, 2)
    part = two["frozen_bytes"] / one["frozen_bytes"]
    assert 0.5 <= part < 0.51 if "--shard" in more else part == 1
    assert len(two["losses"]) == 6
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-5)
    for name, part in one["loss_parts"].items():
        assert two["loss_parts"][name] == (None if part is None else pytest.approx(part, rel=1e-4)), name
    for name, value in load_file(world / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-3, msg=name)
    must("merge", "adapter", "-o", "together")
    for name, value in tensors(world / "sparse").items():
        assert torch.equal(tensors(world / "together")[name] != 0, value != 0), name


@pytest.mark.parametrize("options", ["", "--shard world --teacher dense"])
def test_two_processes_find_the_rate_of_one(shallow, start_shallow, options):
    """--steps 32 is the shortest run that has trials; the last --steps counts."""
    more = ("--steps", 32, *options.split())
    one = must(
        *LINE.split(), "--batch-size", 4, "--steps", 32, *options.replace("--shard world", "").split()
    ).json
    restore(shallow, start_shallow)
    two = launch(shallow, 2, "--batch-size", 2, *more)
    assert [each["lr"] for each in two["lr_trials"]] == [each["lr"] for each in one["lr_trials"]]
    for ours, theirs in zip(two["lr_trials"], one["lr_trials"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert two["lr"] == pytest.approx(one["lr"], rel=0.1)  # rounded to two digits
    assert two["losses"][-1] == pytest.approx(one["losses"][-1], rel=0.05)


def test_splitting_needs_processes_to_split_over(world, start):
    assert "this is a single one; start with torchrun" in one_line(
        command(*LINE.split(), "--shard", "world").err
    )
    assert "is not one of 'world', 'node'" in one_line(command(*LINE.split(), "--shard", "all").err)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_splits_models_its_own_way_is_refused(world, start, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    assert "give --shard world or node" in one_line(command(*LINE.split()).err)


def test_one_process_goes_on_where_two_stopped(shallow, start_shallow):
    whole = launch(shallow, 2, "--batch-size", 2, "--save-steps", 3, "--shard", "world")
    restore(shallow, start_shallow)
    for path in (shallow / "adapter" / "checkpoint-6").iterdir():
        path.unlink()
    (shallow / "adapter" / "checkpoint-6").rmdir()
    rest = must(*LINE.split(), "--batch-size", 4, "--save-steps", 3, "--resume").json
    torch.testing.assert_close(
        torch.tensor(rest["losses"][-3:]), torch.tensor(whole["losses"][-3:]), rtol=1e-5, atol=1e-5
    )
    assert rest["loss"] == pytest.approx(whole["loss"], rel=1e-5)
