"""One small model of a type through every verb: what works, and why the rest does not."""

import contextlib
import io
import json
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from spp_fx.adapters.adapter_folder import FACTORS
from spp_fx.errors import SppFxError
from spp_fx.exporters.onnx.random_inputs import ImageTokens
from spp_fx.graph.model import load_model
from spp_fx.graph.names import layer_of
from spp_fx.graph.program import Program
from spp_fx.graph.task import BATCH, FRAMES, LENGTH, TARGET, find_task
from spp_fx.graph.trace import EXPORT_ERRORS, trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.verbs.export import export
from spp_fx.verbs.inject import inject
from spp_fx.verbs.load import load_program
from spp_fx.verbs.merge import merge
from spp_fx.verbs.prune import prune
from spp_fx.verbs.settings import Calibration
from spp_fx.verbs.verify import verify
from tests.command import tensors
from tests.coverage.models import VOCABULARY, small_model

COLUMNS = (
    "trace",
    "lengths",
    "match",
    "wanda",
    "inject",
    "train",
    "fold",
    "verify",
    "load",
    "cusparselt",
    "onnx",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = " ".join(LETTERS)
RECORDS: dict[str, dict[str, Any]] = {
    "causal-lm": {"text": TEXT},
    "masked-lm": {"text": TEXT},
    "sequence-classification": {"text": TEXT, "label": 1},
    "token-classification": {"tokens": [*LETTERS], "ner_tags": [0, 1] * 13},
    "question-answering": {
        "question": "a b",
        "context": TEXT,
        "answers": {"text": ["d"], "answer_start": [6]},
    },
    "seq2seq-lm": {"source": TEXT, "target": "z y x w v"},
    "feature-extraction": {"text": TEXT},
}
"""A record of the tasks that are calibrated on text; others need an image processor, or one of sound."""

SIZES = tuple(
    {BATCH: rows, LENGTH: length, TARGET: target, FRAMES: 400}
    for rows, length, target in ((2, 7, 5), (3, 12, 9), (2, 20, 14))
)
"""At which answers are compared; the last is longer than two windows or chunks."""
EXACT, ROUNDED = 1e-5, 1e-4  # of a program with its model; of a folded float32 model with its program
TINY = 1e-7  # a gradient that is a rounding error
LONGEST = 200
TOO_LONG = "did not end"


class Differs(Exception):
    """A comparison that failed; the message is the reason."""


@dataclass
class Row:
    """What works for one type.

    Attributes:
        cells: by column, `y`, `-` or the reason; `lengths` says which lengths one trace holds for.
    """

    task: str
    model_type: str
    cells: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, str]:
        """The reasons, by column."""
        return {
            name: cell for name, cell in self.cells.items() if name != "lengths" and cell not in ("y", "-")
        }

    @property
    def whole(self) -> bool:
        """Whether everything works that applies."""
        return not self.failures and self.cells["cusparselt"] == self.cells["onnx"] == "y"

    @property
    def whole_but_onnx(self) -> bool:
        return self.failures.keys() <= {"onnx"} and self.cells["cusparselt"] == "y"


def probe(
    task: str,
    model_type: str,
    report: Callable[[Row], None] = lambda row: None,
    *,
    without: Collection[str] = (),
    sizes: Sequence[Mapping[str, int]] = SIZES,
) -> Row:
    """Take a type through every stage, until one that the later ones need fails.

    Args:
        report: called before and after each stage, with the row so far.
        without: columns that are left out: `wanda`, `onnx`, `cusparselt`.
        sizes: at which answers are compared; a model whose code branches on them is traced for each.
    """
    row = Row(task, model_type, dict.fromkeys(COLUMNS, "-"))

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        row.cells[name] = TOO_LONG
        report(row)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
            row.cells[name] = "y"
        except Exception as error:
            row.cells[name] = reason(error)
            raise _Stop from error
        finally:
            report(row)

    with tempfile.TemporaryDirectory(prefix="spp-fx-coverage-") as folder, contextlib.suppress(_Stop):
        _stages(row, Path(folder), stage, without, sizes)
    return row


class _Stop(Exception):
    """A stage failed that later ones need."""


def reason(error: BaseException) -> str:
    """An error in one short line without names of folders; one that is not the project's own says its class."""
    said = " ".join(str(error).split())
    said = re.sub(r"\S*spp-fx-coverage-[^\s/:,;]*/?", "", said)
    said = re.sub(r"^[\w-]*: ", "", said) if isinstance(error, SppFxError) else said
    said = re.sub(r"^\w+ cannot be traced: ", "", said)
    if not isinstance(error, SppFxError | Differs):
        said = f"{type(error).__name__}: {said}"
    return said if len(said) <= LONGEST else f"{said[: LONGEST - 3]}..."


