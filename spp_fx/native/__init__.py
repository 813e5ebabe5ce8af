"""Machine code made by llvmlite alone: built and compiled once, kept as an object file, loaded in milliseconds.

numba would do for the same loops, but its import and the start of its first cached kernel take longer than
reading a gigabyte. Here a module of kernels is an LLVM module written with `llvmlite.ir`, which is not even
built where the object file of an earlier run fits.
"""

from spp_fx.native.library import Library
from spp_fx.native.memory import address
from spp_fx.native.target import Host, host

__all__ = ["Host", "Library", "address", "host"]
