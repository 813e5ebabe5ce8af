"""reconstruct: bring a pruned model close to the dense one, layer by layer, without moving a zero."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from spp_fx.adapters.method import make_method
from spp_fx.console import Table, grouped
from spp_fx.errors import MaskError, UsageError
from spp_fx.exporters.manifest import open_model, sha256
from spp_fx.parallel import in_order
from spp_fx.passes.causal import Causal
from spp_fx.passes.inject_adapters import adaptable
from spp_fx.passes.partition import Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.pruning.blocks import LayerError, Reconstruction, Training, Update, reconstruct_layers
from spp_fx.pruning.gradients import Source
from spp_fx.pruning.layerwise import Tick, outside_of_layers, silent
from spp_fx.pruning.update import UPDATES
from spp_fx.pruning.walk import Samples
from spp_fx.sparsity.lock import LOCK_NAME, Lock, compare, lock_beside
from spp_fx.sparsity.scan import scan_stored
from spp_fx.storage.folder import OWN_FILES, ModelFolder
from spp_fx.storage.links import links_option
from spp_fx.storage.workspace import Say, Workspace, check_output, workspace
from spp_fx.storage.writer import copy_others
from spp_fx.verbs.layers import LayerStore
from spp_fx.verbs.load import FolderWeights, check_teacher, device_of, draw_samples, samples_digest
from spp_fx.verbs.pruned import choose_pruned, lock_of, refuse_sparse_teacher, trained_vectors
from spp_fx.verbs.settings import Calibration, ReconstructSettings
from spp_fx.verbs.starts import check_dense
from spp_fx.verification import provenance
from spp_fx.verification.model_sites import ModelSites, find_sites

TOKENS = 2048
"""Tokens that run at once at most, where a window has not more."""


@dataclass(frozen=True)
class Reconstructed:
    """The result of reconstruct.

    Attributes:
        out: the folder written.
        method: as given.
        lock: of its masks, which are the model's.
        layers: how close each is to the dense model's, in the order in which they run.
        refused: sites that are as before, each with the reason.
        trained: norms and biases that changed.
        samples, tokens: of the calibration text; tokens of one window, None for other data.
    """

    out: Path
    method: str
    lock: Lock
    layers: tuple[LayerError, ...]
    refused: dict[str, str]
    trained: tuple[str, ...]
    samples: int
    tokens: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "calibration": {
                "samples": self.samples,
                **({} if self.tokens is None else {"seq_len": self.tokens}),
            },
            "layers": [
                {
                    "layer": each.layer,
                    "error_before": each.before,
                    "error_after": each.after,
                    "changed": each.changed,
                }
                for each in self.layers
            ],
            "sites": [entry.name for entry in self.lock.sites],
            "trained": list(self.trained),
            "refused": self.refused,
        }

    def lines(self) -> Iterator[str | Table]:
        rows = [(each.layer, f"{each.before:.4%}", f"{each.after:.4%}") for each in self.layers]
        yield Table(("layer", "output error: before", "after"), rows)
        if same := [each.layer for each in self.layers if not each.changed]:
            yield f"layers that are as they were, since they would come no closer: {', '.join(same)}"
        yield f"{self.out}: {len(self.layers) - len(same)} layers changed; the masks are those of the model"
        yield from (f"  left as they were: {line}" for line in grouped(self.refused))


@links_option
def reconstruct(
    model: str | Path,
    out: str | Path,
    *,
    teacher: str | Path,
    calibration: Calibration,
    method: str = "masked-full",
    inputs: Literal["reconstructed", "dense"] = "reconstructed",
    epochs: int = 4,
    batch_size: int = 8,
    lr: float | None = None,
    train_norms: bool = False,
    seed: int = 0,
    targets: Sequence[str] = (),
    skip: Sequence[str] = (),
    task: str | None = None,
    device: str | None = None,
    force: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Tick = silent,
    say: Say = lambda line: None,
    **options: Any,
) -> Reconstructed:
    """Change the kept weights of a pruned model folder until each layer makes what the dense model's makes.

    Memory holds one layer. A run that was stopped continues after its finished layers, on a CPU to the same bytes.

    Args:
        teacher: the dense model that was pruned.
        method: `admm`, each matrix by itself; or an adapter method that is trained on whole layers and folded.
        inputs: what a layer sees: outputs of the `reconstructed` layers before it, or of the `dense` ones.
        epochs, batch_size, lr, train_norms, seed: of training; see `ReconstructSettings`.
        targets, skip, task, device: as in `prune`.
        fresh: start over even if a stopped run has finished something.
        allow_links: follow symbolic links that leave a folder; see `links.check_link`.
        say: called with notes for the user while it runs.
        options: of the adapter method.

    Raises:
        UsageError: an option is wrong, the text too short, the teacher another model, or the output exists.
        PatternError: the model is dense, or a layer cannot be reconstructed; names it.
        MaskError: the model is not the one that its lock describes, or what was read back has another mask.
    """
    model, out, teacher = Path(model), Path(out), Path(teacher)
    asked = ReconstructSettings(
        teacher=str(teacher), method=method, inputs=inputs, epochs=epochs, batch_size=batch_size, lr=lr,
        train_norms=train_norms, seed=seed, targets=tuple(targets), skip=tuple(skip), task=task, device=device,
    )  # fmt: skip
    if method in UPDATES and options:
        raise UsageError(f"--method {method} has no option {next(iter(options))}")
    check_output(out, force, [model, teacher], say)
    provenance.load(model)  # a damaged history is an error before the work
    where = device_of(device)
    found = find_sites(open_model(model), task=task, trust_remote_code=trust_remote_code, runnable=True)
    dense = find_sites(open_model(teacher), task=task, trust_remote_code=trust_remote_code)
    for note in (*found.notes, *dense.notes):
        say(note)
    sites, refused, masks = choose_pruned(found, targets, skip)
    run_pipeline(found.program, [Partition(), Causal()])
    outside = dict.fromkeys(
        outside_of_layers(found.program, sites),
        "is used outside of its layer, and layers are changed one by one",
    )
    refused |= outside | found.others
    sites = [name for name in sites if name not in outside]
    if method not in UPDATES:
        if options.get("dropout"):
            raise UsageError("--dropout: layers are trained without dropout; leave it out")
        shapes = {name: found.program.sites[name].shape for name in sites}
        sites, unfit = adaptable(dict.fromkeys(sites, make_method(method, **options)), shapes)
        refused |= unfit
    if not sites:
        raise UsageError(f"no site can be reconstructed: {'; '.join(sorted(set(refused.values())))}")
    refuse_sparse_teacher(found, sites, teacher, values=True)
    check_teacher(found.program, dense.program, model, teacher, trust_remote_code=trust_remote_code)
    check_dense(found, dense, sites)
    _check_code(found, dense)
    lock = lock_of(found, sites, masks)
    samples, _ = draw_samples(model, found.program, calibration, trust_remote_code=trust_remote_code, say=say)
    rows = _rows(samples, batch_size)
    how = _how(found, asked, options, rows)
    settings = asdict(asked) | {"targets": list(targets), "skip": list(skip)} | options
    del settings["teacher"], settings["device"]  # histories name inputs by their digests
    plan = {
        "verb": "reconstruct",
        "base": found.folder.fingerprint(),
        "teacher": dense.folder.fingerprint(),
        "config": found.folder.config,
        "settings": settings,
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
        "samples": samples_digest(samples),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "threads": torch.get_num_threads(),
    }
    shards = [shard.path for each in (found, dense) for shard in each.folder.shards]
    with workspace(
        out, plan, force=force, fresh=fresh, sources=[model, teacher], inputs=shards,
        need=found.folder.stored_bytes, say=say,
    ) as work:  # fmt: skip
        batches = (
            [{"input_ids": part} for part in samples.split(rows)] if isinstance(samples, Tensor) else samples
        )
        layers, trained = _walk(found, dense, batches, sites, how, work, where, inputs == "dense", tick)
        copy_others(found.folder, work.folder, skip=OWN_FILES)
        _check_masks(ModelFolder.open(work.folder), lock)
        (work.folder / LOCK_NAME).write_text(_whole_lock(model, lock).dumps())
        digests = in_order(sha256, (work.folder / shard.name for shard in found.folder.shards))
        provenance.record(
            model, work.folder, "reconstruct",
            inputs={
                "model": found.folder.fingerprint(), "teacher": dense.folder.fingerprint(),
                "calibration": samples_digest(samples),
            },
            settings=settings,
            digests=dict(zip((shard.name for shard in found.folder.shards), digests, strict=True)),
        )  # fmt: skip
    tokens = samples.shape[1] if isinstance(samples, Tensor) else None
    return Reconstructed(out, method, lock, tuple(layers), refused, trained, len(samples), tokens)


def _how(found: ModelSites, asked: ReconstructSettings, options: dict[str, Any], rows: int) -> Reconstruction:
    if asked.method in UPDATES:
        return Update(asked.method)
    vectors = {*trained_vectors(found)[0]} & found.matrices.keys() if asked.train_norms else ()
    return Training(
        make_method(asked.method, **options),
        asked.epochs,
        max(1, asked.batch_size // rows),
        asked.lr,
        asked.seed,
        frozenset(vectors),
    )


def _rows(samples: Samples, batch_size: int) -> int:
    """Windows of text that run at once: all runs have one shape, and every step the same number of them.

    More tokens than `TOKENS` at once gain little, and take as much memory as the layer.
    """
    if not isinstance(samples, Tensor):
        return 1
    count, tokens = samples.shape
    most = gcd(count, batch_size)
    return max(n for n in range(1, most + 1) if most % n == 0 and (n == 1 or n * tokens <= TOKENS))


def _walk(
    found: ModelSites,
    dense: ModelSites,
    samples: Samples,
    sites: Sequence[str],
    how: Reconstruction,
    work: Workspace,
    device: torch.device,
    dense_inputs: bool,
    tick: Tick,
) -> tuple[list[LayerError], tuple[str, ...]]:
    """Change the layers one by one and write the folder's weights; the errors, and the vectors that changed."""
    store = LayerStore(work, found)

    def finish(index: int, tensors: Mapping[str, Tensor], error: LayerError) -> None:
        vectors = [name for name in tensors if name not in found.program.sites]
        store.finish(index, tensors, {"error": asdict(error), "vectors": vectors})

    if device.type != "cpu":
        found.program.move_constants(torch.device("cpu"), device)
    program = found.program.eval()
    reconstruct_layers(
        Source(program, FolderWeights(found), store.states),
        Source(program, FolderWeights(dense), store.more_states("dense")),
        samples, sites, how,
        dense_inputs=dense_inputs, device=device, start=store.done, finish=finish, tick=tick,
    )  # fmt: skip
    store.write()
    facts = store.facts()
    vectors = sorted(name for each in facts for name in each["vectors"])
    return [LayerError(**each["error"]) for each in facts], tuple(vectors)


