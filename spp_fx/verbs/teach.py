"""teach: keep a teacher's predictions of a text on disk, as tokens drawn from them, to train on without the teacher."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

import torch
from torch import Tensor

from spp_fx.adapters.adapter_folder import AdapterFolder
from spp_fx.console import megabytes
from spp_fx.errors import UsageError
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.program import Program
from spp_fx.graph.task import CAUSAL_LM
from spp_fx.sparsity.lock import lock_beside
from spp_fx.storage.folder import is_adapter
from spp_fx.storage.links import links_option
from spp_fx.storage.workspace import check_output, workspace
from spp_fx.training.records import Skipped
from spp_fx.training.samples import IGNORED, Rows, check_vocabulary, pad, pad_token, training_rows
from spp_fx.training.teacher_cache import (
    MANIFEST,
    CacheFile,
    CacheText,
    Drawn,
    Manifest,
    TeacherCache,
    draw,
    uniforms,
    write_drawn,
)
from spp_fx.verbs.load import device_of, load_program, load_tokenizer, window_length
from spp_fx.verbs.settings import TeachSettings

FILE_PAIRS = 2**23
"""Pairs of a token and a count that a file holds at most, unless one row has more: about 25 to 50 MB."""


@dataclass(frozen=True)
class Taught:
    """What teach wrote.

    Attributes:
        bytes: of the whole folder.
        skipped: rows of the data with nothing to learn.
    """

    out: Path
    manifest: Manifest
    bytes: int
    skipped: Skipped
    seconds: float

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.manifest.text.positions)

    def to_json(self) -> dict[str, Any]:
        text = self.manifest.text
        return {
            "out": str(self.out),
            "teacher": self.manifest.teacher,
            "data": text.data,
            "rows": text.rows,
            "tokens": text.positions,
            "seq_len": text.seq_len,
            "samples": self.manifest.samples,
            "temperature": self.manifest.temperature,
            "entropy": self.manifest.entropy,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes_per_token,
            "skipped_rows": self.skipped.count,
            "seconds": self.seconds,
        }

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.out}: {self.manifest.samples} samples at each of {self.manifest.text.positions:,} tokens in "
            f"{self.seconds:.0f} s, {megabytes(self.bytes)}, {self.bytes_per_token:.1f} bytes per token; "
            f"entropy of the teacher {self.manifest.entropy:.3f} nats"
        )


@links_option
def teach(
    model: str | Path,
    out: str | Path,
    data: str | Path,
    *,
    samples: int = 32,
    temperature: float = 1.0,
    seq_len: int | None = None,
    loss_on: Literal["all", "answer"] = "all",
    packing: bool = False,
    batch_size: int = 8,
    device: str | None = None,
    seed: int = 0,
    strict: bool = False,
    force: bool = False,
    fresh: bool = False,
    trust_remote_code: bool = False,
    allow_links: bool = False,
    tick: Callable[[int, int | None, str], None] = lambda done, total, item: None,
    say: Callable[[str], None] = lambda line: None,
) -> Taught:
    """Write a folder of tokens drawn from a model's predictions, which `train` takes as its teacher.

    An interrupted run continues at its last file when it is started again. Memory holds one file and one batch.

    Args:
        model: a model folder, or an adapter folder.
        data: what will be trained on, with the same `seq_len`, `loss_on` and `packing`.
        samples: tokens drawn for each predicted token, see `teacher_cache.draw`.
        tick: called with the rows done, all rows, and the file that is written.

    Raises:
        UsageError: the model, the text or the settings cannot be used, or `out` exists.
        SppFxError: the teacher's predictions are not finite.
    """
    model, out, began = Path(model), Path(out), perf_counter()
    settings = TeachSettings(
        data=str(data), samples=samples, temperature=temperature, seq_len=seq_len, loss_on=loss_on, packing=packing,
        batch_size=batch_size, device=device, seed=seed, strict=strict,
    )  # fmt: skip
    check_output(out, force, [model], say)
    where = device_of(device)
    loaded = load_program(model, trust_remote_code=trust_remote_code)
    if loaded.program.task.name != CAUSAL_LM:
        raise UsageError(
            f"{model}: is a model for {loaded.program.task.name}; teach samples the tokens of causal language models"
        )
    program = loaded.program.eval().requires_grad_(False)
    tokenizer = load_tokenizer(loaded.model, trust_remote_code=trust_remote_code)
    length = window_length(program, seq_len)
    rows, skipped = training_rows(
        data, tokenizer, length, loss_on=loss_on, packing=packing, strict=strict, fixed=True
    )
    if line := skipped.line(data):
        say(line)
    check_vocabulary(rows.tokens, program.vocabulary, data)
    text = CacheText.of(
        rows, data, tokenizer, program.vocabulary, seq_len=length, loss_on=loss_on, packing=packing
    )
    folder = open_model(loaded.model)
    if lock_beside(folder.path) is not None:
        say(f"{model}: is sparse itself; the usual teacher is the dense model that was pruned")
    inputs = [shard.path for shard in folder.shards]
    if is_adapter(model):
        inputs.append(AdapterFolder.open(model).shard.path)
    plan = {
        "verb": "teach",
        "teacher": folder.fingerprint(),
        "text": text.model_dump(),
        "samples": samples,
        "temperature": temperature,
        "seed": seed,
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "torch": torch.__version__,
    }
    pad_id = pad_token(tokenizer, program.vocabulary)
    program.to(where)
    with workspace(out, plan, force=force, fresh=fresh, sources=[model], inputs=inputs, say=say) as work:
        files: list[CacheFile] = []
        total = 0.0
        for number, block in enumerate(_blocks(rows, FILE_PAIRS // samples)):
            name = f"tokens-{number:05d}.safetensors"
            facts = work.finished(name)
            if facts is None:
                drawn: list[Drawn] = []
                for part in _predict(program, rows, block, settings, pad_id):
                    drawn += part
                    tick(block.start + len(drawn), len(rows), name)
                file = write_drawn(work.folder / name, drawn, samples, program.vocabulary)
                entropy = sum(float(row.entropy.sum()) for row in drawn)
                facts = {"file": file.model_dump(), "entropy": entropy}
                work.finish(name, **facts)
            files.append(CacheFile.model_validate(facts["file"]))
            total += cast(float, facts["entropy"])
        manifest = Manifest(
            format_version=1, teacher=str(model), fingerprint=folder.fingerprint(), text=text, samples=samples,
            temperature=float(temperature), seed=seed, entropy=total / text.positions, files=files,
        )  # fmt: skip
        (work.folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        TeacherCache.open(work.folder)
    size = sum(path.stat().st_size for path in out.iterdir())
    return Taught(out, manifest, size, skipped, perf_counter() - began)


def _blocks(rows: Rows, positions: int) -> Iterator[range]:
    """Consecutive rows with at most so many predicted tokens, but at least one row."""
    begin, held = 0, 0
    for index in range(len(rows)):
        own = len(_places(rows[index]["labels"]))
        if index > begin and held + own > positions:
            yield range(begin, index)
            begin, held = index, 0
        held += own
    yield range(begin, len(rows))


def _places(labels: Tensor) -> Tensor:
    """The positions of a row that predict a token that is learned."""
    return (labels[1:] != IGNORED).nonzero().flatten()


@torch.no_grad()
def _predict(
    program: Program, rows: Rows, block: Sequence[int], settings: TeachSettings, pad_id: int
) -> Iterator[list[Drawn]]:
    """What is drawn for each row of a block, on the CPU, batch by batch."""
    for begin in range(0, len(block), settings.batch_size):
        numbers = block[begin : begin + settings.batch_size]
        batch = pad([rows[number] for number in numbers], pad_id)
        logits = program(
            batch["input_ids"].to(program.device), batch["attention_mask"].to(program.device)
        ).logits
        found: list[Drawn] = []
        for number, labels, row in zip(numbers, batch["labels"], logits, strict=True):
            places = _places(labels)
            uniform = uniforms(settings.seed, number, len(places))
            drawn = draw(row[places.to(row.device)], uniform, settings.samples, settings.temperature)
            found.append(Drawn(*(each.cpu() for each in drawn)))
        yield found
