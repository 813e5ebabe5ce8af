"""One case by its number: a copy of an artifact, and the damage done to it."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from google.protobuf.message import DecodeError

from spp_fx.sparsity.lock import LOCK_NAME
from tests.fuzz import bytewise, graphfile, jsonish, tensorfile, values
from tests.fuzz.seeds import Seed

MANIFEST = "export.json"
_LIKELY = {
    ".safetensors": 8,
    ".onnx": 8,
    ".data": 3,
    "adapter_config.json": 6,
    MANIFEST: 5,
    LOCK_NAME: 4,
    "model.safetensors.index.json": 6,
    "config.json": 1,
    "generation_config.json": 0,
    "README.md": 0,
}


@dataclass
class Case:
    """A damaged artifact.

    Attributes:
        number: the case.
        seed: the artifact, in the copy that was damaged.
        done: what was done, file by file.
        lock_touched: its own lock no longer binds it.
        harmless: nothing that verify looks for has changed.
    """

    number: int
    seed: Seed
    done: list[str] = field(default_factory=list)
    lock_touched: bool = False
    harmless: bool = False


def rng_of(seed: int, number: int) -> Random:
    """The choices of a case, the same on every machine."""
    return Random(f"{seed}/{number}")


def make(rng: Random, number: int, seed: Seed, scratch: Path) -> Case:
    """Copy an artifact into a new folder and damage it."""
    copy, outside = scratch / "work", scratch / "outside"
    shutil.copytree(seed.root, copy)
    outside.mkdir()
    case = Case(number, seed.at(copy))
    for _ in range(rng.choice([1, 1, 1, 1, 1, 2])):
        files = sorted(path for path in copy.rglob("*") if _can_be_damaged(path))
        if not files:
            break
        path = rng.choices(files, [_weight(path) for path in files])[0]
        try:
            what, harmless = _damage(rng, path, outside, seed)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            OSError,
            DecodeError,
            RecursionError,
        ) as error:
            if not case.done:
                raise
            what, harmless = f"could not be damaged twice ({type(error).__name__})", False
        case.harmless = harmless and not case.done
        case.done.append(f"{path.relative_to(copy)}: {what}")
        case.lock_touched |= path.name == LOCK_NAME
    if rng.random() < 0.9:
        _seal(copy)
    else:
        case.harmless = False
    return case


def _can_be_damaged(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24


def _weight(path: Path) -> int:
    return _LIKELY.get(path.name, _LIKELY.get(path.suffix, 1))


def _damage(rng: Random, path: Path, outside: Path, seed: Seed) -> tuple[str, bool]:
    draw = rng.random()
    if draw < 0.06:
        return bytewise.replace_file(rng, path, outside), False
    if draw < 0.22:
        return _bytes(path, bytewise.mutate(rng, path.read_bytes())), False
    if path.suffix == ".json":
        if path.name.endswith("index.json") and draw < 0.5:
            return _index(rng, path, outside, seed), False
        text, what = jsonish.mutate(rng, path.read_bytes())
        return _bytes(path, (text.encode("utf-8", "surrogatepass"), what)), False
    if path.suffix in (".safetensors", ".onnx"):
        if draw < 0.55:
            return values.mutate(rng, path)
        if path.suffix == ".onnx":
            return graphfile.mutate(rng, path), False
        if path.parent.name == "sparse" and draw < 0.8:
            return _bytes(path, tensorfile.mutate_inner(rng, path.read_bytes())), False
        return _bytes(path, tensorfile.mutate(rng, path.read_bytes())), False
    return _bytes(path, bytewise.mutate(rng, path.read_bytes())), False


def _bytes(path: Path, changed: tuple[bytes, str]) -> str:
    path.write_bytes(changed[0])
    return changed[1]


def _index(rng: Random, path: Path, outside: Path, seed: Seed) -> str:
    """An index that leads elsewhere: out of the folder, through links, to another shard, in other words."""
    index = json.loads(path.read_bytes())
    weights: dict[str, str] = index["weight_map"]
    name = rng.choice(sorted(weights))
    file = weights[name]
    shutil.copy(seed.root / path.parent.name / file, outside / file)
    choice = rng.choice(
        ["absolute", "above", "link", "linked folder", "other", "dots", "drop", "add", "case", "all"]
    )
    if choice == "absolute":
        weights[name] = str(outside / file)
    elif choice == "above":
        weights[name] = f"../../outside/{file}"
    elif choice == "link":
        (path.parent / "linked.safetensors").symlink_to(outside / file)
        weights |= {key: "linked.safetensors" for key, value in weights.items() if value == file}
    elif choice == "linked folder":
        (path.parent / "sub").symlink_to(outside, target_is_directory=True)
        weights |= {key: f"sub/{file}" for key, value in weights.items() if value == file}
    elif choice == "other":
        weights[name] = rng.choice(sorted(set(weights.values())))
    elif choice == "dots":
        weights[name] = rng.choice(
            [f"./{file}", f"a/../{file}", f"{file}/", f"//{file}", f"\\{file}", f"C:{file}"]
        )
    elif choice == "drop":
        del weights[name]
    elif choice == "add":
        weights[name + ".more"] = file
    elif choice == "case":
        weights[name] = file.upper()
    else:
        weights |= dict.fromkeys(weights, file)
    path.write_text(json.dumps(index))
    return f"index {choice} of {name}"


def _seal(copy: Path) -> None:
    """Give export.json the digests of what is there now: then only what is in the files can tell."""
    for path in copy.rglob(MANIFEST):
        if not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 20:
            continue
        try:
            manifest = json.loads(path.read_bytes())
            for name in manifest["files"]:
                file = path.parent / name
                if file.is_file() and file.stat().st_size < 1 << 24:
                    manifest["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
            if _sound(path):
                path.write_text(json.dumps(manifest))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            continue  # it was damaged itself: it stays as it is


def _sound(path: Path) -> bool:
    """Whether writing a manifest again keeps its damage: no key twice, no number that JSON has not."""
    text = path.read_text("utf-8")
    return jsonish.dump(jsonish.parse(text)) == json.dumps(json.loads(text), separators=(",", ":"))


def describe(done: Iterable[str]) -> str:
    return "; ".join(done)
