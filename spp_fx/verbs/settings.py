"""The settings of each verb: the fields are keyword arguments in Python, and options on the command line."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from spp_fx.errors import UsageError
from spp_fx.options import at_least_one, check_values, not_negative, option, positive

TARGETS = (
    "Sites to take: last words of module names or globs, comma-separated or repeated (q_proj,v_proj or "
    "'model.layers.0.*'). Default: every linear of the decoder layers."
)
STRICT = "Fail on rows without content, such as an empty answer. Default: skip and count them."
TASK = (
    "What the model is run for, such as masked-lm, seq2seq-lm or image-classification. Default: what config.json says "
    "(architectures); causal-lm for language models that also see images (image-text-to-text)."
)
NAMES = "last word of a module's name or a glob; repeatable"


@dataclass(frozen=True)
class PruneSettings:
    """How to prune."""

    method: str = option("magnitude", "magnitude; wanda, ria or sparsegpt, which need a text (--calib).")
    pattern: str = option("2:4", "N:M (N kept of every M inputs) or a share of zeros, 50%.")
    repair: str | None = option(
        None, "dsnot: swap pruned weights for kept ones until outputs keep their mean."
    )
    update: str | None = option(
        None, "admm: new values for the kept weights, which bring outputs closest to the dense ones."
    )
    ratios: tuple[str, ...] = option(
        (),
        "Another pattern for some sites: down_proj@4:8, 'model.layers.0.*@30%'. The last match wins.",
        flag="ratio",
        metavar="NAME@PATTERN",
    )
    skip: tuple[str, ...] = option((), "Sites that stay dense, named as for --targets.", split=True)
    targets: tuple[str, ...] = option((), TARGETS, split=True)
    task: str | None = option(None, TASK)
    device: str | None = option(None, "Where layers run. Default: cuda where there is one, else cpu.")


@dataclass(frozen=True)
class Calibration:
    """Calibration text; instructions and chats are rendered as the model sees them."""

    data: str | Path = option(
        MISSING,
        "Text to calibrate on, or data of the task: a file, .jsonl records, or the name of a dataset on the hub.",
        flag="calib",
    )
    samples: int = option(128, "Windows drawn from the text; of other tasks, rows of the data.", at_least_one)
    seq_len: int | None = option(
        None, "Tokens per window. Default: 2048, or what the model has; of other tasks, 512 per row at most."
    )
    seed: int = option(0, "Seed of the draw of windows.")
    strict: bool = option(False, STRICT, flag="strict-data")

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class InjectSettings:
    """How to make an adapter."""

    method: str = option("spp", "Adapter method; `--method NAME --help` shows the options of NAME.")
    seed: int = option(0, "Seed of the factors' initial values, and of the draw of windows.")
    targets: tuple[str, ...] = option((), TARGETS, split=True)
    skip: tuple[str, ...] = option((), "Sites that get no adapter, named as for --targets.", split=True)
    task: str | None = option(None, TASK)
    train_norms: bool = option(
        False,
        "Also train the norms and biases of the decoder; they are less than 0.1% of a model and no mask is touched.",
    )
    init: Literal["default", "gradient", "reconstruct"] = option(
        "default",
        "Start of the factors. default: the method's own. On a text (--calib), gradient: where the loss falls "
        "fastest; reconstruct: the outputs closest to those of the dense model (--teacher).",
    )
    budget: str | None = option(
        None,
        "Instead of --rank: trained parameters at most, as a share of the model's (0.3%) or a count; ranks are chosen "
        "by --budget-by.",
    )
    budget_by: Literal["size", "error", "gradient"] = option(
        "size",
        "Ranks of the budget: size, the same for every site; error, in proportion to what pruning took from each, "
        "||dense - pruned|| (--teacher); gradient, to ||weight * gradient|| on a text (--calib).",
    )
    teacher: str | None = option(
        None,
        "The dense model that MODEL was pruned from, for --budget-by error and --init reconstruct; for --init gradient "
        "and --budget-by gradient, the model whose predictions are learned instead of the text's own tokens.",
    )
    device: str | None = option(
        None, "Where layers run for gradients and reconstruction. Default: cuda where there is one, else cpu."
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")
        if self.budget is not None:
            from spp_fx.adapters.per_site import parse_budget  # numpy, which --help does without

            parse_budget(self.budget, 1 << 62)
        elif self.budget_by != "size":
            raise UsageError(f"--budget-by {self.budget_by} needs a budget: give one with --budget")
        if self.teacher is None and self.compares:
            asked = (
                "--init reconstruct needs"
                if self.init == "reconstruct"
                else "--budget-by error compares with"
            )
            raise UsageError(f"{asked} the dense model: give it with --teacher MODEL")
        if self.teacher is not None and not self.compares and not self.walks():
            raise UsageError(
                "--teacher is the dense model for --budget-by error and --init reconstruct, or the model to learn from "
                "for --init gradient and --budget-by gradient; leave it out"
            )

    def walks(self, dry_run: bool = False) -> bool:
        """Whether the model is run on a text, layer by layer; a dry run makes no start."""
        return self.budget_by == "gradient" or (self.init != "default" and not dry_run)

    @property
    def compares(self) -> bool:
        """Whether the weights are compared with those of the dense model."""
        return self.init == "reconstruct" or self.budget_by == "error"

    def check_text(self, calibration: Calibration | None, dry_run: bool = False) -> None:
        """UsageError if the model is run and there is no text, or there are options for that and it is not run."""
        if self.walks(dry_run) and calibration is None:
            asked = "--budget-by gradient" if self.budget_by == "gradient" else f"--init {self.init}"
            raise UsageError(f"{asked} needs a text: give it with --calib FILE")
        given = {"--calib": calibration, "--device": self.device}
        unused = [option for option, value in given.items() if value is not None and not self.walks()]
        if unused:
            raise UsageError(
                f"{unused[0]} is for --init gradient, --init reconstruct and --budget-by gradient; nothing else reads "
                "it"
            )


@dataclass(frozen=True)
class ReconstructSettings:
    """How to bring a pruned model close to the dense one."""

    teacher: str = option(MISSING, "The dense model that MODEL was pruned from.")
    method: str = option(
        "masked-full",
        "admm: each matrix by itself, from its inputs; or an adapter method that is trained on the output of the whole "
        "layer and folded: masked-full, which is the kept weights themselves, spp, hira, ... `--method NAME --help` "
        "shows the options of NAME.",
    )
    inputs: Literal["reconstructed", "dense"] = option(
        "reconstructed",
        "What a layer sees: outputs of the layers before it as they are by then, or as they are in the dense model.",
    )
    epochs: int = option(4, "Times that each layer is trained on the text.", at_least_one)
    batch_size: int = option(8, "Windows or rows of an optimizer step.", at_least_one)
    lr: float | None = option(None, "Peak learning rate. Default: what the method suggests.", positive)
    train_norms: bool = option(False, "Also train the norms and biases of the layers.")
    seed: int = option(0, "Seed of the factors' initial values, and of the draw and order of windows.")
    targets: tuple[str, ...] = option((), TARGETS, split=True)
    skip: tuple[str, ...] = option((), "Sites that stay as they are, named as for --targets.", split=True)
    task: str | None = option(None, TASK)
    device: str | None = option(None, "Where layers run. Default: cuda where there is one, else cpu.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")
        if self.method == "admm" and (self.lr is not None or self.train_norms):
            unused = "--train-norms" if self.lr is None else "--lr"
            raise UsageError(f"{unused} is for methods that are trained, and admm is not; leave it out")


@dataclass(frozen=True)
class TrainData:
    """What to train and evaluate on."""

    data: str = option(
        MISSING,
        "Text file (lines '<|endoftext|>' part documents); .json or .jsonl with text, with instruction, input and "
        "output (or prompt and completion, question and answer), or with messages or conversations; or the name of a "
        "dataset on the hub.",
    )
    eval_data: str | None = option(
        None,
        "Text whose perplexity is measured before and after, read as --data is; of instructions and chats the whole "
        "text counts, prompts too.",
    )
    teacher: str | None = option(
        None,
        "Model folder whose predictions are learned, such as the dense model; or a folder of its sampled tokens, made "
        "by 'spp-fx teach'.",
    )
    base: Path | None = option(None, "Base model, if it is not where the adapter says.")


def _seed(value: int) -> str | None:
    return None if 0 <= value < 2**32 else f"must be 0 to {2**32 - 1}"


def _samples(value: int) -> str | None:
    return None if 1 <= value < 2**16 else f"must be 1 to {2**16 - 1}"


def _share(value: float) -> str | None:
    return None if 0 <= value <= 1 else "must be 0 to 1"


@dataclass(frozen=True)
class TrainSettings:
    """How to train; either `steps` or `epochs` ends it."""

    steps: int | None = option(None, "Optimizer steps.", positive)
    epochs: float | None = option(
        None, "Passes over the data. Default: 3, unless --steps is given.", positive
    )
    lr: float | None = option(
        None,
        "Peak learning rate of AdamW, the same for all factors, as papers state it. Default: found for the run.",
        positive,
    )
    lr_trials: bool = option(
        True,
        "Without --lr: try rates around the method's own suggestion for a fifth of the steps (10 to 24) each, "
        "3 to 7 of them; a run of less than 32 steps tries the suggestion alone. While the best of them ends above "
        "the start, lower ones are tried.",
    )
    batch_size: int = option(16, "Rows per forward and device.", positive)
    accumulate: int = option(1, "Forwards per optimizer step.", positive)
    seq_len: int | None = option(None, "Tokens per row at most. Default: 512, or what the model has.")
    teacher_weight: float | None = option(
        None,
        "W, 0 to 1: the loss is (1 - W) * that of the text + W * that of --teacher. Default: 1.",
        _share,
    )
    temperature: float | None = option(
        None,
        "T of the divergence from --teacher, T^2 * KL of predictions at T. Default: 1, or that of sampled tokens.",
        positive,
    )
    match_hidden: float = option(
        0.0,
        "Weight of the distance of the hidden states from those of --teacher, which must have as many layers and the "
        "same width; 0: off.",
        not_negative,
    )
    loss_on: Literal["all", "answer"] = option("all", "answer: leave prompts out of the loss.")
    packing: bool = option(False, "Put several short instructions or chats into one row.")
    weight_decay: float = option(1e-3, "Weight decay of AdamW.", not_negative)
    schedule: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = option("linear", "Schedule of the learning rate.")
    min_lr: float = option(0.0, "Rate at the end of --schedule cosine.", not_negative)
    warmup: float = option(0.03, "Warmup steps; below 1, a share of all steps.", not_negative)
    clip: float = option(1.0, "Largest norm of the gradient; 0: none.", not_negative)
    bf16: bool = option(False, "Compute under bfloat16 autocast.")
    packed: bool = option(False, "Keep the frozen weights packed: 0.56 of their memory at 2:4 in bf16.")
    gradient_checkpointing: bool = option(False, "Less memory: layers run again in backward.")
    shard: Literal["world", "node"] | None = option(
        None, "Under torchrun: split the frozen weights over the processes of the world, or of a node."
    )
    save_steps: int | None = option(None, "Steps between checkpoints. Default: none.", positive)
    eval_steps: int | None = option(
        None, "Steps between evaluations on --eval-data. Default: none.", positive
    )
    early_stop: int | None = option(
        None, "Stop after this many evaluations without improvement; keep the best factors.", positive
    )
    logging_steps: int = option(
        10,
        "Steps between reports of the loss: in the bar of a terminal, to --report-to, in the losses of --json.",
        positive,
    )
    report_to: tuple[str, ...] = option((), "tensorboard, wandb, ... as transformers names them.")
    resume: bool = option(False, "Continue from the newest whole checkpoint in ADAPTER.")
    force: bool = option(False, "Start again, deleting the checkpoints of an earlier run.")
    seed: int = option(
        0,
        "Seed of data order and dropout. Training further with the same seed reads the rows in the same order again.",
        _seed,
    )
    strict: bool = option(False, STRICT, flag="strict-data")

    def __post_init__(self) -> None:
        check_values(self)
        if self.steps is not None and self.epochs is not None:
            raise UsageError("give --steps or --epochs, not both")
        if self.min_lr and self.schedule != "cosine":
            raise UsageError(f"--min-lr needs --schedule cosine; the schedule is {self.schedule}")
        if self.min_lr and self.lr is not None and self.min_lr > self.lr:
            raise UsageError(f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}")
        if self.early_stop and not self.eval_steps:
            raise UsageError("--early-stop needs --eval-steps, the evaluations to count")


@dataclass(frozen=True)
class TeachSettings:
    """What to keep of a teacher's predictions."""

    data: str = option(MISSING, "What to predict: the text that will be trained on, read as in train.")
    samples: int = option(
        32, "Tokens drawn per predicted token, 1 to 65535: more bytes and less noise.", _samples
    )
    temperature: float = option(1.0, "Draw from softmax(logits / T); training is at this T.", positive)
    seq_len: int | None = option(
        None, "Tokens per row at most, as in training. Default: 512, or what the model has."
    )
    loss_on: Literal["all", "answer"] = option(
        "all", "answer: leave prompts out, as training with this option does."
    )
    packing: bool = option(False, "Put several short instructions or chats into one row, as in training.")
    batch_size: int = option(8, "Rows per forward.", at_least_one)
    device: str | None = option(None, "Where the teacher runs. Default: cuda where there is one, else cpu.")
    seed: int = option(0, "Seed of the draws.", _seed)
    strict: bool = option(False, STRICT, flag="strict-data")

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class MergeSettings:
    """How to merge."""

    verify_sparsity: bool = option(
        True, "Read the output back from disk and check every mask against the lock."
    )
    base: Path | None = option(None, "Base model, if it is not where the adapter says.")
    vanish: Literal["keep", "error", "allow"] = option(
        "keep",
        "A non-zero that folds to zero: keep the smallest normal number, fail, or allow the zero.",
    )


