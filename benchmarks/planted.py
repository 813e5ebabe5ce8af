"""Is one changed weight in a large artifact found and named, whatever the artifact is?

    python benchmarks/planted.py --gb 1

Makes a random Llama-shaped model of that size, pruned to 2:4, and

- in its folder, in folders of other dtypes, and in single files of dtypes that no model of transformers has,
  changes one random weight in place: a zero to a non-zero, or the other way round, and puts it back
  after `spp-fx verify` by the lock;
- for each export format that holds weights in another form, exports the model and a copy of it that has one
  non-zero less, and gives each export the lock of the other, its digest made good.

`verify --json` must fail that very site, alone, and name row and column. The report counts how often it did;
`untouched` says that verify was silent before. Exits 1 where one was missed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.llama import Shape, write_llama
from common.process import run_spp_fx
from common.report import publish

from spp_fx.sparsity.kernels import element_type
from spp_fx.sparsity.lock import LOCK_NAME, load_lock
from spp_fx.storage.folder import ModelFolder
from spp_fx.storage.safetensors import Shard, TensorInfo, torch_dtype
from spp_fx.storage.writer import write_safetensors

MODELS = ("BF16", "F16", "F32")
PACKED = ("cusparselt", "cutlass", "sparse-bitmask", "onnx", "onnx-packed", "onnx-dense")
LONE = {"F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(frozen=True)
class Place:
    tensor: str
    row: int
    column: int

    def is_named(self, verdict: dict[str, Any]) -> bool:
        """Whether a verdict fails this site, no other, and says where."""
        failed = [site for site in verdict["sites"] if not site["ok"]]
        words = f"row {self.row}, column {self.column}:"
        return (
            not verdict["ok"]
            and [s["name"] for s in failed] == [self.tensor]
            and words in failed[0]["reason"]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=1)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument(
        "--only", nargs="+", metavar="ARTIFACT", default=[*MODELS, *LONE, *PACKED],
        help="of BF16, F16, F32 (model folders), F64, F8_E4M3, F8_E5M2 (files) and the export formats",
    )  # fmt: skip
    parser.add_argument("--plants", type=int, default=4, help="for each artifact that is changed in place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    random = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = list(measure(Path(folder), options, random))
    missed = sum(result["plants"] - result["named"] for result in results)
    report = {
        "question": "one changed weight in a large artifact: is it found and named?",
        "command": "python benchmarks/planted.py " + " ".join(sys.argv[1:]),
        "missed": missed,
        "results": results,
    }
    publish(report, options.output)
    if missed or not all(result["untouched"] for result in results):
        sys.exit("planted: a changed weight was missed, or an untouched artifact failed")


def measure(root: Path, options: argparse.Namespace, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    model = make_model(root, options)
    for dtype in (dtype for dtype in MODELS if dtype in options.only):
        folder = model if dtype == "BF16" else converted(model, root / dtype, dtype)
        yield in_place(f"model {dtype}", folder, options.plants, random)
        if folder != model:
            shutil.rmtree(folder)
    for dtype in (dtype for dtype in LONE if dtype in options.only):
        file = lone_file(root / "lone", dtype, options.gb, random)
        yield in_place(f"safetensors {dtype}", file, options.plants, random)
        shutil.rmtree(root / "lone")
    formats = [format for format in PACKED if format in options.only]
    if formats:
        place, less = without_one(model, root / "less", random)
        for format in formats:
            yield exported(format, root, (model, less), place)


def exported(format: str, root: Path, models: tuple[Path, Path], place: Place) -> dict[str, Any]:
    """Exports of two models that differ in one weight, each with the other's lock."""
    extra = ["--dtype", "float16", "--no-compare-logits"] if format.startswith("onnx") else []
    named, untouched, seconds = 0, True, 0.0
    out = root / "out"
    for model, other in (models, models[::-1]):
        run_spp_fx("export", model, "--format", format, "-o", out, "-q", *extra)
        untouched &= verify(out)["ok"]
        put_lock(out, (other / LOCK_NAME).read_bytes())
        start = time.perf_counter()
        named += place.is_named(verify(out))
        seconds += time.perf_counter() - start
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        shutil.rmtree(out)
    return {
        "artifact": format, "gb": round(size / 1e9, 3), "plants": 2, "named": named, "untouched": untouched,
        "seconds": round(seconds / 2, 2),
    }  # fmt: skip