def _stages(
    row: Row,
    root: Path,
    stage: Callable[[str], Any],
    without: Collection[str],
    sizes: Sequence[Mapping[str, int]],
) -> None:
    dense, sparse, adapter, merged = (root / name for name in ("dense", "sparse", "adapter", "merged"))
    with stage("trace"):
        model = _built(row)
        model.save_pretrained(dense)
        _save_tokenizer(dense)
        # from_pretrained decides what is tied, and what a buffer holds.
        model = load_model(dense, task=find_task(row.task))
        program = trace(model, task=row.task)
        row.cells["lengths"] = program.sizes.described()
        _compare(program, model, EXACT, sizes)
    with stage("match"):
        run_pipeline(program, [Canonicalize()])
        _all_linears_known(program, model)
    del program
    if row.task in RECORDS and "wanda" not in without:
        with contextlib.suppress(_Stop), stage("wanda"):
            data = root / "data.jsonl"
            data.write_text(f"{json.dumps(RECORDS[row.task])}\n" * 8)
            prune(dense, sparse, method="wanda", pattern="2:4", calibration=Calibration(data, 4, 32))
    if row.cells["wanda"] != "y":
        shutil.rmtree(sparse, ignore_errors=True)
    with stage("inject"):
        if row.cells["wanda"] != "y":
            prune(dense, sparse, method="magnitude", pattern="2:4")
        inject(sparse, adapter, rank=4)
    with stage("train"):
        loaded = load_program(adapter)
        program = loaded.program
        _step(program, model, loaded.factors, adapter)
    with stage("fold"):
        _only_values_changed(sparse, merged, merge(adapter, merged, verify_sparsity=True).counts)
    with stage("verify"):
        verdict = verify(merged, pattern="2:4")
        if not verdict.ok:
            raise Differs(str(verdict.failures[0]))
    with stage("load"):
        reloaded = load_model(merged, task=find_task(row.task))
        _compare(program, reloaded, ROUNDED, sizes)
    with contextlib.suppress(_Stop), stage("cusparselt"):
        done = export(merged, root / "packed", "cusparselt", sm=90, dtype="float16")
        if done.checks["masks_equal"] != len(done.manifest.tensors):
            raise Differs(f"{done.checks['masks_equal']} of {len(done.manifest.tensors)} masks are equal")
    if "onnx" not in without:
        with stage("onnx"):
            export(merged, root / "onnx", "onnx-packed", compare_logits=True)


