"""Which form of a sparse weight runs on a GPU, and whether its products equal those of the dense weight.

Products are compared on the GPU that they are to run on. Unit vectors come first: each product is one column of the
weight, a sum of 1 w and zeros that no accumulation order can round. For 16-bit types it must equal the weight bit for
bit, and one misplaced entry shows. Random inputs of several token counts, some of them padded, follow. Their products
must be within the error bound of an inner product (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
eq. 3.5):

    |y - x w| <= u |x w| + n 2^-23 |x| |w|

with n terms, u the spacing of the output type (a library may truncate where PyTorch rounds), and 2^-23 for
accumulation in float32 without rounding to nearest. Products of two 16-bit numbers are exact in float32.
float32 weights run on tensor cores as TF32, ten bits of mantissa: each operand is off by up to 2^-10.

The layout of a pack depends on the GPU and the library and is not documented, so a pack is untrusted until the first
weight of its shape was compared; the result holds for that shape as long as the process lives.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from spp_fx.runtime.cuda_library import Library

TOKENS: Final = (1, 16, 100)
"""Token counts of the random inputs: libraries pad to multiples of 8 or 16."""
UNIT_VECTORS: Final = 1024
"""Unit vectors in one product."""
ROWS: Final = 1024
"""Rows of the weight in float64 at a time."""
ACCUMULATION: Final = 2.0**-23
TF32: Final = 2.0**-10

Multiply = Callable[[Tensor], Tensor]


def product_fault(multiply: Multiply, dense: Tensor) -> str | None:
    """The first difference between a library's products and those of the dense weight, None where they agree.

    Args:
        multiply: x (tokens, in) -> (tokens, out), both of dense's dtype and on its device.
        dense: (out, in) float16, bfloat16 or float32, finite.
    """
    return _unit_vectors(multiply, dense) or next(
        (fault for tokens in TOKENS if (fault := _random_input(multiply, dense, tokens))), None
    )


def _unit_vectors(multiply: Multiply, dense: Tensor) -> str | None:
    m, k = dense.shape
    relative = TF32 if dense.dtype == torch.float32 else 0.0
    least = torch.finfo(torch.float32).tiny  # what it accumulates in; a library may flush what is smaller
    for start in range(0, k, UNIT_VECTORS):
        stop = min(start + UNIT_VECTORS, k)
        x = torch.zeros(stop - start, k, dtype=dense.dtype, device=dense.device)
        x[:, start:stop].fill_diagonal_(1)
        y = multiply(x)
        if tuple(y.shape) != (stop - start, m):
            return _wrong_shape(y, (stop - start, m))
        expected = dense[:, start:stop].t().float()
        off = ~((y.float() - expected).abs() <= relative * expected.abs() + least)  # NaN is off, too
        if bool(off.any()):
            column, row = (int(i) for i in off.nonzero()[0])
            return (
                f"times a unit vector it gives {float(y[column, row])} at row {row}, column {start + column}, "
                f"the weight has {float(dense[row, start + column])} "
                f"({int(off.sum())} of {off.numel()} entries differ)"
            )
    return None


def _random_input(multiply: Multiply, dense: Tensor, tokens: int) -> str | None:
    m, k = dense.shape
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens))
    x = x.to(device=dense.device, dtype=dense.dtype)
    y = multiply(x)
    if tuple(y.shape) != (tokens, m):
        return _wrong_shape(y, (tokens, m))
    inputs = k * ACCUMULATION + (2 * TF32 if dense.dtype == torch.float32 else 0.0)
    output = torch.finfo(dense.dtype).eps
    exact_x = x.double()
    for start in range(0, m, ROWS):
        rows = dense[start : start + ROWS].double()
        exact, size = exact_x @ rows.t(), exact_x.abs() @ rows.abs().t()
        error = (y[:, start : start + ROWS].double() - exact).abs()
        bound = output * exact.abs() + inputs * size
        within = error <= bound + torch.finfo(dense.dtype).tiny
        if not bool(within.all()):
            token, row = (int(i) for i in (~within).nonzero()[0])
            return (
                f"with {tokens} tokens, row {start + row} gives {float(y[token, start + row]):.6g}, the dense "
                f"product is {float(exact[token, row]):.6g} (at most {float(bound[token, row]):.2g} off)"
            )
    return None


def _wrong_shape(y: Tensor, shape: tuple[int, int]) -> str:
    return f"a product has shape {list(y.shape)}, expected {list(shape)}"


Form = Literal["packed", "repacked", "dense"]


class PackWarning(UserWarning):
    """A weight does not run from its stored pack; names the weight, the reason, and what runs instead."""


@dataclass(frozen=True)
class SiteForm:
    """The form in which a sparse weight runs.

    Attributes:
        form: `packed` from the stored bytes, `repacked` by the library at load, or `dense`.
        reason: why it is not `packed`; None where it is.
    """

    form: Form
    reason: str | None = None


@dataclass(frozen=True)
class PackedSite:
    """A packed weight of an export.

    Attributes:
        name: the checkpoint's name of the weight.
        shape: (out, in) of the dense weight.
        dtype: of the weight.
        layout: of the stored bytes, and the version of spp-fx that wrote them.
        sm: the compute capability that it is packed for, None where the pack does not depend on it.
        unpacked: why the export holds no pack of it, None where it holds one.
        parts: reads the stored tensors of the pack onto the GPU, by part.
        dense: reads the decoded weight onto the GPU.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    layout: str
    sm: int | None
    unpacked: str | None
    parts: Callable[[], Mapping[str, Tensor]]
    dense: Callable[[], Tensor]


