"""The judgement of one case: an error of the project or a true verdict, soon, in bounded memory."""

import json
import signal
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from spp_fx import runtime
from spp_fx.errors import SppFxError
from spp_fx.sparsity.lock import LOCK_NAME
from spp_fx.verbs.inspect import inspect
from spp_fx.verbs.merge import merge
from spp_fx.verbs.unpack import unpack
from spp_fx.verbs.verify import Verified, verify
from tests.fuzz import cases
from tests.fuzz.cases import Case
from tests.fuzz.plain import READERS, Look, dense_site
from tests.fuzz.seeds import Seed

TIME_LIMIT = 10.0
"""Seconds of processor time that a case may take."""
WAIT_LIMIT = 600.0
"""Seconds on the clock: a machine may be busy with other things, and a pipe may never end."""
MESSAGE_LIMIT = 2000

REFUSED, NOT_OK, UNCHANGED = "refused", "not ok", "ok, unchanged"
CRASH, HANG, FALSE_OK, FALSE_ALARM, UNCLEAN = "crash", "hang", "false ok", "false alarm", "unclean message"
FAILURES = (CRASH, HANG, FALSE_OK, FALSE_ALARM, UNCLEAN)


class TimeUp(BaseException):
    """The case took too long; no handler of ordinary errors may swallow it."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        outcome: one of the words above.
        detail: the error's class, or what went wrong.
        done: what had been done to the artifact.
    """

    case: int
    kind: str
    outcome: str
    detail: str
    done: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_case(seeds: Mapping[str, Seed], seed: int, number: int, limit: float = TIME_LIMIT) -> Outcome:
    """Make a case, run everything that reads such an artifact, and judge it."""
    kinds = list(seeds)
    kind = kinds[number % len(kinds)]
    rng = cases.rng_of(seed, number)
    with tempfile.TemporaryDirectory(prefix="spp-fx-fuzz-") as scratch:
        case = cases.make(rng, number, seeds[kind], Path(scratch))
        try:
            with _time_limit(limit):
                outcome, detail = _judge(rng, case, seeds[kind], Path(scratch))
        except TimeUp:
            outcome, detail = HANG, f"more than {limit} s of processor time, or {WAIT_LIMIT} s"
    return Outcome(number, kind, outcome, detail, cases.describe(case.done))


@contextmanager
def _time_limit(seconds: float):
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeUp

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, WAIT_LIMIT)}
    before = {which: signal.signal(which, stop) for which in timers}
    for timer, after in timers.values():
        signal.setitimer(timer, after)
    try:
        yield
    finally:
        for which, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(which, before[which])


def _judge(rng: Random, case: Case, pristine: Seed, scratch: Path) -> tuple[str, str]:
    own = _attempt("verify", lambda: verify(case.seed.path))
    trusted = _attempt("verify --lock", lambda: verify(case.seed.path, lock=pristine.lock))
    others = [_attempt(name, run) for name, run in _other_verbs(rng, case, scratch)]
    for failed in (own, trusted, *others):
        if failed.outcome in FAILURES:
            return failed.outcome, failed.detail
    believed = [trusted] if case.lock_touched else [own, trusted]
    if any(_holds(each.result, case) for each in believed):
        if difference := _difference(case.seed, pristine):
            return FALSE_OK, difference
    elif case.harmless and case.seed.kind != "adapter":
        return FALSE_ALARM, own.detail
    for name, run, fault in _without_lock(rng, case, pristine):
        asked = _attempt(name, run)
        if asked.outcome in FAILURES:
            return asked.outcome, asked.detail
        if _holds(asked.result, case):
            if difference := fault():
                return FALSE_OK, f"{name}: {difference}"
        elif case.harmless:
            return FALSE_ALARM, f"{name}: {asked.detail}"
    written = scratch / "written"
    if written.exists() and not case.lock_touched and (difference := _written_differs(written, pristine)):
        return FALSE_OK, f"{'merge' if case.seed.kind == 'adapter' else 'unpack'} wrote it: {difference}"
    return (UNCHANGED, "") if _holds(own.result, case) else (own.outcome, own.detail)


@dataclass(frozen=True)
class _Attempt:
    outcome: str
    detail: str
    result: Any = None


