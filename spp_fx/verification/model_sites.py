"""The sites of a model folder, found by tracing on the meta device, and where they are stored."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_fx.adapters.adapter_folder import StoredMatrix
from spp_fx.errors import FormatError, SppFxError, UsageError
from spp_fx.exporters.manifest import MANIFEST, Manifest
from spp_fx.graph.binding import NOT_STORED, Binding, Parameter, bind
from spp_fx.graph.model import hollow, hollow_model, meta_model
from spp_fx.graph.outline import outline
from spp_fx.graph.program import Program
from spp_fx.graph.task import Task, find_task
from spp_fx.graph.trace import trace
from spp_fx.parallel import Tick, no_tick
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.match import Match
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.sparsity.mask import PackedMask
from spp_fx.sparsity.pattern import Pattern, detect_pattern
from spp_fx.sparsity.scan import scan_stored
from spp_fx.sparsity.weights import Sites, Weights, is_matrix, within, without
from spp_fx.storage.folder import ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_LAYER_COUNTS = frozenset(
    ("decoder_layers", "encoder_layers", "n_layer", "n_layers", "num_decoder_layers", "num_hidden_layers", "num_layers")
)  # fmt: skip
"""The keys of config.json, and of the tables nested in it, that give a number of layers."""


def check_layer_count(folder: ModelFolder, stored: int) -> None:
    """FormatError if config.json has more layers than there are stored tensors: each layer has several."""
    tables: list[dict[str, Any]] = [folder.config]
    while tables:
        for key, value in tables.pop().items():
            if isinstance(value, dict):
                tables.append(value)
            elif key in _LAYER_COUNTS and isinstance(value, int | float) and value > stored:
                raise FormatError(
                    f"{folder.path / 'config.json'}: {key} is {value:.15g}, and only {stored} tensors are stored; "
                    "get the config.json of these weights again"
                )


@dataclass(frozen=True)
class ModelSites:
    """A model folder with its canonical program on the meta device, and where each weight is stored.

    Attributes:
        binding: the stored matrices of every parameter.
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
    def matrices(self) -> dict[str, tuple[StoredMatrix, ...]]:
        return self.binding.matrices

    @property
    def others(self) -> dict[str, str]:
        """Every matrix that is not a site, with the reason."""
        return self.left_out | self.unread

    @property
    def notes(self) -> tuple[str, ...]:
        """What users should know before sites are changed."""
        notes = list(self.folder.notes)
        if self.folder.shards and (missing := self._missing()):
            notes.append(
                f"{self.folder.path}: holds nothing for {len(missing)} parameters (first: {missing[0]}); "
                "transformers would fill them with random numbers"
            )
        if self.program.untraced is not None:
            notes.append(
                f"{self.folder.path}: {self.program.untraced}; its sites are therefore the linears among its "
                "modules, and train, eval and pruning by inputs do not support it"
            )
        return tuple(notes)

    def _missing(self) -> list[str]:
        """Parameters that are stored under none of their names."""
        first = self.program.tied
        stored = {first.get(name, name) for name in self.matrices}
        return [
            name
            for name, _ in self.program.named_parameters()
            if self.binding.refused.get(name) == NOT_STORED and first.get(name, name) not in stored
        ]


def find_sites(
    folder: ModelFolder,
    *,
    task: str | None = None,
    trust_remote_code: bool = False,
    runnable: bool = False,
) -> ModelSites:
    """Find the sites of a folder's model without its weights, and the stored matrices of each.

    A model that cannot be traced is described by its modules (see `outline`), unless it has to be runnable.

    Args:
        folder: as `open_model` gives it.
        task: name of what the model is for; None: what its configuration says.
        runnable: give the program real constants and buffers, so that it runs once its parameters are filled in.
    """
    if not folder.config:
        raise UsageError(f"{folder.path}: config.json is missing or empty; a model folder needs it")
    if folder.shards:
        check_layer_count(folder, len(folder.names))
    make = hollow_model if runnable else meta_model
    chosen = None if task is None else find_task(task)
    model = make(folder.path, task=chosen, trust_remote_code=trust_remote_code)
    stored = {name: folder.info(name)[1].shape for name in folder.names}
    return _model_sites(folder, model, stored, chosen, runnable=runnable)