def make_model(root: Path, options: argparse.Namespace) -> Path:
    hidden, heads = options.hidden, max(1, options.hidden // 64)
    shape = Shape(hidden, options.intermediate, heads, max(1, heads // 4), 1)
    layers = max(1, round((1e9 * options.gb - 4 * 32000 * hidden) / (2 * shape.layer_parameters)))
    dense, model = root / "dense", root / "model"
    write_llama(dense, Shape(hidden, options.intermediate, heads, max(1, heads // 4), layers))
    run_spp_fx("prune", dense, "-o", model, "--pattern", "2:4", "-q")
    shutil.rmtree(dense)
    return model


def converted(model: Path, target: Path, dtype: str) -> Path:
    """The model with all its tensors in another dtype, and a lock of what that made of their zeros."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors", "sparsity.*"))
    for shard in ModelFolder.open(model).shards:
        specs = [(info.name, dtype, info.shape) for info in shard.header.tensors.values()]

        def produce(name: str, shard: Shard = shard) -> torch.Tensor:
            return shard.read(name).to(torch_dtype(dtype))

        write_safetensors(target / shard.name, specs, produce, {"format": "pt"})
    run_spp_fx("lock", target, "-q")
    return target


def lone_file(folder: Path, dtype: str, gb: float, random: np.random.Generator) -> Path:
    """A file of 2:4 matrices of one dtype, and its lock."""
    folder.mkdir()
    columns = 4096
    rows = max(4, round(1e9 * gb / 4 / columns / LONE[dtype].itemsize))
    names = [f"layers.{i}.mlp.up_proj.weight" for i in range(4)]

    def blocks(_: str) -> Iterator[torch.Tensor]:
        for start in range(0, rows, 1024):
            count = min(1024, rows - start)
            values = torch.from_numpy(random.uniform(0.5, 1, (count, columns // 4, 4)).astype(np.float32))
            values[:, :, 1::2] = 0
            yield values.reshape(count, columns).to(LONE[dtype])

    path = folder / "weights.safetensors"
    write_safetensors(path, [(name, dtype, (rows, columns)) for name in names], blocks)
    run_spp_fx("lock", path, "-q")
    return path


def in_place(name: str, artifact: Path, plants: int, random: np.random.Generator) -> dict[str, Any]:
    folder = artifact.is_dir()
    shards = ModelFolder.open(artifact).shards if folder else (Shard.open(artifact),)
    lock = load_lock((artifact if folder else artifact.parent) / LOCK_NAME)
    before = verify(artifact)["ok"]
    named, seconds = 0, 0.0
    for turn in range(plants):
        entry = lock.sites[random.integers(len(lock.sites))]
        shard = next(shard for shard in shards if entry.name in shard.header.tensors)
        with planted(shard, shard.info(entry.name), zero=turn % 2 == 0, random=random) as place:
            start = time.perf_counter()
            named += place.is_named(verify(artifact))
            seconds += time.perf_counter() - start
    size = sum(shard.path.stat().st_size for shard in shards)
    return {
        "artifact": name, "gb": round(size / 1e9, 3), "plants": plants, "named": named, "untouched": before,
        "seconds": round(seconds / plants, 2),
    }  # fmt: skip


@contextmanager
def planted(shard: Shard, info: TensorInfo, *, zero: bool, random: np.random.Generator) -> Iterator[Place]:
    """One random weight that is zero made non-zero, or the other way round; put back at the end."""
    kind = element_type(info.dtype)
    rows, columns = info.shape
    with open(shard.path, "r+b") as file:
        while True:
            index = int(random.integers(rows * columns))
            file.seek(info.start + index * kind.itemsize)
            old = file.read(kind.itemsize)
            if (int.from_bytes(old, "little") & kind.magnitude == 0) == zero:
                break
        least = 1 if zero else 0  # the smallest subnormal, which is no zero
        for value in (least.to_bytes(kind.itemsize, "little"), old):
            file.seek(info.start + index * kind.itemsize)
            file.write(value)
            file.flush()
            if value is not old:
                yield Place(info.name, *divmod(index, columns))


def without_one(model: Path, target: Path, random: np.random.Generator) -> tuple[Place, Path]:
    """A copy of a model with one non-zero less, and its own lock."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("sparsity.*"))
    lock = load_lock(model / LOCK_NAME)
    entry = lock.sites[random.integers(len(lock.sites))]
    shard, info = ModelFolder.open(target).info(entry.name)
    with open(shard.path, "r+b") as file:
        while True:
            index = int(random.integers(info.shape[0] * info.shape[1]))
            file.seek(info.start + 2 * index)
            if any(file.read(2)):
                break
        file.seek(info.start + 2 * index)
        file.write(bytes(2))
    run_spp_fx("lock", target, "--pattern", "2:4", "-q")
    return Place(entry.name, *divmod(index, info.shape[1])), target


def put_lock(export: Path, lock: bytes) -> None:
    """Give an export another lock, and make the digest of it good."""
    (export / LOCK_NAME).write_bytes(lock)
    path = export / "export.json"
    manifest = json.loads(path.read_text())
    manifest["files"][LOCK_NAME] = hashlib.sha256(lock).hexdigest()
    path.write_text(json.dumps(manifest))


def verify(artifact: Path) -> dict[str, Any]:
    """The verdict, whatever it is."""
    run = subprocess.run(
        [sys.executable, "-m", "spp_fx", "verify", artifact, "-q", "--json"],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    if run.returncode not in (0, 1):
        sys.exit(f"planted: verify failed: {run.stderr}")
    return json.loads(run.stdout)


if __name__ == "__main__":
    main()
