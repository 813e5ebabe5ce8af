"""What a run of verify does not wait for."""

import os
import subprocess
import sys

import pytest

from spp_fx.sparsity.pattern import parse_pattern
from tests.handmade import lock_of, save_model, sparse

HEAVY = {
    "torch", "numba", "transformers", "onnx", "rich", "yaml", "huggingface_hub",
}  # fmt: skip
CODE = """
import sys
from spp_fx.cli import run
if code := run(sys.argv[1:]):
    sys.exit(code)
print(*sorted(sys.modules), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A 2:4 model folder with its lock; one site does not fill a word."""
    folder = tmp_path_factory.mktemp("start") / "model"
    weights = {"small.weight": sparse(5, 12, "BF16")}
    weights |= {f"layers.{i}.weight": sparse(1024, 1024, "BF16", seed=i) for i in range(8)}
    save_model(folder, [weights])
    (folder / "sparsity.lock.json").write_text(lock_of(weights, parse_pattern("2:4")).dumps())
    return folder


def modules_after(*arguments: str) -> tuple[set[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, env=os.environ, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split()), done.stdout


def test_verify_of_a_model_that_holds_loads_no_heavy_library(model):
    loaded, out = modules_after("verify", str(model))
    assert out.startswith("ok: ")
    assert "spp_fx.sparsity.compiled_scan" in loaded
    assert not loaded & HEAVY
