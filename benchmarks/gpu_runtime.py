"""When does 2:4 pay on a GPU? Dense and packed linears at 1 to 8192 tokens, and a model that generates.

    PYTHONPATH=. python benchmarks/gpu_runtime.py

First it holds our packs to the library: cuSPARSELt's own compression of the same weight must give the same
bytes (which is the proof of the metadata's order on that GPU), and products must be those of the dense weight.
Then it times. The table goes to stderr, the JSON to stdout and to benchmarks/results/gpu_runtime.json.

Needs torch with CUDA, and this checkout; the model that generates needs transformers as well.
With `--device cpu` it only tries itself out: both sides are the dense product.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import packed_layers

RESULT = Path(__file__).parent / "results" / "gpu_runtime.json"
SMOKE = "a CPU both sides are the dense product: a smoke test"


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_runtime: torch sees no CUDA device, so nothing was measured")
    if options.repeats < 5 and device.type == "cuda":
        sys.exit("gpu_runtime: a median needs --repeats 5 or more")
    dtype, sm = getattr(torch, options.dtype), capability(device)
    shapes = options.shapes or [
        (f"{size} {layer}", shape)
        for size in options.models
        for layer, shape in packed_layers.LLAMAS[size].items()
    ]
    report: dict[str, Any] = {
        "question": "when 2:4 pays: dense and packed linears, and generation",
        "on": describe(device),
        "timing": f"median of {options.repeats}; CUDA events, queued ahead, L2 overwritten before each"
        if device.type == "cuda"
        else SMOKE,
        "checks": [],
        "results": [],
        "end_to_end": None,
    }
    for layer, shape in shapes:
        say(f"{layer}: {shape[0]} x {shape[1]}")
        checks, results = packed_layers.measure(
            layer, shape, dtype, options.tokens, options.repeats, device, sm
        )
        report["checks"].append(checks)
        report["results"] += results
    if options.llama_layers:
        report["end_to_end"] = generate(options, dtype, device, sm)
    lines = list(packed_layers.table(report["results"]))
    report["pays"] = lines if device.type == "cuda" else [f"not measured, on {SMOKE}"]
    tell(report)
    text = json.dumps(report, indent=1)
    print(text)
    output = options.output or (RESULT if device.type == "cuda" else None)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=list(packed_layers.LLAMAS), default=list(packed_layers.LLAMAS)
    )
    parser.add_argument(
        "--shapes", nargs="+", type=read_shape, help="such as 4096x11008, instead of --models"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**n for n in range(14)])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--llama", choices=["tiny", "1B", "7B"], default="7B", help="the model that generates"
    )
    parser.add_argument("--llama-layers", type=int, default=16, help="of it; 0 leaves it out")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try it out")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    return parser.parse_args()


def read_shape(text: str) -> tuple[str, tuple[int, int]]:
    m, _, k = text.partition("x")
    return "layer", (int(m), int(k))


def capability(device: torch.device) -> int:
    """What packs are made for; on a CPU as for Ampere."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def describe(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    known = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        known |= {"sm": capability(device), "cusparselt": torch.backends.cusparselt.version()}
    return known


def generate(
    options: argparse.Namespace, dtype: torch.dtype, device: torch.device, sm: int
) -> dict[str, Any]:
    if find_spec("transformers") is None:
        return {"left_out": "transformers is not installed"}
    from common import packed_model

    say(f"Llama {options.llama}, {options.llama_layers} layers")
    return packed_model.measure(
        options.llama, options.llama_layers, dtype, options.batches, options.prompt, options.new_tokens,
        min(options.repeats, 5), device, sm,
    )  # fmt: skip


def tell(report: dict[str, Any]) -> None:
    say(f"on {report['on']['device']}; {report['timing']}")
    for checks in report["checks"]:
        say(f"{checks['layer']} {checks['shape'][0]} x {checks['shape'][1]}: {told(checks)}")
    for line in report["pays"]:
        say(line)
    for form, found in ((report["end_to_end"] or {}).get("forms") or {}).items():
        for batch, speeds in found.get("tokens_per_second", {}).items():
            say(f"{form}, batch {batch}: {speeds['generated']} tokens/s generated, {speeds['prompt']} read")


def told(checks: dict[str, Any]) -> str:
    """The checks of a layer in one line."""
    found = checks.get("bytes", {"same": None, "reason": "no pack is made ahead of time for this GPU"})
    verdicts = {
        True: "bytes match",
        False: f"BYTES DIFFER {found}",
        None: f"bytes not compared ({found.get('reason')})",
    }
    words = [verdicts[found["same"]]]
    for layout in ("cusparselt", "cutlass"):
        reason = checks[layout]["reason"]
        words.append(f"{layout} {checks[layout]['runs']}" + (f" ({reason})" if reason else ""))
    return ", ".join(words)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
