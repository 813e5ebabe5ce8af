"""How fast is packing, against merely copying the file?

    python benchmarks/pack.py --gb 1

Writes a folder of 2:4 bfloat16 matrices with its lock, reads it once, and times in turn, several times over:

- `cp` of the weights' file, and `cp` with `sync` of the copy;
- the packing stream of each format: read, pack, write, `fsync`; and the same without `fsync`, as in `cp`;
- the whole of `spp-fx export`: the model's lock proven, packed, read back and compared, verified. The lock
  spares it the tracing of the model.

Rates are bytes of dense weights a second, by the median; `ratio_to_cp` and `ratio_to_cp_and_sync` are theirs
to that of a copy. `peak_mb` is what the process held at most beyond what it held before. Kernels are compiled,
or loaded from the cache, before the first measurement.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from common.report import publish

from spp_fx.exporters import cusparselt, cutlass, sparse_bitmask
from spp_fx.exporters.format import Source
from spp_fx.exporters.packed import Choose, Layouts, plan, write_files
from spp_fx.sparsity.lock import LOCK_NAME, Lock, load_lock, make_entry
from spp_fx.sparsity.pattern import NM
from spp_fx.sparsity.scan import pack_mask
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.writer import write_safetensors
from spp_fx.verbs.export import export

WEIGHTS = "model.safetensors"
COLUMNS = 8192
BLOCK_ROWS = 2048  # 32 MiB
PATTERN = NM(2, 4)


def pack_cusparselt(source: Source, out: Path, sm: int) -> None:
    write_packed(source, out, partial(cusparselt.choose_layout, sm=sm), cusparselt.layouts(sm))


def pack_cutlass(source: Source, out: Path) -> None:
    write_packed(source, out, cutlass.choose_layout, cutlass.LAYOUTS)


def write_packed(source: Source, out: Path, choose: Choose, layouts: Layouts) -> None:
    out.mkdir()
    write_files(source, out, plan(source, choose, "takes 2:4 matrices"), layouts, lambda *_: None)


def pack_bitmask(source: Source, out: Path) -> None:
    sparse_bitmask.write_shard(source, source.folder.shards[0], out, lambda *_: None)


STREAMS: dict[str, Callable[[Source, Path], None]] = {
    "cusparselt-sm80": lambda source, out: pack_cusparselt(source, out, 80),
    "cusparselt-sm90": lambda source, out: pack_cusparselt(source, out, 90),
    "cutlass": pack_cutlass,
    "sparse-bitmask": pack_bitmask,
}
EXPORTS: dict[str, tuple[str, dict[str, int]]] = {
    "export-cusparselt-sm80": ("cusparselt", {"sm": 80}),
    "export-cusparselt-sm90": ("cusparselt", {"sm": 90}),
    "export-cutlass": ("cutlass", {}),
    "export-sparse-bitmask": ("sparse-bitmask", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of the weights (default 1)")
    parser.add_argument("--rows", type=int, default=4096, help=f"of a matrix of {COLUMNS} columns")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement (default 5)")
    parser.add_argument("--only", nargs="+", choices=[*STREAMS, *EXPORTS], default=[*STREAMS, *EXPORTS])
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = Path(folder) / "model"
        model.mkdir()
        write_model(model, max(1, round(options.gb * 1e9 / (2 * COLUMNS * options.rows))), options.rows)
        report = measure(model, Path(folder) / "out", options.only, options.repeats)
    publish(report, options.output)


def write_model(folder: Path, matrices: int, rows: int) -> None:
    """A folder of 2:4 matrices (rows, COLUMNS), all of the same blocks, with its lock."""
    block = random_2_4(min(rows, BLOCK_ROWS))
    weight = block.repeat(-(-rows // len(block)), 1)[:rows]
    names = [f"layers.{index}.weight" for index in range(matrices)]
    specs = [(name, "BF16", (rows, COLUMNS)) for name in names]
    write_safetensors(folder / WEIGHTS, specs, lambda _: weight, {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "none"}\n')
    mask = pack_mask(weight)
    lock = Lock.of(make_entry(name, "linear", mask, PATTERN) for name in names)
    (folder / LOCK_NAME).write_text(lock.dumps())


def random_2_4(rows: int) -> torch.Tensor:
    """(rows, COLUMNS) bfloat16 with two non-zeros, at random places, in every group of four."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(rows, COLUMNS // 4, 4, generator=generator)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    return ((scores + 0.5) * kept).reshape(rows, COLUMNS).to(torch.bfloat16)


def measure(model: Path, out: Path, only: list[str], repeats: int) -> dict[str, object]:
    source = Source(ModelFolder.open(model), load_lock(model / LOCK_NAME), trust_remote_code=False)
    runs: dict[str, Callable[[], object]] = {
        "cp": lambda: subprocess.run(["cp", model / WEIGHTS, out], check=True),
        "cp and sync": lambda: subprocess.run(
            ["sh", "-c", 'cp "$0" "$1" && sync "$1"', model / WEIGHTS, out], check=True
        ),
    }
    for name in only:
        if name in STREAMS:
            runs[name] = lambda stream=STREAMS[name]: stream(source, out)
            runs[f"{name} without sync"] = lambda stream=STREAMS[name]: without_sync(stream, source, out)
        else:
            format, options = EXPORTS[name]
            runs[name] = lambda format=format, options=options: export(model, out, format, **options)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for turn in range(repeats + 1):  # the first is to warm up
        for name, run in runs.items():
            os.sync()  # what others left to be written is not this run's to wait for
            before = reset_peak()
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
                peaks[name] = max(peaks.get(name, 0), peak() - before)
            remove(out)
    size = source.folder.stored_bytes
    rates = {name: size / median(each) / 1e9 for name, each in seconds.items()}
    return {
        "question": "bytes of dense weights packed a second, against cp of the file",
        "command": "python benchmarks/pack.py " + " ".join(sys.argv[1:]),
        "gb": round(size / 1e9, 3),
        "largest_tensor_mb": round(
            max(i.nbytes for i in source.folder.shards[0].header.tensors.values()) / 1e6
        ),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "repeats": repeats,
        "gb_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "ratio_to_cp": {name: round(rate / rates["cp"], 3) for name, rate in rates.items()},
        "ratio_to_cp_and_sync": {n: round(rate / rates["cp and sync"], 3) for n, rate in rates.items()},
        "peak_mb": {name: round(peaks[name] / 1e6) for name in only},
    }


def without_sync(stream: Callable[[Source, Path], None], source: Source, file: Path) -> None:
    with mock.patch("os.fsync"):
        stream(source, file)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def reset_peak() -> int:
    """Bytes that this process holds now; what it holds at most is counted from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
