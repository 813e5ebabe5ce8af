"""verify: an artifact against its lock, a pattern, or another artifact, site by site."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from spp_fx.errors import SppFxError
from spp_fx.exporters.manifest import MANIFEST
from spp_fx.parallel import Tick, in_order, no_tick, thread_count
from spp_fx.sparsity.lock import LOCK_NAME, Lock, load_lock
from spp_fx.storage.folder import is_adapter
from spp_fx.storage.links import links_option
from spp_fx.verification.artifact import Artifact, open_artifact
from spp_fx.verification.checks import SiteCheck, check_site, plan_checks
from spp_fx.verification.policy import Check, Coverage, Requirements, nothing_to_check
from spp_fx.verification.verdict import Finding, SiteVerdict, Verified

MASK_BYTES = 256 << 20
"""How much freed memory the command keeps: a mask for each job, whose pages the next one reuses."""

_NEEDS_ORIGIN = ("mask-changed", "pattern-broken", "non-finite")
"""Findings for which it matters which step wrote the file."""


@links_option
def verify(
    path: str | Path,
    *,
    pattern: str | None = None,
    lock: str | Path | None = None,
    against: str | Path | None = None,
    rules: Iterable[tuple[Iterable[str], str]] = (),
    require: Iterable[str] = (),
    allow_dense: Iterable[str] = (),
    coverage: Coverage = "lock",
    trust_remote_code: bool = False,
    jobs: int | None = None,
    allow_links: bool = False,
    tick: Tick = no_tick,
) -> Verified:
    """Check every site of an artifact against a lock (by default the one beside it), a pattern, another artifact.

    A lock is checked for the sites that it names; `pattern` and `against` for every site of the artifact. A file
    that cannot be read raises; `run_check` makes it part of the verdict.

    Args:
        rules: (names, pattern) of sites that hold another pattern; the first that names a site counts.
        require: names of sites that must be sparse.
        allow_dense: names of sites that need not be.
        coverage: 'all' requires that every site of the model is in the lock, or sparse where there is no lock,
            and that no weight is left unread.
        trust_remote_code: run code that a model folder brings, where sites have to be found; off, it never runs.
        jobs: sites that are scanned at once; by default one per CPU, at most 8, and only one where weights
            have to be decoded.
        allow_links: follow symbolic links that leave a folder; see `links.check_link`.
        tick: called with a site's name and its number of weights when it is done.

    Raises:
        UsageError: the path is not an artifact, or there is nothing to check it against.
        FormatError: a file is damaged.
        SppFxError: the lock is that of another model.
        OSError: a file cannot be read.
    """
    requirements = Requirements.of(
        pattern, rules=rules, require=require, allow_dense=allow_dense, coverage=coverage
    )
    check = Check(
        Path(path),
        requirements,
        None if lock is None else Path(lock),
        None if against is None else Path(against),
        trust_remote_code,
    )
    return _verify(check, jobs, tick, damage_is_raised=True)


def run_check(check: Check, *, jobs: int | None = None, tick: Tick = no_tick) -> Verified:
    """As `verify`, but a file that cannot be read is a failure in the verdict.

    A site that cannot be read fails, and the others are still checked; where the artifact as a whole cannot be
    read, the verdict has that problem and no sites.

    Raises:
        UsageError: the check itself is wrong, see `Check.validate`; a missing file is damage.
    """
    check.validate()
    try:
        return _verify(check, jobs, tick, damage_is_raised=False)
    except (SppFxError, OSError) as error:
        return Verified(check.path, _kind_of_damaged(check.path), (), (_damage(error),), error=error)


def _verify(check: Check, jobs: int | None, tick: Tick, *, damage_is_raised: bool) -> Verified:
    artifact = open_artifact(check.path, trust_remote_code=check.trust_remote_code)
    lock = load_lock(check.lock) if check.lock else artifact.lock
    against = (
        open_artifact(check.against, trust_remote_code=check.trust_remote_code) if check.against else None
    )
    if lock is None and against is None and not check.requirements.any and not artifact.problems:
        raise nothing_to_check(check.path)
    if lock and lock.sites and not any(entry.name in artifact.weights.names for entry in lock.sites):
        raise SppFxError(
            f"{check.lock or LOCK_NAME} is the lock of another model: {artifact.path} has none of its "
            f"{len(lock.sites)} sites (first: {lock.sites[0].name}); give the lock of this model"
        )
    plan = plan_checks(artifact, lock, check.requirements, against)
    if not plan.checks and not plan.faults:
        raise SppFxError(f"{check.path}: holds no weight that can be verified")
    origin = _origin_of_files(artifact)

    def checked(site: SiteCheck) -> SiteVerdict:
        try:
            return check_site(artifact, site, against)
        except (SppFxError, OSError) as error:
            if damage_is_raised:
                raise
            return site.verdict(_damage(error))

    if jobs is None:
        jobs = min(thread_count(), len(plan.checks)) if _is_streamed(artifact, against) else 1
    sites: list[SiteVerdict] = []
    for site in in_order(checked, plan.checks, jobs):
        if site.file and any(finding.rule in _NEEDS_ORIGIN for finding in site.findings):
            site = replace(site, origin=origin(site.file))
        sites.append(site)
        tick(site.name, site.numel)
    faults = [Finding("artifact-damaged", problem) for problem in artifact.problems]
    if lock and (fault := _wrong_shapes(check, lock, sites)):
        if damage_is_raised:
            raise SppFxError(fault)
        faults.append(Finding("artifact-damaged", fault))
    return Verified(
        check.path,
        artifact.kind,
        tuple(sites),
        (*faults, *plan.faults),
        plan.allowed_dense,
        plan.left_out,
        plan.unread,
        notes=tuple(dict.fromkeys((*artifact.notes, *(against.notes if against else ())))),
    )


def _is_streamed(artifact: Artifact, against: Artifact | None) -> bool:
    """Whether a scan holds the mask alone; where a weight is decoded first, one at a time is in memory."""
    kinds = {each.kind for each in (artifact, against) if each is not None}
    return kinds <= {"model", "adapter", "safetensors"}


def _origin_of_files(artifact: Artifact) -> Callable[[str], str | None]:
    """Which step wrote a file; each file is read once."""
    folder = artifact.path if artifact.path.is_dir() else artifact.path.parent

    @cache
    def origin(file: str) -> str | None:
        from spp_fx.verification.provenance import blame

        return blame(folder, file)

    return origin


def _damage(error: Exception) -> Finding:
    return Finding("artifact-damaged", str(error))


def _kind_of_damaged(path: Path) -> str:
    """The kind of an artifact that cannot be opened, by its name and files."""
    if path.suffix in (".onnx", ".safetensors"):
        return path.suffix.removeprefix(".")
    if (path / MANIFEST).is_file():
        return "unknown"  # the manifest names the format, and may be the damaged file
    return "adapter" if is_adapter(path) else "model"


def _wrong_shapes(check: Check, lock: Lock, sites: Iterable[SiteVerdict]) -> str | None:
    """What is wrong where not one site has the shape that the lock has for it."""
    entries = lock.by_name()
    locked = [site for site in sites if site.name in entries]
    if not locked or any(entries[site.name].shape == site.shape for site in locked):
        return None
    first = locked[0]
    return (
        f"{check.lock or LOCK_NAME} is the lock of another model: {first.name} has shape "
        f"{list(first.shape)} in {check.path}, {list(entries[first.name].shape)} in the lock; "
        "give the lock of this model"
    )
