"""A module of kernels: found in the cache or compiled, then callable."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llvmlite
from llvmlite import binding

from spp_fx.native import object_cache
from spp_fx.native.target import Host, host, target_machine

if TYPE_CHECKING:
    from importlib.abc import ResourceLoader

_OWN_SOURCES = ("spp_fx.native.building", "spp_fx.native.compiler", "spp_fx.native.target")
_engines: list[Any] = []  # an engine that is freed takes its code along, under the feet of who calls it


@dataclass(frozen=True)
class Library:
    """Kernels that one Python module builds.

    Attributes:
        builder: name of the module whose `build()` gives the LLVM module; imported only to compile.
        constants: names of modules of this package that the builder takes numbers from.
    """

    builder: str
    constants: tuple[str, ...] = ()

    def load(self, prototypes: Mapping[str, Any]) -> dict[str, Any]:
        """The kernels by name, ready to call; a call lets other threads run meanwhile.

        Args:
            prototypes: kernel name -> its `ctypes.CFUNCTYPE`, which must be what `build()` defined: a call
                passes raw addresses, and nothing checks them.

        Raises:
            ImportError: the system lets no process run code that it made.
            RuntimeError: LLVM refuses the module, or it lacks one of the kernels.
        """
        code = self.object_code()
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target_machine(host()))
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _engines.append(engine)
        functions: dict[str, Any] = {}
        for name, prototype in prototypes.items():
            where = engine.get_function_address(name)
            if not where:
                raise RuntimeError(f"{self.builder} builds no kernel {name}")
            functions[name] = prototype(where)
        return functions

    def object_code(self) -> bytes:
        """The object file, from the cache or compiled and put there."""
        target = host()
        key = self.key(target)
        name = f"{self.builder.rpartition('.')[2]}.{key[:16]}.o"
        folders = object_cache.folders(Path(_spec(self.builder).origin))
        cached = object_cache.load(folders, name, key)
        if cached is not None:
            return cached
        from spp_fx.native.compiler import compile_module

        code = compile_module(import_module(self.builder).build(), target)
        object_cache.store(folders, name, key, code)
        return code

    def key(self, target: Host) -> str:
        """64 hex digits that differ wherever the machine code might."""
        digest = hashlib.sha256()
        versions = (llvmlite.__version__, ".".join(map(str, binding.llvm_version_info)))
        for text in (self.builder, *versions, target.triple, target.cpu, target.features):
            digest.update(text.encode() + b"\0")
        for module in (self.builder, *self.constants, *_OWN_SOURCES):
            digest.update(hashlib.sha256(_source(module)).digest())
        return digest.hexdigest()


def _spec(module: str) -> Any:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module {module} lies in this installation of spp-fx; install it again")
    return spec


def _source(module: str) -> bytes:
    """What the module is loaded from: its source, or the byte code where no source was installed."""
    spec = _spec(module)
    loader: ResourceLoader = spec.loader
    return loader.get_data(spec.origin)
