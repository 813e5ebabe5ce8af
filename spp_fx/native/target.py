"""The CPU of this process, and LLVM's code generator for it."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import binding


@dataclass(frozen=True)
class Host:
    """What machine code depends on, besides its source and the compiler.

    Attributes:
        triple: LLVM's name of architecture, vendor and system, as "x86_64-unknown-linux-gnu".
        cpu: LLVM's name of the CPU, as "znver4".
        features: its instruction sets, as "+avx2,-avx512f"; empty where LLVM cannot tell.
    """

    triple: str
    cpu: str
    features: str

    def has(self, feature: str) -> bool:
        """Does the CPU have this instruction set, by LLVM's name of it?"""
        return f"+{feature}" in self.features.split(",")


@cache
def host() -> Host:
    """The CPU this process runs on.

    Raises:
        ImportError: the system lets no process run code that it made (SELinux and the like), which leaves
            callers what they have where llvmlite is missing.
    """
    try:
        binding.check_jit_execution()
    except OSError as error:
        raise ImportError(str(error)) from error
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    try:
        features = binding.get_host_cpu_features().flatten()
    except RuntimeError:  # a CPU whose features LLVM does not read: code for its name alone is right
        features = ""
    return Host(binding.get_process_triple(), binding.get_host_cpu_name(), features)


def target_machine(target: Host) -> Any:
    """A new code generator; an execution engine takes it over, so that each needs its own.

    The options are those of numba's: code that may lie anywhere in memory.
    """
    return binding.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu,
        features=target.features,
        opt=3,
        reloc="static" if target.triple.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )
