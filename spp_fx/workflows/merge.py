"""merge: fold an adapter into its base, span by span from disk to disk, and prove the masks."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_fx.adapters.fold_counts import FoldCounts, Vanish
from spp_fx.checkpoint import OWN_FILES, ModelFolder, Shard
from spp_fx.checkpoint.layout import within
from spp_fx.checkpoint.links import links_option
from spp_fx.checkpoint.resume import copy_others
from spp_fx.checkpoint.rewrite import rewrite
from spp_fx.checkpoint.workspace import Workspace, workspace
from spp_fx.errors import MaskError, UsageError
from spp_fx.parallel import in_order, thread_count
from spp_fx.progress import Tick, no_tick
from spp_fx.sparsity import LOCK_NAME, Lock, LockEntry, compare, load_scanner, lock_beside, scan_file
from spp_fx.workflows import provenance
from spp_fx.workflows.adapter_folder import CONFIG, FACTORS, AdapterFolder
from spp_fx.workflows.fold_plan import Folded, FoldPlan
from spp_fx.workflows.open_model import open_model
from spp_fx.workflows.read_back import read_back, unproven

ADAPTER_FILES = (CONFIG, FACTORS, LOCK_NAME)


@dataclass(frozen=True)
class Merged:
    """What merge wrote, and what was proven of it.

    Attributes:
        out: the merged model folder.
        base: the base model folder.
        counts: by stored tensor, what folding met.
        mask_equal: by stored tensor, whether its mask read back from disk is the lock's; None if not read.
        untouched: stored tensors that were copied.
        nbytes: size of the weights written.
    """

    out: Path
    base: Path
    counts: dict[str, FoldCounts]
    mask_equal: dict[str, bool | None]
    untouched: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        files = sorted(p for p in self.out.rglob("*") if p.is_file())
        return {
            "ok": True,
            "out": str(self.out),
            "base": str(self.base),
            "sites": [
                {
                    "name": name,
                    "changed": counts.changed,
                    "vanished": counts.vanished,
                    "mask_equal": self.mask_equal[name],
                }
                for name, counts in self.counts.items()
            ],
            "files": [{"name": p.relative_to(self.out).as_posix(), "bytes": p.stat().st_size} for p in files],
            "summary": {
                "sites": len(self.counts),
                "masks_equal": sum(equal is True for equal in self.mask_equal.values()),
                "vanished": sum(counts.vanished for counts in self.counts.values()),
                "untouched": self.untouched,
                "bytes": self.nbytes,
            },
        }


@links_option
def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    vanish: Vanish = "keep",
    verify_sparsity: bool = True,
    force: bool = False,
    fresh: bool = False,
    allow_links: bool = False,
    tick: Tick = no_tick,
    say: Callable[[str], None] = lambda line: None,
) -> Merged:
    """Write base + adapter as a model folder with the base's names, shards, dtypes and metadata.

    With `verify_sparsity` the base's masks are held to the lock before anything is folded, and what was
    written is read back from disk by another reader: every folded tensor's mask must be the lock's,
    every other tensor must have the base's bytes. A run that was stopped goes on with its finished shards
    when it is called again, and writes the same bytes.

    Args:
        adapter: the adapter folder.
        out: the folder to write.
        base: the base model, if it is not where the adapter says.
        vanish: what to do with a non-zero that folds to zero.
        force: replace `out` if it exists.
        fresh: do not go on with what a stopped run has finished.
        allow_links: follow symbolic links that leave a folder; see `checkpoint.links`.
        tick: told of progress.
        say: told what is odd about the base's files, where the work begins, and what is kept of it if it fails.

    Raises:
        UsageError: no adapter folder, no base, an output that exists or that another process works on.
        FormatError: a file is damaged, or the base is not the one the adapter was made for.
        MaskError: a mask is not the lock's, or a value folds to NaN or infinity. Nothing is written.
    """
    adapter, out = Path(adapter), Path(out)
    source = AdapterFolder.open(adapter)
    base = source.find_base(Path(base) if base else None)
    folder = open_model(base)
    source.check_base(folder)
    for note in folder.notes:
        say(note)
    fold = FoldPlan.make(source, folder, vanish)
    # What the base's own lock holds beyond the adapter's sites stays locked: it is copied, and proven.
    own = lock_beside(base)
    held = Lock.of(((own.by_name() if own else {}) | source.lock.by_name()).values())
    locked = held.by_name()
    _check_names(folder, locked)
    history = adapter if provenance.load(adapter) else base
    provenance.load(history)
    plan = _plan(source, folder, vanish)
    with workspace(
        out,
        plan,
        force=force,
        fresh=fresh,
        sources=[base, adapter],
        inputs=[*(shard.path for shard in folder.shards), *(adapter / name for name in ADAPTER_FILES)],
        need=folder.stored_bytes,
        say=say,
    ) as work:
        if verify_sparsity:
            _check_base(folder, locked)
        copy_others(folder, work.folder, skip=OWN_FILES)
        counts = _write(folder, fold, work, tick)
        if verify_sparsity:
            proven = read_back(folder, work.folder, locked, counts, vanish, tick)
        else:
            proven = unproven(folder, work.folder, locked, counts, vanish)
        (work.folder / LOCK_NAME).write_text(Lock.of(proven.entries.values()).dumps())
        provenance.record(
            history,
            work.folder,
            "merge",
            inputs={"model": plan["base"], "adapter": plan["adapter"][FACTORS]},
            settings={"vanish": vanish, "verify_sparsity": verify_sparsity},
            digests=proven.digests,
        )
    mask_equal = {name: proven.mask_equal.get(name) for name in counts}
    return Merged(out, base, counts, mask_equal, len(folder.names) - len(counts), folder.stored_bytes)


def _plan(adapter: AdapterFolder, base: ModelFolder, vanish: Vanish) -> dict[str, Any]:
    """Everything that the written bytes depend on, but for the stamps of the inputs."""
    return {
        "verb": "merge",
        "base": base.fingerprint(),
        "adapter": {name: _digest(adapter.path / name) for name in ADAPTER_FILES},
        "vanish": vanish,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _check_names(folder: ModelFolder, locked: dict[str, LockEntry]) -> None:
    for name in locked:
        if name not in folder:
            raise UsageError(
                f"{folder.path} has no tensor {name}, which is locked: it is not the base of this adapter, "
                f"or its {LOCK_NAME} is that of another model"
            )


def _check_base(folder: ModelFolder, locked: dict[str, LockEntry]) -> None:
    load_scanner()

    def check(entry: LockEntry) -> None:
        shard, info = folder.info(entry.name)
        scan = scan_file(shard.path, info.start, info.shape, info.dtype, transposed=entry.transposed)
        difference = compare(entry, scan.mask)
        if not difference.equal:
            raise MaskError(
                f"{folder.path}: {entry.name}: the base no longer has its locked mask {difference.reason}"
            )

    for _ in in_order(check, locked.values()):
        pass


def _write(folder: ModelFolder, fold: FoldPlan, work: Workspace, tick: Tick) -> dict[str, FoldCounts]:
    """Write every shard that is not finished yet; what folding met, by tensor in the order of the files.

    Shards are written side by side, each by its share of the threads, and reach the disk on threads of their
    own, so that no core waits for it.
    """
    jobs = min(thread_count(), len(folder.shards))
    with ThreadPoolExecutor(2, thread_name_prefix="fsync") as syncing:

        def write(shard: Shard) -> tuple[dict[str, FoldCounts], Future[None] | None]:
            known = work.finished(shard.name)
            if known is not None:
                return {name: FoldCounts(*both) for name, both in known["folded"].items()}, None
            place = within(work.folder, shard.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            counts = _sum(rewrite(shard, place, fold.changes(shard)), tick)
            facts = {name: [each.vanished, each.changed] for name, each in counts.items()}
            return counts, syncing.submit(work.finish, shard.name, folded=facts)

        done = list(in_order(write, folder.shards, jobs))
        for _, synced in done:
            if synced is not None:
                synced.result()
    return {name: each for counts, _ in done for name, each in counts.items()}


def _sum(spans: Iterable[Folded], tick: Tick) -> dict[str, FoldCounts]:
    counts: dict[str, FoldCounts] = {}
    for span in spans:
        counts.setdefault(span.tensor, FoldCounts()).add(span.counts)
        tick(span.tensor, span.nbytes)
    return counts
