"""Factors by least squares: what brings the outputs of a pruned weight closest to those of the dense one."""

from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spp_fx.adapters.method import Factors, Method
from spp_fx.adapters.rows import row_ranges
from spp_fx.errors import UsageError
from spp_fx.pruning.gradients import SampleWalk, Source
from spp_fx.pruning.layerwise import Tick, silent
from spp_fx.pruning.statistics import Inputs, Observer, observed
from spp_fx.pruning.walk import Samples

BLOCK_ELEMENTS = 1 << 24
"""Elements of the products of one block of rows."""
DAMPING = 1e-4
"""Added to the diagonal of X Xᵀ, relative to its mean: moves that the inputs hardly see would be large, and untold
in float32."""
RIDGE = 1e-6
"""Of the normal equations, relative to the mean of their diagonal: two of a row's directions may be the same."""


@dataclass(frozen=True)
class SiteInputs:
    """A site and what its layer feeds it.

    Attributes:
        site: its name.
        weight: (out, in) or (experts, out, in), the program's own: the next layer sees what is written to it.
        inputs: with their `hessian`, by expert, 0 where the site is a plain matrix; an expert without tokens has none.
    """

    site: str
    weight: Tensor
    inputs: Mapping[int, Inputs]


def layer_inputs(
    source: Source,
    samples: Samples,
    sites: Collection[str],
    *,
    device: torch.device,
    tick: Tick = silent,
) -> Generator[SiteInputs, None, None]:
    """Walk forward, and give the sites of each layer with their inputs, before the next layer is run on its outputs.

    Memory holds one layer and a matrix (in, in) in float32 for each input of its sites.

    Args:
        source: the model; `states` keeps the inputs of at most two layers.
        samples: what is walked.
        sites: names, each in one layer; see `outside_of_layers`.
        device: where layers run.

    Raises:
        PatternError: inputs are not finite; names the site.
    """
    walk = SampleWalk.of(source, samples, device)
    source, program, count = walk.source, walk.source.program, len(walk.samples)
    layers, done = walk.walk.layers, 0

    def progress(what: str) -> None:
        nonlocal done
        done += 1
        tick(done, (2 * len(layers) - 1) * count, what)

    shared = walk.enter()
    for index, layer in enumerate(layers):
        own = [name for name in sites if program.sites[name].layer in layer.units]
        with walk.in_place(walk.walk.layer_tensors(index)):
            observer = Observer(observed(program, own), hessian=True, samples=count, device=device)
            for i in range(count):
                with torch.no_grad():
                    walk.walk.observe(index, walk.load(index, i), shared, observer)
                progress(f"{layer.path}: inputs")
            for name in own:
                seen = {expert: each for (site, expert), each in observer.inputs.items() if site == name}
                yield SiteInputs(name, program.canonical_weight(name).detach(), seen)
            for i in range(count) if index + 1 < len(layers) else ():
                with torch.no_grad():
                    values = walk.walk.run(index, walk.load(index, i), shared)
                source.states.save(index + 1, i, values)
                progress(f"{layer.path}: outputs")
        source.states.forget(index)


def row_factor(method: Method, shape: tuple[int, ...]) -> str | None:
    """The factor that least squares can find: one that starts at zero and has a row for each row of the weight."""
    found = [
        key
        for key, spec in method.factors(shape).items()
        if spec.init == "zeros" and spec.rows == 1 and spec.columns is None
    ]
    return found[0] if len(found) == 1 else None


def check_linear(method: Method, shape: tuple[int, ...]) -> None:
    """UsageError unless the update is linear in `row_factor`, tried on some rows of a weight of this shape."""
    key, (m, n) = row_factor(method, shape[-2:]), shape[-2:]
    rows = min(m, 8)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    factors = {
        name: torch.randn(spec.shape, generator=generator, dtype=torch.float64)[spec.index((0, rows))]
        for name, spec in method.factors((m, n)).items()
    }
    if key is not None:
        zero, one, two = (
            method.update(weight, **factors | {key: times * factors[key]}) for times in (0.0, 1.0, 2.0)
        )
        if torch.allclose(
            two - zero, 2 * (one - zero), rtol=1e-9, atol=1e-9 * float((one - zero).abs().max())
        ):
            return
    raise UsageError(
        f"{method.name}: its update is not linear in a factor that has one row for each row of the weight, so least "
        "squares cannot give it a start. Leave out --init"
    )


@dataclass(frozen=True)
class Solved:
    """The factors of a matrix, and the squared norm of what its outputs differ from the dense weight's.

    Attributes:
        before, after: of the pruned weight and of the adapted one, over the calibration inputs, times 2/samples.
        energy: of the dense weight's outputs, likewise.
    """

    factors: dict[str, Tensor]
    before: float
    after: float
    energy: float


@torch.no_grad()
def solve_rows(method: Method, weight: Tensor, dense: Tensor, hessian: Tensor, factors: Factors) -> Solved:
    """The row factor b for which || (W + update - W_dense) X || is least, row by row, where the mask leaves entries.

    The update of row i is a sum over b_ik z_ik, so with C = X Xᵀ its b solves (Z C Zᵀ) b = Z C d, d = w_dense - w
    (and less what the other factors add already). For SPP, z = s w * alpha and beta = z C d / z C z. A row that
    gains nothing keeps its start. The cost is r + 3 products of the size of W with C.

    Args:
        weight: the pruned matrix (m, n), float32.
        dense: (m, n) float32.
        hessian: C, (n, n) float32, at any scale.
        factors: where the factors start.
    """
    m, n = weight.shape
    specs = method.factors((m, n))
    key = row_factor(method, (m, n))
    assert key is not None
    count = factors[key].shape[-1]
    result = factors[key].clone()
    damping = DAMPING * float(hessian.diagonal().mean())
    before = after = energy = 0.0
    for start, stop in row_ranges(0, m, n * count, 1, BLOCK_ELEMENTS):
        own = {name: value[specs[name].index((start, stop))] for name, value in factors.items()}
        w, mask = weight[start:stop], weight[start:stop] != 0
        here = own[key]
        # Times the mask: what merge keeps, also of a method that trains without it.
        first = method.update(w, **own) * mask
        basis = torch.stack(
            [
                method.update(w, **own | {key: here + unit}) * mask - first
                for unit in torch.eye(count, device=w.device)
            ]
        )
        gap = dense[start:stop] - w - first
        products = basis @ hessian
        system = torch.einsum("krn,jrn->rkj", products.double(), basis.double())
        right = torch.einsum("krn,rn->rk", products.double(), gap.double())
        system += damping * torch.einsum("krn,jrn->rkj", basis.double(), basis.double())
        size = system.diagonal(dim1=1, dim2=2).mean(-1)
        ridge = torch.where(size > 0, RIDGE * size, 1)
        eye = torch.eye(count, dtype=system.dtype, device=w.device)
        change = torch.linalg.solve(system + ridge[:, None, None] * eye, right).to(result.dtype)
        lost, left, whole = (
            ((rows @ hessian).double() * rows.double()).sum(-1)
            for rows in (gap, gap - torch.einsum("rk,krn->rn", change, basis), dense[start:stop])
        )
        useful = left < lost
        result[start:stop] += torch.where(useful[:, None], change, 0)
        before, after = before + float(lost.sum()), after + float(torch.where(useful, left, lost).sum())
        energy += float(whole.sum())
    return Solved({**factors, key: result}, before, max(after, 0.0), energy)
