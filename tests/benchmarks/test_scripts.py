"""Every benchmark runs and says what it measured, as JSON."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import save_tokenizer
from tests.effort import nightly
from tests.families import make_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY = {
    "linear_step.py": "--width 64 --batch 8 --repeats 1",
    "gpu_train_step.py": "--device cpu --width 64 --batch 8 --repeats 1",
    "gpu_runtime.py": "--device cpu --shapes 128x256 --tokens 1 4 --repeats 1 --llama tiny --llama-layers 1 "
    "--batches 1 --prompt 4 --new-tokens 2",
    "model_step.py": "--layers 1 --tokens 32 --seq-len 16 --repeats 1 --dtype bfloat16 "
    "--only lors spp_fused spp_packed sqft sqft_checkpoint hira sqft_fused lors_fused hira_fused",
    "graph_overhead.py": "--layers 1 --tokens 32 --seq-len 16 --repeats 1 --dtype float32",
    "pack.py": "--gb 0.02 --rows 256 --repeats 1",
    "export_large.py": "--layers 1 --hidden 128 --intermediate 256 --formats onnx-packed",
    "export_sizes.py": "--layers 1 --hidden 128 --intermediate 256 --patterns 2:4",
    "planted.py": "--gb 0.02 --hidden 128 --intermediate 256 --plants 2 --only BF16 F64",
    "scan.py": "--gib 0.05 --repeats 1",
    "stream.py": "--gb 0.02 --hidden 128 --intermediate 256 --repeats 1",
    "learning_rate.py": "--width 32 --dense-steps 2 --steps 4 --factors 2 --batch 2 --seq-len 16",
    "study.py": "--models demo --dense-steps 2 --criteria wanda --patterns 2:4 --steps 2 --batch 2 --seeds 2 --jobs 1 "
    "--results OUT/runs.jsonl --docs OUT --work OUT/work --only spp 'alpha zero'",
    "prune_layers.py": "--no-floor --layers 1 --hidden 64 --intermediate 128 --samples 2 --seq-len 16",
    "reconstruct.py": "MODEL --text TEXT --data TEXT --patterns 2:4 --windows 2 --seq-len 32 --epochs 1",
    "prune_criteria.py": "MODEL --calib TEXT --data TEXT --samples 2 --seq-len 32 --ways wanda --patterns 2:4",
}


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


TESTED_BELOW = ("gpu_runtime.py",)
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", [nightly(name) if name in TESTED_BELOW else name for name in SCRIPTS])
def test_it_runs(script, tmp_path):
    options = TINY[script]
    if "MODEL" in options:
        make_model("llama").save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model")
        (tmp_path / "text.txt").write_text(" ".join(["the cat sat"] * 100))
        options = options.replace("MODEL", str(tmp_path / "model")).replace(
            "TEXT", str(tmp_path / "text.txt")
        )
    result = run(script, *shlex.split(options.replace("OUT", str(tmp_path))))
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert report["question"]
    for case in report.get("results", []):
        times = case.get("milliseconds", {"all": case["seconds"]} if "seconds" in case else {})
        assert all(value > 0 for value in times.values())
    if script == "export_sizes.py":
        assert report["results"][0]["shares"] == {
            "cusparselt": 0.5625,
            "cutlass": 0.5625,
            "sparse-bitmask": 0.5625,
            "onnx-packed": pytest.approx(0.5625, abs=0.02),  # a table and shapes, beside so few weights
            "onnx-dense": 1.0,
            "onnx": 1.0,  # 16-bit indices reach this far
            "onnx, int64 indices": 2.5,
            "safetensors": 1.0,
        }
    if script == "learning_rate.py":
        (case,) = report["results"]
        assert case["excess"] == pytest.approx(case["loss"] / min(case["loss"], *case["grid"].values()) - 1)
        assert case["before"]["lr"] == pytest.approx(4e-3 * (4096 / 32) ** 0.5)
    if script == "study.py":
        page = (tmp_path / "recovery.md").read_text()
        assert "| spp |" in page
        assert "| alpha zero |" in page
        assert (tmp_path / "pictures" / "recovery-demo-wanda.svg").read_text().endswith("</svg>\n")
        assert all(len(json.loads(row["run"])) == 6 for row in report["results"])
    if script in ("linear_step.py", "gpu_train_step.py", "model_step.py"):
        (case, *_) = report["results"]
        assert case["ratio_to_lors"]["lors"] == 1
        assert {"spp_fused", "spp_packed", "sqft", "sqft_checkpoint"} < case["peak_mib"].keys()
    if script in ("linear_step.py", "gpu_train_step.py"):
        ours = {f"{name}_{way}" for name in ("sqft", "lors", "hira") for way in ("fused", "packed")}
        assert ours | {"hira"} < case["milliseconds"].keys()


def test_nothing_is_claimed_of_a_gpu_that_is_not_there():
    result = run("gpu_train_step.py", "--width", "64", "--batch", "8", "--repeats", "1")
    import torch

    if torch.cuda.is_available():
        assert result.returncode == 0
    else:
        assert result.returncode == 1
        assert "nothing was measured" in result.stderr
        assert result.stdout == ""


def test_dense_and_packed_are_compared_and_on_a_cpu_called_dense(tmp_path):
    output = tmp_path / "results" / "runtime.json"
    result = run("gpu_runtime.py", *TINY["gpu_runtime.py"].split(), "--output", str(output))
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert json.loads(output.read_text()) == report
    (checks,) = report["checks"]
    assert [checks[layout]["runs"] for layout in ("cusparselt", "cutlass")] == ["packed", "packed"]
    names = {"dense", "dense_decoded_from_cusparselt", "dense_decoded_from_cutlass"}
    assert [set(case["milliseconds"]) for case in report["results"]] == [names, names]
    assert set(report["end_to_end"]["forms"]) == names
    for form in report["end_to_end"]["forms"].values():
        assert form["largest_logit_difference"] == 0
        assert form["tokens_per_second"]["1"]["generated"] > 0
    assert "a smoke test" in report["timing"]
    assert report["pays"] == ["not measured, on a CPU both sides are the dense product: a smoke test"]


def test_packs_are_made_where_little_more_than_torch_is_installed(tmp_path):
    """The GPU machines that the benchmark is for cannot install anything."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.machinery as machinery\n"
        "find = machinery.PathFinder.find_spec\n"
        "missing = {'pydantic', 'numba', 'click', 'onnxscript', 'onnx', 'accelerate', 'rich'}\n"
        "machinery.PathFinder.find_spec = lambda name, *rest: None if name in missing else find(name, *rest)\n"
    )
    code = (
        "import torch; from common import packing, packed_layers\n"
        "weight = packing.sparse_weight(128, 128, torch.float16, torch.device('cpu'))\n"
        "print(*[tuple(packing.pack(weight, layout, 90)['packed'].shape) for layout in packing.FORMATS])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.stdout.strip() == "(128, 72) (128, 64)", result.stderr[-2000:]


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], {"same": True, "bytes": 4}),
        ([1, 2, 3, 4], [1, 2, 3], {"same": False, "our_bytes": 4, "their_bytes": 3}),
        (
            [1, 9, 3, 4],
            [1, 2, 3, 5],
            {"differing": 2, "first": 1, "in": "values", "byte_there": 1, "ours": 9},
        ),
        (
            [1, 2, 3, 4],
            [1, 2, 3, 5],
            {"differing": 1, "first": 3, "in": "metadata", "byte_there": 1, "theirs": 5},
        ),
    ],
)
def test_the_first_byte_in_which_two_packs_differ_is_told(ours, theirs, found, monkeypatch):
    import torch

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from common.packing import first_difference

    told = first_difference(*(torch.tensor(each, dtype=torch.uint8) for each in (ours, theirs)), values=2)
    assert found.items() <= told.items()