@dataclass(frozen=True)
class VerifySettings:
    """What to check, and where to report it."""

    pattern: str | None = option(None, "Pattern that every site must hold, such as 2:4.")
    lock: Path | None = option(None, "Lock file. Default: sparsity.lock.json of the artifact.")
    against: Path | None = option(None, "Another artifact whose masks must be the same.")
    require: tuple[str, ...] = option((), f"Sites that must be sparse: {NAMES}.", metavar="NAME")
    allow_dense: tuple[str, ...] = option((), f"Sites that need not be: {NAMES}.", metavar="NAME")
    coverage: Literal["lock", "all"] | None = option(
        None,
        "all: every site of the model must be in the lock, or sparse where there is none; nothing is left unread.",
    )
    policy: Path | None = option(None, "Policy file. Default: spp-fx.toml of the current folder, if any.")
    jobs: int | None = option(None, "Sites checked at once. Default: the CPUs, at most 8.", at_least_one)
    junit: Path | None = option(None, "Also write a JUnit report.")
    sarif: Path | None = option(None, "Also write a SARIF 2.1.0 report.")
    github: bool = option(
        False, "Also print GitHub annotations, and write the step's summary if there is one."
    )

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class LockSettings:
    """Which sites to lock."""

    pattern: str | None = option(
        None, "Pattern that every site must hold, such as 2:4. Default: what each one holds."
    )
    targets: tuple[str, ...] = option((), TARGETS, split=True)


