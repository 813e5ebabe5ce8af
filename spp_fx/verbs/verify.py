"""verify: an artifact against its lock, a pattern, or another artifact, site by site."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from spp_fx.adapters.adapter_folder import is_adapter
from spp_fx.errors import SppFxError
from spp_fx.exporters.manifest import MANIFEST
from spp_fx.parallel import Tick, in_order, no_tick, thread_count
from spp_fx.sparsity.lock import LOCK_NAME, Lock, load_lock
from spp_fx.storage.links import links_option
from spp_fx.verify.artifact import Artifact, open_artifact
from spp_fx.verify.checks import Other, Question, judge, look, other_of, plan
from spp_fx.verify.policy import Check, Coverage, Demands, check_request, nothing_to_hold_to
from spp_fx.verify.verdict import Finding, SiteVerdict, Verified

__all__ = ["Check", "SiteVerdict", "Verified", "check_request", "gate", "verify"]


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
    """Hold every site of an artifact to a lock (by default the one beside it), a pattern, another artifact.

    A lock is asked of the sites that it names; `pattern` and `against` of every site of the artifact. What
    cannot be read is raised here; `gate` makes it part of the verdict.

    Args:
        rules: (names, pattern) of sites that hold another pattern; the first that names a site counts.
        require: names of sites that must be sparse.
        allow_dense: names of sites that need not be.
        coverage: 'all' asks that every site of the model is in the lock, or sparse where there is no lock, and
            that no weight is left unread.
        trust_remote_code: run code that a model folder brings, where sites have to be found; never done unasked.
        jobs: sites that are looked at at once; by default the CPUs at hand, at most 8, and one where weights
            have to be decoded.
        allow_links: follow symbolic links that leave a folder; see `checkpoint.links`.
        tick: called with a site's name and its number of weights when it is done.

    Raises:
        UsageError: the artifact is of no known kind, or there is nothing to hold it to.
        FormatError: a file is damaged.
        SppFxError: the lock is that of another model.
        OSError: a file cannot be read.
    """
    demands = Demands.of(pattern, rules=rules, require=require, allow_dense=allow_dense, coverage=coverage)
    check = Check(
        Path(path),
        demands,
        None if lock is None else Path(lock),
        None if against is None else Path(against),
        trust_remote_code,
    )
    return _verify(check, jobs, tick, damaged=None)


def gate(check: Check, *, jobs: int | None = None, tick: Tick = no_tick) -> Verified:
    """As `verify`, but damage is a verdict as well: what cannot be read does not hold.

    A site that cannot be read is one that fails, and the others are looked at; where the artifact as a
    whole cannot be, that is its fault and no site is named.

    Raises:
        UsageError: the request itself is wrong, see `check_request`; a file that is lost is damage.
    """
    check_request(check)
    try:
        return _verify(check, jobs, tick, damaged=_damaged)
    except (SppFxError, OSError) as error:
        return Verified(check.path, _kind_of(check.path), (), (_damage(error),), error=error)


_Damaged = Callable[[Question, Exception], SiteVerdict]


def _verify(check: Check, jobs: int | None, tick: Tick, *, damaged: _Damaged | None) -> Verified:
    """The verdict; sites that cannot be read are raised, or become what `damaged` makes of them."""
    artifact = open_artifact(check.path, trust_remote_code=check.trust_remote_code)
    lock = load_lock(check.lock) if check.lock else artifact.lock
    opened = (
        open_artifact(check.against, trust_remote_code=check.trust_remote_code) if check.against else None
    )
    if lock is None and opened is None and not check.demands.any and not artifact.problems:
        raise nothing_to_hold_to(check.path)
    if lock:
        _check_some_are_there(check, artifact, lock)
    asked = plan(artifact, lock, check.demands, against=opened)
    if not asked.questions and not asked.faults:
        raise SppFxError(f"{check.path}: it has no weight that could be verified")
    other = other_of(opened, asked.questions) if opened else None
    sites = _judge_all(artifact, asked.questions, other, jobs, tick, damaged)
    faults = [Finding("artifact-damaged", problem) for problem in artifact.problems]
    if lock and (stranger := _other_shapes(check, lock, sites)):
        if damaged is None:
            raise SppFxError(stranger)
        faults.append(Finding("artifact-damaged", stranger))
    return Verified(
        check.path,
        artifact.kind,
        tuple(sites),
        (*faults, *asked.faults),
        asked.allowed_dense,
        asked.left_out,
        asked.unread,
        notes=tuple(dict.fromkeys((*artifact.notes, *(opened.notes if opened else ())))),
    )


def _judge_all(
    artifact: Artifact,
    questions: tuple[Question, ...],
    other: Other | None,
    jobs: int | None,
    tick: Tick,
    damaged: _Damaged | None,
) -> list[SiteVerdict]:
    """Every question's verdict, in order, however many are worked on at once."""

    def answer(question: Question) -> SiteVerdict:
        try:
            return judge(artifact, question, look(artifact, question), other)
        except (SppFxError, OSError) as error:
            if damaged is None:
                raise
            return damaged(question, error)

    streams = _streams(artifact, other)
    if jobs is None:
        jobs = min(thread_count(), len(questions)) if streams else 1
    origin = _historian(artifact)
    sites: list[SiteVerdict] = []
    for site in in_order(answer, questions, jobs):
        sites.append(replace(site, origin=origin(site.file)) if _has_an_origin(site) else site)
        tick(site.name, site.numel)
    return sites