def _model_sites(
    folder: ModelFolder,
    model: "PreTrainedModel",
    stored: Mapping[str, tuple[int, ...]],
    task: Task | None = None,
    *,
    runnable: bool = False,
) -> ModelSites:
    program = _program_of(model, task, runnable=runnable)
    binding = Binding({}, {}, {})
    if stored:
        parameters = {name: Parameter(name, tuple(value.shape)) for name, value in model.state_dict().items()}
        binding = bind(model, parameters | program.sites, stored)
    return ModelSites(folder, program, binding, *_other_matrices(program, binding, stored))


def _program_of(model: "PreTrainedModel", task: Task | None = None, *, runnable: bool = False) -> Program:
    """The canonical program of a model without weights."""
    try:
        program = hollow(trace(model, task=task))
    except SppFxError as error:
        if runnable:
            raise
        return outline(model, str(error))
    run_pipeline(program, [Canonicalize()])
    return program


def _other_matrices(
    program: Program, binding: Binding, stored: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Matrices that are not sites: `ModelSites.left_out` and `ModelSites.unread`."""
    left_out: dict[str, str] = {}
    unread: dict[str, str] = {}
    owners = {tensor: name for name, matrices in binding.matrices.items() for tensor in tensors_of(matrices)}
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
            unread[tensor] = "its role in the model is unknown"
    first = program.tied
    held = {first.get(name, name) for name in binding.matrices}  # under any name of a shared parameter
    for name, why in program.left_out.items():
        if name not in first and name not in held and is_matrix(program.get_parameter(name).shape):
            (left_out if why.known else unread)[name] = why.reason
    return left_out, unread


def choose(found: ModelSites, match: Match) -> tuple[list[str], dict[str, str]]:
    """Run `match` and keep the sites whose stored tensors can be rewritten; all others with reasons.

    Raises:
        UsageError: no site is left.
    """
    if not found.program.sites:
        reasons = "; ".join(sorted(set(found.others.values()))) or "it has no matrices"
        raise UsageError(f"{found.folder.path}: the model has no linear to adapt or prune: {reasons}")
    (report,) = run_pipeline(found.program, [match])
    skipped = dict(report.skipped)
    for name in list(found.program.matched):
        reason = found.binding.refused.get(name) or _not_floating(found, name)
        if reason is not None:
            skipped[name] = reason
            del found.program.matched[name]
    if not found.program.matched:
        raise UsageError(f"no site can be changed: {'; '.join(sorted(set(skipped.values())))}")
    return list(found.program.matched), skipped


def _not_floating(found: ModelSites, site: str) -> str | None:
    for matrix in found.matrices[site] if found.folder.shards else ():
        dtype = found.folder.info(matrix.tensor)[1].dtype
        if dtype not in ("F64", "F32", "F16", "BF16"):
            return f"is stored as {dtype}, which is not a plain floating type"
    return None


def matched_sites(found: ModelSites) -> Sites:
    """The stored tensors of the sites that `match` takes by default, whatever their dtype; others are left out."""
    program, binding = found.program, found.binding
    left_out = found.left_out | {
        tensor: reason
        for name, reason in _match_all(program).items()
        for tensor in tensors_of(binding.matrices.get(name, ()))
    }
    owner = {name: program.tied.get(name, name) for name in program.sites}
    stored = {owner[name] for name in program.matched if name in binding.matrices}
    transposed: dict[str, bool] = {}
    unreadable: dict[str, str] = {}
    for name in program.matched:
        if name in binding.matrices:
            matrices = tensors_of(binding.matrices[name])
            transposed |= {tensor: matrix.transposed for tensor, matrix in matrices.items()}
        elif owner[name] in stored:
            continue  # shared with another site, under whose name it is stored
        elif (reason := binding.refused.get(name, NOT_STORED)) == NOT_STORED:
            transposed[name] = program.sites[name].transposed
        else:
            unreadable[name] = reason
    return Sites(transposed, unreadable, without(left_out, transposed), without(found.unread, transposed))


def _match_all(program: Program) -> dict[str, str]:
    """Match the sites that match takes by default; returns the reasons for the others."""
    if not program.sites:
        return {}
    try:
        (report,) = run_pipeline(program, [Match(dense=True)])
    except UsageError:  # there are none
        return dict.fromkeys(program.sites, "is not matched unless it is named")
    return report.skipped


def sites_by_config(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, trust_remote_code: bool = False
) -> Sites:
    """The sites of a file or export of a model, by the model's configuration alone.

    Args:
        path: a folder with the model's config.json.
        shapes: of the stored tensors, by name.
    """
    folder = ModelFolder.open(path, weights=False)
    check_layer_count(folder, len(shapes))
    model = meta_model(path, as_stored=False, trust_remote_code=trust_remote_code)
    return matched_sites(_model_sites(folder, model, shapes))


def sites_of_graph(
    path: Path, manifest: Manifest, weights: Weights, *, trust_remote_code: bool = False
) -> Sites:
    """The sites of an exported graph, which holds them as the loaded model does, except the parts in its manifest.

    The graph's other matrices are known by the model's names for them, or by what the graph does with them.

    Args:
        path: the export folder, with the model's config.json.
        weights: those of the graph.
    """
    rows: Counter[str] = Counter()
    for record in manifest.tensors:
        rows[record.part.initializer if record.part else record.name] += prod(record.shape[:-1])
    check_layer_count(ModelFolder.open(path, weights=False), len(weights.names))
    stated = manifest.requirements.get("task")  # older exports are all of causal language models
    task = None if stated is None else find_task(str(stated))
    model = meta_model(path, as_stored=False, task=task, trust_remote_code=trust_remote_code)
    program = _program_of(model, task)
    not_matched = _match_all(program)
    transposed: dict[str, bool] = {}
    unreadable: dict[str, str] = {}
    for name in program.matched:
        site = program.sites[name]
        if name not in rows:
            transposed[name] = site.transposed
        elif rows[name] < (all_rows := prod(site.shape[:-1])):
            unreadable[name] = (
                f"{MANIFEST} names {rows[name]} of its {all_rows} rows, so the others are unknown"
            )
    # A graph holds what its outputs depend on: some of the model's matrices, and its own constants.
    known = transposed.keys() | rows.keys()
    roles = {name: why.reason for name, why in program.left_out.items() if why.known} | not_matched
    unclear = {name: why.reason for name, why in program.left_out.items() if not why.known}
    graph = weights.sites
    left_out = without({**graph.left_out, **within(roles, weights.names)}, known)
    unreadable |= without(graph.unreadable, known | left_out.keys())
    unread = {**graph.unread, **within(unclear, weights.names)}
    unread = without(unread, known | left_out.keys() | unreadable.keys())
    return Sites(transposed, unreadable, left_out, unread).with_sites(graph.transposed)


def tensors_of(matrices: Iterable[StoredMatrix]) -> dict[str, StoredMatrix]:
    """The stored tensors of matrices, each once (a stack stored whole counts once)."""
    return {matrix.tensor: matrix for matrix in matrices}


def scan_sites(
    found: ModelSites, sites: Iterable[str], tick: Tick = no_tick
) -> dict[str, tuple[PackedMask, Pattern | None]]:
    """Scan the stored tensors of sites: mask and pattern by tensor; sets `program.patterns`.

    A site made of several tensors is dense if one of them is, and holds the loosest of their patterns otherwise.
    """
    seen: dict[str, tuple[PackedMask, Pattern | None]] = {}
    for site in sites:
        patterns: list[Pattern | None] = []
        for tensor, matrix in tensors_of(found.matrices[site]).items():
            if tensor not in seen:
                mask = scan_stored(found.folder.info(tensor)[0], tensor, transposed=matrix.transposed).mask
                seen[tensor] = (mask, detect_pattern(mask))
            patterns.append(seen[tensor][1])
            tick(tensor, found.folder.info(tensor)[1].nbytes)
        known = [pattern for pattern in patterns if pattern is not None]
        all_known = len(known) == len(patterns) > 0
        found.program.patterns[site] = min(known, key=lambda p: p.sparsity) if all_known else None
    return seen
