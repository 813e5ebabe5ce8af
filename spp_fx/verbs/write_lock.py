"""lock: write the lock of a sparse model that has none, whichever tool pruned it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_fx.console import grouped
from spp_fx.errors import FormatError, MaskError, PatternError, UsageError
from spp_fx.exporters.manifest import open_model, sha256
from spp_fx.parallel import Tick, in_order, no_tick
from spp_fx.sparsity.kernels import element_type
from spp_fx.sparsity.lock import LOCK_NAME, Lock, LockEntry, load_lock, make_entry
from spp_fx.sparsity.pattern import Pattern, detect_pattern, parse_pattern, scan_bits
from spp_fx.sparsity.scan import scan_stored
from spp_fx.sparsity.weights import is_target, sites_by_name
from spp_fx.storage.folder import peft_adapter
from spp_fx.storage.links import links_option
from spp_fx.storage.output import atomic_file
from spp_fx.storage.safetensors import Shard
from spp_fx.storage.workspace import Say
from spp_fx.verification import provenance

if TYPE_CHECKING:
    from spp_fx.verification.model_sites import ModelSites

_HAVE_OWN_LOCK = {"export.json": "an export", "adapter_config.json": "an adapter"}
"""Folders whose lock is a part of them, by the file that marks them."""

_SHOWN = 5
"""Names of one kind that are listed."""


@dataclass(frozen=True)
class Candidate:
    """A stored weight that is locked if it is sparse."""

    shard: Shard
    name: str
    kind: str
    transposed: bool


@dataclass(frozen=True)
class Made:
    """A lock, the reason for each weight that is not in it, and which of those are sites that cannot be read."""

    lock: Lock
    left_out: dict[str, str]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Locked:
    """What lock wrote.

    Attributes:
        out: the lock file.
        left_out: weights that are not locked, each with its reason.
        replaced: sites `added`, `removed` and `changed` since the lock that was there before; None without one.
    """

    out: Path
    lock: Lock
    left_out: dict[str, str]
    replaced: dict[str, list[str]] | None = None

    @property
    def patterns(self) -> dict[str, int]:
        """How many sites hold which pattern, the most frequent first."""
        return dict(Counter(str(entry.pattern) for entry in self.lock.sites).most_common())

    @property
    def sparsity(self) -> float:
        """Share of zeros over all sites."""
        return 1 - sum(e.nnz for e in self.lock.sites) / sum(prod(e.shape) for e in self.lock.sites)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": True,
            "out": str(self.out),
            "pattern": self.lock.pattern,
            "sites": [
                entry.model_dump(mode="json", include={"name", "kind", "shape", "pattern", "nnz"})
                | {"sparsity": 1 - entry.nnz / prod(entry.shape)}
                for entry in self.lock.sites
            ],
            "left_out": self.left_out,
            "replaced": self.replaced,
            "summary": {
                "sites": len(self.lock.sites),
                "patterns": self.patterns,
                "sparsity": self.sparsity,
            },
        }

    def lines(self) -> Iterator[str]:
        patterns = ", ".join(f"{count} of {pattern}" for pattern, count in self.patterns.items())
        yield f"{self.out}: {len(self.lock.sites)} weights locked: {patterns}"
        for what, names in (self.replaced or {}).items():
            yield from (f"  {what}: {name}" for name in names[:_SHOWN])
            if len(names) > _SHOWN:
                yield f"  {what}: {len(names) - _SHOWN} more; --json lists all"
        yield from (f"  not locked: {line}" for line in grouped(self.left_out))


@links_option
def lock(
    model: str | Path,
    out: str | Path | None = None,
    *,
    pattern: str | None = None,
    targets: Sequence[str] = (),
    force: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
    say: Say = lambda line: None,
) -> Locked:
    """Write the lock of a sparse model folder, or of a .safetensors file without a model around it.

    Args:
        out: the lock file; by default sparsity.lock.json beside the weights, where verify looks for it.
        pattern: what every matched site must hold. None detects each weight's own pattern and leaves dense
            weights out.
        targets: sites to lock; see `Match`.
        force: replace an existing lock.
        allow_links: follow symbolic links that leave a folder; see `links.check_link`.

    Raises:
        UsageError: the lock exists, a target names no site, or the folder has a lock of its own.
        PatternError: a site does not hold `pattern`, or no site is sparse. Nothing is written.
        MaskError: a weight holds NaN or infinity.
        FormatError: a file is damaged.
    """
    model = Path(model)
    required = parse_pattern(pattern) if pattern is not None else None
    for marker, what in _HAVE_OWN_LOCK.items():
        if (model / marker).is_file() and peft_adapter(model) is None:
            raise UsageError(f"{model}: is {what}, which has a lock of its own: {model / LOCK_NAME}")
    is_file = model.suffix == ".safetensors" and not model.is_dir()
    beside = (model.parent if is_file else model) / LOCK_NAME
    target = beside if out is None else Path(out)
    if not is_file:
        provenance.load(model)  # a damaged one is an error before the long scan
    with atomic_file(target, force) as temporary:
        before = _replaced_lock(target, say)
        if is_file:
            found, made = None, _lock_file(model, required, targets, tick)
        else:
            from spp_fx.verification.model_sites import find_sites

            found = find_sites(open_model(model), trust_remote_code=trust_remote_code)
            for note in found.notes:
                say(note)
            made = make_lock(found, pattern=required, targets=targets, tick=tick)
        if not made.lock.sites:
            raise nothing_sparse(model, made)
        temporary.write_text(made.lock.dumps())
        if found is not None and target.resolve() == beside.resolve():
            # Before the lock has its name: if this fails, the next run must not find a lock that it has to replace.
            _record(found, temporary, {"pattern": pattern, "targets": list(targets)})
    return Locked(target, made.lock, made.left_out, _changes(before, made.lock))


def make_lock(
    found: "ModelSites",
    *,
    pattern: Pattern | None = None,
    targets: Sequence[str] = (),
    tick: Tick = no_tick,
) -> Made:
    """The lock of a model's sparse weights.

    Args:
        found: the model, opened with its weights.
        pattern: required of every site that `match` takes. None detects each weight's pattern, of all sites (or of
            `targets`): whatever is sparse is locked, also what no pass would train.

    Raises:
        UsageError: a target that names no site.
        PatternError: a weight does not hold `pattern`; names it, its file, row and columns.
        MaskError: a weight holds NaN or infinity.
    """
    from spp_fx.passes.match import Match
    from spp_fx.passes.pipeline import run_pipeline
    from spp_fx.verification.model_sites import tensors_of

    if not found.program.sites:
        return Made(Lock.of([]), found.others)
    (report,) = run_pipeline(found.program, [Match(targets=tuple(targets), dense=True)])
    left_out = found.others | report.skipped
    sites = list(found.program.matched)
    if pattern is None and not targets:
        # A tied head belongs to the embedding, unless the checkpoint stores it under the head's name.
        own = {name for name, matrices in found.matrices.items() if any(p.tensor == name for p in matrices)}
        sites = [name for name, site in found.program.sites.items() if site.tied_to is None or name in own]
        left_out = {name: reason for name, reason in left_out.items() if name not in sites}
    candidates: dict[str, Candidate] = {}
    unreadable: list[str] = []
    for site in sites:
        if site not in found.matrices:
            left_out[site] = found.binding.refused[site]
            unreadable.append(site)
            continue
        kind = found.program.sites[site].kind
        candidates |= {
            tensor: Candidate(found.folder.info(tensor)[0], tensor, kind, matrix.transposed)
            for tensor, matrix in tensors_of(found.matrices[site]).items()
        }
    return _lock(list(candidates.values()), pattern, left_out, unreadable, tick)


def _lock_file(path: Path, pattern: Pattern | None, targets: Sequence[str], tick: Tick) -> Made:
    """The lock of a .safetensors file without a model around it: its sites are known by their names."""
    if (path.parent / "config.json").is_file():
        raise UsageError(f"{path}: is part of the model {path.parent}; lock that folder")
    shard = Shard.open(path)
    matrices = {name: info for name, info in shard.header.tensors.items() if len(info.shape) > 1}
    unknown = [target for target in targets if not any(is_target(name, target) for name in matrices)]
    if unknown:
        raise UsageError(f"{path}: holds no matrix named {', '.join(unknown)}")
    by_name = sites_by_name({name: info.shape for name, info in matrices.items()})
    left_out: dict[str, str] = {}
    candidates: list[Candidate] = []
    for name, info in matrices.items():
        if targets and not any(is_target(name, target) for target in targets):
            left_out[name] = "not among the targets"
        elif len(info.shape) > 3:
            left_out[name] = f"has {len(info.shape)} dimensions, a mask has two or three"
        elif 0 in info.shape:
            left_out[name] = "is empty"
        elif not targets and name not in by_name.transposed:
            reason = {**by_name.left_out, **by_name.unread}.get(name, "is a vector, by its shape")
            left_out[name] = f"{reason}; name it with --targets to lock it"
        else:
            kind = "experts" if len(info.shape) == 3 else "linear"
            candidates.append(Candidate(shard, name, kind, transposed=False))
    return _lock(candidates, pattern, left_out, [], tick)


def _lock(
    candidates: Sequence[Candidate],
    pattern: Pattern | None,
    left_out: dict[str, str],
    unreadable: list[str],
    tick: Tick,
) -> Made:
    """Scan the candidates and lock those that are sparse; the others are added to `left_out`, `unreadable`."""
    readable: list[Candidate] = []
    for candidate in candidates:
        try:
            element_type(candidate.shard.info(candidate.name).dtype)
            readable.append(candidate)
        except FormatError as error:
            left_out[candidate.name] = str(error)
            unreadable.append(candidate.name)
    entries: list[LockEntry] = []
    for candidate, entry in zip(readable, in_order(partial(_entry, pattern), readable), strict=True):
        if isinstance(entry, str):
            left_out[candidate.name] = entry
        else:
            entries.append(entry)
        tick(candidate.name, candidate.shard.info(candidate.name).nbytes)
    return Made(Lock.of(entries), left_out, tuple(unreadable))


def _entry(pattern: Pattern | None, weight: Candidate) -> LockEntry | str:
    """The lock entry of a weight, or why it has none."""
    scan = scan_stored(weight.shard, weight.name, transposed=weight.transposed)
    where, mask = f"{weight.name} ({weight.shard.name})", scan.mask
    if not mask.numel:
        return "is empty"
    if scan.position is not None:
        raise MaskError(
            f"{where}: {scan.position} is NaN or infinite ({scan.non_finite} such values); "
            "train or prune the model again before you lock it"
        )
    found = pattern or detect_pattern(mask)
    if found is None:
        return f"dense, {mask.sparsity:.1%} zeros"
    if pattern is not None:
        try:
            violations = scan_bits(mask, pattern)
        except PatternError as error:
            raise PatternError(f"{where}: {error}") from error
        if violations.count:
            raise PatternError(
                f"{where}: {violations.describe(pattern)}; no lock was written. Name the sites that hold {pattern} "
                "with --targets, or leave out --pattern to lock each weight as it is"
            )
    return make_entry(weight.name, weight.kind, mask, found, weight.transposed)


def nothing_sparse(model: Path, made: Made) -> PatternError:
    """Either every weight is dense, or sparse ones may be among those that cannot be read."""
    if made.unreadable:
        name = made.unreadable[0]
        return PatternError(
            f"{model}: holds no sparse weight that can be read, and {len(made.unreadable)} weights cannot be read "
            f"(first: {name}: {made.left_out[name]}); convert them to a plain type such as bfloat16"
        )
    return PatternError(
        f"{model}: is dense: none of {len(made.left_out)} weights has enough zeros to lock; "
        "prune it first: spp-fx prune MODEL -o OUT --pattern 2:4"
    )


def _replaced_lock(target: Path, say: Say) -> Lock | None:
    """The lock that is about to be replaced; None where there is none, or it is damaged."""
    if not target.is_file():
        return None
    try:
        return load_lock(target)
    except FormatError as error:
        say(f"{error}; replacing it")
        return None


def _changes(before: Lock | None, after: Lock) -> dict[str, list[str]] | None:
    if before is None:
        return None
    old, new = before.by_name(), after.by_name()
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
    }


def _record(found: "ModelSites", lock: Path, settings: dict[str, Any]) -> None:
    """Add this step to the history of the folder, with the digests of the weights that were locked."""
    folder, shards = found.folder.path, found.folder.shards
    digests = in_order(sha256, (shard.path for shard in shards))
    provenance.record(
        folder,
        folder,
        "lock",
        inputs={"model": found.folder.fingerprint()},
        settings=settings,
        digests={shard.name: digest for shard, digest in zip(shards, digests, strict=True)},
        lock=lock,
    )
