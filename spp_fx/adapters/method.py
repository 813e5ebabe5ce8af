"""What an adapter method is: trainable factors of a weight and one formula; everything else is derived from it.

torch is imported where numbers are made: an adapter folder is read, checked and folded without it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import isfinite, lcm, prod, sqrt
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, get_type_hints

import numpy as np

from spp_fx.errors import UsageError
from spp_fx.options import check_options, check_values
from spp_fx.registry import Registry, naming

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from spp_fx.adapters.op import AdaptedWeight

Factors: TypeAlias = "Mapping[str, Tensor]"
FoldKernel: TypeAlias = "Callable[[NDArray[Any], NDArray[Any], int], tuple[int, int, int]]"
"""(stored rows, out, index of the first row in the matrix) -> how many changed, underflowed to zero, not finite."""
Axis: TypeAlias = "slice | NDArray[np.int64]"


@dataclass(frozen=True)
class FactorSpec:
    """One trainable factor of a weight (..., out, in).

    Attributes:
        shape: of the factor, of two dimensions beside those of a stack of experts.
        init: its initial value: zeros, or `kaiming` for U(-1/sqrt n, 1/sqrt n), n the last extent.
        rows: how many consecutive rows of the weight share one entry of dimension -2; None if that
            dimension does not follow the weight's rows.
        columns: the same for dimension -1 and the weight's columns.
        ones: a part of it that starts at 1 instead: its first row or its first column.
    """

    shape: tuple[int, ...]
    init: Literal["zeros", "kaiming"]
    rows: int | None = None
    columns: int | None = None
    ones: Literal["row", "column"] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def index(
        self, rows: tuple[int, int] | None, columns: tuple[int, int] | None = None
    ) -> tuple[EllipsisType, Axis, Axis]:
        """The index of the part of the factor that belongs to ranges of the weight's rows and columns.

        It makes a view where a range holds whole groups or lies within one; else entries repeat, one for each row.
        """
        return ..., _entries(self.rows, rows), _entries(self.columns, columns)


def _entries(group: int | None, taken: tuple[int, int] | None) -> Axis:
    if group is None or taken is None:
        return slice(None)
    start, stop = taken
    first, last = start // group, -(-stop // group)
    if last - first == 1 or (start % group == 0 and stop % group == 0):
        return slice(first, last)
    return np.arange(start, stop) // group


STEPS, WIDTH = 60, 128
"""Of the runs that the suggested rates were measured in; see docs/decisions/0003."""


@dataclass(frozen=True)
class Run:
    """What the best learning rate of a site's factors depends on, beside the method.

    Attributes:
        steps: of the optimizer.
        width: the site's input features.
        spread: root mean square of its non-zero weights.
    """

    steps: int
    width: float
    spread: float

    def rate_of_product(self, scale: float, rank: int = 1, unit: float = 1.0) -> float:
        """The rate of two factors of which one starts at zero: the change is s times `rank` products of them.

        Adam moves each factor by about the rate a step, and the start is soon forgotten: the products grow with the
        square of the rate. Measured, `rank` of them add up like rank^0.8.

        Args:
            unit: what the change is relative to, 1 for multipliers of the weight.
        """
        share = 0.0173 * (WIDTH / self.width) ** 0.25 * (STEPS / self.steps) ** 0.9
        return sqrt(share * unit / (abs(scale) * rank**0.8))

    def rate_of_sum(self, unit: float = 1.0) -> float:
        """The rate of a factor that is itself the change."""
        return 0.04 * (WIDTH / self.width) ** 0.25 * (STEPS / self.steps) ** 0.25 * unit


class Kernels(Protocol):
    """Compiled `tile` and `pullback` of a method; may be a module with these functions."""

    def takes(self, adapted: AdaptedWeight, other: torch.dtype) -> bool:
        """Whether the kernels take these types and are faster; `other` is the dtype of the built weight or of G."""
        ...

    def tile(self, adapted: AdaptedWeight, start: int, stop: int, base: float, out: Tensor) -> None:
        """Write rows start..stop of base * W + update into `out`."""

    def pullback(
        self, adapted: AdaptedWeight, grad: Tensor, start: int, stop: int, grads: dict[str, Tensor]
    ) -> None:
        """Add the factors' gradients from rows start..stop of G to `grads`."""


