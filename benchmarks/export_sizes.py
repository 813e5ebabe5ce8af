"""What do the sparse weights of a model take in each export format, against dense float16?

    python benchmarks/export_sizes.py

Makes a random Llama-shaped model, prunes it to each pattern, rounds it to float16, and writes every format.
`shares` are bytes of the sparse weights in the export by bytes of the same weights dense; `whole` counts all
files of the export, by those of the dense model. The table goes to stderr, the JSON to stdout.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common.llama import Shape, write_llama
from common.report import publish
from transformers import AutoModelForCausalLM, AutoTokenizer

import spp_fx

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "cusparselt": ("cusparselt", {}),
    "cutlass": ("cutlass", {}),
    "sparse-bitmask": ("sparse-bitmask", {}),
    "onnx-packed": ("onnx-packed", {"compare_logits": False}),
    "onnx-dense": ("onnx-dense", {"compare_logits": False}),
    "onnx": ("onnx", {"compare_logits": False}),
    "onnx, int64 indices": ("onnx", {"compare_logits": False, "indices": "int64"}),
    "safetensors": ("safetensors", {}),
}
ONLY_2_4 = ("cusparselt", "cutlass")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "2:8", "50%", "80%"])
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    shape = Shape(options.hidden, options.intermediate, 8, 4, options.layers)
    with tempfile.TemporaryDirectory() as folder:
        bfloat16, dense = Path(folder) / "bfloat16", Path(folder) / "dense"
        write_llama(bfloat16, shape)
        rounded(bfloat16, dense)
        results = [measure(dense, Path(folder), pattern) for pattern in options.patterns]
    report = {
        "question": "bytes of the sparse weights in each format, against dense float16",
        "command": "python benchmarks/export_sizes.py " + " ".join(sys.argv[1:]),
        "results": results,
    }
    tell(results)
    publish(report, options.output)


def rounded(model: Path, out: Path) -> None:
    """The same model in float16: as transformers saves it."""
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def measure(dense: Path, folder: Path, pattern: str) -> dict[str, Any]:
    """Shares of every format that takes the pattern."""
    model, out = folder / "sparse", folder / "out"
    spp_fx.prune(dense, model, method="magnitude", pattern=pattern)
    shares: dict[str, float] = {}
    whole: dict[str, float] = {}
    for name, (format, options) in FORMATS.items():
        if name in ONLY_2_4 and pattern != "2:4":
            continue
        data = spp_fx.export(model, out, format, **options).to_json()
        shares[name] = round(data["sizes"]["sites_bytes"] / data["sizes"]["dense_bytes"], 4)
        whole[name] = round(sum(file["bytes"] for file in data["files"]) / folder_bytes(dense), 4)
        shutil.rmtree(out)
    shutil.rmtree(model)
    return {"pattern": pattern, "shares": shares, "whole": whole}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tell(results: list[dict[str, Any]]) -> None:
    """The shares, a line a format, a column a pattern."""
    print("".ljust(22) + "".join(f"{each['pattern']:>9}" for each in results), file=sys.stderr)
    for name in FORMATS:
        cells = (f"{each['shares'].get(name, '-'):>9}" for each in results)
        print(name.ljust(22) + "".join(cells), file=sys.stderr)


if __name__ == "__main__":
    main()
