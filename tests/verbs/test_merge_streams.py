"""merge while the world changes: inputs that move, transposed and empty weights, locks without a read-back."""

import json
import os
import subprocess
import sys

import pytest
import torch

from spp_fx.sparsity.lock import load_lock
from spp_fx.verbs.merge import FoldPlan
from tests.command import command, must, one_line, rewrite, tensors

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("changed", ["adapter/adapter_model.safetensors", "sparse/model.safetensors"])
def test_an_input_that_changes_on_the_way_is_no_output(world, monkeypatch, changed):
    """Parts of both versions could be in it."""
    true_changes = FoldPlan.changes

    def changes(plan, shard):
        yield from true_changes(plan, shard)
        path = world / changed
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))

    monkeypatch.setattr(FoldPlan, "changes", changes)
    result = command("merge", world / "adapter", "-o", world / "new", "-q")
    assert result.code == 1
    assert "changed while" in one_line(result.err)
    assert changed in result.err
    assert not (world / "new").exists()
    assert not (world / ".new.work").exists()


def test_a_lock_without_read_back_is_that_of_what_was_written(world):
    def cancel(values: dict[str, torch.Tensor]) -> None:
        values[f"{Q}.spp_alpha"][0] = -1.0
        values[f"{Q}.spp_alpha"][1:] = 1.0
        values[f"{Q}.spp_beta"].fill_(0.5)

    rewrite(world / "adapter" / "adapter_model.safetensors", cancel)
    must("merge", world / "adapter", "-o", world / "new", "--vanish", "allow", "--no-verify-sparsity")
    before = load_lock(world / "sparse" / "sparsity.lock.json").by_name()
    after = load_lock(world / "new" / "sparsity.lock.json").by_name()
    assert after.keys() == before.keys()
    assert after[Q].nnz == int((tensors(world / "new")[Q] != 0).sum()) < before[Q].nnz
    must("verify", world / "new")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_merge_says_what_it_keeps_even_when_quiet(world, tmp_path):
    """The process interrupts itself when its first file is finished: the main thread waits for that.

    The handler is installed here: Python leaves it out where SIGINT is ignored, as in a shell's background.
    """
    must("inject", world / "sharded", "-o", world / "many", "--rank", 4)
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import signal, sys, threading\n"
        "from spp_fx.storage.workspace import Workspace\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "first, true = threading.Lock(), Workspace.finish\n"
        "def finish(self, name, **facts):\n"
        "    true(self, name, **facts)\n"
        "    if first.acquire(blocking=False):\n"
        "        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)\n"
        "Workspace.finish = finish\n"
        "from spp_fx.cli import run\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    words = [sys.executable, script, "merge", world / "many", "-o", world / "new", "-q"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    errors = done.stderr
    assert done.returncode == 130, errors
    assert "interrupted\n" in errors
    assert ".new.work keeps" in errors
    assert not (world / "new").exists()
    must("merge", world / "many", "-o", world / "new")
    must("merge", world / "many", "-o", world / "undisturbed")
    assert tensors(world / "new").keys() == tensors(world / "undisturbed").keys()
    assert json.loads((world / "new" / "sparsity.lock.json").read_text())
    for path in (world / "undisturbed").glob("*.safetensors"):
        assert (world / "new" / path.name).read_bytes() == path.read_bytes()
