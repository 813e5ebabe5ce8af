"""The sites of a model folder, found by tracing on the meta device, and where they are stored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_fx.adapters.adapter_folder import Piece
from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.graph.binding import NOT_STORED, Binding, Parameter, bind
from spp_fx.graph.model import hollow, hollow_model, meta_model
from spp_fx.graph.outline import outline
from spp_fx.graph.program import Program
from spp_fx.graph.trace import trace
from spp_fx.parallel import Tick, no_tick
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern, detect_pattern
from spp_fx.sparsity.scan import Scan, is_matrix, scan_file
from spp_fx.storage.folder import ModelFolder
from spp_fx.verify.artifact import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_COUNTS = frozenset(
    (
        "decoder_layers",
        "encoder_layers",
        "n_layer",
        "n_layers",
        "num_decoder_layers",
        "num_hidden_layers",
        "num_layers",
    )
)
"""What configurations call the number of layers, in the file and in the tables nested in it."""


def check_layer_count(folder: ModelFolder, stored: int) -> None:
    """FormatError if config.json speaks of more layers than there are stored tensors, of which each has several."""
    tables: list[dict[str, Any]] = [folder.config]
    while tables:
        for key, value in tables.pop().items():
            if isinstance(value, dict):
                tables.append(value)
            elif key in _COUNTS and isinstance(value, int | float) and value > stored:
                raise FormatError(
                    f"{folder.path / 'config.json'}: {key} is {value:.15g}, and only {stored} tensors are stored; "
                    "it is damaged, or not that of these weights"
                )


@dataclass(frozen=True)
class Survey:
    """A model folder with its canonical program on the meta device and the place of each weight.

    Attributes:
        binding: the stored tensors of every parameter.
        left_out: matrices that are not sites because of what the model does with them, each with that reason;
            by the names of stored tensors, as `unread`, or of parameters that have none.
        unread: all other matrices that are not sites, with what is known of each: parameters that no linear
            reads, stored tensors that the model does not have.
    """

    folder: ModelFolder
    program: Program
    binding: Binding
    left_out: dict[str, str]
    unread: dict[str, str]

    @property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        return self.binding.pieces

    @property
    def others(self) -> dict[str, str]:
        """Every matrix that is not a site, with the reason."""
        return self.left_out | self.unread

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know before sites are treated."""
        notes = list(self.folder.notes)
        if self.folder.shards and (missing := self._missing()):
            notes.append(
                f"{self.folder.path}: holds nothing for {len(missing)} parameters (first: {missing[0]}); "
                "transformers would fill them with random numbers"
            )
        if self.program.untraced is not None:
            notes.append(
                f"{self.folder.path}: {self.program.untraced}; so its sites are the linears among its modules, and "
                "train, eval and pruning by inputs do not take it"
            )
        return tuple(notes)

    def _missing(self) -> list[str]:
        """Parameters of which nothing is stored, under none of their names."""
        first = self.program.tied
        stored = {first.get(name, name) for name in self.pieces}
        names = (name for name, _ in self.program.named_parameters())
        return [
            name
            for name in names
            if self.binding.refused.get(name) == NOT_STORED and first.get(name, name) not in stored
        ]


def survey(
    path: Path,
    *,
    weights: bool = True,
    trust_remote_code: bool = False,
    runnable: bool = False,
    any_config: bool = False,
) -> Survey:
    """Open a model folder, find the sites of its model without weights, and the stored tensors of each.

    A model that cannot be traced is told by its modules (see `outline`), unless it has to be runnable.

    Args:
        runnable: give the program real constants and buffers, so that it runs once its parameters are filled in.
        weights, any_config: as for `open_model`.
    """
    folder = open_model(path, weights=weights, any_config=any_config)
    if not folder.config:
        raise UsageError(f"{path}: config.json is missing or empty; a model folder needs it")
    if folder.shards:
        check_layer_count(folder, len(folder.names))
    make = hollow_model if runnable else meta_model
    model = make(path, trust_remote_code=trust_remote_code)
    program = _program_of(model, runnable=runnable)
    stored = {name: folder.info(name)[1].shape for name in folder.names}
    binding = _bind(model, program, stored)
    return Survey(folder, program, binding, *_others(program, binding, stored))


def _program_of(model: "PreTrainedModel", *, runnable: bool = False) -> Program:
    """The program of a model without weights, with its sites."""
    try:
        program = hollow(trace(model))
    except SppFxError as error:
        if runnable:
            raise
        return outline(model, str(error))
    run_pipeline(program, [Canonicalize()])
    return program