def _rows(value: str) -> str | None:
    return None if value == "auto" or (value.isdecimal() and int(value) > 0) else "must be a number or auto"


@dataclass(frozen=True)
class EvaluateSettings:
    """What to measure: a text, tasks, or both."""

    data: str | None = option(
        None,
        "Text file, .json or .jsonl records (text, instructions, chats), or the name of a dataset on the hub.",
    )
    strict: bool = option(False, STRICT, flag="strict-data")
    seq_len: int | None = option(None, "Tokens per window of the text. Default: 512, or what the model has.")
    stride: int | None = option(
        None,
        "Overlapping windows: each predicts only its last N tokens. Default: --seq-len, no overlap.",
        at_least_one,
        metavar="N",
    )
    tasks: tuple[str, ...] = option(
        (),
        "Tasks of lm-evaluation-harness, comma-separated or repeated: names (hellaswag, mmlu), zero-shot (the seven "
        "of the papers), a task's YAML file, or a folder of them. Needs: pip install 'spp-fx[tasks]'.",
        split=True,
    )
    limit: int | None = option(None, "Documents of each task at most.", at_least_one)
    shots: int | None = option(
        None, "Examples in a task's prompt. Default: 5 for mmlu, else the task's own.", not_negative
    )
    batch_size: str = option("1", "Rows of a task per forward; auto: as many as fit.", _rows, metavar="N")
    task: str | None = option(None, TASK)
    teacher: Path | None = option(
        None, "Model whose embeddings those of MODEL are compared with (feature-extraction)."
    )
    generate: bool = option(
        False,
        "Let the model write its texts, of --seq-len tokens at most, and compare them with the data's: BLEU "
        "(seq2seq-lm), word error rate (speech-seq2seq).",
    )
    base: Path | None = option(None, "Base model of an adapter, if it is not where the adapter says.")
    device: str | None = option(None, "Where the model runs. Default: cuda where there is one, else cpu.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.data is None and not self.tasks:
            raise UsageError("nothing to measure: give a text with --data, or --tasks")
        if self.data is None and self.generate:
            raise UsageError("--generate needs the texts that the model should write: give them with --data")
        if self.data is None and (self.stride or self.seq_len):
            raise UsageError("--seq-len and --stride need a text: give one with --data")
        if not self.tasks and (self.limit or self.shots is not None or self.batch_size != "1"):
            raise UsageError("--limit, --shots and --batch-size need tasks: name some with --tasks")


@dataclass(frozen=True)
class OptimizeSettings:
    """Which passes to run."""

    pipeline: str = option(MISSING, "canonicalize,match{targets=q_proj},inject{rank=8},...", short="-p")
    print_after_all: bool = option(False, "Print the program after every pass.")
