"""Load programs with weights, tokenizers and calibration text from model and adapter folders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spp_fx.adapters.adapter_folder import AdapterFolder
from spp_fx.adapters.per_site import as_overrides
from spp_fx.errors import UsageError
from spp_fx.exporters.manifest import open_model
from spp_fx.graph.model import TOKENIZER_FILES, Readable, check_causal, load_model
from spp_fx.graph.program import Program, factor_attribute
from spp_fx.graph.trace import trace
from spp_fx.passes.canonicalize import Canonicalize
from spp_fx.passes.causal import Causal
from spp_fx.passes.inject_adapters import Inject
from spp_fx.passes.lower import Lower
from spp_fx.passes.match import Match
from spp_fx.passes.partition import Checkpoint, Partition
from spp_fx.passes.pipeline import run_pipeline
from spp_fx.passes.shard import Over, Shard
from spp_fx.passes.train_norms import TrainNorms
from spp_fx.storage.folder import is_adapter
from spp_fx.training.records import Skipped, read_samples
from spp_fx.training.samples import check_vocabulary, token_stream
from spp_fx.training.trainer import load_factors
from spp_fx.verbs.settings import Calibration


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
) -> Loaded:
    """The program of a model folder, or of an adapter folder with its factors in place.

    Args:
        base: the adapter's base model, if it is not where the adapter says.
        packed: pack the frozen weights of adapted sites.
        checkpointed: checkpoint the activations of each decoder layer in training.
        layers: find the decoder layers, `Program.units`; so do `checkpointed` and `shard`.
        shard: split the frozen weights of each layer over the processes of the `world` or of a `node`.

    Raises:
        UsageError, FormatError: the folder is neither, or is damaged.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        open_model(folder)
        check_causal(folder)
        program = trace(load_model(folder, trust_remote_code=trust_remote_code))
        run_pipeline(program, [Causal()])
        if layers or shard:
            run_pipeline(program, [Canonicalize(), Partition()])
        if shard:
            program.requires_grad_(False)
            run_pipeline(program, [Shard(over=shard)])
        return Loaded(program, folder, {})
    adapter = AdapterFolder.open(folder)
    model = adapter.find_base(Path(base) if base else None)
    adapter.check_base(open_model(model))
    check_causal(model)
    program = trace(load_model(model, trust_remote_code=trust_remote_code))
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


def window_length(program: Program, asked: int | None, default: int = 512) -> int:
    """The length of windows of text: as given, else `default`, and at most the model's positions."""
    most = program.positions
    if asked is None:
        return min(default, most or default)
    if asked < 2:
        raise UsageError(f"--seq-len must be at least 2, got {asked}")
    if most and asked > most:
        raise UsageError(f"--seq-len {asked} is more than the model's {most} positions")
    return asked


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
        begins = torch.randperm(windows, generator=generator)[:samples] * length
    else:
        say(
            f"{data}: its {len(tokens)} tokens fill {windows} windows of {length}; the {samples} samples overlap"
        )
        begins = torch.randperm(starts, generator=generator)[:samples]
    return Drawn(torch.stack([tokens[begin : begin + length] for begin in begins.tolist()]), skipped)