def _bind(model: "PreTrainedModel", program: Program, stored: Mapping[str, tuple[int, ...]]) -> Binding:
    if not stored:
        return Binding({}, {}, {})
    parameters = {name: Parameter(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    return bind(model, parameters | program.sites, stored)


def _others(
    program: Program, binding: Binding, stored: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Matrices that are not sites: `Survey.left_out` and `Survey.unread`."""
    left_out: dict[str, str] = {}
    unread: dict[str, str] = {}
    owners = {tensor: name for name, pieces in binding.pieces.items() for tensor in tensors_of(pieces)}
    buffers = dict(program.named_buffers(remove_duplicate=False))
    for tensor, shape in stored.items():
        owner = owners.get(tensor)
        if owner in program.sites or not is_matrix(shape):
            continue
        target = owner or binding.targets.get(tensor, tensor)
        if target in program.left_out:
            why = program.left_out[target]
            (left_out if why.known else unread)[tensor] = why.reason
        elif target in buffers and (owner is None or not buffers[target].is_floating_point()):
            left_out[tensor] = "is a buffer that the model computes, or a table of numbers"
        elif target in binding.refused:
            unread[tensor] = f"belongs to {target}, which {binding.refused[target]}"
        elif owner is None:
            unread[tensor] = "the model of config.json does not have it"
        else:
            unread[tensor] = "nothing in the model tells what it does"
    first = program.tied
    held = {
        first.get(name, name) for name in binding.pieces
    }  # under one name of a shared parameter, or another
    for name, why in program.left_out.items():
        if name not in first and name not in held and is_matrix(program.get_parameter(name).shape):
            (left_out if why.known else unread)[name] = why.reason
    return left_out, unread


def choose(found: Survey, match: Match) -> tuple[list[str], dict[str, str]]:
    """Run `match` and keep the sites whose stored tensors can be rewritten; all others with reasons.

    Raises:
        UsageError: no site is left.
    """
    if not found.program.sites:
        reasons = "; ".join(sorted(set(found.others.values()))) or "it has no matrices"
        raise UsageError(f"{found.folder.path}: the model has no linear that could be treated: {reasons}")
    (report,) = run_pipeline(found.program, [match])
    refused = dict(report.skipped)
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
            return f"is stored as {dtype}, which is not a plain floating type"
    return None


@dataclass(frozen=True)
class Expected:
    """The weights that should be sparse in a model, whatever their dtype, whether they are there or not.

    Attributes:
        sites: stored tensor -> stored (in, out)? A site of which nothing is stored is under its own name.
        refused: sites that are stored in a way that cannot be looked at, and why.
        left_out, unread: all other matrices, as in `Survey`; also sites that `match` leaves alone.
    """

    sites: dict[str, bool]
    refused: dict[str, str]
    left_out: dict[str, str]
    unread: dict[str, str]


def expected_of(found: Survey) -> Expected:
    """The stored tensors of the sites that `match` would take, and each of them that has none."""
    return _expected(found.program, found.binding, found.left_out, found.unread)


def _expected(
    program: Program, binding: Binding, left_out: Mapping[str, str], unread: Mapping[str, str]
) -> Expected:
    left_out = dict(left_out) | {
        tensor: reason
        for name, reason in _match_all(program).items()
        for tensor in (tensors_of(binding.pieces[name]) if name in binding.pieces else ())
    }
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
    return Expected(
        sites,
        refused,
        {name: reason for name, reason in left_out.items() if name not in sites},
        {name: reason for name, reason in unread.items() if name not in sites},
    )


def _match_all(program: Program) -> dict[str, str]:
    """Match every site that is one by default; returns the reasons of the others."""
    if not program.sites:
        return {}
    try:
        (report,) = run_pipeline(program, [Match(dense=True)])
    except UsageError:  # none is
        return dict.fromkeys(program.sites, "is not taken unless it is named")
    return report.skipped


def expected_sites(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, trust_remote_code: bool = False
) -> Expected:
    """The weights that should be sparse in whatever was made of a model, by its configuration alone.

    Args:
        path: a folder with the model's config.json.
        shapes: of the stored tensors, by name.
    """
    check_layer_count(ModelFolder.open(path, weights=False), len(shapes))
    model = meta_model(path, as_stored=False, trust_remote_code=trust_remote_code)
    program = _program_of(model)
    binding = _bind(model, program, shapes)
    return _expected(program, binding, *_others(program, binding, shapes))


def loaded_program(
    path: Path, stored: int, *, trust_remote_code: bool = False
) -> tuple[Program, dict[str, str]]:
    """The program of a model by its configuration alone, matched, and why sites of it are not.

    Args:
        path: a folder with the model's config.json.
        stored: how many tensors there are, which bounds the number of layers.
    """
    check_layer_count(ModelFolder.open(path, weights=False), stored)
    program = _program_of(meta_model(path, as_stored=False, trust_remote_code=trust_remote_code))
    return program, _match_all(program)


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