def _streams(artifact: Artifact, other: Other | None) -> bool:
    """Whether a look at a weight holds its mask alone; where it is decoded first, one at a time is in memory."""
    kinds = {artifact.kind} | ({other.artifact.kind} if other else set())
    return kinds <= {"model", "adapter", "safetensors"}


def _has_an_origin(site: SiteVerdict) -> bool:
    """Whether it matters which step wrote the site's file: something in it is not as it was."""
    changed = ("mask-changed", "pattern-broken", "non-finite")
    return bool(site.file) and any(finding.rule in changed for finding in site.findings)


def _historian(artifact: Artifact) -> Callable[[str], str | None]:
    """Which step a file is from; each file is looked into once."""
    folder = artifact.path if artifact.path.is_dir() else artifact.path.parent

    @cache
    def origin(file: str) -> str | None:
        from spp_fx.verify.provenance import blame

        return blame(folder, file)

    return origin


def _damaged(question: Question, error: Exception) -> SiteVerdict:
    shape = question.entry.shape if question.entry else ()
    pattern = question.pattern or (question.entry.parsed_pattern() if question.entry else None)
    return SiteVerdict(
        question.name, shape, pattern=None if pattern is None else str(pattern), findings=(_damage(error),)
    )


def _damage(error: Exception) -> Finding:
    return Finding("artifact-damaged", str(error))


def _kind_of(path: Path) -> str:
    """The kind of an artifact that cannot be opened, as far as the files say that are there."""
    if path.suffix in (".onnx", ".safetensors"):
        return path.suffix.removeprefix(".")
    if (path / MANIFEST).is_file():
        return "unknown"  # the manifest, which may be what is damaged, says which format
    return "adapter" if is_adapter(path) else "model"


def _check_some_are_there(check: Check, artifact: Artifact, lock: Lock) -> None:
    missing = [entry.name for entry in lock.sites if entry.name not in artifact.names]
    if missing and len(missing) == len(lock.sites):
        raise SppFxError(
            f"{check.lock or LOCK_NAME} is the lock of another model: {artifact.path} has none of its "
            f"{len(missing)} sites (first: {missing[0]})"
        )


def _other_shapes(check: Check, lock: Lock, sites: Iterable[SiteVerdict]) -> str | None:
    """What is wrong where not one site has the shape that the lock says."""
    entries = lock.by_name()
    locked = [site for site in sites if site.name in entries]
    wrong = [site for site in locked if entries[site.name].shape != site.shape]
    if not wrong or len(wrong) < len(locked):
        return None
    return (
        f"{check.lock or LOCK_NAME} is the lock of another model: {wrong[0].name} has shape "
        f"{list(wrong[0].shape)} in {check.path}, {list(entries[wrong[0].name].shape)} in the lock"
    )
