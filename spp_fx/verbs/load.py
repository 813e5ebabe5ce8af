"""Load programs with weights, tokenizers and calibration text from model and adapter folders."""

import filecmp
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spp_fx.adapters.adapter_folder import AdapterFolder
from spp_fx.adapters.per_site import as_overrides
from spp_fx.errors import FormatError, UsageError
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.binding import assemble
from spp_fx.graph.model import PROCESSOR_FILES, TOKENIZER_FILES, Readable, check_task, load_model
from spp_fx.graph.names import in_model
from spp_fx.graph.program import Program, factor_attribute
from spp_fx.graph.task import CAUSAL_LM, TEXT_INPUTS, TaskModel, find_task
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.causal import Causal
from spp_fx.passes.fold_adapters import Fold
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.lower import Lower
from spp_fx.passes.match import Match
from spp_fx.passes.partition import Checkpoint, Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.passes.shard import Over, Shard
from spp_fx.passes.train_norms import TrainNorms
from spp_fx.pruning.layerwise import Part, replace_tensor
from spp_fx.pruning.walk import Samples
from spp_fx.storage.folder import ModelFolder, is_adapter
from spp_fx.storage.safetensors import torch_dtype
from spp_fx.training.records import Skipped, read_samples
from spp_fx.training.samples import check_vocabulary, token_stream
from spp_fx.training.task_rows import task_rows
from spp_fx.training.trainer import load_factors
from spp_fx.verbs.settings import Calibration
from spp_fx.verification.model_sites import ModelSites


@dataclass(frozen=True)
class Loaded:
    """A program, the model folder with its tokenizer, and its factors by their names on disk."""

    program: Program
    model: Path
    factors: dict[str, nn.Parameter]


def load_program(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    packed: bool = False,
    checkpointed: bool = False,
    layers: bool = False,
    shard: Over | None = None,
    folded: bool = False,
    source: PreTrainedModel | None = None,
    task: str | None = None,
) -> Loaded:
    """The program of a model folder, or of an adapter folder with its factors in place.

    Args:
        base: the adapter's base model, if it is not where the adapter says.
        packed: pack the frozen weights of adapted sites.
        checkpointed: checkpoint the activations of each decoder layer in training.
        layers: find the decoder layers, `Program.units`; so do `checkpointed` and `shard`.
        shard: split the frozen weights of each layer over the processes of the `world` or of a `node`.
        folded: fold an adapter into the weights, as merge does; the program then has no factors.
        source: the model of the folder, or the adapter's base, where it is loaded already: the program shares its
            parameters.
        task: what a model folder is run for; None: what its configuration says. An adapter says it itself.

    Raises:
        UsageError, FormatError: the folder is neither, or is damaged.
        MaskError: a value folds to NaN or infinity.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        open_model(folder)
        chosen = None if task is None else find_task(task)
        if chosen is None:
            check_task(folder, "this verb")
        model = source or load_model(folder, task=chosen, trust_remote_code=trust_remote_code)
        program = trace(model, task=chosen)
        run_pipeline(program, [Causal()])
        if layers or shard:
            run_pipeline(program, [Canonicalize(), Partition()])
        if shard:
            program.requires_grad_(False)
            run_pipeline(program, [Shard(over=shard)])
        return Loaded(program, folder, {})
    adapter = AdapterFolder.open(folder)
    adapter.check_finite()
    model = adapter.find_base(Path(base) if base else None)
    adapter.check_base(open_model(model))
    chosen = find_task(adapter.config.task)
    program = trace(
        source or load_model(model, task=chosen, trust_remote_code=trust_remote_code), task=chosen
    )
    storage = "packed" if packed else "dense"
    run_pipeline(
        program,
        [
            Canonicalize(),
            Causal(),
            Match(targets=tuple(adapter.matrices)),
            # check_base has checked the fingerprint of the base, and nothing here writes to it.
            Inject(
                adapter.method,
                as_overrides(adapter.method, adapter.methods),
                seed=adapter.config.seed,
                masks=False,
            ),
            # Shard itself packs, one layer at a time.
            Lower(kernel="fused", storage="dense" if shard else storage),
        ],
    )
    if adapter.trained:
        run_pipeline(program, [TrainNorms(tuple(adapter.trained))])
    if checkpointed or layers or shard:
        run_pipeline(program, [Partition()])
    if checkpointed:
        run_pipeline(program, [Checkpoint()])
    if shard:
        run_pipeline(program, [Shard(over=shard, storage=storage)])
    factors: dict[str, nn.Parameter] = {}
    for site in adapter.matrices:
        owner, _, parameter = site.rpartition(".")
        for key in adapter.methods[site].factors(program.sites[site].shape):
            name = f"{owner}.{factor_attribute(parameter, key)}"
            factors[f"{site}.{key}"] = program.get_parameter(name)
    factors |= {name: program.get_parameter(name) for name in adapter.trained}
    load_factors(factors, {name: adapter.shard.read(name) for name in factors}, adapter.shard.path)
    if folded:
        run_pipeline(program, [Fold()])
        return Loaded(program, model, {})
    return Loaded(program, model, factors)


def load_tokenizer(model: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; UsageError if there is none, or it cannot be loaded."""
    what = "its tokenizer cannot be loaded"
    with Readable(model, what, TOKENIZER_FILES, UsageError):
        tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    # transformers 5 makes a tokenizer without a vocabulary where the files are missing.
    names = [name for name in type(tokenizer).vocab_files_names.values() if isinstance(name, str)]
    if (
        names
        and model.is_dir()
        and not any((model / name).exists() for name in (*names, *TOKENIZER_FILES[:1]))
    ):
        raise UsageError(
            f"{model}: {what}: the folder has none of {', '.join(dict.fromkeys(names))}; copy the tokenizer files "
            "from the original model"
        )
    return tokenizer


