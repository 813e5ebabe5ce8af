"""prune: a dense model folder into a sparse one, tensor by tensor or decoder layer by decoder layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from spp_fx.checkpoint import (
    OWN_FILES,
    ModelFolder,
    Shard,
    TensorInfo,
    atomic_folder,
    check_target,
    rewrite_model,
)
from spp_fx.errors import MaskError, UsageError
from spp_fx.ir.binding import take_apart
from spp_fx.passes import Causal, Match, Partition, run_pipeline
from spp_fx.pruning import make_criterion
from spp_fx.pruning.layerwise import LayerResult, Tick, outside_of_layers, prune_layers, silent
from spp_fx.pruning.recipe import MatrixReport, Recipe, check_patterns, patterns_of, prune_matrix
from spp_fx.sparsity import LOCK_NAME, Lock, LockEntry, Pattern, make_entry, parse_pattern, scan_bits
from spp_fx.version import VERSION
from spp_fx.workflows.calibration import Calibration, calibration_tokens
from spp_fx.workflows.layer_store import layer_store
from spp_fx.workflows.layer_weights import FolderWeights
from spp_fx.workflows.survey import Survey, choose, scan_tensor, survey, tensors_of


@dataclass(frozen=True)
class Pruned:
    """What prune did.

    Attributes:
        out: the folder written.
        pattern: what every pruned weight holds now, unless a ratio says otherwise.
        lock: the masks, as written to `sparsity.lock.json`.
        refused: sites left dense, each with its reason.
        reports: what was done to each matrix, by the tensor that holds it; a stack stored whole has several.
        calibration: how many windows of how many tokens were looked at, if any.
    """

    out: Path
    pattern: Pattern
    lock: Lock
    refused: dict[str, str]
    reports: dict[str, list[MatrixReport]]
    calibration: dict[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "pattern": str(self.pattern),
            "calibration": self.calibration,
            "sites": [
                {
                    "name": e.name,
                    "shape": list(e.shape),
                    "nnz": e.nnz,
                    "sparsity": 1 - e.nnz / torch.Size(e.shape).numel(),
                    "pattern": str(e.pattern),
                    **self.errors(e.name),
                    "notes": list(dict.fromkeys(n for report in self.reports[e.name] for n in report.notes)),
                }
                for e in self.lock.sites
            ],
            "refused": self.refused,
        }

    def errors(self, tensor: str) -> dict[str, float | None]:
        """What the outputs of a weight lost of their energy on calibration inputs.

        `error_before` is what the first mask alone takes, `error_after` what is missing after update and repair;
        both are squared norms relative to the dense weight's, None without calibration.
        """
        reports = self.reports[tensor]
        energy = sum(report.energy or 0 for report in reports)
        if not energy:
            return {"error_before": None, "error_after": None}
        return {
            "error_before": sum(report.lost_before or 0 for report in reports) / energy,
            "error_after": sum(report.lost_after or 0 for report in reports) / energy,
        }


def prune(
    model: str | Path,
    out: str | Path,
    *,
    method: str,
    pattern: str,
    calibration: Calibration | None = None,
    repair: str | None = None,
    damp: float | None = None,
    block_size: int | None = None,
    permute: bool | None = None,
    targets: Sequence[str] = (),
    ratios: Sequence[str] = (),
    skip: Sequence[str] = (),
    device: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    tick: Tick = silent,
    say: Callable[[str], None] = lambda line: None,
) -> Pruned:
    """Prune every matched site of a model folder and write the lock beside the weights.

    Without calibration, tensor by tensor. With it, decoder layer by decoder layer: each is run on what the
    pruned layers before it give, pruned, and run again; memory holds the weights of one layer. An interrupted
    run goes on at the layer where it was stopped when it is called again, and writes the same bytes.

    Args:
        method: name of a criterion.
        pattern: N:M or a share of zeros.
        repair: `dsnot`, or none.
        damp, block_size, permute: options of the criteria that have them.
        targets: sites to take; see `Match`.
        ratios: `NAME@PATTERN`: other patterns for the sites of that name; the last that fits counts.
        skip: names of sites that stay dense.
        device: where layers run; a GPU if torch sees one.
        say: called with what the reader should know while it runs.

    Raises:
        UsageError: an option is wrong, the text too short, or the output exists.
        PatternError: the pattern does not divide a site's inputs, or a site cannot be pruned; names it.
        MaskError: what was read back is not what was meant to be written.
    """
    model, out, wanted = Path(model), Path(out).absolute(), parse_pattern(pattern)
    criterion = make_criterion(method, damp=damp, block_size=block_size, permute=permute)
    recipe = Recipe(criterion, repair)
    if recipe.calibrated and calibration is None:
        raise UsageError(f"{repair or method} looks at inputs: give the text to calibrate on, --calib FILE")
    check_target(out, force, [model])
    where = _device(device)
    found = survey(model, trust_remote_code=trust_remote_code, runnable=calibration is not None)
    matched, refused = choose(found, Match(targets=tuple(targets), dense=True))
    if calibration is not None:
        run_pipeline(found.program, [Partition(), Causal()])
        outside = outside_of_layers(found.program, matched)
        refused |= outside
        matched = [name for name in matched if name not in outside]
        if not matched:
            raise UsageError(f"no site can be calibrated: {'; '.join(sorted(set(outside.values())))}")
    patterns, skipped = patterns_of(matched, wanted, ratios, skip)
    refused |= skipped
    check_patterns(found.program.sites, patterns, criterion)
    if calibration is None:
        written = _stream(found, patterns, recipe, out, force, model, tick)
        used = None
    else:
        tokens = calibration_tokens(
            model, found.program, calibration, trust_remote_code=trust_remote_code, say=say
        )
        used = {"samples": tokens.shape[0], "seq_len": tokens.shape[1]}
        written = _walk(found, patterns, recipe, tokens, out, force, model, where, tick, say)
    return Pruned(out, wanted, written.lock, refused, written.by_tensor, used)


@dataclass(frozen=True)
class _Written:
    lock: Lock
    by_tensor: dict[str, list[MatrixReport]]


def _stream(
    found: Survey,
    patterns: Mapping[str, Pattern],
    recipe: Recipe,
    out: Path,
    force: bool,
    model: Path,
    tick: Tick,
) -> _Written:
    """Prune by the weights alone, one stored tensor in memory."""
    site_of = {piece.tensor: (site, piece) for site in patterns for piece in found.pieces[site]}
    by_tensor: dict[str, list[MatrixReport]] = {}

    def replace(shard: Shard, info: TensorInfo) -> Tensor | None:
        if info.name not in site_of:
            return None
        site, piece = site_of[info.name]
        weight = shard.read(info.name)
        canonical = weight.transpose(-1, -2) if piece.transposed else weight
        matrices = list(canonical) if canonical.ndim == 3 else [canonical]
        by_tensor[info.name] = [
            prune_matrix(matrix, None, patterns[site], recipe, info.name, i if piece.whole else None)
            for i, matrix in enumerate(matrices)
        ]
        tick(len(by_tensor), len(site_of), info.name)
        return weight

    return _Written(_write(found, patterns, out, force, model, replace), by_tensor)


def _walk(
    found: Survey,
    patterns: Mapping[str, Pattern],
    recipe: Recipe,
    tokens: Tensor,
    out: Path,
    force: bool,
    model: Path,
    device: torch.device,
    tick: Tick,
    say: Callable[[str], None],
) -> _Written:
    """Prune layer by layer, with one layer in memory."""
    plan = {
        "version": VERSION,
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
        "base": found.folder.fingerprint(),
        "config": found.folder.config,
        "files": {shard.name: _stamp(shard.path) for shard in found.folder.shards},
        "criterion": {"name": recipe.criterion.name, **asdict(recipe.criterion)},
        "repair": recipe.repair,
        "patterns": {name: str(pattern) for name, pattern in patterns.items()},
        "tokens": blake2b(tokens.numpy().tobytes()).hexdigest(),
        "shape": list(tokens.shape),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
    with layer_store(out, plan, say) as store:

        def finish(index: int, result: LayerResult) -> None:
            tensors = {
                stored: part
                for name, tensor in result.tensors.items()
                for stored, part in take_apart(found.pieces[name], tensor)
            }
            store.finish(index, tensors, result.reports)

        if device.type != "cpu":
            found.program.move_constants(torch.device("cpu"), device)
        if store.done < len(found.program.units):
            prune_layers(
                found.program.eval(), tokens, patterns, recipe, weights=FolderWeights(found),
                states=store.states, device=device, start=store.done, finish=finish, tick=tick,
            )  # fmt: skip
        pruned = store.tensors()

        def replace(shard: Shard, info: TensorInfo) -> Tensor | None:
            return pruned[info.name].read(info.name) if info.name in pruned else None

        lock = _write(found, patterns, out, force, model, replace)
        by_site: dict[str, list[MatrixReport]] = {}
        for report in store.reports():
            by_site.setdefault(report.site, []).append(report)
    by_tensor = {
        piece.tensor: [
            r for r in by_site[site] if piece.whole or (r.expert, r.start) == (piece.expert, piece.start)
        ]
        for site in patterns
        for piece in found.pieces[site]
    }
    return _Written(lock, by_tensor)


def _write(
    found: Survey,
    patterns: Mapping[str, Pattern],
    out: Path,
    force: bool,
    model: Path,
    replace: Callable[[Shard, TensorInfo], Tensor | None],
) -> Lock:
    """Write the folder with some tensors replaced, and the lock as read back from it."""
    with atomic_folder(out, force, sources=[model]) as temporary:
        rewrite_model(found.folder, temporary, replace, skip=OWN_FILES)
        lock = _lock_folder(ModelFolder.open(temporary), found, patterns)
        (temporary / LOCK_NAME).write_text(lock.dumps())
    return lock


def _lock_folder(folder: ModelFolder, found: Survey, patterns: Mapping[str, Pattern]) -> Lock:
    """The lock of a folder just written, from its own bytes; every mask must hold its pattern."""
    entries: list[LockEntry] = []
    for site, pattern in patterns.items():
        for piece in tensors_of(found.pieces[site]).values():
            mask = scan_tensor(folder, piece.tensor, transposed=piece.transposed).mask
            violations = scan_bits(mask, pattern)
            if violations.count:
                raise MaskError(
                    f"{piece.tensor}: read back, it does not hold: {violations.describe(pattern)}"
                )
            kind = found.program.sites[site].kind
            entries.append(make_entry(piece.tensor, kind, mask, pattern, piece.transposed))
    return Lock.of(entries)


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _stamp(path: Path) -> list[int]:
    """Size and time of a file's last change."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]
