"""What a model folder holds: its sites, found by tracing on the meta device, and where they are stored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spp_fx.checkpoint import ModelFolder
from spp_fx.errors import UsageError
from spp_fx.ir.binding import NOT_STORED, Binding, Parameter, bind
from spp_fx.ir.model import hollow, hollow_model, meta_model
from spp_fx.ir.piece import Piece
from spp_fx.ir.program import Program
from spp_fx.ir.site import Site
from spp_fx.ir.trace import trace
from spp_fx.passes import Canonicalize, Match, run_pipeline
from spp_fx.progress import Tick, no_tick
from spp_fx.sparsity import PackedMask, Pattern, Scan, detect_pattern, scan_file
from spp_fx.workflows.layer_count import check_layer_count
from spp_fx.workflows.open_model import open_model


@dataclass(frozen=True)
class Survey:
    """A model folder with its canonical program on the meta device and the place of each weight."""

    folder: ModelFolder
    program: Program
    binding: Binding

    @property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        return self.binding.pieces


def survey(
    path: Path,
    *,
    weights: bool = True,
    trust_remote_code: bool = False,
    runnable: bool = False,
    any_config: bool = False,
) -> Survey:
    """Open a model folder, trace its model without weights, find the stored tensors of each site.

    Args:
        runnable: give the program real constants and buffers, and find the stored tensors of every
            parameter too, so that it runs once these are filled in.
        weights, any_config: as for `open_model`.
    """
    folder = open_model(path, weights=weights, any_config=any_config)
    if not folder.config:
        raise UsageError(f"{path}: config.json is missing or empty; a model folder needs it")
    if folder.shards:
        check_layer_count(folder, len(folder.names))
    make = hollow_model if runnable else meta_model
    model = make(path, trust_remote_code=trust_remote_code)
    program = hollow(trace(model))
    run_pipeline(program, [Canonicalize()])
    stored = {name: folder.info(name)[1].shape for name in folder.names}
    if not stored:
        return Survey(folder, program, Binding({}, {}))
    parameters = {name: Parameter(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    slots = parameters | program.sites if runnable else program.sites
    return Survey(folder, program, bind(model, slots, stored))


def choose(found: Survey, match: Match) -> tuple[list[str], dict[str, str]]:
    """Run `match` and keep the sites whose stored tensors can be rewritten; all others with reasons.

    Raises:
        UsageError: no site is left.
    """
    (report,) = run_pipeline(found.program, [match])
    refused = dict(report.refused)
    for name in list(found.program.matched):
        reason = found.binding.refused.get(name) or _unusable(found, name)
        if reason is not None:
            refused[name] = reason
            del found.program.matched[name]
    if not found.program.matched:
        raise UsageError(f"no site can be treated: {'; '.join(sorted(set(refused.values())))}")
    return list(found.program.matched), refused


def _unusable(found: Survey, site: str) -> str | None:
    for piece in found.pieces[site] if found.folder.shards else ():
        dtype = found.folder.info(piece.tensor)[1].dtype
        if dtype not in ("F64", "F32", "F16", "BF16"):
            return f"is stored as {dtype}, which is no plain floating type"
    return None


@dataclass(frozen=True)
class Expected:
    """The weights that should be sparse in a model, whatever their dtype, whether they are there or not.

    Attributes:
        sites: stored tensor -> stored (in, out)? A site of which nothing is stored is under its own name.
        refused: sites that are stored in a way that cannot be looked at, and why.
    """

    sites: dict[str, bool]
    refused: dict[str, str]


def expected_of(program: Program, binding: Binding) -> Expected:
    """The stored tensors of the sites that `match` would take, and each of them that has none."""
    run_pipeline(program, [Match(dense=True)])
    owner = {name: program.tied.get(name, name) for name in program.sites}
    stored = {owner[name] for name in program.matched if name in binding.pieces}
    sites: dict[str, bool] = {}
    refused: dict[str, str] = {}
    for name in program.matched:
        if name in binding.pieces:
            pieces = tensors_of(binding.pieces[name])
            sites |= {tensor: piece.transposed for tensor, piece in pieces.items()}
        elif owner[name] in stored:
            continue  # shared with another site, under whose name it is stored
        elif (reason := binding.refused.get(name, NOT_STORED)) == NOT_STORED:
            sites[name] = program.sites[name].transposed
        else:
            refused[name] = reason
    return Expected(sites, refused)


def expected_sites(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Expected:
    """The weights that should be sparse in whatever was made of a model, by its configuration alone.

    Args:
        path: a folder with the model's config.json.
        shapes: of the stored tensors, by name.
    """
    check_layer_count(ModelFolder.open(path, weights=False), len(shapes))
    model = meta_model(path)
    program = hollow(trace(model))
    run_pipeline(program, [Canonicalize()])
    return expected_of(program, bind(model, program.sites, shapes))


def loaded_sites(path: Path, stored: int) -> dict[str, Site]:
    """The weights that should be sparse in the loaded model, by its configuration alone.

    Args:
        path: a folder with the model's config.json.
        stored: how many tensors there are, which bounds the number of layers.
    """
    check_layer_count(ModelFolder.open(path, weights=False), stored)
    program = hollow(trace(meta_model(path)))
    run_pipeline(program, [Canonicalize(), Match(dense=True)])
    return {name: program.sites[name] for name in program.matched}


def scan_tensor(folder: ModelFolder, tensor: str, *, transposed: bool) -> Scan:
    """The fast look at one stored tensor."""
    shard, info = folder.info(tensor)
    return scan_file(shard.path, info.start, info.shape, info.dtype, transposed=transposed)


def tensors_of(pieces: Iterable[Piece]) -> dict[str, Piece]:
    """The stored tensors of pieces, each once (a stack stored whole counts once)."""
    return {piece.tensor: piece for piece in pieces}


def observe(
    found: Survey, sites: Iterable[str], tick: Tick = no_tick
) -> dict[str, tuple[PackedMask, Pattern | None]]:
    """Look at the stored tensors of sites: mask and pattern by tensor; the program learns the patterns.

    A site that is made of several tensors is dense if one of them is, and holds a pattern if all do.
    """
    seen: dict[str, tuple[PackedMask, Pattern | None]] = {}
    for site in sites:
        patterns: list[Pattern | None] = []
        for tensor, piece in tensors_of(found.pieces[site]).items():
            mask = scan_tensor(found.folder, tensor, transposed=piece.transposed).mask
            seen[tensor] = (mask, detect_pattern(mask))
            patterns.append(seen[tensor][1])
            tick(tensor, found.folder.info(tensor)[1].nbytes)
        found.program.patterns[site] = _common(patterns)
    return seen


def _common(patterns: list[Pattern | None]) -> Pattern | None:
    if None in patterns or not patterns:
        return None
    return min((p for p in patterns if p is not None), key=lambda pattern: pattern.sparsity)
