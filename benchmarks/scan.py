"""How fast is the look for zeros, against merely reading the file?

    python benchmarks/scan.py --gib 2

Writes a 2:4 bfloat16 file, warms it, and times, in turn and several times over, `cat FILE > /dev/null` and
the whole verification of one tensor: mask, non-zero and non-finite counts, digest, every group of four.
The ratio is that of the two medians: 1 means as fast as `cat`. The naive torch expression runs on a part.
Kernels are compiled, or loaded from the cache, before the first measurement; `first_call_seconds` says
how long that took.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from spp_fx.sparsity.pattern import NM, scan_bits
from spp_fx.sparsity.scan import Scan, scan_file, scan_tensor

COLUMNS = 8192
PATTERN = NM(2, 4)
BLOCK_ROWS = 4096  # 64 MiB
NAIVE_ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file (default 2)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each measurement (default 7)")
    parser.add_argument("--folder", type=Path, help="where to write it (default: the temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "weights.bin"
        block = random_2_4(BLOCK_ROWS)
        rows = max(1, round(options.gib * 2**30 / (2 * COLUMNS * BLOCK_ROWS))) * BLOCK_ROWS
        write(path, block, rows)
        print(json.dumps(measure(path, block[:NAIVE_ROWS], rows, options.repeats), indent=2))


def random_2_4(rows: int) -> torch.Tensor:
    """(rows, COLUMNS) bfloat16 with exactly two non-zeros, at random places, in every group of four."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(rows, COLUMNS // 4, 4, generator=generator)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    return ((scores + 0.5) * kept).reshape(rows, COLUMNS).to(torch.bfloat16)


def write(path: Path, block: torch.Tensor, rows: int) -> None:
    data = block.view(torch.uint8).numpy().tobytes()
    with path.open("wb") as stream:
        for _ in range(rows // BLOCK_ROWS):
            stream.write(data)


def verify(path: Path, rows: int) -> Scan:
    scan = scan_file(path, 0, (rows, COLUMNS), "BF16")
    violations = scan_bits(scan.mask, PATTERN)
    if violations.count or scan.non_finite or 2 * scan.mask.nnz != scan.mask.numel:
        raise SystemExit(f"the file should hold {PATTERN} exactly: {violations}")
    return scan


def measure(path: Path, part: torch.Tensor, rows: int, repeats: int) -> dict[str, object]:
    size = path.stat().st_size
    first_call = seconds(lambda: scan_bits(scan_tensor(part).mask, PATTERN))
    cat = ["sh", "-c", 'cat "$0" > /dev/null', str(path)]
    subprocess.run(cat, check=True)
    verify(path, rows)
    cats: list[float] = []
    scans: list[float] = []
    for _ in range(repeats):
        cats.append(seconds(lambda: subprocess.run(cat, check=True)))
        scans.append(seconds(lambda: verify(path, rows)))
    naive = median(seconds(lambda: ((part.view(-1, 4) != 0).sum(-1) <= 2).all()) for _ in range(3))
    rates = {
        "cat": size / median(cats) / 1e9,
        "scan": size / median(scans) / 1e9,
        "naive": part.nbytes / naive / 1e9,
    }
    return {
        "question": "throughput of the whole look at a 2:4 bfloat16 file, against cat FILE > /dev/null",
        "gib": size / 2**30,
        "repeats": repeats,
        "gb_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "scan_gb_per_s_range": [round(size / s / 1e9, 2) for s in (max(scans), min(scans))],
        "ratio_to_cat": round(rates["scan"] / rates["cat"], 3),
        "ratio_to_naive": round(rates["scan"] / rates["naive"], 1),
        "first_call_seconds": round(first_call, 3),
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