def _save_tokenizer(folder: Path) -> None:
    """A tokenizer of single letters."""
    special = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "?",
        "mask_token": "<mask>",
    }
    numbers = {word: number for number, word in enumerate((*special.values(), *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def _built(row: Row) -> PreTrainedModel:
    try:
        return small_model(row.task, row.model_type)
    except Exception as error:
        raise Differs(f"transformers does not build it: {reason(error)}") from error


def batch_of(program: Program, model: PreTrainedModel, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Random inputs of a program; tokens are not special, but for those first ones that an image takes the place of."""
    generator = torch.Generator().manual_seed(sizes[BATCH] * 1000 + sizes[LENGTH])
    entries = {entry.name: entry for entry in program.inputs}
    batch = {name: entry.drawn(sizes, torch.float32, generator) for name, entry in entries.items()}
    for name in {"input_ids", "decoder_input_ids"} & entries.keys():
        if (below := entries[name].below) is not None:
            batch[name] = 3 + batch[name] % (min(VOCABULARY // 2, below) - 3)
    images = ImageTokens.of(model, program.inputs)
    return batch if images is None else images.inserted(batch, entries, at=0)


def labels_of(program: Program, batch: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor | None:
    """Labels of a batch, as the task of a program has them; None for a task without."""
    rows, length = sizes[BATCH], sizes[LENGTH]
    match program.task.name:
        case "feature-extraction":
            return None
        case "sequence-classification" | "image-classification":
            return torch.arange(rows) % 2
        case "token-classification":
            return (torch.arange(rows * length) % 2).view(rows, length)
        case "question-answering":
            return torch.tensor([[1, 3]] * rows)
        case "seq2seq-lm" | "speech-seq2seq":
            return batch["decoder_input_ids"]
        case _:
            return batch["input_ids"]


def _answers(program: Program, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """What a model itself gives for the outputs of its program."""
    given = model(**batch, **{"use_cache": False} if program.task.cached else {})
    return [getattr(given, name) for name in program.task.outputs]


def _compare(
    program: Program, model: PreTrainedModel, tolerance: float, every: Sequence[Mapping[str, int]]
) -> None:
    """Differs if a program and a model give other answers, relative to the largest.

    Sizes that the model itself does not take are left out.
    """
    program.eval(), model.eval()
    refused: BaseException | None = None
    compared = 0
    for sizes in every:
        with torch.no_grad():
            try:
                batch = batch_of(program, model, sizes)
                expected = _answers(program, model, batch)
            except EXPORT_ERRORS as error:
                refused = error
                continue
            answer = program(**batch)
        compared += 1
        for name, theirs in zip(program.task.outputs, expected, strict=True):
            if not theirs.isfinite().all():
                raise Differs("the model itself answers with NaN or infinity")
            far = float((answer[name] - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
            if not far <= tolerance:
                where = f"{sizes[BATCH]} rows of {sizes[LENGTH]}"
                raise Differs(f"{where}: {name} differ by {far:.1g} of the largest")
    if not compared:
        raise Differs(f"the model itself fails: {reason(refused)}")  # pyright: ignore[reportArgumentType]


def _all_linears_known(program: Program, model: PreTrainedModel) -> None:
    """Differs if a linear of a layer is neither a site nor left out with a reason that the graph proves."""
    unknown: dict[str, str] = {}
    for path, module in model.named_modules():
        experts = "Expert" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            linear = (isinstance(module, nn.Linear | Conv1D) and name == "weight") or (
                experts and parameter.ndim == 3
            )
            if not linear or layer_of(full) is None:
                continue
            full = program.tied.get(full, full)
            if full in program.sites:
                continue
            why = program.left_out.get(full)
            if why is None:
                unknown[full] = "is not mentioned"
            elif not why.known and "is not read" not in why.reason:
                unknown[full] = why.reason
    if unknown:
        first, why = next(iter(unknown.items()))
        raise Differs(f"{len(unknown)} linears of layers are not sites: {first} {why}")


def _step(
    program: Program, model: PreTrainedModel, factors: Mapping[str, nn.Parameter], adapter: Path
) -> None:
    """One step of AdamW on one batch; the factors are written to the adapter folder.

    Differs if the loss does not change, or a factor stays whose weight has a gradient in the model.
    """
    batch = batch_of(program, model, SIZES[0])
    labels = labels_of(program, batch, SIZES[0])

    def loss() -> Tensor:
        answer = program(**batch) if labels is None else program(**batch, labels=labels)
        return answer.loss if labels is not None else answer[0].square().mean()

    optimizer = torch.optim.AdamW([p for p in program.parameters() if p.requires_grad], lr=0.02)
    program.train()
    before = loss()
    before.backward()
    optimizer.step()
    program.eval()
    with torch.no_grad():
        after = float(loss())
    if not math.isfinite(after) or after == float(before):
        raise Differs(f"the loss is {float(before):.6g} before a step and {after:.6g} after it")
    path = adapter / FACTORS
    stored = load_file(path)
    still = {name.rpartition(".")[0] for name in stored if torch.equal(stored[name], factors[name])}
    if still:
        sum(output.square().sum() for output in _answers(program, model, batch)).backward()
        learning = {
            n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > TINY
        }
        model.zero_grad()
        if still & learning:
            raise Differs(f"{len(still & learning)} weights were not trained: {min(still & learning)}")
    save_file({name: factors[name].detach().contiguous() for name in stored}, path, {"format": "pt"})


def _only_values_changed(sparse: Path, merged: Path, folded: Collection[str]) -> None:
    """Differs if a name, a mask or a tensor without an adapter is another one in the merged model."""
    ours, theirs = tensors(sparse), tensors(merged)
    if ours.keys() != theirs.keys():
        raise Differs(f"the merged model has other tensors: {min(ours.keys() ^ theirs.keys())}")
    for name, weight in ours.items():
        before, after = (each.flatten().view(torch.uint8) for each in (weight, theirs[name]))
        if name not in folded and not torch.equal(before, after):
            raise Differs(f"{name} has no adapter and changed")
        if not torch.equal(weight != 0, theirs[name] != 0):
            raise Differs(f"{name} has another mask in the merged model")
    if all(torch.equal(ours[name], theirs[name]) for name in folded):
        raise Differs("no weight changed")
