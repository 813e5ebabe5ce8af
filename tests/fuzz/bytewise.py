"""Damage to files that asks nothing of what they hold."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

HOLE = 9 << 28
"""Size of a file that is mostly a hole, in bytes: more than a case may take of memory."""


def mutate(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Changed bytes, and what was done to them."""
    operation = rng.choice(OPERATIONS)
    return operation(rng, bytearray(data)), operation.__name__[1:]


def _flip(rng: Random, data: bytearray) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 2, 16])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _flip_in_head(rng: Random, data: bytearray) -> bytes:
    if data:
        data[rng.randrange(min(len(data), 256))] = rng.randrange(256)
    return bytes(data)


def _truncate(rng: Random, data: bytearray) -> bytes:
    return bytes(data[: rng.choice([0, 1, 7, 8, 9, max(0, len(data) - 1), rng.randrange(len(data) + 1)])])


def _extend(rng: Random, data: bytearray) -> bytes:
    return bytes(data) + rng.choice([b"\0", b" ", b"\n", b"{}", rng.randbytes(8), bytes(data), b"\0" * 4096])


def _cut(rng: Random, data: bytearray) -> bytes:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice([1, 2, 8, 100])]
    return bytes(data)


def _splice(rng: Random, data: bytearray) -> bytes:
    start, target = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    piece = bytes(data[start : start + rng.choice([1, 4, 16, 512])])
    if rng.random() < 0.5:
        data[target : target + len(piece)] = piece
    else:
        data[target:target] = piece
    return bytes(data)


def _lie_about_length(rng: Random, data: bytearray) -> bytes:
    length = int.from_bytes(data[:8], "little")
    lies = [0, 1, length - 1, length + 1, len(data), len(data) - 8, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1]
    data[:8] = (rng.choice(lies) % 2**64).to_bytes(8, "little")
    return bytes(data)


def _noise(rng: Random, data: bytearray) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 16, 5000]))


OPERATIONS: tuple[Callable[[Random, bytearray], bytes], ...] = (
    _flip,
    _flip,
    _flip_in_head,
    _truncate,
    _extend,
    _cut,
    _splice,
    _lie_about_length,
    _noise,
)


def replace_file(rng: Random, path: Path, outside: Path) -> str:
    """Put something that is no such file in the place of a file.

    Args:
        outside: a folder that is no part of the artifact.
    """
    operation = rng.choice(REPLACEMENTS)
    other = rng.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
    copy = Path(shutil.copy(path, outside / path.name))
    held = other.read_bytes()
    path.unlink()
    operation(path, copy, held)
    return f"{operation.__name__[1:]} for {path.name}"


def _nothing(path: Path, copy: Path, other: bytes) -> None:
    """The file is gone."""


def _empty(path: Path, copy: Path, other: bytes) -> None:
    path.touch()


def _folder(path: Path, copy: Path, other: bytes) -> None:
    path.mkdir()


def _fifo(path: Path, copy: Path, other: bytes) -> None:
    os.mkfifo(path)


def _link_to_itself(path: Path, copy: Path, other: bytes) -> None:
    path.symlink_to(path.name)


def _link_to_device(path: Path, copy: Path, other: bytes) -> None:
    path.symlink_to("/dev/zero")


def _link_to_nothing(path: Path, copy: Path, other: bytes) -> None:
    path.symlink_to("nothing-here")


def _link_out(path: Path, copy: Path, other: bytes) -> None:
    path.symlink_to(copy)


def _link_within(path: Path, copy: Path, other: bytes) -> None:
    (path.parent / "real.bin").write_bytes(copy.read_bytes())
    path.symlink_to("real.bin")


def _other_file(path: Path, copy: Path, other: bytes) -> None:
    path.write_bytes(other)


def _hole(path: Path, copy: Path, other: bytes) -> None:
    """A file that says it is larger than the memory a case has."""
    path.write_bytes(copy.read_bytes())
    os.truncate(path, HOLE)


REPLACEMENTS: tuple[Callable[[Path, Path, bytes], None], ...] = (
    _nothing,
    _nothing,
    _empty,
    _folder,
    _fifo,
    _link_to_itself,
    _link_to_device,
    _link_to_nothing,
    _link_out,
    _link_within,
    _other_file,
    _other_file,
    _other_file,
    _hole,
)