Case: TypeAlias = tuple[object, ...]
"""The device, library, layout, shape and so on that a decision holds for."""
DECIDED: dict[Case, SiteForm] = {}
"""The decisions of this process."""


def decide(
    sites: Iterable[PackedSite], library: Library, decided: dict[Case, SiteForm] = DECIDED
) -> dict[str, SiteForm]:
    """The form of each site, by name; `PackWarning` once for each shape that does not run from its pack.

    Args:
        sites: of one export.
        library: on the GPU that they are to run on.
        decided: earlier decisions; new ones are added.
    """
    cases: dict[Case, list[PackedSite]] = {}
    for site in sites:
        case = (library.device, library.name, site.layout, site.sm, site.unpacked, site.shape, site.dtype)
        cases.setdefault(case, []).append(site)
    for case, members in cases.items():
        if case not in decided:
            decided[case] = _examine(members[0], library)
        if decided[case].form != "packed":
            warnings.warn(_warning(members, decided[case]), PackWarning, stacklevel=4)  # the caller of `load`
    return {site.name: decided[case] for case, members in cases.items() for site in members}


def make_weight(site: PackedSite, form: Form, library: Library) -> Tensor:
    """The weight in a form, on the GPU."""
    if form == "packed":
        return library.wrap(site.parts(), site.shape)
    return library.repack(site.dense()) if form == "repacked" else site.dense()


def _examine(site: PackedSite, library: Library) -> SiteForm:
    dense = site.dense()
    reason = site.unpacked or library.refusal() or _other_sm(site, library)
    if reason is None:
        reason = _fault(lambda: library.wrap(site.parts(), site.shape), dense, library)
        if reason is None:
            return SiteForm("packed")
    again = _fault(lambda: library.repack(dense), dense, library)
    if again is None:
        return SiteForm("repacked", reason)
    return SiteForm("dense", reason if again == reason else f"{reason}; packed again: {again}")


def _other_sm(site: PackedSite, library: Library) -> str | None:
    # The metadata's order is that of a generation: on another GPU of it the comparison decides.
    if site.sm is None or site.sm // 10 == library.sm // 10:
        return None
    return f"it is packed for sm{site.sm}, {library.device} is sm{library.sm}"


def _fault(make: Callable[[], Tensor], dense: Tensor, library: Library) -> str | None:
    """Why a packed form of a weight cannot be used, None where its products are right."""
    try:
        weight = make()
        return product_fault(lambda x: library.multiply(x, weight), dense)
    except torch.OutOfMemoryError:
        raise  # it is a RuntimeError too, but says nothing about the pack
    except (RuntimeError, TypeError) as error:  # TypeError: another release of torch has other arguments
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"{library.name} on {library.device} refuses it: {said}"


def _warning(sites: list[PackedSite], found: SiteForm) -> str:
    first, (m, k) = sites[0], sites[0].shape
    others = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    dtype = str(first.dtype).removeprefix("torch.")
    instead = "it was packed again" if found.form == "repacked" else "it runs dense, without the gain of 2:4"
    return (
        f"{first.name}{others} ({m} x {k}, {dtype}): the stored pack is not used: {found.reason}; {instead}"
    )
