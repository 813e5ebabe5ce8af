"""Which form of a sparse weight runs on a GPU: its pack, one made anew, or the dense weight.

A pack is tied to the GPU and to the library, whose layout is not documented. So it is not believed: the
first weight of each shape is compared with the dense product (`product`), and what was found holds for that
shape as long as the process lives.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spp_fx.runtime.library import Library
from spp_fx.runtime.product import product_fault

Form = Literal["packed", "repacked", "dense"]


class PackWarning(UserWarning):
    """A weight does not run from the pack that the export holds; says which, why, and what runs instead."""


@dataclass(frozen=True)
class SiteForm:
    """How a sparse weight runs.

    Attributes:
        form: `packed` from the stored bytes, `repacked` by the library at load, or `dense`.
        reason: why it does not run from the stored bytes; None where it does.
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
        layout: what the bytes depend on, in words.
        sm: the compute capability that it is packed for, None where the pack does not depend on it.
        unpacked: why the export holds no pack of it, None where it does.
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


@dataclass(frozen=True)
class Case:
    """What a decision holds for."""

    device: str
    library: str
    layout: str
    sm: int | None
    unpacked: str | None
    shape: tuple[int, int]
    dtype: torch.dtype


DECIDED: dict[Case, SiteForm] = {}
"""What was found in this process."""


def case_of(site: PackedSite, library: Library) -> Case:
    return Case(library.device, library.name, site.layout, site.sm, site.unpacked, site.shape, site.dtype)


def decide(
    sites: Iterable[PackedSite], library: Library, decided: dict[Case, SiteForm] = DECIDED
) -> dict[str, SiteForm]:
    """The form of each site, by name; `PackWarning` once for each shape that does not run from its pack.

    Args:
        sites: of one export.
        library: on the GPU that they are to run on.
        decided: what is known already; grows.
    """
    cases: dict[Case, list[PackedSite]] = {}
    for site in sites:
        cases.setdefault(case_of(site, library), []).append(site)
    for case, members in cases.items():
        if case not in decided:
            decided[case] = _examine(members[0], library)
        if decided[case].form != "packed":
            warnings.warn(_tell(members, decided[case]), PackWarning, stacklevel=4)  # who calls `load`
    return {site.name: decided[case] for case, members in cases.items() for site in members}


def make_weight(site: PackedSite, form: Form, library: Library) -> Tensor:
    """The weight in the form that was decided on, on the GPU."""
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
    return SiteForm("dense", reason if again == reason else f"{reason}; packed anew: {again}")


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
        raise  # it is a RuntimeError too, but no verdict on the pack
    except (RuntimeError, TypeError) as error:  # TypeError: another release of torch has other arguments
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"{library.name} on {library.device} refuses it: {said}"


def _tell(sites: list[PackedSite], found: SiteForm) -> str:
    first, (m, k) = sites[0], sites[0].shape
    others = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    dtype = str(first.dtype).removeprefix("torch.")
    instead = "it was packed anew" if found.form == "repacked" else "it runs dense, without the gain of 2:4"
    return (
        f"{first.name}{others} ({m} x {k}, {dtype}): the stored pack is not used: {found.reason}; {instead}"
    )
