"""The part of a site that one stored matrix holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """One stored matrix of a site.

    Attributes:
        tensor: its name in the checkpoint.
        transposed: it is stored (in, out).
        expert: index of the matrix in a stack, None for a plain matrix.
        start, stop: the rows of the site's matrix that it holds.
        whole: the stored tensor is the whole stack (experts, …), of which this is one matrix.
    """

    tensor: str
    transposed: bool
    expert: int | None
    start: int
    stop: int
    whole: bool = False
