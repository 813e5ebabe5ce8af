import errno
import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.storage.safetensors import Shard, TensorInfo, dtype_name
from spp_fx.storage.writer import copy_file, rewrite_shard, write_safetensors
from tests.effort import examples

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (0, 5), (5, 0), (3, 5), (7, 2, 3)]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bit pattern, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    data = torch.randint(0, 2 if dtype == "BOOL" else 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(DTYPES[dtype]).reshape(shape)


def everything() -> dict[str, torch.Tensor]:
    return {
        f"{dtype}.{'x'.join(map(str, shape))}": random_tensor(dtype, shape, seed)
        for seed, (dtype, shape) in enumerate((d, s) for d in DTYPES for s in SHAPES)
    }


def specs(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]


def assert_library_reads(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            stored = file.get_tensor(name)
            assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape), name
            assert bits(stored) == bits(tensor), name


def test_reads_every_dtype_and_shape_the_library_wrote(tmp_path: Path) -> None:
    tensors = everything()
    save_file(tensors, tmp_path / "m.safetensors")
    shard = Shard.open(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        stored = shard.read(name)
        assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape), name
        assert bits(stored) == bits(tensor), name


def test_the_library_reads_every_dtype_and_shape_we_wrote(tmp_path: Path) -> None:
    tensors = everything()
    write_safetensors(tmp_path / "m.safetensors", specs(tensors), tensors.__getitem__)
    assert_library_reads(tmp_path / "m.safetensors", tensors)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_fresh_file_equals_the_library_s_byte_for_byte(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    tensors = everything() | {'é"\n\x7f\x01': torch.zeros(1)}
    save_file(tensors, tmp_path / "library.safetensors", metadata)
    write_safetensors(tmp_path / "ours.safetensors", specs(tensors), tensors.__getitem__, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_packed_four_bit_floats_keep_their_shape(tmp_path: Path) -> None:
    packed = torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 3)
    save_file({"a": packed}, tmp_path / "m.safetensors")
    shard = Shard.open(tmp_path / "m.safetensors")
    assert shard.info("a").shape == (2, 6)  # stored elements; torch holds two in one
    assert shard.read("a").shape == (2, 3)
    write_safetensors(tmp_path / "n.safetensors", [("a", "F4", (2, 6))], shard.read)
    assert_library_reads(tmp_path / "n.safetensors", {"a": packed})


def test_a_read_tensor_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(8.0)}, path)
    tensor = Shard.open(path).read("a")
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(tensor, torch.arange(8.0))
    tensor.add_(1)  # and may be written to


@examples(10)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 6), max_size=3).map(tuple),
    max_bytes=st.integers(1, 200),
    data=st.data(),
)
def test_row_blocks_put_together_are_the_tensor(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], max_bytes: int, data: st.DataObject
) -> None:
    tensor = random_tensor(dtype, shape)
    path = tmp_path / "m.safetensors"
    path.unlink(missing_ok=True)
    write_safetensors(path, [("a", dtype, shape)], lambda _: tensor)
    shard = Shard.open(path)
    blocks = list(shard.row_blocks("a", max_bytes))
    assert b"".join(map(bits, blocks)) == bits(tensor)
    if shape:
        assert all(len(bits(block)) <= max_bytes or block.shape[0] == 1 for block in blocks)
        start = data.draw(st.integers(0, shape[0]))
        stop = data.draw(st.integers(start, shape[0]))
        rows = shard.read_rows("a", start, stop)
        assert rows.shape == (stop - start, *shape[1:])
        assert bits(rows) == bits(tensor[start:stop])


@pytest.mark.parametrize(("name", "start", "stop"), [("a", -1, 2), ("a", 2, 1), ("a", 0, 4), ("s", 0, 1)])
def test_rows_outside_of_the_tensor_are_refused(name: str, start: int, stop: int, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 2), "s": torch.zeros(())}, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=f"'{name}' of shape .* has no rows {start} to {stop}"):
        Shard.open(tmp_path / "m.safetensors").read_rows(name, start, stop)


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.ones(3, dtype=torch.bool)}, path)
    shard = Shard.open(path)
    with pytest.raises(UsageError, match="holds no tensor 'c'"):
        shard.read("c")
    content = bytearray(path.read_bytes())
    content[-1] = 7
    path.write_bytes(content)
    with pytest.raises(FormatError, match="'b': holds a byte that is neither 0 nor 1"):
        shard.read("b")
    os.truncate(path, path.stat().st_size - 9)
    with pytest.raises(FormatError, match="'a': the file shrank after its header was read"):
        shard.read("a")
    path.unlink()
    with pytest.raises(SppFxError, match="cannot be read"):
        shard.read("a")


