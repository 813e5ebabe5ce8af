"""Named weights whose zeros can be looked at, wherever they are stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spp_fx.sparsity.scan import Scan


@dataclass(frozen=True)
class Weights:
    """The weights of something written, looked at one by one.

    Attributes:
        names: its weights.
        scan: look at a weight, given its name and whether its site is stored (in, out).
        file: the name of the file that holds a weight.
        sites: the weights that must be sparse where no lock says so: name -> stored (in, out)?
    """

    names: frozenset[str]
    scan: Callable[[str, bool], Scan]
    file: Callable[[str], str]
    sites: Callable[[], Mapping[str, bool]]