_SPELLED = re.compile(
    r"_|.*(token|drop|cache|dtype|version|architectures|label|quantization|initializer|output).*"
)
"""Keys of config.json that change nothing of what a model computes from its weights."""


def _check_code(found: ModelSites, dense: ModelSites) -> None:
    """UsageError unless two models run the same code on their weights, by their configurations."""
    ours, theirs = (each.program.config.to_dict() for each in (found, dense))
    for key in sorted(ours.keys() | theirs.keys()):
        if not _SPELLED.match(key) and ours.get(key) != theirs.get(key):
            raise UsageError(
                f"{dense.folder.path}: its {key} is {theirs.get(key)} (config.json), that of {found.folder.path} is "
                f"{ours.get(key)}; --teacher must be the dense model that the pruned one was made from"
            )


def _check_masks(folder: ModelFolder, lock: Lock) -> None:
    """MaskError unless a written folder, read back, has the masks of a lock."""
    for entry in lock.sites:
        mask = scan_stored(folder.info(entry.name)[0], entry.name, transposed=entry.transposed).mask
        difference = compare(entry, mask)
        if not difference.equal:
            raise MaskError(f"{entry.name}: read back from disk: {difference.reason or 'zeros moved'}")


def _whole_lock(model: Path, lock: Lock) -> Lock:
    """A model's own lock, where it has one, and the entries that are not in it."""
    own = lock_beside(model)
    return Lock.of(((own.by_name() if own else {}) | lock.by_name()).values())