def load_processor(folder: Path, model: TaskModel, *, trust_remote_code: bool = False) -> Any:
    """What makes a model's inputs of records: the tokenizer of a folder, its image processor, or both.

    Raises:
        UsageError: there is none, it cannot be loaded, or needs a package that is not installed.
    """
    names = {entry.name for entry in model.inputs}
    if names <= TEXT_INPUTS | {"decoder_input_ids"}:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    auto = AutoImageProcessor if names == {"pixel_values"} else AutoProcessor
    with Readable(folder, "its processor cannot be loaded", PROCESSOR_FILES, UsageError):
        return auto.from_pretrained(str(folder), trust_remote_code=trust_remote_code)


def tokenizer_of(processor: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of what `load_processor` gives, if it has one."""
    return (
        processor if isinstance(processor, PreTrainedTokenizerBase) else getattr(processor, "tokenizer", None)
    )


def window_length(program: Program, asked: int | None, default: int = 512) -> int:
    """The length of windows of text: as given, else `default`, and at most the model's positions."""
    return fit_length(program.positions, asked, default)


def fit_length(most: int | None, asked: int | None, default: int = 512) -> int:
    """`window_length` for a model of at most so many positions."""
    if asked is None:
        return min(default, most or default)
    if asked < 2:
        raise UsageError(f"--seq-len must be at least 2, got {asked}")
    if most and asked > most:
        raise UsageError(f"--seq-len {asked} is more than the model's {most} positions")
    return asked


def check_teacher(
    student: TaskModel, teacher: TaskModel, model: Path, folder: Path, *, trust_remote_code: bool = False
) -> None:
    """UsageError if a teacher's predictions are not about the same tokens, or not of the same classes or width.

    Args:
        model, folder: of the student's and the teacher's weights; tokenizers are compared where both have one.
    """
    same = {"id2label": student.task.has_classes, "hidden_size": student.task.name == "feature-extraction"}
    for field in (name for name, compared in same.items() if compared):
        ours, theirs = (getattr(each.config, field, None) for each in (student, teacher))
        if ours != theirs:
            raise UsageError(
                f"{folder}: has the {field} {theirs} (config.json), the student {ours}; they must agree"
            )
    if teacher.vocabulary != student.vocabulary:
        raise UsageError(
            f"{folder}: its vocabulary has {teacher.vocabulary} tokens, the student's {student.vocabulary}; a teacher "
            "must share the tokenizer"
        )
    files = [path / TOKENIZER_FILES[0] for path in (model, folder)]
    if all(file.is_file() for file in files) and filecmp.cmp(*files, shallow=False):
        return
    if not all(any((path / name).is_file() for name in TOKENIZER_FILES) for path in (model, folder)):
        return
    ours, theirs = (
        {
            number: word
            for word, number in load_tokenizer(path, trust_remote_code=trust_remote_code).get_vocab().items()
        }
        for path in (model, folder)
    )
    for number in sorted(ours.keys() & theirs.keys()):
        if ours[number] != theirs[number]:
            raise UsageError(
                f"{folder}: token {number} is {theirs[number]!r}, the student's is {ours[number]!r}; a teacher must "
                "share the tokenizer"
            )


_LOOKED_AT = 8
"""Weights, and rows of each, that tell a dense model from a pruned one."""


def is_as_sparse(teacher: ModelFolder, pruned: ModelFolder, tensors: Sequence[str]) -> bool:
    """Whether a model is zero wherever a pruned one is, in the first rows of some weights.

    It is then the pruned model itself, a copy of it, or what it became by training.

    Args:
        tensors: of the pruned model's sites.
    """
    zeros = 0
    for name in tensors[:: max(1, len(tensors) // _LOOKED_AT)]:
        shape = pruned.info(name)[1].shape
        if name not in teacher or teacher.info(name)[1].shape != shape:
            return False
        rows = min(shape[0], _LOOKED_AT if len(shape) == 2 else 1)
        ours, theirs = (folder.read_rows(name, 0, rows).float() for folder in (pruned, teacher))
        if bool(theirs[ours == 0].any()):
            return False
        zeros += int((ours == 0).sum())
    return zeros > 0


@dataclass(frozen=True)
class FolderWeights:
    """Tensors that are read from a folder before a layer runs, and freed after it."""

    found: ModelSites

    @property
    def folder(self) -> ModelFolder:
        return self.found.folder

    def fill(self, program: Program, names: Iterable[str], device: torch.device) -> None:
        """Read parameters and stored buffers, in the dtype that the program computes in.

        Raises:
            FormatError: the folder has no tensor for a parameter.
        """
        filled: dict[str, Tensor] = {}
        for name in names:
            current = _current(program, name)
            source = self._source(program, name)
            if source in filled:  # another name of a shared parameter
                replace_tensor(program, name, filled[source])
                continue
            if source is None and current.device.type == "meta":
                raise FormatError(
                    f"{self.folder.path}: {name}: "
                    f"{self.found.binding.refused.get(name, 'the checkpoint holds no tensor for it')}"
                )
            tensor = current if source is None else self._read(source, current)
            if current.is_floating_point() and (not tensor.is_floating_point() or tensor.itemsize < 2):
                raise FormatError(
                    f"{self.folder.path}: {name} is stored as {tensor.dtype}, which has a meaning only with its "
                    "scales; decompress the model first"
                )
            tensor = tensor.to(device=device, dtype=current.dtype)
            if source is not None:
                filled[source] = tensor = (
                    nn.Parameter(tensor, False) if tensor.is_floating_point() else tensor
                )
            replace_tensor(program, name, tensor)

    def empty(self, program: Program, names: Iterable[str]) -> None:
        for name in names:
            if self._source(program, name) is not None:
                replace_tensor(program, name, _current(program, name).to("meta"))

    def stored(self, program: Program, name: str) -> Tensor:
        parameter = program.get_parameter(name).data
        dtypes = {self.folder.info(matrix.tensor)[1].dtype for matrix in self.found.matrices[name]}
        if {torch_dtype(dtype) for dtype in dtypes} == {parameter.dtype}:
            return parameter
        return self._read(name, parameter).to(parameter.device)

    def parts(self, program: Program, site: str) -> list[Part]:
        return [(matrix.expert, matrix.start, matrix.stop) for matrix in self.found.matrices[site]]

    def _source(self, program: Program, name: str) -> str | None:
        """The name under which the folder holds a tensor: its own, or that of a parameter that shares it."""
        name = in_model(name)
        first = program.tied.get(name, name)
        group = [name, first, *(other for other, owner in program.tied.items() if owner == first)]
        return next((each for each in group if each in self.found.matrices), None)

    def _read(self, name: str, like: Tensor) -> Tensor:
        return assemble(self.found.matrices[name], tuple(like.shape), self.folder.read)


def _current(program: Program, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    tensor = getattr(program.get_submodule(path), attribute)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def device_of(name: str | None) -> torch.device:
    """The device of an option: as named, else a GPU if torch has one; UsageError where torch cannot use it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UsageError("--device meta: holds no numbers; give cpu or cuda")
    return device


@dataclass(frozen=True)
class Drawn:
    """Windows of a text, (samples, length) int64, and the rows of the data that were skipped."""

    tokens: Tensor
    skipped: Skipped


def draw_windows(
    model: Path,
    program: Program,
    calibration: Calibration,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Drawn:
    """Draw windows of a text at random.

    Windows do not overlap unless the text is too short; then they begin at different tokens. `say`
    reports this, and rows that are skipped.

    Raises:
        UsageError: the text is too short, or cannot be used.
    """
    data, samples = calibration.data, calibration.samples
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    length = window_length(program, calibration.seq_len, default=2048)
    tokens, skipped = token_stream(
        tokenizer, read_samples(data, strict=calibration.strict), strict=calibration.strict
    )
    if line := skipped.line(data):
        say(line)
    windows, starts = len(tokens) // length, len(tokens) - length + 1
    if starts < samples:
        raise UsageError(
            f"{data}: is too short: its {len(tokens)} tokens do not give {samples} windows of {length}; use more text, "
            "fewer --samples or a smaller --seq-len"
        )
    check_vocabulary(tokens, program.vocabulary, data)
    generator = torch.Generator().manual_seed(calibration.seed)
    if windows >= samples:
        say(f"{data}: {samples:,} of its {windows:,} windows of {length} tokens are drawn")
        begins = torch.randperm(windows, generator=generator)[:samples] * length
    else:
        say(
            f"{data}: its {len(tokens)} tokens fill {windows} windows of {length}; the {samples} samples overlap"
        )
        begins = torch.randperm(starts, generator=generator)[:samples]
    return Drawn(torch.stack([tokens[begin : begin + length] for begin in begins.tolist()]), skipped)


def draw_samples(
    model: Path,
    program: Program,
    calibration: Calibration,
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Samples, Skipped]:
    """What a program is calibrated on: of a causal language model `draw_windows`, else rows of the task at random.

    Raises:
        UsageError: there are too few, or the data cannot be used.
    """
    task, data, count = program.task, calibration.data, calibration.samples
    if task.name == CAUSAL_LM:
        drawn = draw_windows(model, program, calibration, trust_remote_code=trust_remote_code, say=say)
        return drawn.tokens, drawn.skipped
    rows, skipped = task_rows(
        data,
        program,
        load_processor(model, program, trust_remote_code=trust_remote_code),
        length=window_length(program, calibration.seq_len),
        strict=calibration.strict,
        seed=calibration.seed,
    )
    if line := skipped.line(data):
        say(line)
    if len(rows) < count:
        raise UsageError(
            f"{data}: has {len(rows)} rows, and {count} are drawn; use more data or fewer --samples"
        )
    say(f"{data}: {count:,} of its {len(rows):,} rows are drawn")
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(calibration.seed))[:count]
    return [{name: each[None] for name, each in rows[n].items()} for n in chosen.tolist()], skipped


def samples_digest(samples: Samples) -> str:
    """BLAKE2b-256 of samples as `draw_samples` gives them, as histories record it."""
    if isinstance(samples, Tensor):
        return blake2b(samples.numpy().tobytes(), digest_size=32).hexdigest()
    digest = blake2b(digest_size=32)
    for sample in samples:
        for name, value in sorted(sample.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