@dataclass(frozen=True)
class Method(ABC):
    """An adapter method; its options are the fields of its dataclass, made by `option`.

    `factors` and `update` define it. `update` alone gives the reference, fused, packed, stacked and
    folded executions; the rest makes them faster. In `tile`, `pullback` and `factor_grads`, `weight` and `factors`
    are those of some rows: of whole groups of `row_group` rows, or of a range within one group. A factor then has
    fewer rows than `factors` says, so `update` takes group sizes from the shapes it is given.

    An option `dropout` is special: the probability on the adapter branch's input while training.
    """

    name: ClassVar[str]
    masked: ClassVar[bool] = True
    """Whether `update` is zero where the weight is zero. If False, the update is dense while training; the mask is
    applied to it in evaluation and by the fold, which counts what that removes."""
    factor_grads: ClassVar[Callable[..., None] | None] = None
    """(self, x, grad_y, factors, grads): adds the factors' gradients to `grads` from the input (b, in) and
    rows of the output's gradient (b, rows), for methods that need neither W nor G = grad_yᵀ x."""

    masked_gradient: ClassVar[bool] = False
    """Whether the factors' gradients depend on the effective weight's only where the weight is non-zero, as they do
    unless `update` has gradients of its own; the rest of it may then be taken as zero."""

    def __post_init__(self) -> None:
        check_values(self, self.name)

    @abstractmethod
    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        """The trainable factors of a site of canonical shape (..., out, in), by name."""

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a site of this shape cannot be adapted, or None."""
        return None

    @abstractmethod
    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        """The change of `weight` (..., out, in) that the factors stand for.

        It is zero where the weight is zero, unless the method is not `masked`.
        """

    def effective_weight(self, weight: Tensor, **factors: Tensor) -> Tensor:
        """The weight that the adapted site stands for, in the promoted dtype of its inputs."""
        return weight + self.update(weight, **factors)

    def tile(self, weight: Tensor, factors: Factors, base: float, out: Tensor) -> None:
        """Write base * weight + update, computed at least in float32, into `out` (rows, in)."""
        work = work_dtype(weight, *factors.values())
        weight = weight.to(work)
        change = self.update(weight, **{key: value.to(work) for key, value in factors.items()})
        out.copy_(weight + change if base else change)

    def pullback(self, grad: Tensor, weight: Tensor, factors: Factors, grads: dict[str, Tensor]) -> None:
        """Add the factors' gradients to `grads`, given `grad`, the effective weight's (rows, in)."""
        import torch

        work = work_dtype(grad, weight, *factors.values())
        own = {key: value.to(work, copy=True) for key, value in factors.items()}
        with recording():
            change = self.update(
                weight.to(work), **{key: value.requires_grad_() for key, value in own.items()}
            )
        found = torch.autograd.grad(
            change, list(own.values()), grad.to(change.dtype), allow_unused=True, materialize_grads=True
        )
        for key, value in zip(own, found, strict=True):
            grads[key] += value

    def row_group(self, shape: tuple[int, ...]) -> int:
        """Rows of the weight that are best treated together, since they share entries of a factor."""
        return lcm(*(spec.rows or 1 for spec in self.factors(shape).values()))

    def kernels(self, device: str) -> Kernels | None:
        """Compiled kernels for a type of device, if the method has any and their compiler is installed."""
        return None

    def fold_kernel(self, factors: Mapping[str, NDArray[np.float64]], dtype: str) -> FoldKernel | None:
        """A compiled fold of one matrix that gives the bits of the definition, if the method has one.

        Args:
            factors: of the matrix.
            dtype: of the stored numbers, as safetensors spells it.
        """
        return None

    def gradient_start(self, weight: Tensor, grad: Tensor, factors: Factors) -> dict[str, Tensor] | None:
        """The start of the factors from which the first steps lower the loss most, for `inject --init gradient`.

        It stands for no change, as the default start does, and trained factors have the default's root mean square,
        so that starts differ by their direction alone.

        Args:
            weight: of one matrix (out, in), float32.
            grad: the gradient of the loss with respect to it (out, in), float32; not zero where the weight is.
            factors: the default start of the matrix's factors.

        Returns:
            The start of every factor; None, for every matrix, where the method has no start but its default.
        """
        return None

    def rate(self, run: Run) -> float:
        """The peak learning rate of AdamW where the user gives none: by default that of one product of two factors
        that multiplies the weight.
        """
        return run.rate_of_product(1.0)

    def remedy(self, shapes: Iterable[tuple[int, ...]]) -> str | None:
        """Options that would suit sites of these shapes, none of which the method takes; None if unknown."""
        return None

    def parameters(self) -> dict[str, Any]:
        """The options, as the adapter's configuration stores them."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class MaskedUpdate(Method):
    """A method with a dense update as it is evaluated and folded: W + update * (W != 0)."""

    name: ClassVar[str] = "masked-update"
    dense: Method

    def factors(self, shape: tuple[int, ...]) -> dict[str, FactorSpec]:
        return self.dense.factors(shape)

    def update(self, weight: Tensor, **factors: Tensor) -> Tensor:
        return self.dense.update(weight, **factors) * (weight != 0)