def test_six_bit_floats_are_copied_but_not_decoded(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    shard = Shard.open(path)
    with pytest.raises(FormatError, match="'a': torch has no dtype 'F6_E2M3'"):
        shard.read("a")
    rewrite_shard(shard, tmp_path / "n.safetensors", lambda _: None)
    assert (tmp_path / "n.safetensors").read_bytes() == path.read_bytes()


def test_rewriting_nothing_copies_every_byte(tmp_path: Path) -> None:
    save_file(everything(), tmp_path / "m.safetensors", {"z": "1", "format": "pt", "a": "2"})
    shard = Shard.open(tmp_path / "m.safetensors")
    rewrite_shard(shard, tmp_path / "n.safetensors", lambda _: None)
    assert (tmp_path / "n.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize("kernel_copy", ["whole", "absent", "refused", "answers zero", "in small steps"])
def test_rewriting_replaces_some_and_keeps_the_rest(
    kernel_copy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.copy_file_range

    def refused(*_: int) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    def small(src: int, dst: int, count: int, at: int, to: int) -> int:
        return real(src, dst, min(count, 100), at, to)

    match kernel_copy:
        case "absent":
            monkeypatch.delattr(os, "copy_file_range")
        case "refused":
            monkeypatch.setattr(os, "copy_file_range", refused)
        case "answers zero":
            monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
        case "in small steps":
            monkeypatch.setattr(os, "copy_file_range", small)
    before = {f"t{i}": torch.arange(i * 30, dtype=torch.float32).reshape(-1, 3) for i in range(9)}
    save_file(before, tmp_path / "m.safetensors", {"format": "pt"})
    source = Shard.open(tmp_path / "m.safetensors")
    asked: list[str] = []

    def replace(info: TensorInfo) -> torch.Tensor | Iterator[torch.Tensor] | None:
        asked.append(info.name)
        if info.name in ("t0", "t1", "t5"):
            return source.read(info.name) + 1
        if info.name == "t6":
            return (block + 1 for block in source.row_blocks(info.name, 40))
        return None

    rewrite_shard(source, tmp_path / "n.safetensors", replace)
    after = {name: t + 1 if name in ("t0", "t1", "t5", "t6") else t for name, t in before.items()}
    assert asked == list(source.header.tensors)
    assert_library_reads(tmp_path / "n.safetensors", after)
    assert Shard.open(tmp_path / "n.safetensors").header.raw == source.header.raw


def test_tensors_that_are_not_laid_out_in_order_are_written_as_they_read(tmp_path: Path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    complex_ = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj()
    tensors = {"t": wide.t(), "s": wide[:, 1:3], "p": torch.nn.Parameter(wide), "c": complex_}
    write_safetensors(tmp_path / "m.safetensors", specs(tensors), tensors.__getitem__)
    shard = Shard.open(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(shard.read(name), tensor)


WRONG_CONTENT = {
    "dtype": (torch.zeros(4, 3, dtype=torch.float64), "needs torch.float32, was given torch.float64"),
    "shape": (torch.zeros(3, 4), r"rows of shape \[3, 4\] do not fit in \[4, 3\]"),
    "columns": ([torch.zeros(2, 3), torch.zeros(2, 2)], r"rows of shape \[2, 2\] do not fit in \[4, 3\]"),
    "dimensions": ([torch.zeros(12)], r"rows of shape \[12\] do not fit in \[4, 3\]"),
    "too few rows": ([torch.zeros(3, 3)], r"was given 3 rows, needs shape \[4, 3\]"),
    "too many rows": ([torch.zeros(3, 3)] * 2, r"rows of shape \[3, 3\] do not fit in \[4, 3\]"),
    "block dtype": ([torch.zeros(4, 3).half()], "needs torch.float32, was given torch.float16"),
}


@pytest.mark.parametrize("fault", WRONG_CONTENT)
def test_content_of_another_form_is_refused_and_nothing_stays(fault: str, tmp_path: Path) -> None:
    content, message = WRONG_CONTENT[fault]
    save_file({"a": torch.zeros(4, 3)}, tmp_path / "m.safetensors")
    source, target = Shard.open(tmp_path / "m.safetensors"), tmp_path / "n.safetensors"
    with pytest.raises(FormatError, match=f"n.safetensors: tensor 'a': .*{message}"):
        rewrite_shard(source, target, lambda _: content)
    with pytest.raises(FormatError, match=f"n.safetensors: tensor 'a': .*{message}"):
        write_safetensors(target, [("a", "F32", (4, 3))], lambda _: content)
    assert not target.exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_exception_in_the_middle_leaves_no_file(stop: type[BaseException], tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "m.safetensors")
    source = Shard.open(tmp_path / "m.safetensors")
    before = source.path.read_bytes()

    def replace(info: TensorInfo) -> torch.Tensor | None:
        if info.name == "b":
            raise stop
        return torch.ones(4)

    with pytest.raises(stop):
        rewrite_shard(source, tmp_path / "n.safetensors", replace)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert source.path.read_bytes() == before


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        rewrite_shard(Shard.open(path), path, lambda _: None)
    with pytest.raises(UsageError, match="exists"):
        write_safetensors(path, [], lambda _: torch.zeros(0))
    with pytest.raises(UsageError, match="exists"):
        copy_file(path, path)
    assert path.read_bytes() == before
    with pytest.raises(SppFxError, match="cannot be written"):
        write_safetensors(tmp_path / "absent" / "m.safetensors", [], lambda _: torch.zeros(0))
    with pytest.raises(SppFxError, match=r"absent.bin: failed while .*n.bin was written"):
        copy_file(tmp_path / "absent.bin", tmp_path / "n.bin")
    assert not (tmp_path / "n.bin").exists()


def test_a_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(400)}, path)
    source = Shard.open(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError, match="shrank while it was copied"):
        rewrite_shard(source, tmp_path / "n.safetensors", lambda _: None)
    assert not (tmp_path / "n.safetensors").exists()


@pytest.mark.parametrize(
    ("wrong", "metadata", "message"),
    [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], {}, "'a': is given twice"),
        ([("__metadata__", "F32", (1,))], {}, "a name that the format reserves"),
        ([("a", "F7", (1,))], {}, "'a': unknown dtype 'F7'"),
        ([("a", "F4", (3,))], {}, "'a': F4 of shape .* does not end on a whole byte"),
        ([("a", "F32", (2**62, 4))], {}, "more than 2"),
        ([("\ud800", "F32", (1,))], {}, "not Unicode"),
        ([("a", "F32", (1,))], {"k": "\ud800"}, "not Unicode"),
        ([("a", "F6_E2M3", (4,))], {}, "'a': torch has no dtype 'F6_E2M3'"),
    ],
)
def test_announcements_that_no_file_can_hold(
    wrong: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        write_safetensors(tmp_path / "m.safetensors", wrong, lambda _: torch.zeros(1), metadata)
    assert not list(tmp_path.iterdir())


def test_a_dtype_the_format_lacks_is_refused() -> None:
    with pytest.raises(FormatError, match="complex128 cannot be stored"):
        dtype_name(torch.complex128)


def test_a_full_disk_is_said_in_plain_words(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limit[1]))  # the same error path as a full disk
    try:
        with pytest.raises(SppFxError, match=r"failed while .*m.safetensors was written \(File too large\)"):
            write_safetensors(
                tmp_path / "m.safetensors", [("a", "F32", (2**16,))], lambda _: torch.zeros(2**16)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


MEMORY_PROGRAM = """
import json, sys
from pathlib import Path
import torch
from spp_fx.storage.safetensors import Shard
from spp_fx.storage.writer import rewrite_shard, write_safetensors

def peak():
    # not ru_maxrss, which a process takes over from the one that started it
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024

folder, rows, width = Path(sys.argv[1]), 2048, 4096              # 8 tensors of 16 MiB, one of 128 MiB
specs = [(f"t{i}", "BF16", (rows, width)) for i in range(8)] + [("big", "BF16", (8 * rows, width))]

def produce(name):
    for _ in range(8 if name == "big" else 1):
        yield torch.ones(rows, width, dtype=torch.bfloat16)

# Once in small, so that pages of libraries that are touched for the first time are not counted.
write_safetensors(folder / "warm", [("a", "BF16", (rows, width))], lambda _: produce("a"))
warm = Shard.open(folder / "warm")
rewrite_shard(warm, folder / "again", lambda info: (b.mul_(2) for b in warm.row_blocks("a", 2**24)))
before = peak()
write_safetensors(folder / "m", specs, produce)
source = Shard.open(folder / "m")

def replace(info):
    if info.name == "big":
        return (block.mul_(2) for block in source.row_blocks("big", 2**24))
    return source.read(info.name).mul_(2) if info.name == "t3" else None

rewrite_shard(source, folder / "n", replace)
print(json.dumps(peak() - before))
"""


def test_memory_stays_that_of_one_block(tmp_path: Path) -> None:
    """Writes and rewrites 256 MiB, one tensor of it 128 MiB, in blocks of 16 MiB: two at most, beyond the one
    of the warm-up. glibc is told to give every block back, or what it keeps, which varies, would be measured."""
    out = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    assert json.loads(out.stdout) < 40
    with safe_open(tmp_path / "n", "pt") as file:
        assert torch.all(file.get_slice("big")[-1:] == 2)
        assert torch.all(file.get_slice("t3")[:1] == 2)
        assert torch.all(file.get_slice("t4")[:1] == 1)
    for name in ("warm", "again", "m", "n"):
        (tmp_path / name).unlink()
