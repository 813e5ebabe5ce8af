"""Named weights whose zeros can be looked at, wherever they are stored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from spp_fx.sparsity.scan import Scan


def _nothing() -> Mapping[str, str]:
    return {}


@dataclass(frozen=True)
class Weights:
    """The weights of something written, looked at one by one.

    Attributes:
        names: its weights.
        scan: look at a weight, given its name and whether its site is stored (in, out).
        file: the name of the file that holds a weight.
        sites: the weights that must be sparse where no lock says so: name -> stored (in, out)? One that is
            not there is among them, under the name that it should have.
        refused: sites whose weights cannot be looked at although something is stored for them, and why.
        left_out: matrices that are not sites because of what the model does with them (embeddings, the head,
            routers), each with that reason.
        unread: whatever else holds weights, is not among the sites and is not looked at, each with the reason.
        guessed: whether `sites` goes by names alone, so that how they are stored is not known.
        shape: of a weight, without a look at it; None where that is not known, and every weight is a matrix.
    """

    names: frozenset[str]
    scan: Callable[[str, bool], Scan]
    file: Callable[[str], str]
    sites: Callable[[], Mapping[str, bool]]
    refused: Callable[[], Mapping[str, str]] = _nothing
    left_out: Callable[[], Mapping[str, str]] = _nothing
    unread: Callable[[], Mapping[str, str]] = _nothing
    guessed: bool = False
    shape: Callable[[str], tuple[int, ...]] | None = None


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor is at least a matrix, and not a vector with dimensions of 1 around it."""
    return sum(size > 1 for size in shape) > 1
