"""A module of kernels is built once; a later process takes its object file."""

import ctypes
import sys
import textwrap
from importlib import invalidate_caches
from pathlib import Path

import pytest

from spp_fx.native import Library, host, library, object_cache

UNARY = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
SOURCE = """
    from llvmlite import ir
    from spp_fx.native.building import I64, define, loop

    def build():
        module = ir.Module("{name}")
        builder, (count,) = define(module, "triangle", I64, [I64])
        (total,) = loop(builder, count, [ir.Constant(I64, {start})], lambda i, sums: [builder.add(sums[0], i)])
        builder.ret(total)
        return module
"""


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[Path]:
    found = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(object_cache, "folders", lambda source: found)
    return found


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a builder module anew, as an edit of its source would."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(start: int = 0) -> Library:
        sys.modules.pop("triangles", None)
        invalidate_caches()
        text = textwrap.dedent(SOURCE).format(name="triangles", start=start)
        (tmp_path / "triangles.py").write_text(text)
        return Library("triangles")

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    sys.modules.pop("triangles", None)


def triangle(kernels: Library):
    return kernels.load({"triangle": UNARY})["triangle"]


@pytest.mark.usefixtures("folders")
def test_a_loop_runs_as_often_as_it_is_told(write):
    function = triangle(write(start=7))
    assert [function(count) for count in (-3, 0, 1, 2, 100)] == [7, 7, 7, 8, 4957]


def test_the_second_load_builds_nothing(write, folders, monkeypatch):
    triangle(write())
    (stored,) = folders[0].iterdir()
    before = stored.stat()
    monkeypatch.setattr(library, "import_module", None)
    assert triangle(Library("triangles"))(100) == 4950
    assert stored.stat() == before


def test_an_edit_of_the_source_is_compiled(write, folders):
    assert triangle(write())(100) == 4950
    assert triangle(write(start=1))(100) == 4951
    assert len(list(folders[0].iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"\0" * 1000, b"\x7fELF" + b"\xcc" * 500])
def test_a_damaged_file_is_compiled_anew(write, folders, damage):
    triangle(write())
    (stored,) = folders[0].iterdir()
    content = stored.read_bytes()
    stored.write_bytes(damage)
    assert triangle(write())(100) == 4950
    assert stored.read_bytes() == content


def test_a_file_that_others_may_write_is_replaced(write, folders):
    triangle(write())
    (stored,) = folders[0].iterdir()
    stored.chmod(0o666)
    assert triangle(write())(100) == 4950
    assert not stored.stat().st_mode & 0o022


def test_without_a_folder_every_load_compiles(write, folders):
    for folder in folders:
        folder.touch()
    assert triangle(write())(100) == 4950
    assert triangle(write())(100) == 4950


@pytest.mark.usefixtures("folders")
def test_a_kernel_that_is_not_built_is_told(write):
    with pytest.raises(RuntimeError, match="triangles builds no kernel square"):
        write().load({"square": UNARY})


def test_the_key_tells_hosts_and_constants_apart(write, tmp_path):
    (tmp_path / "numbers_of_it.py").write_text("SIZE = 8")
    kernels, target = write(), host()
    other = type(target)(target.triple, target.cpu, f"{target.features},+other")
    with_constants = Library("triangles", constants=("numbers_of_it",))
    keys = {kernels.key(target), kernels.key(other), with_constants.key(target)}
    (tmp_path / "numbers_of_it.py").write_text("SIZE = 9")
    keys.add(with_constants.key(target))
    assert len(keys) == 4


def test_the_key_tells_compilers_apart(write, monkeypatch):
    kernels = write()
    before = kernels.key(host())
    monkeypatch.setattr(library.llvmlite, "__version__", "0.0.0")
    assert kernels.key(host()) != before


def test_a_feature_is_told_by_its_whole_name():
    target = type(host())("x86_64-unknown-linux-gnu", "haswell", "+avx2,-avx512f")
    assert target.has("avx2")
    assert not target.has("avx")
    assert not target.has("avx512f")