def finite_factor(value: float) -> str | None:
    return None if isfinite(value) and value != 0 else "must be a finite number other than 0"


def probability(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be in [0, 1)"


SCALE_OPTION = ("The factor s of the update.", finite_factor)
DROPOUT_OPTION = ("Dropout on the adapter branch's input in training.", probability)
"""Help and check of options that methods share: `scale: float = option(2.0, *SCALE_OPTION)`."""


METHODS = Registry[type[Method]]("adapter method", "spp_fx.methods", "spp_fx.adapters")
register = naming(METHODS)


def make_method(name: str, **options: Any) -> Method:
    """A method by name with its options; UsageError for an unknown name, or an option that it does not have."""
    check_options(METHODS, name, options)
    option_types(METHODS.find(name))
    return METHODS.find(name)(**options)


def option_types(method: type[Method]) -> dict[str, type]:
    """The types of a method's options; UsageError for one that neither ops nor adapter_config.json can hold."""
    hints = get_type_hints(method)
    kinds = {each.name: hints[each.name] for each in fields(method)}
    if odd := [key for key, kind in kinds.items() if kind not in (int, float, bool, str)]:
        raise UsageError(f"{method.name}: the option {odd[0]} must be an int, float, bool or str")
    return kinds


_TRIED_ROWS = 64


def check_update(method: Method, shape: tuple[int, ...]) -> None:
    """Try `update` on some rows of a weight of this shape; what it gets wrong would only show while training.

    Raises:
        UsageError: it fails, changes the shape, moves a zero, or gives other numbers for a part of the rows.
    """
    import torch

    m, n = shape[-2:]
    group = method.row_group((m, n))
    rows = min(m, _TRIED_ROWS) if group >= _TRIED_ROWS else min(m, _TRIED_ROWS // group * group)
    part = max(1, min(group, rows) // 2)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    weight[:, ::2] = 0
    specs = method.factors((m, n))
    factors = {key: torch.randn(spec.shape, generator=generator).double() for key, spec in specs.items()}

    def updated(count: int) -> Tensor:
        own = {key: factors[key][spec.index((0, count))] for key, spec in specs.items()}
        return method.update(weight[:count], **own)

    try:
        whole, some = updated(rows), updated(part)
    except (RuntimeError, TypeError, KeyError) as error:
        raise UsageError(
            f"{method.name}: update fails for rows of a weight of shape [{m}, {n}]: {str(error).splitlines()[0]}. It "
            "gets parts of a weight too: take group sizes from the shapes that it is given"
        ) from error
    if whole.shape != weight.shape:
        raise UsageError(
            f"{method.name}: update of shape {list(whole.shape)} for a weight of {list(weight.shape)}"
        )
    if method.masked and bool(whole[weight == 0].any()):
        raise UsageError(f"{method.name}: update is not zero where the weight is zero")
    if not torch.allclose(some, whole[:part], rtol=1e-9, atol=1e-12):
        raise UsageError(
            f"{method.name}: update of the first {part} rows alone is not that of all; rows and columns of each "
            "FactorSpec must say how many rows and columns of the weight share one entry"
        )


def initial_factor(spec: FactorSpec, key: str, seed: int, device: torch.device) -> Tensor:
    """A factor's initial value in float32; it depends on seed and key, not on the order of sites."""
    import torch

    if device.type == "meta":
        return torch.zeros(spec.shape, device=device)
    value = torch.zeros(spec.shape)
    if spec.init == "kaiming":
        digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        bound = 1 / sqrt(spec.shape[-1])
        value.uniform_(-bound, bound, generator=generator)
    if spec.ones is not None:
        value.select(-2 if spec.ones == "row" else -1, 0).fill_(1)
    return value.to(device)


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """What elementwise work on tensors runs in: their promoted dtype, at least float32."""
    import torch

    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@contextmanager
def recording() -> Generator[None]:
    """Let autograd record within the implementation of a custom op, from which torch keeps it away.

    `torch.func.vjp` would do so by itself, but not under a dispatch mode such as a counter of operations.
    """
    import torch

    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