def _attempt(name: str, run: Callable[[], Any]) -> _Attempt:
    try:
        result = run()
        if isinstance(result, Verified):
            json.dumps(result.to_json(), allow_nan=False)
    except SppFxError as error:
        message = str(error)
        if len(message) > MESSAGE_LIMIT or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in message):
            return _Attempt(UNCLEAN, f"{name}: {len(message)} characters: {message[:300]!r}")
        return _Attempt(REFUSED, type(error).__name__)
    except TimeUp:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "spp_fx" in f.filename][-3:]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} (spp_fx: {' '.join(ours)})"
        return _Attempt(CRASH, f"{name}: {type(error).__name__}: {str(error)[:200]!r} at {where}")
    return _Attempt(NOT_OK, "", result)


def _other_verbs(rng: Random, case: Case, scratch: Path) -> list[tuple[str, Callable[[], Any]]]:
    kind, path, out = case.seed.kind, case.seed.path, scratch / "written"
    if kind == "adapter":
        return [("merge", lambda: merge(path, out))] if rng.random() < 0.5 else []
    if kind in ("safetensors", "cusparselt", "cutlass", "sparse-bitmask"):
        draw = rng.random()
        if draw < 0.3:
            return [("unpack", lambda: unpack(path, out))]
        return [("runtime.load", lambda: runtime.load(path))] if draw < 0.5 else []
    if kind == "legacy":
        return [("unpack", lambda: unpack(path, out))] if rng.random() < 0.3 else []
    if kind in ("model", "sharded") and rng.random() < 0.02:
        return [("inspect", lambda: inspect(path))]
    return []


_UNLOCKED = {"lone": 0.7, "model": 0.06, "sharded": 0.06}
"""How often a kind is asked about without its lock; a model is traced then, which takes a second."""


def _without_lock(
    rng: Random, case: Case, pristine: Seed
) -> list[tuple[str, Callable[[], Any], Callable[[], str | None]]]:
    """Attempts in which no lock names the sites, each with what tells whether an ok is a false one."""
    kind, path = case.seed.kind, case.seed.path
    if rng.random() >= _UNLOCKED.get(kind, 0):
        return []
    own = (path if path.is_dir() else path.parent) / LOCK_NAME
    if own.is_dir() and not own.is_symlink():
        return []
    own.unlink(missing_ok=True)
    sites = _sites(pristine.lock)
    return [
        (
            "verify --pattern 2:4 --coverage all",
            lambda: verify(path, pattern="2:4", coverage="all"),
            lambda: _plainly(lambda: dense_site(path, sites, names_are_known=kind != "lone")),
        ),
        (
            "verify --against the undamaged one",
            lambda: verify(path, against=pristine.path),
            lambda: _difference(case.seed, pristine),
        ),
    ]


def _holds(result: Any, case: Case) -> bool:
    """Whether a verdict says that every site holds; a legacy folder as such is never ok."""
    if not isinstance(result, Verified):
        return False
    sites = bool(result.sites) and all(site.ok for site in result.sites)
    return sites if case.seed.kind == "legacy" else result.ok


@cache
def _looks(seed: Seed) -> dict[str, Look]:
    return READERS[seed.reader](seed.path, _sites(seed.lock))


@cache
def _sites(lock: Path) -> dict[str, bool]:
    entries = json.loads(lock.read_bytes())["sites"]
    return {entry["name"]: entry.get("transposed", False) for entry in entries}


def _difference(damaged: Seed, pristine: Seed) -> str | None:
    """The first site that is not what it was, or not finite, in a plain reading; None if there is none."""
    before = _looks(pristine)

    def difference() -> str | None:
        return _first_difference(before, READERS[damaged.reader](damaged.path, _sites(pristine.lock)))

    return _plainly(difference)


def _plainly(find: Callable[[], str | None]) -> str | None:
    """What a plain reading finds; that it fails is a finding as well."""
    try:
        return find()
    except Exception as error:  # noqa: BLE001 - the plain reader checks nothing
        return f"a plain reading fails: {type(error).__name__}: {str(error)[:200]}"


def _first_difference(before: Mapping[str, Look], now: Mapping[str, Look]) -> str | None:
    for name, look in before.items():
        if name not in now:
            return f"{name} is gone"
        if now[name] != look:
            same = "the same mask" if now[name].mask == look.mask else "another mask"
            return f"{name}: {look.shape} is {now[name].shape}, {same}, finite: {now[name].finite}"
    return None


def _written_differs(written: Path, pristine: Seed) -> str | None:
    """Hold what unpack or merge wrote to the model that every artifact of this shape was made from."""
    model = pristine.root.with_name("model") / "model"
    sites = _sites(pristine.lock)
    before = _looks(Seed("model", model.parent, "model", "folder"))
    return _first_difference(before, READERS["folder"](written, sites))
