"""Every benchmark runs and says what it measured, as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import save_tokenizer
from tests.families import make_model

ROOT = Path(__file__).parents[2]
TINY = {
    "linear_step.py": "--width 64 --batch 8 --repeats 1",
    "gpu_train_step.py": "--device cpu --width 64 --batch 8 --repeats 1",
    "model_step.py": "--layers 1 --tokens 32 --seq-len 16 --repeats 1 --dtype bfloat16 "
    "--only lors spp_fused spp_packed sqft sqft_checkpoint",
    "graph_overhead.py": "--layers 1 --tokens 32 --seq-len 16 --repeats 1 --dtype float32",
    "scan.py": "--gib 0.05 --repeats 1",
    "prune_layers.py": "--no-floor --layers 1 --hidden 64 --intermediate 128 --samples 2 --seq-len 16",
    "prune_criteria.py": "MODEL --calib TEXT --data TEXT --samples 2 --seq-len 32 --ways wanda --patterns 2:4",
}


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_it_runs(script, tmp_path):
    options = TINY[script]
    if "MODEL" in options:
        make_model("llama").save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model")
        (tmp_path / "text.txt").write_text(" ".join(["the cat sat"] * 100))
        options = options.replace("MODEL", str(tmp_path / "model")).replace(
            "TEXT", str(tmp_path / "text.txt")
        )
    result = run(script, *options.split())
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert report["question"]
    for case in report.get("results", []):
        assert all(value > 0 for value in case.get("milliseconds", {"all": case.get("seconds", 0)}).values())
    if script in ("linear_step.py", "gpu_train_step.py", "model_step.py"):
        (case, *_) = report["results"]
        assert case["ratio_to_lors"]["lors"] == 1
        assert {"spp_fused", "spp_packed", "sqft", "sqft_checkpoint"} < case["peak_mib"].keys()


def test_nothing_is_claimed_of_a_gpu_that_is_not_there():
    result = run("gpu_train_step.py", "--width", "64", "--batch", "8", "--repeats", "1")
    import torch

    if torch.cuda.is_available():
        assert result.returncode == 0
    else:
        assert result.returncode == 1
        assert "nothing was measured" in result.stderr
        assert result.stdout == ""
